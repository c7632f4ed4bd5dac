"""The article as a Streamlit page.

The words come first, as HTML; the mathematics is imported when a reader has begun to
read, once for all, and draws a figure again when a knob is turned. All that visitors
share is made once for each edition of the article and its notebook.
"""

import gc
import importlib.util
import json
import math
import os
import re
import sys
import threading
import time
from concurrent.futures import Future, wait
from html import escape
from pathlib import Path

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from render.article import FOLDED, OPEN, Article, Fold, figure_html
from render.memory import set_allocator

WEB = Path(__file__).with_name("web")


def web(name):
    """The text of a file that goes to the browser."""
    return (WEB / name).read_text(encoding="utf-8")


# -- work that visitors share ---------------------------------------------------------


def start(work, *args, after=0):
    """Do work(*args), after so many seconds, in a thread that ends with the server.

    Returns the thread.
    """
    thread = threading.Timer(after, work, args)
    thread.daemon = True
    thread.start()
    return thread


def one_at_a_time(work):
    """A cached function that no two threads compute at once."""
    lock = threading.RLock()

    def ask(*args, **options):
        with lock:
            return work(*args, **options)

    return ask


class Studio:
    """The imported article and the figures drawn so far, for all visitors."""

    def __init__(self, file):
        # On small matrices several threads of BLAS mostly wait for each other.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        self.file, self.module = file, None
        self.drawings, self.ghosts = {}, {}  # figures as HTML; with default knobs
        self.importing, self.asking = threading.Lock(), threading.Lock()

    def article(self):
        """The article as a module, imported once, whatever its file is called."""
        with self.importing:
            if self.module is None:
                spec = importlib.util.spec_from_file_location("article", self.file)
                module = sys.modules["article"] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                self.prepare(module)
                # Each drawing has a thread, and glibc would give many of them an arena
                # of memory of their own: M_ARENA_MAX is 1.
                self.trim = set_allocator((-8, 1))
                self.settle()
                self.module = module
        return self.module

    def prepare(self, module):
        """Make the article fit for many threads, and quick."""
        from render import drawing

        self.drawing = drawing.drawing
        sys.modules["matplotlib"].rcParams.update(getattr(module, "LOOK", {}))
        for name, value in list(vars(module).items()):
            if hasattr(value, "cache_info"):
                setattr(module, name, one_at_a_time(value))
        if hasattr(module, "canvas"):
            module.canvas = drawing.copied(module.canvas)

    def settle(self):
        """Keep what an import or a compilation has left, give the rest back."""
        # Streamlit collects garbage after every move of a knob. What is here to stay,
        # JAX and its programs, need not be looked through each time.
        gc.collect()
        gc.freeze()
        self.trim(0)

    def promise(self, figure, values):
        """A future of a figure as HTML. The last 150 are kept."""
        key = figure.name, *values.items()
        with self.asking:
            if key not in self.drawings:
                self.drawings[key] = Future()
                start(self.draw, figure, values, self.drawings[key])
            for old in list(self.drawings)[:-150]:
                del self.drawings[old]
            return self.drawings[key]

    def draw(self, figure, values, promise):
        """Draw a figure and keep the promise."""
        begun = time.perf_counter()
        try:
            draw = self.article().FIGURES[figure.name]
            drawn, ghost = draw(**values), None
            changed = {k: v for k, v in values.items() if v != figure.default[k]}
            if changed and "times" not in figure.options:
                if figure.name not in self.ghosts:
                    self.ghosts[figure.name] = draw(**figure.default)
                ghost = self.ghosts[figure.name]
            knobs = ", ".join(f"{k} = {v}" for k, v in changed.items())
            words = figure.words + f" ({knobs})" * bool(knobs)
            promise.set_result(self.drawing(drawn, words, ghost))
        except Exception as error:  # it is raised where the promise is looked at
            promise.set_exception(error)
        if time.perf_counter() - begun > 1 and not promise.exception():
            self.settle()  # it has compiled


class Training:
    """Long work that a figure declares: at most once at a time, for all to see."""

    def __init__(self, studio):
        self.studio, self.thread = studio, None
        self.forget()

    def forget(self):
        self.done, self.total, self.picture = 0, 0, None
        self.outcome, self.stopped, self.owner = "", False, None

    def busy(self):
        return self.thread is not None and self.thread.is_alive()

    def begin(self, name, visitor):
        """Work in the background, unless somebody has begun."""
        if not self.busy():
            self.forget()
            self.owner, self.thread = visitor, start(self.run, name)

    def stop(self, visitor):
        """Stop, if it is the work of this visitor."""
        self.stopped = self.stopped or visitor == self.owner

    def watch(self, done, total, draw):
        """Hear of a share of the work, and of a function that draws how it went."""
        self.done, self.total, self.picture = done, total, draw
        if self.stopped:
            raise InterruptedError

    def run(self, name):
        try:
            work = self.studio.article().FIGURES[name].work
            self.outcome = work(self.watch)
        except InterruptedError:
            self.outcome = "Stopped."
        except Exception as error:
            self.outcome = f"It failed: {error}"

    def curve(self):
        """How the work has gone so far, as HTML."""
        return self.studio.drawing(self.picture(), "How it has gone so far.")


