"""How fast and how light the web page is, in Chromium on this machine.

    python tests/measure_page.py            measure; write the table in README.md
    python tests/measure_page.py --quick    one of each, print, write nothing

Times are medians of five, each server fresh where it says cold. Needs Debian's
`chromium`, and a machine that does nothing else meanwhile.
"""

import argparse
import os
import platform
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import streamlit
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_page import CAPTIONS, CHROMIUM, FLAGS, LIVE, SLOW, serve  # noqa: E402

TITLE = """document.querySelector(".stMarkdown h1")
    && document.querySelectorAll("nav a").length > 30"""
HEADINGS = "document.querySelectorAll('.stMarkdown h2').length > 10"
EVERYTHING = f"""document.querySelectorAll(".drawing").length >= {len(CAPTIONS) - 1}
    && document.querySelectorAll(".katex").length > 250
    && [...document.querySelectorAll(".st-key-explorer *")].some(
        e => e.shadowRoot?.querySelector(".explorer")?.kernel)"""
NO_ERROR = "document.querySelectorAll('[data-testid=stException]').length == 0"


def until(tab, condition, **options):
    tab.wait_for_function(condition, polling=30, timeout=120_000, **options)


def visit(browser, address):
    """Open a page. Returns the tab, and seconds until the title and the table of
    contents are there, the headings of all parts, and everything."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    start = time.perf_counter()
    tab.goto(address, wait_until="commit")
    times = []
    for condition in (TITLE, HEADINGS, EVERYTHING):
        until(tab, condition)
        times.append(time.perf_counter() - start)
    return tab, *times


def move(tab, name, knob, right):
    """Seconds from a step of a knob to another picture; at its end the knob turns."""
    slider = tab.locator(f".st-key-{name} input[name={knob}]")
    return slider.evaluate(
        """(input, [alt, right]) => new Promise((done) => {
          const [low, high, now] = [input.min, input.max, input.value].map(Number);
          const picture = () => [...document.querySelectorAll(".drawing")].find(
            (e) => e.getAttribute("aria-label") == alt)?.innerHTML;
          const old = picture(), start = performance.now();
          const observer = new MutationObserver(() => {
            if ([old, undefined].includes(picture())) return;
            observer.disconnect();
            requestAnimationFrame(() => done((performance.now() - start) / 1e3));
          });
          observer.observe(document.body, { childList: true, subtree: true });
          (now == low || (right && now != high)) ? input.stepUp() : input.stepDown();
          input.dispatchEvent(new Event("input"));
        })""",
        [CAPTIONS[name], right],
    )


def moves(tab, count, right=True):
    """Move every knob in turn, count moves in all. Yields the knob and the seconds."""
    live = [pair for pair in LIVE if pair[0] not in SLOW]
    for i in range(count):
        pair = live[i % len(live)]
        yield pair, move(tab, *pair, right)


def megabytes(server):
    """Memory of the server that is its own (resident)."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def crowd(address, size=10):
    """Seconds until the last of some visitors, each in a browser, sees the title and
    has everything."""

    def one(_):
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            tab = browser.new_page()
            tab.goto("about:blank")
            while time.perf_counter() < begin:
                time.sleep(0.01)
            tab.goto(address, wait_until="commit")
            until(tab, TITLE)
            seen = time.perf_counter() - begin
            until(tab, EVERYTHING)
            complete = time.perf_counter() - begin
            assert tab.evaluate(NO_ERROR)
            browser.close()
            return seen, complete

    begin = time.perf_counter() + 15  # all browsers are open by then
    with ThreadPoolExecutor(size) as pool:
        return map(max, zip(*pool.map(one, range(size))))


def measure(repeats, visitors, many):
    """Yield rows of the table: what, the limit, the value."""

    def say(what, limit, value):
        print(f"{what:58s} {limit:>10s} {value:>10s}", flush=True)
        return what, limit, value

    middle = statistics.median
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        cold = []
        for _ in range(repeats):
            server, address = serve(ROOT)
            tab, *times = visit(browser, address)
            cold.append(times)
            tab.context.close()
            server.kill()
            server.wait()
        first, headings, everything = map(middle, zip(*cold))
        yield say("cold server: title and contents", "2 s", f"{first:.1f} s")
        yield say("cold server: headings of all parts", "2 s", f"{headings:.1f} s")
        yield say("cold server: everything", "5 s", f"{everything:.1f} s")

        server, address = serve(ROOT)
        visit(browser, address)[0].context.close()
        warm = []
        for _ in range(repeats):
            tab, *times = visit(browser, address)
            warm.append(times)
            tab.context.close()
        first, headings, everything = map(middle, zip(*warm))
        yield say("warm server: title and contents", "1.5 s", f"{first:.1f} s")
        yield say("warm server: headings of all parts", "1.5 s", f"{headings:.1f} s")
        yield say("warm server: everything", "", f"{everything:.1f} s")

        tab, *_ = visit(browser, address)
        list(moves(tab, 2 * (len(LIVE) - len(SLOW)), right=False))  # compile
        tab.context.close()
        tab, *_ = visit(browser, address)
        fresh = {}
        for pair, seconds in moves(tab, repeats * (len(LIVE) - len(SLOW))):
            fresh.setdefault(pair, []).append(seconds)
        each = {pair: middle(times) for pair, times in fresh.items()}
        slowest = max(each, key=each.get)
        ms = f"{1e3 * middle(each.values()):.0f} ms"
        yield say("a knob to its new picture: median knob", "350 ms", ms)
        worst = f"{1e3 * each[slowest]:.0f} ms"
        yield say(f"the slowest knob, {'.'.join(slowest)}", "350 ms", worst)
        tab.context.close()

        for _ in range(visitors):
            tab, *_ = visit(browser, address)
            list(moves(tab, 20))
            tab.context.close()
        after = megabytes(server)
        what = f"server's memory after {visitors} visitors with 20 moves"
        yield say(what, "800 MB", f"{after:.0f} MB")
        tab, *_ = visit(browser, address)
        for half in ("next", "last"):
            before = megabytes(server)
            list(moves(tab, many // 2))
            growth = f"{megabytes(server) - before:+.0f} MB"
            yield say(f"its growth over the {half} {many // 2} moves", "flat", growth)
        browser.close()
        server.kill()
        server.wait()
    server, address = serve(ROOT)
    seen, complete = (f"{seconds:.1f} s" for seconds in crowd(address))
    yield say("ten at once, cold server: the last sees the title", "10 s", seen)
    yield say("ten at once, cold server: the last has everything", "", complete)
    server.kill()
    server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="print only")
    quick = parser.parse_args().quick
    rows = list(measure(*((1, 1, 40) if quick else (5, 10, 400))))
    if quick:
        return
    machine = (
        f"Measured with `python tests/measure_page.py` (medians of five; streamlit "
        f"{streamlit.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU cores):"
    )
    lines = ["| what | limit | measured |", "|:-----|------:|---------:|"]
    lines += [f"| {what} | {limit} | {value} |" for what, limit, value in rows]
    table = "\n".join([machine, "", *lines])
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    marks = r"(?s)(<!-- page -->\n).*?(\n<!-- end -->)"
    readme.write_text(re.sub(marks, rf"\g<1>{table}\g<2>", text), encoding="utf-8")


if __name__ == "__main__":
    main()
