"""Make notebooks/annotated_s4d.ipynb and assets/*.png from annotated_s4d.py.

    python notebooks/build.py            execute if the code has changed, else only
                                         bring the prose up to date
    python notebooks/build.py --execute  execute in any case
"""

import argparse
import base64
import io
import re
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


def fresh_notebook():
    """The article as a notebook without outputs, its cells numbered."""
    notebook = jupytext.read(ROOT / "annotated_s4d.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def keep_outputs(notebook, old):
    """Take over the outputs of a notebook with the same code; False if it differs."""
    pairs = list(zip(code_cells(notebook), code_cells(old)))
    same = len(code_cells(notebook)) == len(code_cells(old))
    if not same or any(new.source != was.source for new, was in pairs):
        return False
    for new, was in pairs:
        new.outputs, new.execution_count = was.outputs, was.execution_count
    return True


def execute(notebook):
    """Run every cell in an empty folder, with a line for each on the way."""
    total = len(code_cells(notebook))

    def tell(cell, cell_index):
        done = sum(c.cell_type == "code" for c in notebook.cells[: cell_index + 1])
        print(f"\rcell {done} of {total}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as empty:
        resources = {"metadata": {"path": empty}}
        NotebookClient(notebook, timeout=None, record_timing=False, resources=resources,
                       on_cell_execute=tell).execute()
    print(file=sys.stderr)


def figure_of(cell):
    """The name of the figure that a cell defines, and its PNG; or None."""
    name = re.search(r"^@figure.*?^def (\w+)", cell.source, re.M | re.S)
    images = [o.data["image/png"] for o in cell.get("outputs", [])
              if "image/png" in o.get("data", {})]
    return (name[1], base64.b64decode(images[0])) if name and images else None


def save_assets(notebook):
    """Write each picture of the notebook to assets, marked with the code's edition."""
    from annotated_s4d import edition

    (ROOT / "assets").mkdir(exist_ok=True)
    for name, png in filter(None, map(figure_of, code_cells(notebook))):
        marks = PngImagePlugin.PngInfo()
        marks.add_text("Source", edition())
        out = io.BytesIO()
        Image.open(io.BytesIO(png)).save(out, "PNG", pnginfo=marks, dpi=(144, 144))
        (ROOT / "assets" / f"{name}.png").write_bytes(out.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--execute", action="store_true", help="execute in any case")
    force, notebook = parser.parse_args().execute, fresh_notebook()
    old = nbformat.read(NOTEBOOK, 4) if NOTEBOOK.exists() else nbformat.v4.new_notebook()
    if force or not keep_outputs(notebook, old):
        execute(notebook)
        save_assets(notebook)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)} is up to date")


if __name__ == "__main__":
    main()