# -- the address ----------------------------------------------------------------------


def fits(text, span):
    """Whether a text from the address is a value that a knob can take."""
    if isinstance(span, list):
        return text in map(str, span)
    try:
        return span[0] <= type(span[0])(text) <= span[1]
    except ValueError:
        return False


def quoted(text):
    """A text that somebody else wrote, as HTML: its beginning, as code."""
    return f"<code>{escape(text[:40])}</code>" + "…" * (len(text) > 40)


def mend_address(figures):
    """Put defaults for what the address asks in vain. Returns notices as HTML."""
    notices, asked = [], st.query_params.to_dict()
    for figure in figures:
        key = f"{figure.name}.poles"
        if asked.get(key) and "data" in figure.options and not read_rows(asked[key]):
            del st.query_params[key]
            notices.append(
                f"The address asks for poles {quoted(asked[key])}; allowed: up to 8 "
                "rows Re A, Im A, Re C, Im C, with Re A in -4 to 0, Im A in 0 to 20, C "
                "in -2 to 2."
            )
        for k, span in figure.knobs.items():
            key = f"{figure.name}.{k}"
            if key in asked and not fits(asked[key], span):
                del st.query_params[key]
                st.session_state[key] = figure.default[k]
                choices = f"{span[0]} to {span[-1]}"
                if isinstance(span, list):
                    choices = ", ".join(map(str, span))
                notices.append(
                    f"The address asks for {k} = {quoted(asked[key])} in the figure "
                    f"{figure.name}; allowed: {choices}. It shows {figure.default[k]}."
                )
    return notices


def read_rows(text):
    """Rows of four numbers from the address, or None if they are not poles."""
    try:
        rows = [[float(v) for v in row.split(",")] for row in text.split(";")]
    except ValueError:
        return None
    limits = (-4, 0), (0, 20), (-2, 2), (-2, 2)
    fits = [
        len(row) == 4 and all(low <= v <= high for v, (low, high) in zip(row, limits))
        for row in rows
    ]
    return rows if all(fits) and len(rows) <= 8 else None


# -- knobs ----------------------------------------------------------------------------


def named(span):
    """Whether a knob chooses among names, which have no order for a slider."""
    return isinstance(span, list) and isinstance(span[0], str)


def knob(key, label, span, default):
    """Show a knob, a slider or a row of names. Returns its value."""
    bound = {"key": key, "bind": "query-params"}
    if named(span):
        return st.segmented_control(
            label, span, default=default, required=True, **bound
        )
    if isinstance(span, list):
        return st.select_slider(label, span, default, **bound)
    fine = 10 ** math.floor(math.log10((span[1] - span[0]) / 25))
    step = 1 if isinstance(default, int) else float(f"{fine:.0e}")
    return st.slider(label, *span, default, step, **bound)


def play(studio, figure):
    """Show a figure under its knobs.

    The picture of the defaults is in the notebook, any other is promised by the
    studio. A walk through the whole page does not wait for it long. What is not there
    by then is looked for every half second, and the picture before stays, so that
    nothing jumps.
    """
    values = {}
    sliders = [k for k, span in figure.knobs.items() if not named(span)]
    places = {k: st.container() for k in figure.knobs if k not in sliders}
    places |= zip(sliders, st.columns(len(sliders)) if sliders else ())
    for k, span in figure.knobs.items():
        with places[k]:
            key, label = f"{figure.name}.{k}", k.replace("_", " ")
            values[k] = knob(key, label, span, figure.default[k])
    before = st.session_state.get(f"{figure.name} before", figure.drawn)
    if values == figure.default and figure.drawn:
        drawn = figure.drawn
    else:
        promise = studio.promise(figure, values)
        wait([promise], timeout=0.4 if st.session_state.walking else 3)
        if not promise.done():
            st.fragment(look_again, run_every=0.5)(figure, promise, before)
            return
        drawn = promise.result()
    st.session_state[f"{figure.name} before"] = drawn
    st.html(figure_html(figure, drawn))


def look_again(figure, promise, before):
    """Wait for a slow figure without holding up the rest of the page."""
    waiting = '<div class="waiting">drawing …</div>'
    st.html(figure_html(figure, f'<div class="before">{waiting}{before}</div>'))
    if promise.done():
        st.rerun()


