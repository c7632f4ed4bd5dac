"""The file and its readers: script, notebook, import, figures, README."""

import ast
import inspect
import json
import linecache
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import jupytext
import matplotlib
import nbformat
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from render.article import editions, read_figures
from render.drawing import drawing
from render.files import fresh_notebook

import annotated_s4d as s4d

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "annotated_s4d.py").read_text(encoding="utf-8")
ARTICLE = jupytext.reads(TEXT, "py:percent")
CODE = [cell.source for cell in ARTICLE.cells if cell.cell_type == "code"]
PROSE = [cell.source for cell in ARTICLE.cells if cell.cell_type == "markdown"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
READ = [  # the code cells but those that are folded away
    cell.source
    for cell in ARTICLE.cells
    if cell.cell_type == "code" and "hide" not in cell.metadata.get("tags", [])
]
# Not moved here: the first stops the time and compiles much for that, the second asks
# the trained model; tests/test_page.py moves it in the browser.
SLOW = {"cost_against_length", "pixel_by_pixel"}


@pytest.fixture(scope="module")
def rehearsal():
    """Every code cell, run as a script runs it; small models train for ten steps."""
    namespace = {"__name__": "__main__", "__file__": str(ROOT / "annotated_s4d.py")}
    drawn = {}
    for number, source in enumerate(CODE):
        name, lines = f"<code cell {number}>", source.splitlines(True)
        linecache.cache[name] = len(source), None, lines, name  # for inspect.getsource
        exec(compile(source, name, "exec"), namespace)
        if "def show(" in source:
            picture = namespace["picture"]

            def show(draw, promise=False, picture=picture):
                if not promise:
                    drawn[draw.__name__] = picture(draw)

            namespace["show"] = show
        if "def save_parameters(" in source:
            namespace["save_parameters"] = lambda *_: None  # the assets stay
        if "def best_time(" in source:
            namespace["best_time"] = lambda *args, **options: 1.0  # speed is not tested
        if "def levels_per_second(" in source:
            rate = namespace["levels_per_second"]  # of four levels, not of thousands
            namespace["levels_per_second"] = lambda m, n, _, rate=rate: rate(m, n, 4)
        if "def digit_model(" in source:
            model = namespace["S4DModel"]
            namespace["digit_model"] = lambda seed=0, model=model: model(
                1, 10, 8, 8, 1, dropout=0.1, rngs=nnx.Rngs(seed)
            )
        if "def generator_model(" in source:
            namespace["generator_model"] = lambda seed=0, model=model: model(
                18, 17, 8, 8, 1, pooling="none", rngs=nnx.Rngs(seed)
            )
        if "def echoes(" in source:
            echoes = namespace["echoes"]  # a shorter stream, longer than the delay
            namespace["echoes"] = lambda n, echoes=echoes, **options: echoes(
                n // 32, **options
            )
        if "def train(" in source:

            def train(model, data, validation, train=namespace["train"], **options):
                data, validation = (
                    [part[:n] for part in pair]
                    for pair, n in ((data, 320), (validation, 32))
                )
                return train(model, data, validation, **options | {"epochs": 1})

            namespace["train"] = train
    return namespace, drawn


def test_every_cell_runs_and_draws(rehearsal):
    """Each check in the cells raises if two views disagree; each figure is drawn."""
    _, drawn = rehearsal
    assert set(drawn) == set(s4d.FIGURES)
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in drawn.values())


def extremes(draw):
    """Each knob in turn at the ends of its range, the others at their defaults."""
    for name, span in draw.knobs.items():
        for value in (span[0], span[-1]):
            yield {name: value}


@pytest.mark.parametrize("name", sorted(set(s4d.FIGURES) - SLOW))
def test_every_knob_changes_its_figure(name):
    draw = s4d.FIGURES[name]
    assert set(draw.knobs) <= set(inspect.signature(draw).parameters)
    if not draw.knobs:
        return

    def drawn(**knobs):
        with matplotlib.rc_context(s4d.LOOK):
            return drawing(draw(**knobs), "caption")

    default = drawn()
    assert drawn() == default  # the same twice
    for knobs in extremes(draw):
        knob, value = next(iter(knobs.items()))
        if inspect.signature(draw).parameters[knob].default != value:
            assert drawn(**knobs) != default, knobs


def test_a_picture_is_the_same_twice():
    assert s4d.picture(s4d.one_mode) == s4d.picture(s4d.one_mode)


def test_captions_say_something():
    for name, draw in s4d.FIGURES.items():
        assert len(inspect.getdoc(draw).split()) > 10, name


