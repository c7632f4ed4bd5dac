"""Make notebooks/annotated_s4d.html, the article as a web page, from the notebook.

    python notebooks/page.py

The page is one file that asks no host for anything and runs no script: pictures and
the source are inside it, and formulas are MathML, which browsers set themselves.
"""

import base64
import re
import struct
import sys
from html import escape, unescape
from xml.etree import ElementTree

import nbformat
from build import NOTEBOOK, ROOT, code_cells, fresh_notebook
from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

PAGE = NOTEBOOK.with_suffix(".html")
LATEX = (  # where latex2mathml differs from LaTeX: a pattern, and what to write instead
    (r"\{aligned\}", r"{split}"),  # it knows the same table by this name only
    (r"(?s)\\begin\{pmatrix\}.*?\\end\{pmatrix\}", r"{\g<0>}"),  # each its own height
    (r"(?s)\\([bB]ig)\(.*?\\\1\)", r"{\g<0>}"),  # else an index keeps the bracket small
    (r"\\sum_", r"\\sum\\limits_"),  # below the sign inside a brace too
    (r"\\mathrm\{(\w+)\}", r"\\text{\1}"),  # a word, not a product of letters
    (r"\\mathcal N", "\N{MATHEMATICAL SCRIPT CAPITAL N}"),  # browsers know no variant
)
GLUE = re.compile(r'\(?<math display="inline">(?:(?!</math>).)*</math>[^\s<]+')
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'"
    "%3E%3Cpath d='M2 16C6-6 9-6 12 16s5 16 8 0 4-9 6 0 2 3 4 0' fill='none' "
    "stroke='%232f86d6' stroke-width='3.5' stroke-linecap='round'/%3E%3C/svg%3E"
)
CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --dim: #59636e;
  --line: #d1d9e0; --tint: #f6f8fa; --link: #0a5cb8; --word: #cf222e; --text: #0a3069;
  --number: #0550ae; --name: #6639ba; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #d8dee4;
  --paper: #101418; --dim: #9198a1; --line: #343b43; --tint: #181d23; --link: #6cb0ff;
  --word: #ff7b72; --text: #a5d6ff; --number: #79c0ff; --name: #d2a8ff; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: var(--paper); line-height: 1.6;
  font: 1.0625rem/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, serif; }
main { max-width: 46rem; margin: auto; padding: 1.5rem 1rem 5rem;
  overflow-wrap: break-word; }
h1, h2, h3, nav, .bar, .toc, summary, figcaption, table {
  font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1, h2, h3 { line-height: 1.25; margin: 2.4em 0 .7em; }
h1 { font-size: 2.3rem; margin-top: .6em; }
h2 { font-size: 1.6rem; padding-top: 1em; border-top: 1px solid var(--line); }
h3 { font-size: 1.2rem; }
a { color: var(--link); text-underline-offset: .15em; }
.anchor { margin-left: .35em; text-decoration: none; font-weight: 400; opacity: 0; }
:hover > .anchor, .anchor:focus { opacity: 1; }
pre, code, [mathvariant=monospace] { font-family: ui-monospace, SFMono-Regular, Menlo,
  Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .86em; background: var(--tint); padding: .1em .25em; }
pre { overflow-x: auto; font-size: .785rem; line-height: 1.5; margin: 1.2em 0;
  padding: .7rem .75rem; }
pre.code { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; }
pre.output { font-size: .74rem; color: var(--dim); border-left: 3px solid var(--line); }
pre code { all: unset; }
.code [class^=c] { color: var(--dim); font-style: italic; }
.code [class^=k], .code .ow { color: var(--word); }
.code [class^=s] { color: var(--text); }
.code [class^=m], .code [class^=nb], .code .bp { color: var(--number); }
.code .nf, .code .nc, .code .nd, .code .fm { color: var(--name); }
summary { cursor: pointer; color: var(--dim); font-size: .9rem; margin: .8em 0; }
.wide { overflow-x: auto; margin: 1.2em 0; }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.45; }
th, td { padding: .4em 1em .4em 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td code, .glue { white-space: nowrap; }
math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", "STIX Math",
  "DejaVu Math TeX Gyre", math; }