def explore(studio, figure):
    """Show a figure that the browser draws, by a script of its name.

    It starts from data that the article gives. Where these are poles, the address may
    set others, and follows when the reader lets one go.
    """
    key, asked = f"{figure.name}.poles", st.query_params.get(f"{figure.name}.poles", "")
    draw = None if figure.data else studio.article().FIGURES[figure.name]
    data = json.loads(figure.data) if figure.data else draw.data()
    if "poles" in data:
        first = read_rows(asked) or data["poles"]
        data["poles"] = st.session_state.setdefault("poles at first", first)
    frame = web(f"{figure.name}.html").replace("CAPTION", escape(figure.words))
    css, js = (web(f"plot.{k}") + web(f"{figure.name}.{k}") for k in ("css", "js"))
    mount = st.components.v2.component(figure.name, html=frame, css=css, js=js)
    # A list, as in a dict Streamlit looks for data frames, and imports pandas for that.
    poles = mount(key=figure.name, data=[data], on_poles_change=lambda: None).poles
    if poles:
        rows = (",".join(f"{v:g}" for v in row) for row in poles)
        st.query_params[key] = ";".join(rows)
    st.html(figure_html(figure, ""))


def follow(training, name, watching):
    """The button for long work, and how it goes."""
    if watching and not training.busy():
        st.rerun()  # it has ended: no need to look every second any more
    left, right = st.columns([1, 3], vertical_alignment="center")
    busy, visitor = training.busy(), get_script_run_ctx().session_id
    if not busy and left.button("train here, now", key="train"):
        training.begin(name, visitor)
        st.rerun()
    if busy and visitor == training.owner and left.button("stop", key="stop"):
        training.stop(visitor)
        st.rerun()
    if busy and training.total:
        said = f"{training.done} of {training.total} epochs, for all to see"
        right.progress(training.done / training.total, said)
    elif busy:
        right.progress(0.0, "compiling, which takes some seconds; for all to see")
    elif training.outcome:
        right.text(training.outcome)
    with st.container(key="progress") if busy else st.container():
        if training.done > 1:
            st.html(training.curve())


# -- the page -------------------------------------------------------------------------


def for_streamlit(block, unfolded):
    """HTML as Streamlit lets it pass: formulas, which it strips, in an attribute."""
    if not unfolded:
        block = block.replace(OPEN, FOLDED)
    hidden = '<span class="math" data-math="{}"></span>'.format
    return re.sub("(?s)<math.*?</math>", lambda m: hidden(escape(m[0])), block)


def show(item, unfolded, studio, training):
    """Show one item of the page: HTML, a figure, or a fold with figures.

    Figures are no HTML, so they stand below the head of their fold and not inside; the
    stylesheet hides them while it is folded.
    """
    if isinstance(item, str):
        st.html(f'<div class="article">{for_streamlit(item, unfolded)}</div>')
        return
    if isinstance(item, Fold):
        with st.container(key=f"fold-{item.name}"):
            for below in (f"{item.head}</details>", *item.items):
                show(below, unfolded, studio, training)
        return
    with st.container(key=f"figure-{item.name}"):
        if "data" in item.options:
            st.fragment(explore)(studio, item)
        elif item.knobs or not item.drawn:
            st.fragment(play)(studio, item)
        else:
            st.html(figure_html(item, item.drawn))
        if "work" in item.options:
            busy = training.busy()
            every = 1 if busy else None
            st.fragment(follow, run_every=every)(training, item.name, busy)


def contents(headings):
    """The table of contents as HTML, a link for each section."""
    links = (
        f'<li class="h{level}"><a href="#{name}">{escape(title)}</a></li>'
        for level, title, name in headings
        if level > 1
    )
    return (
        f'<nav aria-label="Contents"><ul class="contents">{"".join(links)}</ul></nav>'
    )


def open_studio(file, notebook, edition):
    """What visitors share: article, studio, training."""
    studio = Studio(file)
    return Article(file, notebook), studio, Training(studio)


def page(file):
    """Show an article. The headings of all parts and the first screen go first."""
    notebook = file.parent / "notebooks" / f"{file.stem}.ipynb"
    made_of = [file, notebook, *WEB.iterdir(), *WEB.parent.glob("*.py")]
    edition = [path.stat().st_mtime_ns for path in made_of if path.exists()]
    share = st.cache_resource(max_entries=1, show_spinner=False)
    article, studio, training = share(open_studio)(file, notebook, edition)

    st.set_page_config(page_title=article.title, page_icon="🌊")
    st.html(f"<style>{web('article.css')}{web('live.css')}</style>")
    st.html(f"<script>{web('live.js')}</script>", unsafe_allow_javascript=True)
    with st.sidebar:
        unfolded = st.toggle("show code", True, key="code", bind="query-params")
        st.html(contents(article.headings))
    first, st.session_state.walking = "notices" not in st.session_state, True
    if first:
        st.session_state.notices = mend_address(article.figures)
    for notice in st.session_state.notices:
        st.html(f'<p class="notice" role="alert">{notice}</p>')
    parts = article.parts
    places = [st.container(key=f"part-{number}") for number in range(len(parts))]
    for place, part in zip(places, parts):
        place.html(f'<div class="article">{part.heading}</div>')
    for number, (place, part) in enumerate(zip(places, parts)):
        with place:
            for item in part.items:
                show(item, unfolded, studio, training)
        if first and number == 0:
            time.sleep(0.4)  # the browser shows the first screen before the rest comes
    st.session_state.walking = False
    st.html('<span class="complete"></span>')
    start(studio.article, after=3)  # when the browser has drawn the page