def test_a_knob_without_argument_is_refused():
    with pytest.raises(TypeError, match="are no arguments"):
        s4d.figure(size=(1, 2))(lambda width=1: None)


# -- figures as HTML ------------------------------------------------------------------


def test_what_is_drawn_is_written_down():
    """Dashes, points, pale lines, names, texts; nothing is taken for HTML."""
    fig, (left, right) = s4d.canvas(1, 2, 3.0)
    left.plot([0, 1], [0, 1], ":", label="a < b", alpha=0.1)
    left.plot([0, 1], [1, 0], "x", label="points")
    left.set(title="<b>", ylabel="$K_l$", xlim=(0, 1), ylim=(0, 1))
    left.legend()
    left.text(0.25, 0.5, "here")
    right.semilogy([0, 1], [2.0, 30.0])
    right.set(ylim=(2.0, 30.0))
    html = drawing(fig, 'it"s')
    assert 'aria-label="it&quot;s"' in html and "a &lt; b" in html
    assert "&lt;b&gt;" in html and "<em>K<sub>l</sub></em>" in html
    assert "stroke-dasharray='2 3'" in unquote(html) and "dotted" in html
    assert "opacity='0.65'" in unquote(html)  # no line is too pale to be seen
    assert html.count('class="point"') == 2 and "left: 25.0%; bottom: 50.0%" in html
    numbers = re.findall(r'<span style="bottom: [\d.]+%">(\d+)</span>', html)
    assert {"5", "10", "20"} <= set(
        numbers
    )  # a log axis of one decade has more than one


def test_axes_stay_and_the_default_is_a_ghost():
    def one(size):
        fig, ax = s4d.canvas()
        ax.plot([0, 1], [0, size], color=s4d.BLUE)
        return fig

    small, large = one(1), one(4)
    assert drawing(one(1), "").count("%3Cpath ") == 1
    both = unquote(drawing(small, "", ghost=large))
    assert both.count("<path ") == 2 and "opacity='0.25'" in both
    assert small.axes[0].get_ylim() == large.axes[0].get_ylim()
    grown = one(8)
    drawing(grown, "", ghost=large)
    assert grown.axes[0].get_ylim() == one(8).axes[0].get_ylim()


# -- generated files ------------------------------------------------------------------


def test_notebook_is_current():
    """The same cells as the article, executed in order, without an error."""
    notebook = nbformat.read(ROOT / "notebooks" / "annotated_s4d.ipynb", 4)
    ours = [(cell.cell_type, cell.source) for cell in ARTICLE.cells]
    theirs = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert theirs == ours, "run: python notebooks/render/build.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.metadata["edition"] for cell in code] == editions(CODE)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        outputs = cell.outputs
        assert all(output.output_type != "error" for output in outputs)
        assert all(output.get("name") != "stderr" for output in outputs), cell.source
        if re.search("^@figure", cell.source, re.M):
            pictures = [o for o in outputs if "image/png" in o.get("data", {})]
            assert len(pictures) == 1
            assert pictures[0].metadata["image/png"]["alt"]


def test_notebook_tells_its_language():
    """Other tools ask its name and suffix. No exact version: builds are the same."""
    notebook = nbformat.read(ROOT / "notebooks" / "annotated_s4d.ipynb", 4)
    assert notebook.metadata == fresh_notebook().metadata
    language = notebook.metadata["language_info"]
    assert language["name"] == language["nbconvert_exporter"] == "python"
    assert language["file_extension"] == ".py" and "version" not in language


def test_pictures_are_current():
    """Each picture in assets was drawn by the code that draws it now.

    Pictures of times are no products of the code alone, and not kept.
    """
    pictures = {path.stem: path for path in (ROOT / "assets").glob("*.png")}
    wanted = {
        figure.name: edition
        for source, edition in zip(CODE, editions(CODE))
        for figure in read_figures(source)
        if "times" not in figure.options
    }
    assert set(pictures) == set(wanted)
    for name, path in pictures.items():
        assert Image.open(path).text["Source"] == wanted[name], f"{name} is stale"


def changed(old, new):
    """The figures that are stale when a piece of the article's code is another."""
    assert TEXT.count(old) >= 1
    other = jupytext.reads(TEXT.replace(old, new, 1), "py:percent")
    code = [cell.source for cell in other.cells if cell.cell_type == "code"]
    drawn = zip(CODE, editions(CODE), editions(code), strict=True)
    pairs = [(source, before == after) for source, before, after in drawn]
    return {f.name for source, same in pairs if not same for f in read_figures(source)}


