"""How fast and how light the web page is, in Chromium on this machine.

    python tests/measure/page.py            measure; write the table in assets/page.md
    python tests/measure/page.py --quick    one of each, print, write nothing

Times are medians of five, each server fresh where it says cold, each visit in a new tab
with nothing in its cache, of a browser that is running. Needs Debian's
`chromium`, and a machine that does nothing else meanwhile.
"""

import asyncio
import os
import platform
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import record  # it puts the article on the path

# isort: split
import streamlit
from playwright.sync_api import sync_playwright
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from test_page import CAPTIONS, CHROMIUM, FINE, FLAGS, LIVE, SLOW, serve
from tornado.websocket import websocket_connect

MOVED = [pair for pair in LIVE if pair[0] not in SLOW and pair not in FINE]
TITLE = """document.querySelector(".article h1")
    && document.querySelectorAll("nav a").length > 30"""
HEADINGS = "document.querySelectorAll('.article h2').length > 10"
EVERYTHING = f"""document.querySelectorAll(".drawing").length >= {len(CAPTIONS) - 1}
    && document.querySelectorAll("math").length > 250
    && document.querySelector(".complete")
    && [...document.querySelectorAll(".st-key-explorer *")].some(
        e => e.shadowRoot?.querySelector(".explorer")?.kernel)"""
NO_ERROR = "document.querySelectorAll('[data-testid=stException]').length == 0"


def until(tab, condition, **options):
    tab.wait_for_function(condition, polling=30, timeout=120_000, **options)


def open_tab(browser):
    """An empty tab, after the second that Chromium is busy with its own window."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    time.sleep(2)
    return tab


def visit(tab, address):
    """Open the page in a tab. Returns seconds until the title and the table of contents
    are there, the headings of all parts, and everything."""
    start = time.perf_counter()
    tab.goto(address, wait_until="commit")
    times = []
    for condition in (TITLE, HEADINGS, EVERYTHING):
        until(tab, condition)
        times.append(time.perf_counter() - start)
    return times


def arrive(browser, address):
    """A tab in which all of the page is there."""
    tab = open_tab(browser)
    visit(tab, address)
    return tab


WATCH = """([slider, name]) => {
  const picture = () => document.querySelector(`#${name} > .drawing`)?.innerHTML;
  const old = picture();
  window.took = null;
  slider.addEventListener("keydown", () => {
    const start = performance.now();
    const observer = new MutationObserver(() => {
      if ([old, undefined].includes(picture())) return;
      observer.disconnect();
      requestAnimationFrame(() => { window.took = (performance.now() - start) / 1e3; });
    });
    observer.observe(document.body, { childList: true, subtree: true });
  }, { once: true });
}"""


def move(tab, name, knob, right):
    """Seconds from an arrow key to another picture; at its end the knob turns."""
    slider = tab.locator(f".st-key-{name}-{knob} input")
    slider.focus()
    low, high, now = slider.evaluate("e => [e.min, e.max, e.value].map(Number)")
    tab.evaluate(WATCH, [slider.element_handle(), name])
    forward = now == low or (right and now != high)
    tab.keyboard.press("ArrowRight" if forward else "ArrowLeft")
    tab.wait_for_function("window.took", timeout=60_000)
    return tab.evaluate("window.took")


def moves(tab, count, right=True):
    """Move every knob in turn, count moves in all. Yields the knob and the seconds."""
    for i in range(count):
        pair = MOVED[i % len(MOVED)]
        yield pair, move(tab, *pair, right)


def megabytes(server):
    """Memory of the server that is its own (resident)."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


async def receive(address):
    """Visit as a browser does, but draw nothing: seconds until all has been sent."""
    start = time.perf_counter()
    stream = address.replace("http", "ws") + "/_stcore/stream"
    connection = await websocket_connect(stream, subprotocols=["streamlit"])
    ask = BackMsg()
    ask.rerun_script.query_string = ""
    await connection.write_message(ask.SerializeToString(), binary=True)
    while message := await connection.read_message():
        answer = ForwardMsg.FromString(message)
        assert answer.delta.new_element.WhichOneof("type") != "exception"
        if answer.WhichOneof("type") == "script_finished":
            connection.close()
            return time.perf_counter() - start
    raise ConnectionError("the server has hung up")


