"""Make notebooks/annotated_s4d.ipynb, and assets/*.png and the trained models there.

python notebooks/build.py            execute if the code has changed, else only
                                     bring the prose up to date
python notebooks/build.py --execute  execute in any case
"""

import argparse
import base64
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "annotated_s4d.ipynb"
sys.path.insert(0, str(ROOT))

from annotated_s4d import DATA, RECORDED, edition  # noqa: E402

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


def fresh_notebook():
    """The article as a notebook without outputs, its cells numbered."""
    notebook = jupytext.read(ROOT / "annotated_s4d.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    kernel = notebook.metadata["kernelspec"]
    notebook.metadata = {"kernelspec": kernel, "language_info": LANGUAGE}
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def drawing_cells(notebook):
    """The code cells but those of the web page, which leave no output."""
    cells = code_cells(notebook)
    return [cell for cell in cells if "page" not in cell.metadata.get("tags", [])]


def keep_outputs(notebook, old):
    """Take over the outputs of a notebook with the same code; False if it differs."""
    ours, theirs = drawing_cells(notebook), drawing_cells(old)
    if [cell.source for cell in ours] != [cell.source for cell in theirs]:
        return False
    for new, was in zip(ours, theirs):
        new.outputs = was.outputs
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
    return True


# What the web page shows without computing: each figure as HTML, and the trained
# models.
MODELS = ("digits.npz", "generator.npz")
RECORD = """
import json
with matplotlib.rc_context(LOOK):
    drawn = {name: drawing(draw(), caption(draw)) for name, draw in FIGURES.items()}
save_parameters("digits.npz", *trained()[:2])
save_parameters("generator.npz", *trained_generator()[:2])
print(json.dumps(drawn | {"explorer data": explorer_data()}))
"""


def execute(notebook):
    """Run every cell in an all but empty folder; record what the page needs.

    Returns the names of the trained models with their bytes.
    """
    total, done = len(code_cells(notebook)), 0
    with tempfile.TemporaryDirectory() as empty:
        for recorded in (ROOT / "assets").glob("*.json"):  # what tests/ have measured
            shutil.copy(recorded, empty)
        resources = {"metadata": {"path": empty}}
        client = NotebookClient(
            notebook, timeout=None, record_timing=False, resources=resources
        )
        with client.setup_kernel():
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
                done += cell.cell_type == "code"
                print(f"\rcell {done} of {total}", end="", file=sys.stderr, flush=True)
            notebook.cells.append(nbformat.v4.new_code_cell(RECORD))
            client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
        models = {name: (Path(empty) / name).read_bytes() for name in MODELS}
    print(file=sys.stderr)
    extra = notebook.cells.pop()
    record(notebook, json.loads("".join(output["text"] for output in extra.outputs)))
    return models


def record(notebook, drawn):
    """Put each figure as HTML beside its PNG, where the page will look for it."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                name = figure_name(cell)
                output.data[RECORDED] = drawn[name]
                if name == "explorer":
                    output.data[DATA] = json.dumps(drawn["explorer data"])


def figure_name(cell):
    """The name of the figure that a cell defines; None if it defines none."""
    name = re.search(r"^@figure.*?^def (\w+)", cell.source, re.M | re.S)
    return name and name[1]


def figure_of(cell):
    """The name of the figure that a cell defines, and its PNG; or None."""
    images = [
        output.data["image/png"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return (figure_name(cell), base64.b64decode(images[0])) if images else None


def save_assets(notebook):
    """Write each picture of the notebook to assets, marked with the code's edition."""
    (ROOT / "assets").mkdir(exist_ok=True)
    for name, png in filter(None, map(figure_of, code_cells(notebook))):
        marks = PngImagePlugin.PngInfo()
        marks.add_text("Source", edition())
        out = io.BytesIO()
        Image.open(io.BytesIO(png)).save(out, "PNG", pnginfo=marks, dpi=(144, 144))
        (ROOT / "assets" / f"{name}.png").write_bytes(out.getvalue())


def main():
    parser = argparse.ArgumentParser(description="Bring the notebook up to date.")
    parser.add_argument("--execute", action="store_true", help="execute in any case")
    force, notebook = parser.parse_args().execute, fresh_notebook()
    old = (
        nbformat.read(NOTEBOOK, 4) if NOTEBOOK.exists() else nbformat.v4.new_notebook()
    )
    if force or not keep_outputs(notebook, old):
        models = execute(notebook)
        save_assets(notebook)
        for name, model in models.items():
            (ROOT / "assets" / name).write_bytes(model)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)} is up to date")


if __name__ == "__main__":
    main()