def test_a_figure_is_stale_when_the_code_that_draws_it_has_changed():
    coarse = changed("DT, STEPS = 0.04, 200", "DT, STEPS = 0.05, 200")
    assert {"oscillator_response", "explorer"} <= coarse and "hero" not in coarse
    assert "hero" in changed("def nudged(images, rng):", "def nudged(images, rng=0):")
    # the words of a figure are its own
    assert changed("draws what is below the line", "draws the rest") == {"hero"}


@pytest.mark.parametrize(
    "old, new",
    [
        ("The force in newtons", "A force"),  # a docstring elsewhere
        ("# seconds, samples", "# s"),  # a comment
        ("## Part 1: A continuous system", "## Part 1: A system"),  # prose
        ("def param_count(", "def count_of("),  # what no figure uses
    ],
)
def test_and_not_when_anything_else_has(old, new):
    assert changed(old, new) == set()


def test_a_script_leaves_git_clean():
    """Its pictures and models go where Git does not look."""
    git = ["git", "check-ignore", "-q", str(s4d.results() / "hero.png")]
    assert subprocess.run(git, cwd=ROOT).returncode in (0, 128)  # 128: no checkout
    assert s4d.results().parent == ROOT / "assets"


def test_the_table_of_accuracies_is_the_recorded_one():
    """Numbers in the prose and the README against assets/digits.json."""
    recorded = json.loads((ROOT / "assets" / "digits.json").read_text())
    for text in (TEXT, README):
        for name in ("s4d", "gru"):
            r = recorded[name]
            test = [run["test"] for run in r["runs"]]
            assert len(test) == 3 and np.mean(test) == pytest.approx(r["mean"])
            row = f"{r['mean']:.1%} ± {r['spread']:.1%}"
            assert row in text, f"{name}: {row}"
            assert f"{r['parameters']:,}" in text
    assert recorded["s4d"]["mean"] >= 0.985
    assert recorded["s4d"]["seconds"] <= 90


# -- import ---------------------------------------------------------------------------


IMPORT = """
import jax, matplotlib, os, sys
from jax._src import xla_bridge
def settings():
    return dict(matplotlib.rcParams), dict(os.environ)
before = settings()
import annotated_s4d
assert not xla_bridge.backends_are_initialized()
assert before == settings()
assert "streamlit" not in sys.modules
# python -OO strips docstrings, and a caption is one. Of this file alone: it is quicker.
text = open("annotated_s4d.py", encoding="utf-8").read()
stripped = {"__name__": "stripped"}
exec(compile(text, "annotated_s4d.py", "exec", optimize=2), stripped)
draw = stripped["FIGURES"]["one_mode"]
assert draw.__doc__ is None and stripped["caption"](draw) == "one_mode"
"""


