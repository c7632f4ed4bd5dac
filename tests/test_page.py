"""The web page: in a real browser, and as Streamlit runs it.

The browser is Debian's `chromium`. Where it is missing the tests are skipped, except in
CI (the variable CI is set), where that is a failure.
"""

import json
import keyword
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tokenize
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import jupytext
import numpy as np
import pytest

import annotated_s4d as s4d

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "annotated_s4d.py"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync""".split()
CAPTIONS = {name: s4d.caption(draw) for name, draw in s4d.FIGURES.items()}
LIVE = [(name, knob) for name, draw in s4d.FIGURES.items() for knob in draw.knobs]
FINE = {
    ("next_level", "top_p"),
    ("completions", "temperature"),
}  # a step may do nothing
SLOW = {"cost_against_length"}  # stops the time; its move takes many seconds


def serve(folder, name=FILE.name):
    """Start the server of a page in a folder. Returns the process and its address."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    options = f"--server.port={port}", "--server.headless=true"
    server = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", name, *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://localhost:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{address}/_stcore/health")
            return server, address
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server does not answer")


@pytest.fixture(scope="module")
def address():
    server, address = serve(ROOT)
    yield address
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        assert not os.environ.get("CI"), "no chromium; install Debian's chromium"
        pytest.skip("no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def visit(browser, address, query="", wait=True, **context):
    """Open the page in a tab that notes down complaints; wait until all is there."""
    tab = browser.new_context(**context).new_page()
    tab.complaints, tab.outside = [], []
    tab.on("console", lambda m: m.type == "error" and tab.complaints.append(m.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    inside = ("data:", "blob:", address, address.replace("http", "ws"))
    tab.on("request", lambda r: r.url.startswith(inside) or tab.outside.append(r.url))
    tab.goto(address + "/" + query)
    if wait:
        ready(tab)
    return tab


def ready(tab):
    """Wait until the script has run and every figure and formula has arrived."""
    tab.wait_for_function(
        """(figures) => document.querySelector("[data-testid=stApp]")
             ?.dataset.testScriptState == "notRunning"
           && document.querySelectorAll(".drawing").length >= figures
           && document.querySelectorAll(".katex").length > 250""",
        arg=len(CAPTIONS) - 1,
        timeout=90_000,
    )
    tab.locator(".explorer").wait_for()  # a component, in a tree of its own


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.fixture(scope="module")
def desk(browser, address):
    return visit(browser, address, viewport={"width": 1280, "height": 900})


@pytest.fixture(scope="module")
def phone(browser, address):
    size = {"width": 390, "height": 844}
    return visit(browser, address, viewport=size, color_scheme="dark")


# -- what must not be on the page: each check returns what it has found ---------------


def exceptions(tab):
    return tab.locator("[data-testid=stException]").all_inner_texts()


def console_errors(tab):
    return tab.complaints


def outside_requests(tab):
    return tab.outside


def formulas_refused(tab):
    return tab.locator(".katex-error").all_inner_texts()


def formulas_in_red(tab):
    """KaTeX prints a command that it does not know in red, and says nothing."""
    return tab.evaluate(
        """[...document.querySelectorAll(".katex [style*=color]")]
           .filter(e => e.style.color == "rgb(204, 0, 0)").map(e => e.textContent)"""
    )


def stray_dollars(tab):
    return tab.evaluate(
        r"""[...document.querySelectorAll("p, li, td")]
           .map(e => [...e.childNodes].filter(n => n.nodeType == 3)
                     .map(n => n.data).join(""))
           .filter(text => /[$]|\\[a-z]+/.test(text))"""
    )


def broken_anchors(tab):
    return tab.evaluate(
        """[...document.querySelectorAll("a[href^='#']")]
           .map(a => decodeURIComponent(a.hash.slice(1)))
           .filter(id => id && !document.getElementById(id))"""
    )


def figures_missing(tab):
    """Figures that are not there, or whose alternative text is not their caption."""
    there = tab.locator(".drawing, .explorer").evaluate_all(
        """all => all.filter(e => e.offsetHeight > 100)
                     .map(e => e.getAttribute("aria-label"))"""
    )
    return [name for name, text in CAPTIONS.items() if text not in there]


def images_without_text(tab):
    return tab.evaluate(
        """[...document.images].filter(i => !i.hasAttribute("alt")).map(i => i.src)"""
    )


def sideways(tab):
    """What sticks out of the page at the right."""
    return tab.evaluate(
        """[document.documentElement, document.querySelector(".stMain")]
           .filter(e => e.scrollWidth > e.clientWidth).map(e => e.scrollWidth)"""
    )


def pale_texts(tab):
    """Texts whose contrast with the background is under 3."""
    return tab.evaluate(
        """() => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d");
          const rgb = (color, under) => {
            canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1);
            canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const light = (c) => c.map(v => v / 255).map(v =>
            v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const paper = getComputedStyle(document.querySelector(".stApp"))
            .backgroundColor;
          const texts = document.querySelectorAll(
            ".stMarkdown p, .code code, .panel .title, .panel .x span, nav a");
          const pale = (e, part) => {
            const a = light(rgb(getComputedStyle(e, part).color, paper));
            const b = light(rgb(paper, paper));
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 3;
          };
          const code = document.querySelector(".code code");
          const kinds = [...CSS.highlights.keys()].filter(
            (kind) => pale(code, `::highlight(${kind})`));
          return [...texts].filter(e => e.textContent.trim()).filter(e => pale(e))
            .map(e => e.textContent).concat(kinds).slice(0, 5);
        }"""
    )


CHECKS = [
    exceptions,
    console_errors,
    outside_requests,
    formulas_refused,
    formulas_in_red,
    stray_dollars,
    broken_anchors,
    figures_missing,
    images_without_text,
    sideways,
    pale_texts,
]


@pytest.mark.parametrize("check", CHECKS)
def test_desk(desk, check):
    assert check(desk) == []


@pytest.mark.parametrize("check", CHECKS)
def test_phone_in_the_dark(phone, check):
    assert check(phone) == []


def test_dark_is_dark(phone, desk):
    color = "getComputedStyle(document.querySelector('.stApp')).backgroundColor"
    values = [
        sum(map(int, re.findall(r"\d+", tab.evaluate(color))[:3]))
        for tab in (phone, desk)
    ]
    assert values[0] < 150 and values[1] > 700


# -- knobs ----------------------------------------------------------------------------


def figure_html(tab, name):
    return tab.get_by_role("img", name=CAPTIONS[name], exact=True).inner_html()


AT_REST = """document.querySelector("[data-testid=stApp]")
    .dataset.testScriptState === 'notRunning'"""


def move(tab, name, knob):
    """Move a knob by keyboard, when the page is at rest; wait for another figure."""
    tab.wait_for_function(AT_REST, timeout=30_000)
    before = figure_html(tab, name)
    slider = tab.locator(f".st-key-{name}-{knob} input")
    slider.focus()
    low, high, now = slider.evaluate("e => [e.min, e.max, e.value].map(Number)")
    for _ in range(12 if (name, knob) in FINE else 1):
        tab.keyboard.press("ArrowLeft" if now > (low + high) / 2 else "ArrowRight")
    tab.wait_for_function(
        """([alt, old]) => {
          const all = [...document.querySelectorAll(".drawing")];
          const one = all.find(e => e.getAttribute("aria-label") == alt);
          return one && one.innerHTML != old;
        }""",
        arg=[CAPTIONS[name], before],
        timeout=30_000,
    )


@pytest.mark.parametrize("name, knob", LIVE, ids=[f"{n}.{k}" for n, k in LIVE])
def test_each_knob_changes_its_figure_and_the_address(desk, name, knob):
    if name in SLOW:
        assert desk.locator(f".st-key-{name}-{knob} input").count() == 1
        return
    move(desk, name, knob)
    assert f"{name}.{knob}=" in desk.url
    assert exceptions(desk) == []


@pytest.fixture(scope="module")
def sent(browser, address):
    """A view that somebody has sent, opened on a phone."""
    query = "one_mode.decay=3.0&basis_kernels.N=7&held_input.dt=nan&wraparound.steps=60"
    poles = "explorer.poles=-2,5,1,0;-1,9,0.5,0.5"
    size = {"width": 390, "height": 844}
    tab = visit(browser, address, f"?{query}&{poles}", viewport=size)
    tab.wait_for_timeout(2000)  # each figure drawn late has the page run again
    ready(tab)
    return tab


def test_a_view_can_be_sent(sent):
    """Values in an address are taken; what no knob can give is named and mended."""
    tab = sent
    notices = tab.locator(".notice").all_inner_texts()
    assert len(notices) == 2
    assert "dt = nan" in notices[0] and "0.04 to 0.4" in notices[0]
    assert "N = 7" in notices[1] and "4, 8, 16, 32, 64" in notices[1]
    with s4d.matplotlib.rc_context(s4d.LOOK):
        for name, values in {
            "one_mode": {"decay": 3.0},
            "basis_kernels": {},
            "held_input": {},
            "wraparound": {"steps": 60},
        }.items():
            draw = s4d.FIGURES[name]
            wanted = s4d.drawing(draw(**values), s4d.caption(draw))
            wanted = re.findall(r'src="([^"]*)"', wanted)
            shown = re.findall(r'src="([^"]*)"', figure_html(tab, name))
            assert shown == wanted, name
    assert "basis_kernels.N" not in tab.url and "one_mode.decay" in tab.url


def test_what_an_address_asks_for_is_shown_as_code_and_never_read(browser, address):
    """No Markdown, no HTML, no mathematics, no request to an outside host."""
    evil = "![x](http://192.0.2.1/a.png) **b** $x$ :red[x] <img src=//192.0.2.1/b>"
    asked = {
        "kernel_and_spectrum.init": f"legs. {evil}",  # a list of choices
        "one_mode.decay": f"</code>{evil}",  # a range
        "basis_kernels.N": "`\\`" + "9" * 5000,
        "explorer.poles": evil,
        "code": evil,
        "one_mode.unknown": evil,
    }
    query = urllib.parse.urlencode(asked)
    tab = visit(browser, address, f"?{query}", wait=False)
    tab.locator(".notice").nth(3).wait_for()
    tab.wait_for_timeout(300)
    shown = tab.locator(".notice code").all_text_contents()
    names = "explorer.poles", "one_mode.decay", "basis_kernels.N"
    wanted = [asked[name][:40] for name in (*names, "kernel_and_spectrum.init")]
    assert sorted(shown) == sorted(wanted)
    assert tab.locator(".notice :not(code)").count() == 0  # no tag but these
    assert outside_requests(tab) == exceptions(tab) == []
    tab.context.close()


# -- reading --------------------------------------------------------------------------


def test_contents_lead_to_their_sections(desk):
    headings = [
        title
        for cell in jupytext.read(FILE).cells
        if cell.cell_type == "markdown"
        for title in re.findall(r"^##+ (.*)", cell.source, re.M)
    ]
    assert desk.locator("nav a").all_inner_texts() == headings
    link = desk.locator("nav a", has_text="Part 9: The block")
    link.click()
    heading = desk.locator("h2", has_text="Part 9: The block")
    desk.wait_for_timeout(800)
    assert 0 <= heading.bounding_box()["y"] < 400
    assert "here" in link.get_attribute("class")


def test_code_folds_and_copies(desk):
    desk.context.grant_permissions(["clipboard-read", "clipboard-write"])
    cell = desk.locator(".code", has_text="def direct_conv")
    cell.hover()
    cell.locator("button").click()
    copied = desk.evaluate("navigator.clipboard.readText()")
    assert copied.strip() in FILE.read_text() and "np.convolve(u, K)" in copied
    switch = desk.locator(".st-key-code label")
    switch.click()
    desk.wait_for_function("!document.querySelector('.code[open]')")
    assert desk.locator(".printed").count() > 20  # the numbers stay
    switch.click()
    desk.wait_for_function("document.querySelectorAll('.code[open]').length > 50")


def test_code_is_coloured(desk):
    """The words of each kind, against Python's own tokens."""
    marked = desk.evaluate(
        """() => Object.fromEntries([...CSS.highlights].map(([kind, ranges]) =>
          [kind, [...ranges].filter(r => r.startContainer.isConnected).map(r =>
            r.startContainer.data.slice(r.startOffset, r.endOffset))]))"""
    )
    tokens = {kind: [] for kind in marked}
    for cell in jupytext.read(FILE).cells:
        if cell.cell_type == "code":
            before = None
            lines = iter((cell.source + "\n").splitlines(True))
            for token in tokenize.generate_tokens(lambda lines=lines: next(lines, "")):
                kind, word = token.type, token.string
                if kind == tokenize.COMMENT or word.lstrip("r").startswith('"""'):
                    tokens["remark"].append(word.lstrip("r"))
                elif kind == tokenize.STRING:
                    tokens["text"].append(word)
                elif kind == tokenize.NUMBER:
                    tokens["number"].append(word)
                elif keyword.iskeyword(word):
                    tokens["keyword"].append(word)
                elif before in ("def", "class"):
                    tokens["name"].append(word)
                before = word
    tokens["name"] += [w for w in marked["name"] if w.startswith("@")]
    for kind, words in tokens.items():  # in f-strings later versions see more tokens
        ours, theirs = (
            Counter(w for w in part if not w.startswith(("f'", 'f"')))
            for part in (marked[kind], words)
        )
        odd = (ours - theirs) + (theirs - ours)
        assert len(words) > 100
        assert sum(odd.values()) < 0.05 * len(words), (kind, odd.most_common(9))


def test_on_paper_there_is_no_sidebar(desk):
    desk.emulate_media(media="print")
    assert not desk.locator(".stSidebar").is_visible()
    assert not desk.locator(".st-key-one_mode-decay .stSlider").is_visible()
    desk.emulate_media(media="screen")


def test_every_word_is_on_the_page(desk):
    """Prose, code and what was printed, cell by cell."""
    text = desk.evaluate("document.querySelector('.stMain').textContent")
    squeezed = re.sub(r"\s", "", text)
    for cell in jupytext.read(FILE).cells:
        if cell.cell_type == "code":
            assert re.sub(r"\s", "", cell.source) in squeezed, cell.source[:60]
    assert "twisted FFT = loop" in text
    assert "test accuracy" in text


# -- the explorer ---------------------------------------------------------------------


def explorer(tab, attribute):
    """What the component computed; it lives in a shadow root of the page."""
    there = tab.locator(".explorer")
    return np.array(there.evaluate("(e, name) => [...e[name]]", attribute))


def test_explorer_agrees_with_s4d_kernel(desk):
    """In the beginning, after a drag and after arrow keys: kernel and output."""
    data = s4d.explorer_data()
    pole = desk.locator(".explorer .pole").first
    pole.scroll_into_view_if_needed()
    seen = []
    for action in ("nothing", "drag", "keys"):
        if action == "drag":
            box = pole.locator(".dot").bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            desk.mouse.move(x, y)
            desk.mouse.down()
            desk.mouse.move(x + 12, y - 30, steps=4)
            desk.mouse.up()
        if action == "keys":
            pole.focus()
            desk.keyboard.press("ArrowLeft")
            desk.keyboard.press("ArrowUp")
        desk.wait_for_timeout(500)
        rows = explorer(desk, "poles")
        A, C = rows[:, 0] + 1j * rows[:, 1], rows[:, 2] + 1j * rows[:, 3]
        K = s4d.s4d_kernel(A, np.ones(len(A)), C, data["dt"], len(data["u"]))
        y = s4d.direct_conv(np.array(data["u"]), np.asarray(K, float))
        for ours, theirs in (
            (explorer(desk, "kernel"), K),
            (explorer(desk, "output"), y),
        ):
            assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
        seen.append(rows)
    assert not np.allclose(seen[0], seen[1]) and not np.allclose(seen[1], seen[2])
    desk.wait_for_function("location.search.includes('explorer.poles')")


def test_explorer_starts_from_the_address(sent):
    sent.locator(".explorer .pole").first.wait_for()
    assert explorer(sent, "poles").tolist() == [[-2, 5, 1, 0], [-1, 9, 0.5, 0.5]]
    assert sideways(sent) == []


# -- the checks themselves ------------------------------------------------------------


def planted(element):
    """JavaScript that adds an element to the page."""
    return f"document.body.insertAdjacentHTML('beforeend', `{element}`)"


FAULTS = {  # what to plant into the page, so that a check must find it
    exceptions: planted("<div data-testid=stException>oh</div>"),
    console_errors: "console.error('oh')",
    outside_requests: "fetch('http://192.0.2.1/x').catch(() => 0); 0",
    formulas_refused: planted("<span class=katex-error>oh</span>"),
    formulas_in_red: planted(
        "<span class=katex><span style='color: rgb(204, 0, 0)'>oh</span></span>"
    ),
    stray_dollars: planted("<p>costs $x</p>"),
    broken_anchors: planted("<a href=#nowhere>oh</a>"),
    figures_missing: "document.querySelector('.drawing').remove()",
    images_without_text: planted("<img src=data:,>"),
    sideways: "document.querySelector('.stMain').insertAdjacentHTML("
    "'beforeend', '<div style=\"width: 3000px\">oh</div>')",
    pale_texts: "document.querySelector('.stMarkdown p').style.color = '#eeeeee'",
}


def test_every_check_can_fail(sent):
    """Each check finds the fault that is planted for it. The tab is spoilt then."""
    assert set(FAULTS) == set(CHECKS)
    for check, fault in FAULTS.items():
        wait_until(lambda check=check: check(sent) == [])  # a late run has ended
        sent.evaluate(fault)
        sent.wait_for_timeout(100)
        assert check(sent), check.__name__


# -- training -------------------------------------------------------------------------


def page_namespace():
    """The page's cells, run by themselves, as the page does."""
    namespace = {"re": re, "sys": sys, "Path": Path, "__file__": str(FILE)}
    for cell in re.finditer(s4d.PAGE_CELLS, FILE.read_text(encoding="utf-8")):
        exec(cell[1], namespace)
    return namespace


class Rehearsal:
    """An article whose training takes three epochs and no time."""

    drawing = staticmethod(s4d.drawing)
    loss_curve = staticmethod(s4d.loss_curve)

    def __init__(self):
        self.gate, self.history = __import__("threading").Semaphore(0), []

    def article(self):
        return self

    def train_digits(self, watch):
        for step in (1, 2, 3):
            assert self.gate.acquire(timeout=10)
            self.history.append((step, 1 / step, 2 / step, 0.5))
            watch(self.history)
        return "model", self.history, "test"

    def train(self, epochs=40):
        """Asked for its default only."""

    def evaluate(self, model, data):
        assert (model, data) == ("model", "test")
        return 0.1, 0.987


def test_training_is_shared_seen_and_stopped():
    page = page_namespace()
    studio = Rehearsal()
    training = page["Training"](studio)
    training.begin()
    thread = training.thread
    training.begin()  # a second visitor presses the button: nothing new begins
    assert training.thread is thread and training.busy()
    studio.gate.release()
    wait_until(lambda: len(training.history) == 1)
    assert training.curve().count("%3Cpath ") == 2
    studio.gate.release(2)
    thread.join(10)
    assert re.fullmatch(r"Test accuracy 98.70% after \d+ seconds.", training.outcome)
    training.begin()
    training.stopped = True
    studio.gate.release()
    training.thread.join(10)
    assert training.outcome == "Stopped." and not training.busy()


def test_trained_model_is_the_recorded_one():
    """The parameters in assets give the accuracy that the notebook printed."""
    model, history, test = s4d.trained()
    _, accuracy = s4d.evaluate(model, test)
    notebook = (ROOT / "notebooks" / "annotated_s4d.ipynb").read_text(encoding="utf-8")
    printed = re.search(r"seconds, test accuracy ([\d.]+)%", notebook)[1]
    assert f"{accuracy:.2%}" == f"{printed}%"
    assert np.shape(history) == (40, 4)


def test_parameters_of_another_model_are_refused(tmp_path):
    model = s4d.S4DModel(1, 3, 4, 4, 1, rngs=s4d.nnx.Rngs(0))
    other = s4d.S4DModel(1, 2, 4, 4, 1, rngs=s4d.nnx.Rngs(1))
    s4d.save_parameters(tmp_path / "model.npz", model, [(1, 2.0, 3.0, 0.5)])
    before = np.array(other.encoder.kernel[...])
    with pytest.raises(ValueError, match="decoder/kernel"):
        s4d.load_parameters(tmp_path / "model.npz", other)
    assert (before == other.encoder.kernel[...]).all()
    again = s4d.S4DModel(1, 3, 4, 4, 1, rngs=s4d.nnx.Rngs(1))
    with np.load(tmp_path / "model.npz") as saved:
        arrays = {key: saved[key] for key in saved if key != "history"}
    np.savez(tmp_path / "bare.npz", **arrays)
    with pytest.raises(ValueError, match="a history"):
        s4d.load_parameters(tmp_path / "bare.npz", again)
    history = s4d.load_parameters(tmp_path / "model.npz", again)
    assert history.tolist() == [[1, 2.0, 3.0, 0.5]]
    for a, b in zip(*(s4d.jax.tree.leaves(s4d.nnx.state(m)) for m in (model, again))):
        assert a.dtype == b.dtype
    assert (model.decoder.kernel[...] == again.decoder.kernel[...]).all()


# -- without a browser ----------------------------------------------------------------


def test_cells_are_read_as_jupytext_reads_them():
    ours = list(page_namespace()["read_cells"](FILE.read_text(encoding="utf-8")))
    theirs = jupytext.read(FILE).cells
    kinds = {"prose": "markdown", "code": "code"}
    assert [(kinds[kind], source) for kind, _, source in ours] == [
        (cell.cell_type, cell.source) for cell in theirs
    ]


def test_figures_are_read_without_running_them():
    page = page_namespace()
    read = {}
    for kind, _, source in page["read_cells"](FILE.read_text(encoding="utf-8")):
        if kind == "code":
            read |= {figure[0]: figure[1:] for figure in page["read_figures"](source)}
    assert set(read) == set(s4d.FIGURES)
    for name, (caption, knobs, _) in read.items():
        assert (caption, knobs) == (CAPTIONS[name], s4d.FIGURES[name].knobs)


def test_an_old_notebook_is_not_believed(tmp_path):
    """Outputs are shown only if every cell that made them is the same."""
    page = page_namespace()
    parts, _ = page["read_page"](FILE, ROOT / "notebooks" / "annotated_s4d.ipynb")
    items = [item for _, items in parts for item in items]
    assert sum(bool(item.get("drawn")) for item in items) == len(s4d.FIGURES)
    changed = json.loads((ROOT / "notebooks" / "annotated_s4d.ipynb").read_text())
    cell = next(c for c in changed["cells"] if "DT, STEPS" in "".join(c["source"]))
    cell["source"] = "".join(cell["source"]).replace("200", "201")
    (tmp_path / "old.ipynb").write_text(json.dumps(changed))
    parts, _ = page["read_page"](FILE, tmp_path / "old.ipynb")
    items = [item for _, items in parts for item in items]
    assert not any(item.get("drawn") or item.get("printed") for item in items)


ODD_NAMES = """
    annotated.v2 | s4d (1) | 7 | 2nd.copy | it's | "S4D" | Δ-règle | [x](y) | -h | json
"""


@pytest.mark.parametrize("name", [name.strip() for name in ODD_NAMES.split("|")])
def test_the_page_imports_its_file_whatever_it_is_called(tmp_path, name):
    file = tmp_path / f"{name}.py"
    file.write_text("LOOK, set_allocator = {}, lambda *settings: lambda pad: None")
    module = page_namespace()["Studio"](file).article()
    assert module.__file__ == str(file) and sys.modules["json"] is json


def test_the_file_alone_makes_a_page(tmp_path, browser):
    """In an empty folder, by any name: words at once, figures drawn on the spot."""
    name = "annotated s4d (1).v2.py"
    shutil.copy(FILE, tmp_path / name)
    server, address = serve(tmp_path, name)
    try:
        tab = browser.new_page()
        tab.goto(address)
        tab.locator(".drawing").first.wait_for(timeout=90_000)
        assert exceptions(tab) == []
        assert tab.locator("nav a").count() > 30
        tab.close()
    finally:
        server.kill()
        server.wait()
    assert not (tmp_path / "assets").exists()


def test_app_has_no_exception():
    """As Streamlit's own test runner sees it: widgets, words, the button to train."""
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(str(FILE), default_timeout=60).run()
    assert not app.exception and not app.warning
    assert app.markdown[0].value.startswith("# The Annotated S4D")
    assert app.button(key="train").label == "train here, now"
    assert app.toggle(key="code").value is True
    knobs = {widget.key for widget in [*app.slider, *app.select_slider]}
    assert knobs == {f"{name}.{knob}" for name, knob in LIVE}
