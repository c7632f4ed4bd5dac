"""Where article, companion and notebooks are, and how an article makes a notebook."""

from pathlib import Path

import jupytext

from render.article import STARRED, at_headings, editions, read_figures

ROOT = Path(__file__).resolve().parents[2]
ARTICLE = ROOT / "annotated_s4d.py"
NOTEBOOK = ROOT / "notebooks" / f"{ARTICLE.stem}.ipynb"
COMPANION = ROOT / "notebooks" / "training.py"
TO_FILL = ROOT / "notebooks" / "rebuild.ipynb"


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


def mark_starred(notebook):
    """Tag the cells of starred sections, from one's heading to the next heading."""
    starred = False
    for cell in notebook.cells:
        pieces = at_headings(cell.source) if cell.cell_type == "markdown" else []
        headings = [piece for piece in pieces if piece.startswith("#")]
        if headings and headings[0] is pieces[0]:
            starred = bool(STARRED.match(headings[0]))
        if starred:
            cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "starred"]
        if headings:
            starred = bool(STARRED.match(headings[-1]))


def bare_notebook(file=ARTICLE):
    """An article as a notebook without outputs, its cells numbered.

    What only draws is folded, as on the pages.
    """
    notebook = jupytext.read(file)
    mark_starred(notebook)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    for cell in code_cells(notebook):
        if list(read_figures(cell.source)):
            cell.metadata["jupyter"] = {"source_hidden": True}
    kernel = notebook.metadata["kernelspec"]
    notebook.metadata = {"kernelspec": kernel, "language_info": LANGUAGE}
    return notebook


def fresh_notebook(file=ARTICLE):
    """A bare notebook in which each code cell names its edition, by which its outputs
    will be known. Outputs of the companion come from the article's code, too."""
    notebook = bare_notebook(file)
    cells = code_cells(notebook)
    before = code_cells(bare_notebook()) if file == COMPANION else []
    marks = editions([cell.source for cell in (*before, *cells)])
    for cell, edition in zip(cells, marks[len(before) :]):
        cell.metadata["edition"] = edition
    return notebook
