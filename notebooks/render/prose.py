"""Prose as HTML: Markdown, anchors of headings, formulas as MathML."""

import re
from html import unescape
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

LATEX = (  # where latex2mathml differs from LaTeX: a pattern, and what to write instead
    (r"\{aligned\}", r"{split}"),  # it knows the same table by this name only
    (r"(?s)\\begin\{pmatrix\}.*?\\end\{pmatrix\}", r"{\g<0>}"),  # each its own height
    (r"(?s)\\([bB]ig)\(.*?\\\1\)", r"{\g<0>}"),  # else an index keeps the bracket small
    (r"\\sum_", r"\\sum\\limits_"),  # below the sign inside a brace too
    (r"\\mathrm\{(\w+)\}", r"\\text{\1}"),  # a word, not a product of letters
    (r"\\mathcal N", "\N{MATHEMATICAL SCRIPT CAPITAL N}"),  # browsers know no variant
)
GLUE = re.compile(r'\(?<math display="inline">(?:(?!</math>).)*</math>[^\s<]+')


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


def anchor_of(title):
    """The id of a heading, if no other has it."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def anchor(anchors):
    """A rule that gives every heading its id, and a link to itself."""

    def rule(state):
        for mark, inline in zip(state.tokens, state.tokens[1:]):
            if mark.type == "heading_open":
                name = anchors[inline.content]
                mark.attrSet("id", name)
                link = f'<a class="anchor" href="#{name}" aria-label="Link here">#</a>'
                inline.children.append(Token("html_inline", "", 0, content=link))

    return rule


class Prose:
    """A reader of Markdown: tables that scroll, formulas as MathML."""

    def __init__(self, anchors):
        rules = {
            "math_inline": lambda token: mathml(token.content, "inline"),
            "math_block": lambda token: (
                f'<div class="formula">{mathml(token.content, "block")}</div>\n'
            ),
            "table_open": lambda token: '<div class="wide"><table>\n',
            "table_close": lambda token: "</table></div>\n",
        }
        self.md = (
            MarkdownIt().enable("table").use(dollarmath_plugin, allow_labels=False)
        )
        self.md.core.ruler.push("anchor", anchor(anchors))
        for name, rule in rules.items():
            self.md.add_render_rule(
                name, lambda self, tokens, i, *_, rule=rule: rule(tokens[i])
            )

    def render(self, text):
        """Markdown as HTML, no line broken between a formula and what clings to it."""
        return GLUE.sub(r'<span class="glue">\g<0></span>', self.md.render(text))

    def line(self, text):
        """A line of Markdown as HTML."""
        return self.md.renderInline(text)
