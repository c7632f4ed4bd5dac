"""Make the notebooks, the pictures in assets/ and the trained models there.

python notebooks/render/build.py            execute a notebook if code has changed that
                                            an output of it comes from, else only bring
                                            it up to date
python notebooks/render/build.py --execute  execute in any case

rebuild.ipynb is for its reader to execute.
"""

import argparse
import base64
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from render.article import DATA, DRAWN, only_defines, read_figures  # noqa: E402
from render.files import (  # noqa: E402
    COMPANION,
    NOTEBOOK,
    ROOT,
    TO_FILL,
    bare_notebook,
    code_cells,
    fresh_notebook,
)
from render.rebuild import rebuilt  # noqa: E402


def keep_outputs(notebook, old):
    """Take over the outputs of cells of the same edition; False if one is missing."""
    known = {cell.metadata.get("edition"): cell.outputs for cell in code_cells(old)}
    for number, cell in enumerate(code_cells(notebook), 1):
        edition = cell.metadata["edition"]
        if edition not in known and not only_defines(cell.source):
            return False
        cell.outputs = known.get(edition, [])
        cell.execution_count = number
    return True


# What the web page shows without computing: each figure as HTML, and the trained
# models.
MODELS = ("digits.npz", "generator.npz")
RECORD = """
import json, sys
sys.path.append({folder!r})
from render.drawing import drawing
words = {words!r}
with matplotlib.rc_context(LOOK):
    drawn = {{name: drawing(draw(), words[name]) for name, draw in FIGURES.items()}}
save_parameters("digits.npz", *trained()[:2])
save_parameters("generator.npz", *trained_generator()[:2])
data = {{name: draw.data() for name, draw in FIGURES.items() if draw.data}}
print(json.dumps([drawn, data]))
"""


def execute(notebook, folder, then):
    """Run every cell of a notebook in a folder. Returns what the code `then` prints."""
    total, done = len(code_cells(notebook)), 0
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=None, record_timing=False, resources=resources
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
            done += cell.cell_type == "code"
            print(f"\rcell {done} of {total}", end="", file=sys.stderr, flush=True)
        notebook.cells.append(nbformat.v4.new_code_cell(then))
        client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
    print(file=sys.stderr)
    return "".join(output["text"] for output in notebook.cells.pop().outputs)


def execute_article(notebook):
    """Run the article in an all but empty folder; record what the page needs.

    Returns the names of the trained models with their bytes.
    """
    figures = [f for cell in code_cells(notebook) for f in read_figures(cell.source)]
    words = {figure.name: figure.words for figure in figures}
    with tempfile.TemporaryDirectory() as empty:
        for recorded in (ROOT / "assets").glob("*.json"):  # what tests/ have measured
            shutil.copy(recorded, empty)
        code = RECORD.format(folder=str(ROOT / "notebooks"), words=words)
        printed = execute(notebook, empty, code)
        models = {name: (Path(empty) / name).read_bytes() for name in MODELS}
    record(notebook, *json.loads(printed))
    return models


def record(notebook, drawn, data):
    """Put each figure as HTML beside its PNG, where the page will look for it."""
    for name, output in pictures(notebook):
        output.data[DRAWN] = drawn[name]
        if name in data:
            output.data[DATA] = json.dumps(data[name])


def pictures(notebook):
    """Yield each figure's name with the output that holds its PNG."""
    for cell in code_cells(notebook):
        found = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        yield from zip((f.name for f in read_figures(cell.source)), found)


def save_assets(notebook):
    """Write each picture of the notebook to assets, marked with its edition."""
    (ROOT / "assets").mkdir(exist_ok=True)
    editions = {
        figure.name: cell.metadata["edition"]
        for cell in code_cells(notebook)
        for figure in read_figures(cell.source)
        if "times" not in figure.options  # no product of the code alone
    }
    for path in (ROOT / "assets").glob("*.png"):
        if path.stem not in editions:
            path.unlink()
    for name, output in pictures(notebook):
        if name in editions:
            marks = PngImagePlugin.PngInfo()
            marks.add_text("Source", editions[name])
            png, out = base64.b64decode(output.data["image/png"]), io.BytesIO()
            Image.open(io.BytesIO(png)).save(out, "PNG", pnginfo=marks, dpi=(144, 144))
            (ROOT / "assets" / f"{name}.png").write_bytes(out.getvalue())


def is_kept(path, notebook):
    """Whether a notebook could take all outputs from the file that is there."""
    return path.exists() and keep_outputs(notebook, nbformat.read(path, 4))


def make_article(force):
    """The article's notebook. If it is executed, pictures and models are written."""
    notebook = fresh_notebook()
    if force or not is_kept(NOTEBOOK, notebook):
        models = execute_article(notebook)
        save_assets(notebook)
        for name, model in models.items():
            (ROOT / "assets" / name).write_bytes(model)
    return notebook


def make_companion(force):
    """The companion's notebook, executed where a reader opens it, beside its file."""
    notebook = fresh_notebook(COMPANION)
    if force or not is_kept(COMPANION.with_suffix(".ipynb"), notebook):
        execute(notebook, COMPANION.parent, "")
    return notebook


def main():
    parser = argparse.ArgumentParser(description="Bring the notebooks up to date.")
    parser.add_argument("--execute", action="store_true", help="execute in any case")
    force = parser.parse_args().execute
    notebooks = {
        NOTEBOOK: make_article,
        COMPANION.with_suffix(".ipynb"): make_companion,
        TO_FILL: lambda _: rebuilt(bare_notebook()),
    }
    for path, make in notebooks.items():
        nbformat.write(make(force), path)
        print(f"{path.relative_to(ROOT)} is up to date")


if __name__ == "__main__":
    main()