def test_import_has_no_side_effects(tmp_path):
    """Copied to an empty folder: no output, no file, no computation, no settings."""
    (tmp_path / "annotated_s4d.py").write_text(TEXT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["annotated_s4d.py"]


def test_public_names():
    for name in """oscillator ssm_discretize ssm_recurrence ssm_kernel causal_conv
            hippo_legs s4d_init s4d_discretize s4d_kernel s4d_recurrence s4d_scan S4D
            S4DBlock S4DModel build output_size param_count recommended_defaults train
            evaluate generate""".split():
        assert inspect.getdoc(getattr(s4d, name)), name


# -- style ----------------------------------------------------------------------------


def code_lines(source):
    """The number of lines that are neither empty nor of a docstring."""
    tree, prose = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(n not in prose and bool(line.strip()) for n, line in lines)


def test_cells_are_short():
    """One idea a cell, in the story; docstrings are prose. What is folded is longer,
    and so is a class, which is not cut in two. Appendices are as long as is natural."""
    end = next(i for i, c in enumerate(ARTICLE.cells) if "## Appendix A" in c.source)
    story = [c.source for c in ARTICLE.cells[:end] if c.source in CODE]
    plots = [source for source in story if re.search("^@figure", source, re.M)]
    classes = [source for source in story if re.search("^class ", source, re.M)]
    hidden = set(story) - set(READ)
    rest = set(story) - set(plots) - set(classes) - hidden
    lines = sorted(map(code_lines, rest))
    assert lines[len(lines) // 2] <= 10
    assert lines[int(0.9 * len(lines))] <= 22
    assert lines[-1] <= 30
    assert max(map(code_lines, set(plots) - hidden)) <= 34
    assert max(map(code_lines, classes)) <= 40
    assert max(len([x for x in s.splitlines() if x.strip()]) for s in hidden) <= 80


def test_an_assignment_is_one_thought():
    """Several names in one assignment only where they are one thing."""
    nodes = [node for node in ast.walk(ast.parse(TEXT)) if isinstance(node, ast.Assign)]
    several = [
        node.lineno
        for node in nodes
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    assert len(several) < 0.05 * len(nodes), several


def test_the_opening_is_short():
    """Title, three paragraphs, the result; machinery in two folded cells."""
    opening = ARTICLE.cells[
        : [c.source[:7] == "## Part" for c in ARTICLE.cells].index(1)
    ]
    kinds = [cell.cell_type for cell in opening]
    assert kinds == ["markdown", "code", "code", "code"]
    assert len(opening[0].source.split("\n\n")) == 5  # title, subtitle, paragraphs
    imports = [x for x in opening[1].source.splitlines() if re.match("import|from", x)]
    assert len(imports) <= 12 and "def hero(" in opening[3].source
    assert all("hide" in cell.metadata["tags"] for cell in opening[1:])


def test_code_fits_the_page():
    long = [line for source in CODE for line in source.splitlines() if len(line) > 88]
    assert long == []


def test_cells_that_work_bind_no_name_of_a_definition():
    """So that any of them can be run again. A comprehension's names are its own."""
    body, kinds = ast.parse(TEXT).body, (ast.FunctionDef, ast.ClassDef)
    defined = {node.name for node in body if isinstance(node, kinds)} - {"_"}
    own = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

    def bound(node):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, kinds):
            yield node.name, node.lineno
        elif not isinstance(node, own):
            for child in ast.iter_child_nodes(node):
                yield from bound(child)

    works = [n for n in body if isinstance(n, ast.If) and ast.unparse(n.test) == "RUN"]
    again = [(name, line) for n in works for name, line in bound(n) if name in defined]
    assert works and again == []


def test_every_function_says_what_it_does():
    for node in ast.parse(TEXT).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "_":
            assert ast.get_docstring(node), node.name


def test_mathematics_is_of_the_kind_that_renders_everywhere():
    """What KaTeX or Jupyter would show in red, or as raw text."""
    for source in PROSE:
        display = re.findall(r"^\$\$$(.*?)^\$\$$", source, re.M | re.S)
        assert source.count("$$") == 2 * len(display), source[:80]
        rest = re.sub(r"^\$\$$.*?^\$\$$", "", source, flags=re.M | re.S)
        assert rest.count("$") % 2 == 0, source[:80]
        for bad in (
            r"\label",
            r"\eqref",
            r"\href",
            r"\mbox",
            r"\norm",
            r"\begin{align}",
            r"\begin{eqnarray}",
            r"\newcommand",
            r"\(",
            r"\[",
        ):
            assert bad not in source, (bad, source[:80])
        for inline in re.findall(r"\$([^$]+)\$", rest):
            assert inline == inline.strip(), inline


def test_headings_are_unique():
    headings = [h for source in PROSE for h in re.findall(r"^#+ (.*)", source, re.M)]
    assert len(headings) == len(set(headings))
    assert not any("$" in h for h in headings)


# -- README ---------------------------------------------------------------------------


def test_readme_example_runs():
    """The lines that show how to use the layer, as they stand."""
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    exec(compile(example, "README", "exec"), {})


def test_readme_names_what_exists():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python ((?:tests|notebooks)/\S+\.py)", README):
        assert (ROOT / path).exists(), path


def test_readme_says_which_tests_to_run():
    """Every part of the article and every file of tests has a place in its table."""
    table = README[README.index("| you changed |") :].split("\n\n")[0]
    assert README.count("\n") <= 150
    names = set(re.findall(r"`(\w+)`", table))
    assert names == {path.stem[5:] for path in (ROOT / "tests").glob("test_*.py")}
    told = set(re.findall(r"Appendix \w", table))
    for first, last in re.findall(r"Parts? (\d+)(?: to (\d+))?", table):
        told |= {f"Part {n}" for n in range(int(first), int(last or first) + 1)}
    assert len(re.findall(r"\| \d+ \|$", table, re.M)) == table.count("\n") - 1
    parts = set(re.findall(r"^# ## ((?:Part|Appendix) \w+):", TEXT, re.M))
    assert told == parts - {"Part 0"}


def test_top_level():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {
        "README.md",
        "annotated_s4d.py",
        "notebooks",
        "tests",
        "assets",
        "requirements.txt",
    }
    assert {name for name in names if not name.startswith(".")} <= allowed


def test_ruff_finds_nothing():
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, str(ROOT)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