.formula { overflow: auto hidden; padding: .35em 0; margin: 1em 0; }
/* Chromium forgets to draw the parts of a stretched sign that leave its letter box */
.formula mo { box-shadow: 0 0 0 9em transparent; }
[columnalign=left] { text-align: left; }
[columnalign=right] { text-align: right; }
[columnspacing^="0em"] mtd { padding-left: 0; padding-right: 0; }
.overline { border-top: .06em solid; padding-top: .12em; }
figure { margin: 1.6em 0; }
img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--dim); font-size: .88rem; line-height: 1.45; padding: .5em 0; }
.bar { font-size: .9rem; color: var(--dim); }
#code { accent-color: var(--link); margin: 0 .3em 0 0; vertical-align: -.1em; }
#code:not(:checked) ~ .code { display: none; }
.contents { list-style: none; margin: 0; padding: 0; font-size: .9rem;
  line-height: 1.35; }
.contents a { display: block; padding: .22em 0; color: inherit; text-decoration: none; }
.contents .h3 { padding-left: 1.1em; font-size: .93em; color: var(--dim); }
.contents a:hover { text-decoration: underline; }
nav.side { display: none; }
@media screen and (min-width: 72rem) {
  body { display: grid; grid-template-columns: 17rem minmax(0, 46rem); gap: 3rem;
    justify-content: center; }
  nav.side { display: block; position: sticky; top: 0; height: 100vh; padding: 2rem 0;
    overflow-y: auto; scrollbar-width: thin; }
  .toc { display: none; }
}
@media (max-width: 22rem) { body { font-size: 1rem; } main { padding: 1rem .75rem; } }
@media print {
  #code, .bar, .toc, .anchor { display: none; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  pre { white-space: pre-wrap; font-size: 7.5pt; }
  figure, tr, .formula { break-inside: avoid; }
  h1, h2, h3 { break-after: avoid; }
}
"""


def mathml(latex, display):
    """A formula as MathML. What is not understood is refused, and never dropped."""
    text = latex.strip()
    for pattern, instead in LATEX:
        text = re.sub(pattern, instead, text)
    try:
        math = convert_to_element(text, display=display)
        del math.attrib["xmlns"]  # HTML knows
        mend(math)
    except Exception as error:
        raise ValueError(f"cannot set the formula {latex!r}: {error!r}") from error
    return ElementTree.tostring(math, encoding="unicode")


def mend(parent):
    """Give the signs of a formula the form and the spaces that TeX gives them."""
    before = ""
    for i, item in enumerate(parent):
        text = unescape(item.text or "").replace("*", "∗").replace(r"\_", "_")
        if re.search(r"[\\&]", text) or item.get("mathvariant") == "script":
            raise ValueError(f"{text} is not known")
        if text in ("cos", "exp", "log", "sin", "±"):
            item.tag = "mo"
        if text in ("cos", "exp", "log", "sin"):
            item.attrib |= {"lspace": ".17em", "rspace": ".17em"}
        elif text == "(" and before in ("cos", "sin"):
            parent[i - 1].set("rspace", "0")
        elif text == "/":
            item.attrib |= {"lspace": "0", "rspace": "0"}
        elif text in ("+", "−") and before in ("=", "(", ","):
            item.set("form", "prefix")
        elif re.fullmatch("[Α-Ω]", text):
            item.set("mathvariant", "normal")
        elif text == "―":  # the line of \overline: a border is as long as it should be
            parent.tag, parent.attrib = "mrow", {"class": "overline"}
            parent.remove(item)
        elif text == "′":  # is raised already: no exponent, but a sign after the letter
            item.tag, item.attrib = "mo", {"lspace": "0", "rspace": "0"}
            base = ElementTree.Element("mrow")
            base[:] = parent[0], item
            parent[:] = [base, *parent[1:-1]]
            parent.tag = "msub" if len(parent) == 2 else "mrow"
        elif parent.tag == "mover":
            parent.set("accent", "true")
            parent[1].set("stretchy", "false")
        item.text = before = text
        mend(item)


def anchor(state):
    """Give every heading an id, of its own on the page, and a link to itself."""
    headings = state.env.get("headings", [])
    for mark, inline in zip(state.tokens, state.tokens[1:]):
        if mark.type == "heading_open":
            name = re.sub(r"[^a-z0-9]+", "-", inline.content.lower()).strip("-")
            if any(name == taken for *_, taken in headings):
                name += f"-{len(headings)}"
            headings.append((mark.tag, state.md.renderInline(inline.content), name))
            mark.attrSet("id", name)
            link = f'<a class="anchor" href="#{name}" aria-label="Link here">#</a>'
            inline.children.append(Token("html_inline", "", 0, content=link))


def markdown():
    """The reader of the prose: CommonMark, tables that scroll, formulas as MathML."""
    rules = {
        "math_inline": lambda token: mathml(token.content, "inline"),
        "math_block": lambda token: (
            f'<div class="formula">{mathml(token.content, "block")}</div>\n'
        ),
        "table_open": lambda token: '<div class="wide"><table>\n',
        "table_close": lambda token: "</table></div>\n",
    }
    md = MarkdownIt().enable("table").use(dollarmath_plugin, allow_labels=False)
    md.core.ruler.push("anchor", anchor)
    for name, rule in rules.items():
        md.add_render_rule(name, lambda self, tokens, i, *_, rule=rule: rule(tokens[i]))
    return md


def code(cell):
    """The code of a cell in colours, folded away if it is tagged so."""
    lines = highlight(cell.source, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip()
    lines = re.sub(r'<span class="(?:n|o|p|w)">([^<]*)</span>', r"\1", lines)
    block = f'<pre class="code"><code>{lines}</code></pre>\n'
    if {"hide", "page"}.isdisjoint(cell.metadata.get("tags", [])):
        return block
    names = ", ".join(re.findall(r"^(?:def|class) (\w+)", cell.source, re.M))
    summary = f"<summary>Folded code: {names or 'setup'}</summary>"
    return f'<details class="code">{summary}\n{block}</details>\n'


def outputs(cell, md):
    """What a cell printed, and its pictures with the captions that follow them."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(f'<pre class="output">{escape(output.text)}</pre>')
        elif "image/png" in output.data:
            parts.append(f"<figure>{image(output)}</figure>")
        else:
            caption = md.renderInline(output.data["text/markdown"].strip("*"))
            parts.append(f"<figcaption>{caption}</figcaption></figure>")
    text = "".join(parts).replace('</pre><pre class="output">', "")
    return text.replace("</figure><figcaption>", "<figcaption>") + "\n" * bool(text)


