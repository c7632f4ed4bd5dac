"""Read an article in the percent format: its cells become parts, headings and HTML.

Both pages show what is made here: one reader of Markdown, one way to set formulas, one
to colour code, one list of anchors.
"""

import ast
import hashlib
import json
import re
import symtable
import tokenize
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from render.prose import Prose, anchor_of

DRAWN = "application/x-annotated-drawing"  # a figure as HTML, beside its PNG
DATA = "application/x-annotated-data"  # what a script in the browser starts from
CAPTIONS = Prose({})
OPTIONS = "later", "times", "data", "work"  # of @figure; any other keyword is a knob
STARRED = re.compile("###+ ★ ")  # the heading of a section that is folded


# -- cells ----------------------------------------------------------------------------


def read_cells(text):
    """Divide a file in the percent format. Yields kind, marks and source of a cell."""
    for cell in re.split(r"^# %%", text, flags=re.M)[1:]:
        marks, source = cell.split("\n", 1)
        if "[markdown]" in marks:
            yield "prose", marks, re.sub(r"^# ?", "", source.strip("\n"), flags=re.M)
        else:
            yield "code", marks, source.strip("\n")


def at_headings(source):
    """Divide prose where its headings begin."""
    return [piece for piece in re.split("^(?=#+ )", source, flags=re.M) if piece]


def is_answer(marks):
    """Whether the marks of a cell say that it answers an exercise."""
    return '"answer"' in marks


def words_and_code(source):
    """Divide an answer: the comments that it begins with, as prose, and the rest."""
    words = re.match("(#.*\n?)*", source)[0]
    return re.sub("^# ?", "", words, flags=re.M), source[len(words) :].strip("\n")


def first_sentence(text):
    """Divide text after the first sentence of its first paragraph."""
    paragraph, *others = text.strip("\n").split("\n\n")
    sentence, *rest = re.split(r"(?<=[.?!])\s", paragraph, maxsplit=1)
    return sentence, "\n\n".join(rest + others)


@dataclass
class Figure:
    """A figure as its cell declares it, and what the notebook recorded of it."""

    name: str
    caption: str  # one line of Markdown
    knobs: dict  # a list of choices, or (low, high)
    default: dict
    options: list  # of OPTIONS, those that the cell names
    drawn: str = ""
    data: str = ""

    @property
    def words(self):
        """The caption as plain text."""
        return re.sub(r"[`$*]", "", self.caption)


def read_figures(source):
    """Yield each figure that a cell defines, without running it."""
    for node in ast.parse(source).body:
        for call in getattr(node, "decorator_list", ()):
            if ast.unparse(call).startswith("figure("):
                given = {k.arg: k.value for k in call.keywords}
                options = [name for name in given if name in OPTIONS]
                knobs = {
                    k: ast.literal_eval(v) for k, v in given.items() if k not in options
                }
                names = [a.arg for a in node.args.args]
                values = dict(zip(names, node.args.defaults))
                default = {k: ast.literal_eval(values[k]) for k in knobs}
                caption = " ".join(ast.get_docstring(node).split())
                yield Figure(node.name, caption, knobs, default, options)


# -- what a cell's outputs come from ---------------------------------------------------


def without(source, spans):
    """Source without the given places (first, last), each a pair of row and column."""
    lines = source.splitlines()
    for (top, left), (bottom, right) in sorted(spans, reverse=True):
        lines[top - 1 : bottom] = [lines[top - 1][:left] + lines[bottom - 1][right:]]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def comments(source):
    """The places of comments in it."""
    tokens = tokenize.generate_tokens(iter(f"{source}\n".splitlines(True)).__next__)
    return [(t.start, t.end) for t in tokens if t.type == tokenize.COMMENT]


def docstrings(tree):
    """The places of docstrings in it."""
    kinds = ast.FunctionDef, ast.ClassDef
    nodes = [n for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n)]
    words = [node.body[0] for node in nodes]
    return [((w.lineno, w.col_offset), (w.end_lineno, w.end_col_offset)) for w in words]


def globals_of(table):
    """The names of the file that a piece of code uses, local names left out."""
    names = {s.get_name() for s in table.get_symbols() if s.is_global()}
    if table.get_type() == "module":
        names = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    return names.union(*map(globals_of, table.get_children()))


