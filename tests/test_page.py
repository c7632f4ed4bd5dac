"""The web page: in a real browser, and as Streamlit runs it.

The browser is Debian's `chromium`. Where it is missing the tests are skipped, except in
CI (the variable CI is set), where that is a failure.
"""

import inspect
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import jupytext
import numpy as np
import pytest
from PIL import Image
from render import live, static
from render.article import (
    Article,
    is_answer,
    read_cells,
    read_figures,
    words_and_code,
)
from render.drawing import drawing

import annotated_s4d as s4d

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "annotated_s4d.py"
FOLDED = Path(__file__).with_name("folded_article.py")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync""".split()
NOTEBOOK = ROOT / "notebooks" / "annotated_s4d.ipynb"
FIGURES = {figure.name: figure for figure in Article(FILE, NOTEBOOK).figures}
CAPTIONS = {name: figure.words for name, figure in FIGURES.items()}
LIVING = [name for name, draw in s4d.FIGURES.items() if draw.data]  # by the browser
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
           && document.querySelectorAll("math").length > 250
           && document.querySelector(".complete")
           && !document.querySelector(".waiting")""",
        arg=len(CAPTIONS) - len(LIVING),
        timeout=90_000,
    )
    for name in LIVING:  # components, in trees of their own
        tab.locator(f".{name}").wait_for()
    tab.evaluate(OPEN_ALL)


OPEN_ALL = """for (const fold of document.querySelectorAll(".starred, .answer"))
    fold.open = true"""


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
    """Formulas that the browser was not given, or did not understand."""
    return tab.evaluate(
        """[...document.querySelectorAll("[data-math], math merror, math *")]
           .filter(e => !(e instanceof MathMLElement) || e.matches("merror"))
           .map(e => e.outerHTML)"""
    )