def image(output):
    """A picture with its size, so that nothing jumps when it appears."""
    png, marks = output.data["image/png"].strip(), output.metadata["image/png"]
    wide, high = struct.unpack(">II", base64.b64decode(png)[16:24])
    size = f'width="{marks.width}" height="{round(high * marks.width / wide)}"'
    return f'<img alt="{escape(marks.alt)}" {size} src="data:image/png;base64,{png}">'


def page(notebook):
    """The whole page, in one string."""
    md, env, cells = markdown(), {"headings": []}, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = md.render(cell.source, env)
            cells.append(GLUE.sub(r'<span class="glue">\g<0></span>', prose))
        else:
            cells.append(code(cell) + outputs(cell, md))
    (_, title, _), *headings = env["headings"]
    subtitle = re.search(r"^\*(.+)\*$", notebook.cells[0].source, re.M)[1]
    item = '<li class="{0}"><a href="#{2}">{1}</a></li>'
    links = "\n".join(item.format(*heading) for heading in headings)
    source = base64.b64encode((ROOT / "annotated_s4d.py").read_bytes()).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<meta name="description" content="{escape(subtitle)}">
<link rel="icon" href="{ICON}">
<style>{CSS}</style>
</head>
<body>
<nav class="side" aria-label="Contents"><ul class="contents">
{links}
</ul></nav>
<main>
<input type="checkbox" id="code" checked><label class="bar" for="code">code</label>
<span class="bar"> · <a download="annotated_s4d.py"
href="data:text/x-python;base64,{source}">the source, annotated_s4d.py</a></span>
<details class="toc"><summary>Contents</summary><ul class="contents">
{links}
</ul></details>
{"".join(cells)}</main>
</body>
</html>
"""


def executed_notebook():
    """The notebook with its outputs, or an end in one sentence that says what to do."""
    do = "run: python notebooks/build.py"
    if not NOTEBOOK.exists():
        sys.exit(f"{NOTEBOOK} is missing; {do}")
    notebook, fresh = nbformat.read(NOTEBOOK, 4), fresh_notebook()
    if any(cell.execution_count is None for cell in code_cells(notebook)):
        sys.exit(f"{NOTEBOOK} has a cell that was not executed; {do} --execute")
    old, new = ([(c.cell_type, c.source) for c in n.cells] for n in (notebook, fresh))
    if old != new:
        sys.exit(f"{NOTEBOOK} is not made of this annotated_s4d.py; {do}")
    return notebook


def main():
    try:
        text = page(executed_notebook())
    except ValueError as error:
        sys.exit(str(error))
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    print(f"{PAGE.relative_to(ROOT)}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
