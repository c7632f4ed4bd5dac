"""The web page: complete, correct inside, and in need of nothing outside."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from render import static
from render.article import Article, is_answer, read_cells, words_and_code

ROOT = Path(__file__).resolve().parent.parent
FILES = ("annotated_s4d.py", "notebooks/annotated_s4d.ipynb")
VOID = {"meta", "link", "input", "img", "br", "hr"}


def start(root, seed="0"):
    """Start the command in a copy of the files that the page is made of."""
    command = [sys.executable, "notebooks/render/static.py"]
    env = os.environ | {"PYTHONHASHSEED": seed}
    return subprocess.Popen(
        command, cwd=root, stderr=subprocess.PIPE, text=True, env=env
    )


def copy(root):
    cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "notebooks/render", root / "notebooks/render", ignore=cache)
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    return root


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and its text by place."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.prose, self.headings = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"code", "pre", "style"} & set(self.open):
            self.prose += data
        if {"h1", "h2", "h3"} & set(self.open) and data != "#":
            self.headings[-1] += data


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The page of the repository's notebook, built two times at once."""
    roots = [copy(tmp_path_factory.mktemp("page")) for _ in range(2)]
    for run in [start(root, str(seed)) for seed, root in enumerate(roots)]:
        _, complaint = run.communicate()
        assert run.returncode == 0, complaint
    return [(root / "notebooks/annotated_s4d.html").read_bytes() for root in roots]


@pytest.fixture(scope="module")
def made(twice):
    text = twice[0].decode()
    return text, Page(text)


@pytest.fixture(scope="module")
def prose():
    """The Markdown of the article, words of answers included, without its code."""
    cells = []
    for kind, marks, source in read_cells((ROOT / FILES[0]).read_text("utf-8")):
        if kind == "prose" or is_answer(marks):
            cells.append(source if kind == "prose" else words_and_code(source)[0])
    return re.sub(r"`[^`]*`", "", "\n\n".join(cells))


def test_page_asks_no_host_and_runs_no_script(made):
    text, page = made
    assert page.open == []  # every tag is closed, in order
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        assert "srcset" not in attrs and attrs.get("src", "data:").startswith("data:")
        if tag in ("link", "use", "image"):
            assert attrs["href"].startswith("data:")
    css = re.search("<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in css and "@import" not in css


def test_pictures_have_words_and_size(made):
    """Each figure is there once, with its words, and no plot waits for its size."""
    text, page = made
    notebook = nbformat.read(ROOT / "notebooks/annotated_s4d.ipynb", 4)
    drawn = re.findall(r"image/png': '", str(notebook))
    figures = [attrs["aria-label"] for _, attrs in page.tags if "aria-label" in attrs]
    assert all(figures)
    figures, captions, drawings = (
        sum(tag == name or attrs.get("class") == name for tag, attrs in page.tags)
        for name in ("figure", "figcaption", "drawing")
    )
    assert figures == captions == drawings == len(drawn) > 0
    plots = [attrs["style"] for _, attrs in page.tags if attrs.get("class") == "plot"]
    assert all(re.match("height|aspect-ratio", style) for style in plots)
    assert all("alt" in attrs for tag, attrs in page.tags if tag == "img")


def test_links_inside_the_page_arrive(made):
    ids = [attrs["id"] for _, attrs in made[1].tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs.get("href", "") for tag, attrs in made[1].tags if tag == "a"]
    inside = {link[1:] for link in links if link.startswith("#")}
    assert inside and inside <= set(ids)


def test_every_heading_is_there(made, prose):
    wanted = re.findall(r"^#{1,3} (.+)$", prose, re.M)
    assert made[1].headings == wanted


def test_every_formula_is_set(made, prose):
    displayed = re.compile(r"^\$\$\n.*?\n\$\$$", re.M | re.S)
    inline = re.findall(r"\$[^$]+\$", displayed.sub("", prose))
    shown = [attrs["display"] for tag, attrs in made[1].tags if tag == "math"]
    assert shown.count("block") == len(displayed.findall(prose)) > 0
    assert shown.count("inline") == len(inline) > 0
    assert "$" not in made[1].prose and "\\" not in made[1].prose


def test_starred_sections_say_what_they_give(prose):
    """In one sentence, which is not said twice; an answer has words."""
    folded = Path(__file__).with_name("folded_article.py")
    text = static.page(Article(folded, "no notebook"))
    gives = re.findall('<span class="gives">(.*?)</span></summary>', text)
    assert len(gives) == 2 and gives[1] == "It has no figure and no rest"
    assert text.count("looks to the eye") == text.count("no figure and") == 1
    assert text.count('<details class="answer"><summary>Answer</summary>') == 3
    page = Page(text)
    assert page.open == [] and "# It is" not in text
    for section in re.findall("^###+ ★ .*\n\n(.*?)$", prose, re.M):
        assert section[:1].isalnum() or section[:1] in "*`$([", section


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda notebook, source: notebook.unlink(), "is missing; run: python"),
        (
            lambda notebook, source: edit(
                notebook, '"execution_count": 1,', '"execution_count": null,'
            ),
            "was not executed; run: python",
        ),
        (
            lambda notebook, source: edit(source, "A mass hangs", "A bell hangs"),
            "is not made of this annotated_s4d.py; run: python",
        ),
        (
            lambda notebook, source: [
                edit(source, r"# h(t) = C\,", r"# h(t) = C\foo"),
                edit(notebook, r"h(t) = C\\,", r"h(t) = C\\foo"),
            ],
            r"cannot set the formula",
        ),
    ],
)
def test_it_refuses_in_one_sentence(tmp_path, spoil, complaint):
    copy(tmp_path)
    spoil(tmp_path / "notebooks/annotated_s4d.ipynb", tmp_path / "annotated_s4d.py")
    run = start(tmp_path)
    _, told = run.communicate()
    assert run.returncode == 1 and complaint in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "notebooks/annotated_s4d.html").exists()


def test_the_same_bytes_twice(twice):
    assert twice[0] == twice[1]