def formulas_without_size(tab):
    return tab.evaluate(
        """[...document.querySelectorAll("math")]
           .filter(e => !(e.getBoundingClientRect().width > 1)).map(e => e.outerHTML)"""
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
    """Figures that are not there, or whose alternative text is not their caption and,
    where knobs were turned, their values."""
    there = tab.locator(", ".join(f".{name}" for name in ["drawing", *LIVING]))
    there = there.evaluate_all(
        """all => all.filter(e => e.offsetHeight > 100)
                     .map(e => e.getAttribute("aria-label"))"""
    )
    bare = [re.sub(r" \(\w+ = [^()]*\)$", "", text) for text in there]
    return [name for name, text in CAPTIONS.items() if text not in bare]


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


def luminance(color):
    channels = np.array(color[:3]) / 255
    channels = np.where(
        channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
    )
    return channels @ [0.2126, 0.7152, 0.0722]


def contrast(tab, kind):
    """The contrast of a text with what is behind it, by its pixels; None if unseen."""
    clip = tab.evaluate(
        """async (kind) => {
          const seen = [...document.querySelectorAll(kind)].find(
            (e) => e.textContent.trim() && e.checkVisibility({ opacityProperty: 1 }));
          seen?.scrollIntoView({ block: "center", behavior: "instant" });
          await new Promise(requestAnimationFrame);
          const { x, y, width, height } = seen?.getBoundingClientRect() ?? { x: -1 };
          const clip = { x, y, height, width: Math.min(width, innerWidth - x) };
          return x >= 0 && y >= 0 && y + height < innerHeight ? clip : null;
        }""",
        kind,
    )
    if not clip:
        return None
    pixels = Image.open(io.BytesIO(tab.screenshot(clip=clip))).convert("RGB")
    counts = pixels.getcolors(10**6)
    values = [luminance(color) for _, color in counts] + [luminance(max(counts)[1])]
    above, below = max(values) + 0.05, min(values) + 0.05
    paper = values[-1] + 0.05
    return max(above / paper, paper / below)


TEXTS = """.article p|.code .k|.code .nf|.code .c1|.code .sd|.code .mi|.code .s2
    |figcaption|.panel .title span|.panel .x:not(.shared) span|.panel .label
    |nav .h3 a|nav a.here|.stSlider [data-testid=stSliderThumbValue]
    |.starred > summary h3|.starred .gives|.answer > summary"""


def pale_texts(tab):
    """Kinds of text whose contrast is under that of WCAG's level AA."""
    contrasts = {kind: contrast(tab, kind) for kind in map(str.strip, TEXTS.split("|"))}
    assert sum(value is not None for value in contrasts.values()) > 8
    return [kind for kind, value in contrasts.items() if value and value < 4.5]


CHECKS = [
    exceptions,
    console_errors,
    outside_requests,
    formulas_refused,
    formulas_without_size,
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
    return tab.locator(f"#{name} .drawing").inner_html()


AT_REST = """document.querySelector("[data-testid=stApp]")
    .dataset.testScriptState === 'notRunning'"""


CHOSEN, OTHER = "[role=radio][aria-checked=true]", "[role=radio][aria-checked=false]"


def move(tab, name, knob):
    """Move a knob, a slider by keyboard, when the page is at rest; wait for another
    figure."""
    tab.wait_for_function(AT_REST, timeout=30_000)
    before = figure_html(tab, name)
    slider = tab.locator(f".st-key-{name}-{knob} input[type=range]")
    if slider.count():
        slider.focus()
        low, high, now = slider.evaluate("e => [e.min, e.max, e.value].map(Number)")
        for _ in range(12 if (name, knob) in FINE else 1):
            tab.keyboard.press("ArrowLeft" if now > (low + high) / 2 else "ArrowRight")
    else:  # a row of names
        tab.locator(f".st-key-{name}-{knob} {OTHER}").last.click()
    tab.wait_for_function(
        """([name, old]) => {
          const one = document.querySelector(`#${name} .drawing`);
          return one && one.innerHTML != old && !one.closest(".before");
        }""",
        arg=[name, before],
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
            ghost = draw() if values else None
            wanted = drawing(draw(**values), "words", ghost)
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
    for title in ("Part 9: The block", "Part 2: Hold the input", "References"):
        link = desk.locator("nav a", has_text=title)
        link.click()
        desk.wait_for_timeout(800)
        heading = desk.locator(f"#{link.get_attribute('href')[1:]}")
        assert 0 <= heading.bounding_box()["y"] < 150, title
        assert "here" in link.get_attribute("class") or title == "References"
        box = link.bounding_box()
        assert 0 < box["y"] < 900  # the mark itself is in view


def test_an_address_with_an_anchor_lands(browser, address):
    """On a reload too, and where a view that was sent names a figure."""
    size = {"width": 1280, "height": 900}
    for query, place in (
        ("#part-11-training", "#part-11-training"),
        ("?kernel_and_spectrum.init=lin", "#kernel_and_spectrum"),
    ):
        tab = visit(browser, address, query, viewport=size)
        tab.wait_for_timeout(1500)
        box = tab.locator(place).bounding_box()
        assert 0 <= box["y"] < 250, (query, box)
        tab.context.close()


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
    assert desk.locator(".code summary[tabindex]").count() == 0  # now they are seen
    assert desk.locator(".printed").count() > 20  # the numbers stay
    switch.click()
    desk.wait_for_function("document.querySelectorAll('.code[open]').length > 50")


def test_code_is_coloured(desk):
    """The same words of each kind as in the HTML of the article."""
    shown = desk.evaluate(
        """() => Object.fromEntries(["k", "nf", "c1", "s2", "mi"].map(kind =>
          [kind, document.querySelectorAll(`.code .${kind}`).length]))"""
    )
    article = Article(FILE, NOTEBOOK)
    items = [item for part in article.parts for item in part.items]
    for item in items:  # which grows by what is folded
        items += getattr(item, "items", [])
    html = "".join(item for item in items if isinstance(item, str))
    for kind, count in shown.items():
        assert count == html.count(f'<span class="{kind}">') > 100, kind
    colours = {
        desk.locator(f".code .{kind}").first.evaluate("e => getComputedStyle(e).color")
        for kind in shown
    }
    assert len(colours) == len(shown)


def test_on_paper_there_is_no_sidebar(desk):
    desk.emulate_media(media="print")
    assert not desk.locator(".stSidebar").is_visible()
    assert not desk.locator(".st-key-one_mode-decay .stSlider").is_visible()
    desk.emulate_media(media="screen")


def test_every_word_is_on_the_page(desk):
    """Prose, code and what was printed, cell by cell."""
    text = desk.evaluate("document.querySelector('.stMain').textContent")
    squeezed = re.sub(r"\s", "", text)
    for kind, marks, source in read_cells(FILE.read_text(encoding="utf-8")):
        code = words_and_code(source)[1] if is_answer(marks) else source
        if kind == "code":
            assert re.sub(r"\s", "", code) in squeezed, source[:60]
    assert "twisted FFT = loop" in text
    assert "test accuracy" in text


def test_result_on_the_first_screen_and_the_spring_by_the_third(browser):
    """The page in one file, as a reader with a laptop meets it."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    tab.set_content(static.page(Article(FILE, NOTEBOOK)))
    picture = tab.locator("#hero .drawing").bounding_box()
    assert picture["height"] > 200 and picture["y"] + picture["height"] < 900
    part = tab.locator("#part-1-a-continuous-system").bounding_box()
    assert 900 < part["y"] < 2700
    assert tab.evaluate("document.documentElement.scrollWidth") == 1280
    tab.context.close()


# -- what is folded -------------------------------------------------------------------

SHOW = """import sys
from pathlib import Path
sys.path.insert(0, {rooms!r})
from render.live import page
page(Path(__file__).with_name({name!r}))
"""


@pytest.fixture(scope="module")
def folding(tmp_path_factory):
    """The address of a small article with starred sections and answers."""
    folder = tmp_path_factory.mktemp("folded")
    shutil.copy(FOLDED, folder)
    shutil.copytree(ROOT / ".streamlit", folder / ".streamlit")
    rooms = str(ROOT / "notebooks")
    (folder / "show.py").write_text(SHOW.format(rooms=rooms, name=FOLDED.name))
    server, address = serve(folder, "show.py")
    yield address
    server.kill()
    server.wait()


def open_folded(browser, address, query=""):
    tab = visit(browser, address, query, wait=False)
    tab.locator("#line .drawing").wait_for(state="attached", timeout=30_000)
    tab.locator("#answered .drawing").wait_for(state="attached", timeout=30_000)
    tab.wait_for_function(AT_REST)
    return tab


def seen(tab):
    """Which of the words of the small article can be seen."""
    words = "looks to the eye", "second paragraph", "Still inside", "no figure and"
    words += "Outside", "as steep as", "the first line says", "No code at all"
    there = tab.locator(".stMain").inner_text()
    return {word for word in words if word in there}


SHUT = {"looks to the eye", "no figure and", "Outside"}  # while all is folded


def test_starred_sections_and_answers_are_folded(browser, folding):
    """Seen are a heading and a sentence. What opens stays open when a knob moves."""
    tab = open_folded(browser, folding)
    assert seen(tab) == SHUT and not tab.locator("#line").is_visible()
    assert tab.locator("text=looks to the eye").count() == 1  # not said twice
    assert "★ Steep lines" in tab.locator("nav a").all_inner_texts()
    summary = tab.locator(".starred > summary").first
    summary.focus()
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Tab")  # a focus that came by keyboard can be seen
    assert summary.evaluate("e => e == document.activeElement")
    assert summary.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    opened = {"second paragraph", "Still inside", "as steep as"}
    assert seen(tab) == SHUT | opened
    for knob in ("slope", "ends"):
        move(tab, "line", knob)
        assert f"line.{knob}=" in tab.url
    tab.locator(".st-key-code label").click()
    tab.wait_for_function("!document.querySelector('.code[open]')")
    assert seen(tab) == SHUT | opened
    summary.focus()
    tab.keyboard.press("Enter")
    assert seen(tab) == SHUT
    tab.emulate_media(media="print")
    assert len(seen(tab)) == 8 and tab.locator("#line").is_visible()
    tab.emulate_media(media="screen")
    tab.evaluate(OPEN_ALL)
    assert len(seen(tab)) == 8 and tab.locator("#line").is_visible()
    assert formulas_refused(tab) == formulas_without_size(tab) == []
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_timeout(300)
        for kind in (
            ".starred > summary h3",
            ".starred .gives",
            ".answer > summary",
            CHOSEN,
            OTHER,
        ):
            assert contrast(tab, kind) > 4.5, (scheme, kind)
    assert exceptions(tab) == console_errors(tab) == []
    tab.context.close()


@pytest.mark.parametrize("query", ["#steep-lines", "?line.slope=3"])
def test_an_address_and_a_link_open_what_is_folded(browser, folding, query):
    tab = open_folded(browser, folding, query)
    tab.locator("#line").wait_for()
    assert "No code at all" not in seen(tab)
    tab.locator("nav a", has_text="Words alone").click()
    tab.locator(".starred:has-text('Words alone')[open]").wait_for()
    tab.context.close()


def test_the_page_in_one_file_folds(browser, tmp_path):
    """A link opens, as the place it leads to is inside; on paper all is open."""
    (tmp_path / "page.html").write_text(static.page(Article(FOLDED, tmp_path / "none")))
    tab = browser.new_context(viewport={"width": 1280, "height": 500}).new_page()
    address = f"file://{tmp_path}/page.html"
    tab.goto(address)
    inside = tab.locator("text=A second paragraph")
    head = tab.locator("h3", has_text="Steep lines")
    assert not inside.is_visible() and head.is_visible()
    tab.locator("nav.side a", has_text="Steep lines").click()
    assert inside.is_visible() and 0 <= head.bounding_box()["y"] < 150
    tab.goto("about:blank")
    tab.goto(f"{address}#line")
    assert inside.is_visible()
    tab.goto("about:blank")
    tab.goto(address)
    tab.emulate_media(media="print")
    printed = tab.locator("text=the first line says")
    assert printed.bounding_box()["height"] > 10 < inside.bounding_box()["height"]
    tab.context.close()


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


def test_explorer_shows_true_values(desk):
    """Far below a peak, too: a value inside the plot stands where it belongs."""
    poles = [[-0.001, 10, 2, 0], [-4, 2, 0.1, 0]]
    desk.locator(".explorer").evaluate(
        """(e, poles) => { e.poles = poles; e.chosen = 0; e.observer.disconnect();
           e.observer.observe(e.querySelector(".plane")); }""",
        poles,
    )
    desk.wait_for_timeout(300)
    seen = desk.locator(".explorer").evaluate("e => e.response")
    A, C = (np.array([complex(*pole[i : i + 2]) for pole in poles]) for i in (0, 2))
    w = 1j * np.array(seen["w"])[:, None]
    G = np.abs((C / (w - A) + C.conj() / (w - A.conj())).sum(1))
    height = np.array(seen["height"])
    inside = (height >= seen["bottom"]) & (height <= seen["top"])
    assert inside.mean() > 0.9 and not inside.all()
    assert np.allclose(height[inside], np.log10(G[inside]), atol=1e-3)
    assert (np.log10(G[height > seen["top"]]) > seen["top"]).all()
    desk.locator(".explorer .presets button", has_text="the spring").click()
    (pole,) = explorer(desk, "poles")  # its weight is imaginary, and not 0
    shown = desk.locator(".explorer .value").inner_text().replace("\N{MINUS SIGN}", "-")
    assert abs(float(shown)) == pytest.approx(np.hypot(*pole[2:]), abs=0.006) != 0


# -- the checks themselves ------------------------------------------------------------


def planted(element):
    """JavaScript that adds an element to the page."""
    return f"document.body.insertAdjacentHTML('beforeend', `{element}`)"


FAULTS = {  # what to plant into the page, so that a check must find it
    exceptions: planted("<div data-testid=stException>oh</div>"),
    console_errors: "console.error('oh')",
    outside_requests: "fetch('http://192.0.2.1/x').catch(() => 0); 0",
    formulas_refused: planted("<math><merror>oh</merror></math>"),
    formulas_without_size: planted("<math></math>"),
    stray_dollars: planted("<p>costs $x</p>"),
    broken_anchors: planted("<a href=#nowhere>oh</a>"),
    figures_missing: "document.querySelector('.drawing').remove()",
    images_without_text: planted("<img src=data:,>"),
    sideways: "document.querySelector('.stMain').insertAdjacentHTML("
    "'beforeend', '<div style=\"width: 3000px\">oh</div>')",
    pale_texts: "document.querySelector('.article p').style.color = '#999999'",
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


class Rehearsal:
    """An article with a figure whose work takes three epochs and no time."""

    drawing = staticmethod(drawing)

    def __init__(self):
        self.gate, self.FIGURES = __import__("threading").Semaphore(0), {"learn": self}

    def article(self):
        return self

    def work(self, watch):
        history = []
        for step in (1, 2, 3):
            assert self.gate.acquire(timeout=10)
            history.append((step, 1 / step, 2 / step, 0.5))
            watch(step, 3, lambda: s4d.loss_curve(history))
        return "Test accuracy 98.70%."


def test_training_is_shared_seen_and_stopped():
    studio = Rehearsal()
    training = live.Training(studio)
    training.begin("learn", "ann")
    thread = training.thread
    training.begin("learn", "bob")  # he presses the button: nothing new begins
    assert training.thread is thread and training.busy()
    studio.gate.release()
    wait_until(lambda: training.done == 1)
    assert training.curve().count("%3Cpath ") == 2
    training.stop("bob")  # what another has begun
    studio.gate.release(2)
    thread.join(10)
    assert training.outcome == "Test accuracy 98.70%."
    studio.work, work = (lambda watch: 1 / 0), studio.work
    training.begin("learn", "ann")
    training.thread.join(10)
    assert training.outcome == "It failed: division by zero"
    studio.work = work
    training.begin("learn", "ann")
    training.stop("ann")
    studio.gate.release()
    training.thread.join(10)
    assert training.outcome == "Stopped." and not training.busy()


def test_work_of_the_article_can_be_watched(monkeypatch):
    """What the button starts: each epoch is heard of, and the end is a sentence."""
    history = [(1, 1.0, 2.0, 0.5), (2, 0.5, 1.0, 0.75)]

    def train_digits(watch):
        watch(history[:1])
        watch(history)
        return "model", history, "test"

    monkeypatch.setattr(s4d, "train_digits", train_digits)
    monkeypatch.setattr(s4d, "evaluate", lambda model, test: (0.1, 0.987))
    heard = []
    outcome = s4d.FIGURES["learning_curve"].work(lambda *seen: heard.append(seen))
    assert [(done, total) for done, total, _ in heard] == [(1, 40), (2, 40)]
    assert len(heard[0][2]().axes[0].lines[0].get_xdata()) == 1
    assert re.fullmatch(r"Test accuracy 98.70% after \d+ seconds.", outcome)


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
    ours = list(read_cells(FILE.read_text(encoding="utf-8")))
    theirs = jupytext.read(FILE).cells
    kinds = {"prose": "markdown", "code": "code"}
    assert [(kinds[kind], source) for kind, _, source in ours] == [
        (cell.cell_type, cell.source) for cell in theirs
    ]


def test_figures_are_read_without_running_them():
    read = {}
    for kind, _, source in read_cells(FILE.read_text(encoding="utf-8")):
        if kind == "code":
            read |= {figure.name: figure for figure in read_figures(source)}
    assert set(read) == set(s4d.FIGURES)
    for name, figure in read.items():
        draw = s4d.FIGURES[name]
        assert (figure.caption, figure.knobs) == (
            " ".join(inspect.getdoc(draw).split()),
            draw.knobs,
        )


def test_an_old_notebook_is_not_believed(tmp_path):
    """Outputs are shown only if all code that they come from is the same."""

    def shown(article):
        pairs = list(zip(article.sources, article.outputs))
        drawn = {f.name for source, o in pairs if o.drawn for f in read_figures(source)}
        return drawn, sum(bool(outputs.printed) for _, outputs in pairs)

    drawn, printed = shown(Article(FILE, NOTEBOOK))
    assert drawn == set(s4d.FIGURES) and printed > 20
    text = FILE.read_text(encoding="utf-8").replace(
        "STEPS = 0.04, 200", "STEPS = 0.04, 201"
    )
    (tmp_path / "changed.py").write_text(text, encoding="utf-8")
    fewer, lines = shown(Article(tmp_path / "changed.py", NOTEBOOK))
    assert fewer < drawn and lines < printed and "oscillator_response" not in fewer
    assert shown(Article(FILE, tmp_path / "none.ipynb")) == (set(), 0)


ODD_NAMES = """
    annotated.v2 | s4d (1) | 7 | 2nd.copy | it's | "S4D" | Δ-règle | [x](y) | -h | json
"""


@pytest.mark.parametrize("name", [name.strip() for name in ODD_NAMES.split("|")])
def test_the_page_imports_its_file_whatever_it_is_called(tmp_path, name):
    file = tmp_path / f"{name}.py"
    file.write_text("FIGURES = {}")
    module = live.Studio(file).article()
    assert module.__file__ == str(file) and sys.modules["json"] is json


def test_an_article_by_any_name_makes_a_page(tmp_path, browser):
    """Without a notebook: words at once, figures drawn on the spot."""
    name = "annotated s4d (1).v2.py"
    shutil.copy(FILE, tmp_path / name)
    cache = shutil.ignore_patterns("__pycache__")
    folder = tmp_path / "notebooks" / "render"
    shutil.copytree(ROOT / "notebooks" / "render", folder, ignore=cache)
    server, address = serve(tmp_path, name)
    try:
        tab = browser.new_page()
        tab.goto(address)
        tab.locator("#oscillator_response .drawing").wait_for(timeout=90_000)
        assert exceptions(tab) == []
        assert tab.locator("nav a").count() > 30
        tab.close()
    finally:
        server.kill()
        server.wait()
    assert not (tmp_path / "assets").exists()


def test_the_file_alone_says_that_the_page_needs_more(tmp_path):
    """By any name, in one sentence, and nothing is computed."""
    from streamlit.testing.v1 import AppTest

    shutil.copy(FILE, tmp_path / "it's 1.v2.py")
    app = AppTest.from_file(str(tmp_path / "it's 1.v2.py"), default_timeout=60).run()
    assert [e.value for e in app.error] == ["The page needs the whole repository."]
    assert not app.exception and len(app.main) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["it's 1.v2.py"]


def test_app_has_no_exception():
    """As Streamlit's own test runner sees it: widgets, words, the button to train."""
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(str(FILE), default_timeout=60).run()
    assert not app.exception and not app.error
    blocks = [block.proto.body for block in app.get("html")]
    assert any('<h1 id="the-annotated-s4d">The Annotated S4D' in b for b in blocks)
    assert app.button(key="train").label == "train here, now"
    assert app.toggle(key="code").value is True
    widgets = *app.slider, *app.select_slider, *app.segmented_control
    knobs = {widget.key for widget in widgets}
    assert knobs == {f"{name}.{knob}" for name, knob in LIVE}


# -- the spring -----------------------------------------------------------------------


def test_the_grabbed_spring_obeys_its_step_and_comes_to_rest(desk):
    """By keys and by hand, SciPy's step leads from each state to the next."""
    there = desk.locator(".grabbed_spring")
    mass = there.locator(".mass")

    def past():
        return np.array(there.evaluate("e => e.past"))  # rows (u, p, v)

    def moves():
        return there.evaluate("e => Boolean(e.frame)")

    mass.scroll_into_view_if_needed()
    wait_until(lambda: not moves())
    assert past().tolist() == [[0, 0, 0]]  # nothing before the reader acts
    mass.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowDown", "ArrowUp"):
        desk.keyboard.press(key)
    wait_until(lambda: past()[-1, 1] > 0.01)
    assert past()[-1, 0] == 2 and moves()
    assert mass.get_attribute("aria-valuetext").startswith("force 2.0 N, position 0.0")
    desk.keyboard.press("Escape")
    box = mass.locator("rect").bounding_box()
    desk.mouse.move(box["x"] + 9, box["y"] + 9)
    desk.mouse.down()
    desk.mouse.move(box["x"] + 9, box["y"] + 200)  # farther than the hand can pull
    wait_until(lambda: past()[-1, 0] == -5)
    desk.mouse.up()
    there.locator(".blow").click()
    wait_until(lambda: past()[:, 0].max() > 100)
    seen, dt = past(), there.evaluate("e => e.data.dt")
    A, B, _ = s4d.oscillator()
    zeros = np.zeros((2, 1))
    system = s4d.scipy.signal.cont2discrete((A, B[:, None], np.eye(2), zeros), dt)
    wanted = seen[:-1, 1:] @ system[0].T + seen[1:, :1] * system[1].T
    assert np.abs(seen[1:, 1:] - wanted).max() < 1e-6 * np.abs(wanted).max()
    assert len(seen) <= 8 / dt + 1
    desk.emulate_media(reduced_motion="reduce")  # it is at rest at once
    there.locator(".blow").click()
    wait_until(lambda: not moves())
    assert np.abs(past()[-1]).max() < 3e-3 and len(past()) > 5 / dt
    assert there.locator(".says").inner_text() == (
        "At rest: force 0.0 N, position 0.000 m."
    )
    desk.emulate_media(reduced_motion="no-preference")
    there.evaluate("e => e.past.push([0, 0.002, 0])")  # and in the end by itself
    mass.focus()
    desk.keyboard.press("Space")
    assert moves()
    wait_until(lambda: not moves())
    assert np.abs(past()[-1]).max() < 3e-3
    assert exceptions(desk) == console_errors(desk) == []
