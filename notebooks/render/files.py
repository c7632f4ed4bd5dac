"""Where the article and its notebook are, and the notebook that the article makes."""

from pathlib import Path

import jupytext

from render.article import editions, read_figures

ROOT = Path(__file__).resolve().parents[2]
ARTICLE = ROOT / "annotated_s4d.py"
NOTEBOOK = ROOT / "notebooks" / f"{ARTICLE.stem}.ipynb"


# What other tools ask of a notebook's language. A kernel adds its exact version, which
# would make two builds differ.
LANGUAGE = {
    "name": "python",
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "pygments_lexer": "ipython3",
    "nbconvert_exporter": "python",
    "codemirror_mode": {"name": "ipython", "version": 3},
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def fresh_notebook():
    """The article as a notebook without outputs, its cells numbered.

    Each code cell names its edition, by which its outputs will be known. What only
    draws is folded, as on the pages.
    """
    notebook = jupytext.read(ARTICLE)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    cells = code_cells(notebook)
    for cell, edition in zip(cells, editions([cell.source for cell in cells])):
        cell.metadata["edition"] = edition
        if list(read_figures(cell.source)):
            cell.metadata["jupyter"] = {"source_hidden": True}
    kernel = notebook.metadata["kernelspec"]
    notebook.metadata = {"kernelspec": kernel, "language_info": LANGUAGE}
    return notebook