def bound(node):
    """The names that a statement of the file binds, or changes a part of."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.alias):
            names.add(part.asname or part.name.split(".")[0])
        if isinstance(getattr(part, "ctx", None), ast.Store):
            while isinstance(part, ast.Attribute | ast.Subscript):
                part = part.value
            names |= {part.id} if isinstance(part, ast.Name) else set()
    return names


def names(source):
    """The names of the file that a cell uses, and those that it binds."""
    uses = globals_of(symtable.symtable(source, "cell", "exec"))
    return uses, set().union(*map(bound, ast.parse(source).body))


def editions(sources):
    """For each code cell a hash of all code that its outputs come from.

    That is the cell itself, and, over and over, every statement of the file that binds
    a name used so far. Comments do not count, nor docstrings but the cell's own. No
    definition uses a name that is bound where work is done, `if RUN:`, as there is no
    such name when the file is imported. Of a figure, what writes it down is part.
    """
    statements, makers = [], defaultdict(list)
    for number, source in enumerate(sources):
        lines = source.splitlines()
        for node in ast.parse(source).body:
            first = min([node, *getattr(node, "decorator_list", ())], key=line_of)
            text = "\n".join(lines[first.lineno - 1 : node.end_lineno])
            code = without(text, comments(text) + docstrings(ast.parse(text)))
            uses = globals_of(symtable.symtable(text, "cell", "exec"))
            for name in bound(node):
                makers[name].append(len(statements))
            statements.append((number, code, uses, isinstance(node, ast.If)))

    def reached(number):
        found = [i for i, (cell, *_) in enumerate(statements) if cell == number]
        seen = set(found)
        for i in found:  # which grows
            _, _, uses, works = statements[i]
            for j in (j for name in sorted(uses) for j in makers[name]):
                if j not in seen and (works or not statements[j][3]):
                    seen.add(j)
                    found.append(j)
        return sorted(seen)

    writes_down = Path(__file__).with_name("drawing.py").read_text(encoding="utf-8")
    texts = [
        [without(source, comments(source)), *(statements[i][1] for i in reached(n))]
        + [writes_down] * bool(list(read_figures(source)))
        for n, source in enumerate(sources)
    ]
    return [hashlib.sha256("\n".join(t).encode()).hexdigest()[:16] for t in texts]


def line_of(node):
    return node.lineno


def only_defines(source):
    """Whether a cell can have no output: functions, classes, imports and constants."""
    kinds = ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign
    body = ast.parse(source).body
    return all(isinstance(n, kinds) for n in body) and not list(read_figures(source))


# -- what the notebook recorded --------------------------------------------------------


@dataclass
class Outputs:
    """What a cell printed, its figure as HTML, and data for the browser, as JSON."""

    printed: str = ""
    drawn: str = ""
    data: str = ""


def outputs_of(cell):
    """The outputs of a cell of a notebook."""
    outputs = cell["outputs"]

    def join(kind):
        return "".join("".join(o.get("data", {}).get(kind, "")) for o in outputs)

    printed = "".join("".join(o.get("text", "")) for o in outputs)
    return Outputs(printed, join(DRAWN), join(DATA))


def read_outputs(sources, path):
    """For each code cell its outputs, or blanks if they are missing or not of it.

    Outputs belong to a cell of the same edition, wherever it stands.
    """
    if not path.exists():
        return [Outputs() for _ in sources]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    known = {cell["metadata"].get("edition"): outputs_of(cell) for cell in cells}
    return [known.get(edition, Outputs()) for edition in editions(sources)]


# -- HTML -----------------------------------------------------------------------------

FOLDED = '<details class="code"><summary>'
OPEN = '<details class="code" open><summary tabindex="-1">'  # unseen, so not stopped at


def colours(source):
    """Code as HTML, its words marked by their kinds."""
    lines = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip()
    return re.sub(r'<span class="(?:n|o|p|w)">([^<]*)</span>', r"\1", lines)


def code_html(source, folded):
    """A code cell: a title to fold it by, the code, a button to copy it."""
    names = re.findall(r"^(?:def|class) (\w+)", source, re.M)
    first = next((x for x in source.splitlines() if x.strip() and x[0] not in "@#"), "")
    title = "imports" if not names and first.startswith("import ") else first
    title = escape(", ".join(names) or title)
    details = FOLDED if folded else OPEN
    return (
        f'{details}{title}</summary><button title="copy this cell">copy</button>'
        f"<pre><code>{colours(source)}</code></pre></details>\n"
    )


def printed_html(text):
    """What a cell printed. A table knows how wide it is, other lines can be wrapped."""
    if not text:
        return ""
    kind = ' class="printed"'
    if re.search(r"\S {2,}\S+ {2,}\S", text):
        wide = max(map(len, text.splitlines()))
        kind = f' class="printed table" style="--wide: {wide}"'
    return f'<pre{kind} tabindex="-1">{escape(text)}</pre>\n'


def figure_html(figure, drawn):
    """A figure, however it was drawn, over its caption."""
    caption = CAPTIONS.line(figure.caption)
    below = f"<figcaption>{caption}</figcaption>"
    return f'<figure id="{figure.name}">{drawn}{below}</figure>\n'


# -- what is folded --------------------------------------------------------------------


@dataclass
class Fold:
    """A starred section or an answer: what is always seen, and the items below it."""

    kind: str  # its class in CSS
    name: str
    summary: str  # HTML
    items: list = field(default_factory=list)

    @property
    def head(self):
        return f'<details class="{self.kind}"><summary>{self.summary}</summary>'

    def html(self, of_item=str):
        """All of it as HTML; of_item makes it of an item."""
        return f"{self.head}\n{''.join(map(of_item, self.items))}</details>\n"


def joined(pieces):
    """Pieces of HTML, as long as they can be, and between them figures, and folds with
    figures."""
    items = []
    for piece in pieces:
        if isinstance(piece, Fold):
            piece.items = joined(piece.items)
            if all(isinstance(item, str) for item in piece.items):
                piece = piece.html()
        if items and isinstance(piece, str) and isinstance(items[-1], str):
            items[-1] += piece
        else:
            items.append(piece)
    return items


# -- the article -----------------------------------------------------------------------


class Article:
    """An article and what its notebook recorded: parts, headings, figures."""

    def __init__(self, file, notebook):
        self.file, self.notebook = Path(file), Path(notebook)
        self.cells = list(read_cells(self.file.read_text(encoding="utf-8")))
        self.sources = [source for kind, _, source in self.cells if kind == "code"]
        prose = "\n".join(source for kind, _, source in self.cells if kind == "prose")
        self.headings = []  # (level, title, anchor)
        for marks, title in re.findall(r"^(#+) (.*)", prose, re.M):
            name = anchor_of(title)
            if any(name == taken for *_, taken in self.headings):
                name += f"-{len(self.headings)}"
            self.headings.append((len(marks), title, name))
        self.title = self.headings[0][1]
        self.subtitle = re.search(r"^\*(.+)\*$", prose, re.M)[1]
        self.figures = [f for source in self.sources for f in read_figures(source)]
        self.parts = self.divide()

    def divide(self):
        """The parts: from one heading of the first or second level to the next."""
        parts, number = [], 0
        for kind, marks, source in self.cells:
            if kind == "prose" and re.match("##? ", source):
                parts.append(Part(self))
            parts[-1].cells.append((kind, marks, source, number))
            number += kind == "code"
        return parts

    @cached_property
    def outputs(self):
        return read_outputs(self.sources, self.notebook)

    @cached_property
    def prose(self):
        return Prose({title: name for _, title, name in self.headings})


class Part:
    """A heading and the items below it, made when they are first looked at."""

    def __init__(self, article):
        self.article, self.cells = article, []

    @property
    def heading(self):
        """The heading as HTML."""
        return self.article.prose.render(self.cells[0][2].split("\n", 1)[0])

    @cached_property
    def items(self):
        """Pieces of HTML, figures, and folds that hold figures."""
        pieces = []
        place = pieces  # where the next piece belongs
        for kind, marks, source, number in self.cells:
            if kind == "code" and is_answer(marks):
                place.append(self.answer(source, number))
            elif kind == "code":
                place.extend(self.code(marks, source, number))
            for section in at_headings(source) if kind == "prose" else ():
                if section.startswith("#"):
                    place = pieces
                if STARRED.match(section):
                    fold, section = self.starred(section)
                    pieces.append(fold)
                    place = fold.items
                elif not place:  # it begins with the part's own heading
                    section = section.partition("\n")[2]
                place.append(self.article.prose.render(section))
        return joined(pieces)

    def starred(self, section):
        """A fold behind a heading and what its section gives; and its other prose."""
        heading, _, text = section.partition("\n")
        prose, (gives, rest) = self.article.prose, first_sentence(text)
        head = prose.render(heading)
        gives = f'<span class="gives">{prose.line(gives)}</span>'
        return Fold("starred", re.search(' id="(.*?)"', head)[1], head + gives), rest

    def answer(self, source, number):
        """The answer to an exercise: its words, its code, what it printed."""
        words, code = words_and_code(source)
        items = [self.article.prose.render(words)]
        items += self.code("", code, number) if code else ()
        return Fold("answer", f"answer-{number}", "Answer", items)

    def code(self, marks, source, number):
        """A code cell, what it printed, its figures. Code that only draws is folded."""
        figures, outputs = list(read_figures(source)), self.article.outputs[number]
        plots = len(figures) == len(ast.parse(source).body)
        printed = printed_html(outputs.printed)
        yield code_html(source, "hide" in marks or plots) + printed
        for figure in figures:
            figure.drawn, figure.data = outputs.drawn, outputs.data
            yield figure