def look(address, begin):
    """Visit with a browser at a moment: seconds to the title, and to everything."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = open_tab(browser)
        while time.perf_counter() < begin:
            time.sleep(0.01)
        title, _, everything = visit(tab, address)
        assert tab.evaluate(NO_ERROR)
        browser.close()
        return title, everything


def crowd(address, browsers, size=10):
    """Ten arrive at once, some with a browser on this machine, which shares its cores.
    Seconds until the last browser sees the title and has everything, and until the
    last of the others has received everything."""

    async def others():
        await asyncio.sleep(begin - time.perf_counter())
        return await asyncio.gather(*[receive(address) for _ in range(size - browsers)])

    begin = time.perf_counter() + 5 + 2 * browsers  # all browsers are open by then
    with ThreadPoolExecutor(size) as pool:
        seen = [pool.submit(look, address, begin) for _ in range(browsers)]
        received = asyncio.run(others()) if browsers < size else [0.0]
        titles, complete = zip(*[one.result() for one in seen])
    return max(titles), max(complete), max(received)


def measure(repeats, visitors, many):
    """Yield rows of the table: what, the limit, the value."""

    def say(what, limit, value):
        print(f"{what:64s} {limit:>10s} {value:>10s}", flush=True)
        return what, limit, value

    middle = statistics.median
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        cold = []
        for _ in range(repeats):
            tab = open_tab(browser)
            server, address = serve(record.ROOT)
            cold.append(visit(tab, address))
            tab.context.close()
            server.kill()
            server.wait()
        first, headings, everything = map(middle, zip(*cold))
        yield say("cold server: title and contents", "2 s", f"{first:.1f} s")
        yield say("cold server: headings of all parts", "2 s", f"{headings:.1f} s")
        yield say("cold server: everything", "5 s", f"{everything:.1f} s")

        server, address = serve(record.ROOT)
        warm = []
        for _ in range(1 + repeats):
            tab = open_tab(browser)
            warm.append(visit(tab, address))
            tab.context.close()
        del warm[0]  # that one was cold
        first, headings, everything = map(middle, zip(*warm))
        yield say("warm server: title and contents", "1.5 s", f"{first:.1f} s")
        yield say("warm server: headings of all parts", "1.5 s", f"{headings:.1f} s")
        yield say("warm server: everything", "", f"{everything:.1f} s")

        tab = arrive(browser, address)
        for right in (False, True):  # compile
            list(moves(tab, 2 * len(MOVED), right))
        tab.context.close()
        tab = arrive(browser, address)
        fresh = {}
        for pair, seconds in moves(tab, repeats * len(MOVED)):
            fresh.setdefault(pair, []).append(seconds)
        each = {pair: middle(times) for pair, times in fresh.items()}
        slowest = max(each, key=each.get)
        ms = f"{1e3 * middle(each.values()):.0f} ms"
        yield say("a knob to its new picture: median knob", "350 ms", ms)
        worst = f"{1e3 * each[slowest]:.0f} ms"
        yield say(f"the slowest knob, {'.'.join(slowest)}", "350 ms", worst)
        tab.context.close()

        for _ in range(visitors):
            tab = arrive(browser, address)
            list(moves(tab, 20))
            tab.context.close()
        after = megabytes(server)
        what = f"server's memory after {visitors} visitors with 20 moves"
        yield say(what, "800 MB", f"{after:.0f} MB")
        tab = arrive(browser, address)
        for half in ("next", "last"):
            before = megabytes(server)
            list(moves(tab, many // 2))
            growth = f"{megabytes(server) - before:+.0f} MB"
            yield say(f"its growth over the {half} {many // 2} moves", "flat", growth)
        browser.close()
        server.kill()
        server.wait()
    for browsers, who in ((1, "one a browser"), (10, "all browsers here")):
        server, address = serve(record.ROOT)
        title, complete, received = crowd(address, browsers)
        what = f"ten at once, cold server, {who}: "
        yield say(what + "the title", "10 s", f"{title:.1f} s")
        yield say(what + "everything", "", f"{complete:.1f} s")
        if browsers == 1:
            yield say(what + "the rest received", "", f"{received:.1f} s")
        server.kill()
        server.wait()


def main():
    what = "how fast and how light the web page is, in Chromium on this machine"
    options = record.begin(record.parser(what, "page", "one visit of each kind"))
    visits = (1, 1, 40) if options.quick else (5, 10, 400)
    rows = list(measure(*visits))
    record.keep(options, table=rows)
    machine = (
        f"Measured with `python tests/measure/page.py` (medians of {visits[0]}; "
        f"streamlit {streamlit.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU cores):"
    )
    lines = ["| what | limit | measured |", "|:-----|------:|---------:|"]
    lines += [f"| {what} | {limit} | {value} |" for what, limit, value in rows]
    record.keep_table(options, "\n".join([machine, "", *lines]))


if __name__ == "__main__":
    main()
