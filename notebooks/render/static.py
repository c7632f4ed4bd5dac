"""Make notebooks/NAME.html, the article as one file, from its notebook.

    python notebooks/render/static.py

The page asks no host for anything and runs no script: pictures and the source are
inside it, and formulas are MathML, which browsers set themselves.
"""

import base64
import re
import sys
from html import escape
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from render.article import Article, Fold, figure_html  # noqa: E402
from render.files import ARTICLE, NOTEBOOK, ROOT, code_cells, fresh_notebook  # noqa: E402

PAGE = NOTEBOOK.with_suffix(".html")
WEB = Path(__file__).with_name("web")
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'"
    "%3E%3Cpath d='M2 16C6-6 9-6 12 16s5 16 8 0 4-9 6 0 2 3 4 0' fill='none' "
    "stroke='%232f86d6' stroke-width='3.5' stroke-linecap='round'/%3E%3C/svg%3E"
)


def item_html(item):
    """An item of a part as HTML."""
    if isinstance(item, str):
        return item
    if isinstance(item, Fold):
        return item.html(item_html)
    return figure_html(item, item.drawn)


def inside(html):
    """HTML with the place of each starred section inside of it, at the top.

    A browser opens what is folded when a link leads inside, but its summary is outside.
    """
    head = r'(<details class="starred"><summary><h\d) id="(.*?)"(.*?</summary>)'
    return re.sub(head, r'\1\3<span class="place" id="\2"></span>', html, flags=re.S)


def page(article):
    """The whole page, in one string."""
    parts = []
    for part in article.parts:
        parts.append(part.heading)
        parts += [inside(item_html(item)) for item in part.items]
    links = "\n".join(
        f'<li class="h{level}"><a href="#{name}">{escape(title)}</a></li>'
        for level, title, name in article.headings
        if level > 1
    )
    css = "".join((WEB / f"{n}.css").read_text("utf-8") for n in ("article", "static"))
    source = base64.b64encode(article.file.read_bytes()).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(article.title)}</title>
<meta name="description" content="{escape(article.subtitle)}">
<link rel="icon" href="{ICON}">
<style>{css}</style>
</head>
<body>
<nav class="side" aria-label="Contents"><ul class="contents">
{links}
</ul></nav>
<main class="article">
<input type="checkbox" id="code" checked><label class="bar" for="code">code</label>
<span class="bar"> · <a download="{article.file.name}"
href="data:text/x-python;base64,{source}">the source, {article.file.name}</a></span>
<details class="toc"><summary>Contents</summary><ul class="contents">
{links}
</ul></details>
{"".join(parts)}</main>
</body>
</html>
"""


def executed_article():
    """The article with its outputs, or an end in one sentence that says what to do."""
    do = "run: python notebooks/render/build.py"
    if not NOTEBOOK.exists():
        sys.exit(f"{NOTEBOOK} is missing; {do}")
    notebook, fresh = nbformat.read(NOTEBOOK, 4), fresh_notebook()
    if any(cell.execution_count is None for cell in code_cells(notebook)):
        sys.exit(f"{NOTEBOOK} has a cell that was not executed; {do} --execute")
    old, new = ([(c.cell_type, c.source) for c in n.cells] for n in (notebook, fresh))
    if old != new:
        sys.exit(f"{NOTEBOOK} is not made of this {ARTICLE.name}; {do}")
    return Article(ARTICLE, NOTEBOOK)


def main():
    try:
        text = page(executed_article())
    except ValueError as error:
        sys.exit(str(error))
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    print(f"{PAGE.relative_to(ROOT)}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
