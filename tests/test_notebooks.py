"""The notebooks beside the article: its companion's, and the one to be filled in."""

import ast
import builtins
import linecache
import re
from pathlib import Path

import nbformat
import pytest
from render import files, rebuild
from render.article import names, only_defines

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
FOLDED = Path(__file__).with_name("folded_article.py")


# -- what is marked -------------------------------------------------------------------


def test_starred_cells_are_tagged():
    """From a starred heading to the next heading; other tags stay."""
    notebook = files.fresh_notebook(FOLDED)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    starred = [i for i, tag in enumerate(tags) if "starred" in tag]
    first = next(i for i, c in enumerate(notebook.cells) if "def line" in c.source)
    assert starred == [first, first + 1, first + 2]
    assert tags[1] == ["hide"] and tags.count(["answer"]) == 3
    assert notebook.cells[-2].metadata["jupyter"]["source_hidden"]


def test_no_cell_of_the_path_leans_on_what_a_starred_one_has_computed():
    """A definition may stand there; a value that the path goes on with may not."""
    computed, leaning = {}, []
    for cell in files.code_cells(files.bare_notebook()):
        starred = "starred" in cell.metadata.get("tags", ())
        uses, binds = names(cell.source)
        lost = {} if starred else {n for n in uses - binds if computed.get(n)}
        leaning += [f"{name} in {cell.source[:50]}" for name in sorted(lost)]
        works = starred and not only_defines(cell.source)
        computed |= dict.fromkeys(binds, works)
    assert any(computed.values()) and leaning == []


# -- what is made of what -------------------------------------------------------------


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_companions_notebook_is_current():
    """Its cells are the companion's, executed in order, from the code of now."""
    fresh = files.fresh_notebook(files.COMPANION)
    notebook = nbformat.read(files.COMPANION.with_suffix(".ipynb"), 4)
    assert sources(notebook) == sources(fresh), "run: python notebooks/render/build.py"
    cells = files.code_cells(notebook)
    marks = [cell.metadata["edition"] for cell in files.code_cells(fresh)]
    assert [cell.metadata["edition"] for cell in cells] == marks
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any("error" in o.output_type or "stderr" in o.values() for o in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "the same to the last bit: True" in printed


def test_the_notebook_to_be_filled_in_is_current():
    """It is not executed: that is for its reader."""
    notebook = nbformat.read(files.TO_FILL, 4)
    fresh = rebuild.rebuilt(files.bare_notebook())
    assert sources(notebook) == sources(fresh), "run: python notebooks/render/build.py"
    assert not any(cell.outputs for cell in files.code_cells(notebook))
    assert all(cell.execution_count is None for cell in files.code_cells(notebook))


# -- the notebook to be filled in -----------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    """Each code cell as a reader is given it, and as it stands in the article."""
    notebook = files.bare_notebook()
    own = {cell.id: cell.source for cell in notebook.cells}
    notebook = rebuild.rebuilt(notebook)
    return [(cell.source, own[cell.id]) for cell in files.code_cells(notebook)]


REQUEST = r"(?s)raise NotImplementedError\(.*?\n +\)"


def asks(source):
    """The functions that a cell asks for, with what it says."""
    said = ("".join(re.findall('"(.*)"', x)) for x in re.findall(REQUEST, source))
    return dict(words.split(": ", 1) for words in said)


def test_with_the_bodies_put_back_it_is_the_article(cells):
    """Only twelve bodies are missing. Signatures, decorators, docstrings are there."""
    asked = {}
    for given, own in cells:
        asked |= asks(given)
        pattern = "(.+?)".join(map(re.escape, re.split(REQUEST, given)))
        assert re.fullmatch(pattern, own, re.S), given
        outlines = [
            [
                (node.name, ast.unparse(node.args), ast.get_docstring(node))
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef)
            ]
            for source in (given, own)
        ]
        inside = len(outlines[1]) - len(outlines[0])  # functions inside of bodies
        assert set(outlines[0]) <= set(outlines[1]) and inside <= 2 * len(asks(given))
    assert asked == rebuild.TASKS and len(asked) == 12
    assert all(len(line) <= 88 for given, _ in cells for line in given.split("\n"))


def test_it_needs_no_name_that_it_does_not_bind(cells):
    uses, binds = map(set().union, *(names(own) for _, own in cells))
    assert uses - binds - set(dir(builtins)) <= {"__file__"}


def test_a_reader_is_asked_for_each_function_and_for_nothing_else(cells):
    """A cell that needs a function says what to write; when it is there the cell runs,
    and its checks hold. Nothing is drawn, no time is taken; what comes after the last
    request is the article's, and run with it."""
    namespace, asked, own = {"__name__": "__main__"}, [], {}
    quick = {"show": lambda *_, **__: None, "best_time": lambda *_, **__: 1.0}

    def run(source):
        name = f"<cell {len(linecache.cache)}>"
        lines = source.splitlines(True)
        linecache.cache[name] = len(source), None, lines, name  # for inspect.getsource
        exec(compile(source, name, "exec"), namespace)
        namespace.update({k: f for k, f in quick.items() if k in namespace})

    for given, theirs in cells:
        own |= dict.fromkeys(asks(given), theirs)
        while given and len(asked) < len(rebuild.TASKS):
            try:
                run(given)
                break
            except NotImplementedError as error:
                name, said = str(error).split(": ", 1)
                assert said == rebuild.TASKS[name] and "if RUN:" in given
                asked.append(name)
                written = own.pop(name)  # it is asked for once
                run(written)
                given = "" if written == theirs else given
    assert sorted(asked) == sorted(rebuild.TASKS)
