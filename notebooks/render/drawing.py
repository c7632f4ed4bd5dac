"""Write a Matplotlib figure down as HTML that fits any width.

Matplotlib takes a few tenths of a second to paint a picture. Between a hand and an eye
that is too long. So it arranges the figure, and what is there is written down instead:
a line becomes a path in SVG, a text becomes text, which keeps its size when the page is
narrow and takes the colour of the theme. That takes milliseconds.

Known are lines, images, titles, labels, legends of lines, texts and the numbers along
the axes.
"""

import base64
import functools
import io
import pickle
import re
from html import escape
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator

DASHES = {"--": "6 4", ":": "2 3", "-.": "6 3 2 3"}
BORDERS = {"--": "dashed", ":": "dotted", "-.": "dashed"}
POINTS = {"x": "×", "+": "+"}  # a disc is drawn, these are texts


def drawing(fig, alt, ghost=None):
    """Write a figure down. Returns the string.

    If ghost is another figure of the same axes, they show at least what its axes show,
    and its lines, pale, beneath.
    """
    pairs = [(ax, None) for ax in fig.axes]
    if ghost and len(ghost.axes) == len(fig.axes):
        pairs = list(zip(fig.axes, ghost.axes))
    rows, parts = {}, []
    for ax, old in pairs:
        pale = widen(ax, old) if old else []
        rows.setdefault(ax.get_subplotspec().rowspan.start, []).append((ax, pale))
    shares = fig.axes[0].get_gridspec().get_height_ratios()
    for panels, share in zip(rows.values(), shares):
        grid = panels[0][0].get_gridspec()
        height = 82 * fig.get_figheight() / sum(shares)
        widths = grid.get_width_ratios() if len(panels) == grid.ncols else [1]
        columns = " ".join(f"minmax(0, {w}fr)" for w in widths)
        inside = "".join(panel(ax, height * share, pale) for ax, pale in panels)
        narrow = 1 if len(panels) < 4 else (len(panels) + 1) // 2  # columns on a phone
        style = f"--columns: {columns}; --narrow: {narrow}"
        parts.append(f'<div class="row" style="{style}">{inside}</div>')
    below = f'<div class="label">{plain(fig.get_supxlabel())}</div>'
    label = f'role="img" aria-label="{escape(alt)}"'
    return f'<div class="drawing" {label}>{"".join(parts)}{below}</div>'


def widen(ax, old):
    """Show at least what another plot of the same kind shows. Returns its lines."""
    kind = ax.get_xscale(), ax.get_yscale(), len(ax.images)
    if kind != (old.get_xscale(), old.get_yscale(), len(old.images)) or ax.images:
        return []
    for get, put in (("get_xlim", ax.set_xlim), ("get_ylim", ax.set_ylim)):
        ours, theirs = getattr(ax, get)(), getattr(old, get)()
        if (ours[0] < ours[1]) == (theirs[0] < theirs[1]):
            low, high = sorted([*ours, *theirs])[::3]
            put((low, high) if ours[0] < ours[1] else (high, low))
    return [line for line in old.lines if line.get_transform() is old.transData]


def panel(ax, height, pale=()):
    """One plot and the texts around it: places are shares of its width and height."""
    width, depth = np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())
    free = ax.get_aspect() == "auto"
    shape = f"height: {height:.0f}px" if free else f"aspect-ratio: {width / depth:.3f}"
    strip = not free and width > 2 * depth  # on a phone as wide as the screen
    shape += "; max-width: none" if strip else ""
    shape += "" if ax.spines["left"].get_visible() else "; border: 0"
    named = [v for v in ax.lines if ax.get_legend() and v.get_label()[0] != "_"]
    pictures = "".join(map(pixels, ax.images))
    marks = "".join(map(points, ax.lines)) + "".join(map(note, ax.texts))
    kind = "panel" if free else "panel square"
    return f"""<div class="{kind}">
        <div class="title">{tinted(ax.title, ax.get_title())}</div>
        <div class="legend">{"".join(map(swatch, named))}</div>
        <div class="ylabel"><span>{plain(ax.get_ylabel())}</span></div>
        {ticks(ax.yaxis, "y", "bottom")}
        <div class="plot" style="{shape}">{pictures}{curves(ax, pale)}{marks}</div>
        {ticks(ax.xaxis, "x", "left")}
        <div class="label">{plain(ax.get_xlabel())}</div></div>"""


def ticks(axis, name, side):
    """The numbers along an axis, each at its share of the way."""
    scale, marks = axis.get_transform().transform, {}
    view = np.array(axis.get_view_interval())
    low, high = scale(view)
    places = axis.get_majorticklocs()
    texts = axis.get_major_formatter().format_ticks(places)
    inside = [view.min() <= place <= view.max() for place in places]
    if axis.get_scale() == "log" and 0 < sum(inside) < 2:  # one number says little
        places = LogLocator(subs=(1, 2, 5)).tick_values(*sorted(view))
        texts = [f"{place:g}" for place in places]
    shown = axis.get_tick_params()[{"left": "labelbottom", "bottom": "labelleft"}[side]]
    for at, text in zip((scale(places) - low) / (high - low), map(str, texts)):
        if text and -0.001 < at < 1.001:
            marks[plain(text)] = f"{side}: {at:.1%}"
    widest = max(marks, key=len, default="")  # holds the column open
    spans = (f'<span style="{place}">{text}</span>' for text, place in marks.items())
    kind = name if shown else f"{name} shared"  # another plot shows them, if beside it
    return f'<div class="{kind}">{"".join(spans)}<b>{widest}</b></div>'


# -- curves and points ----------------------------------------------------------------


def curves(ax, pale=()):
    """The lines of a plot as an SVG image that takes any size.

    It is stretched to its place, but not the pen, which is round for points.
    """
    paths = "".join(curve(line, ax, 0.25) for line in pale)
    paths += "".join(curve(line, ax) for line in ax.lines)
    svg = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1000 1000' fill='none' "
        "preserveAspectRatio='none' stroke-linejoin='round'>"
        f"<style>path{{vector-effect:non-scaling-stroke}}</style>{paths}</svg>"
    )
    return f'<img alt="" src="data:image/svg+xml,{quote(svg, " =:/,")}">'


def shares(line, ax):
    """The corners of a line as shares of the plot's width and height, (n, 2)."""
    steps = matplotlib.cbook.STEP_LOOKUP_MAP[line.get_drawstyle()]
    xy = np.transpose(steps(*np.array(line.get_xydata()).T))
    to_screen = line.get_transform() if line.axes is ax else ax.transData
    return (to_screen - ax.transAxes).transform(xy)


def curve(line, ax, faint=0):
    """A line, and its discs, as SVG paths in thousandths of the plot."""
    x, y = shares(line, ax).T
    way = matplotlib.path.Path(np.transpose([1000 * x, 1000 - 1000 * y]))
    if len(way) > 100 and line.get_marker() == "None":
        way.simplify_threshold = 0.5  # fewer points where it is almost straight
        way = matplotlib.path.Path(way.cleaned(simplify=True).vertices[:-1])
    points = [f"{a:.0f} {b:.0f}" for a, b in way.vertices]
    dashes = DASHES.get(line.get_linestyle(), "none")
    pen = f"<path stroke='{tone(line)}' opacity='{faint or opacity(line)}'"
    path = (pen + " stroke-linecap='{}' stroke-width='{}' d='{}'/>").format
    out = ""
    if line.get_linestyle() != "None":
        dashed = path("butt", line.get_linewidth(), "M" + "L".join(points))
        out += dashed.replace(" d=", f" stroke-dasharray='{dashes}' d=", 1)
    if line.get_marker() not in ("None", *POINTS):
        out += path("round", line.get_markersize(), "".join(f"M{p}h0" for p in points))
    return out


def opacity(line):
    """How much a line covers: at least what can be seen well on any paper."""
    return max(line.get_alpha() or 1, 0.65)


def points(line):
    """The points of a line that are no discs, as texts."""
    sign = POINTS.get(line.get_marker())
    if not sign:
        return ""
    style = f"color: {tone(line)}; font-size: {2 * line.get_markersize():.0f}px"
    return "".join(
        f'<i class="point" style="left: {x:.1%}; bottom: {y:.1%}; {style}">{sign}</i>'
        for x, y in shares(line, line.axes)
    )


def note(text):
    """A text inside the plot."""
    place = (text.get_transform() - text.axes.transAxes).transform(text.get_position())
    style = f"left: {place[0]:.1%}; bottom: {place[1]:.1%}"
    kind = f"note {text.get_ha()} {text.get_va()}"
    return f'<i class="{kind}" style="{style}">{tinted(text, text.get_text())}</i>'


def swatch(line):
    """What a line looks like, and its name."""
    style = f"color: {tone(line)}; opacity: {opacity(line)}"
    if line.get_linestyle() != "None":
        border = BORDERS.get(line.get_linestyle(), "solid")
        sign = f'<i class="pen" style="{style}; border-top: 3px {border}"></i>'
    else:
        mark = POINTS.get(line.get_marker(), "●")
        sign = f'<i class="mark" style="{style}">{mark}</i>'
    return f"<span>{sign}{plain(line.get_label())}</span>"


# -- images, colours, texts -----------------------------------------------------------


def pixels(image):
    """An array that is shown as a picture: one pixel for each number."""
    png, array = io.BytesIO(), image.get_array()
    matplotlib.image.imsave(png, image.to_rgba(array, bytes=True), format="png")
    code = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="" class="pixels" src="data:image/png;base64,{code}">'


def tone(artist):
    """The colour of a line or a text, in a form that HTML knows."""
    return matplotlib.colors.to_hex(artist.get_color())


def tinted(artist, text):
    """A text in its colour, a little nearer to the ink, so that it can be read."""
    grey = tone(artist) == matplotlib.colors.to_hex(matplotlib.rcParams["text.color"])
    colour = "" if grey else f' style="--tone: {tone(artist)}"'
    return f"<span{colour}>{plain(text)}</span>" if text else ""


def plain(text):
    """Matplotlib's little mathematics as HTML: $K_l$ is an italic K with a small l."""
    signs = {"mathdefault": "", "Re": "Re", "Im": "Im", "Delta": "Δ"}
    text = escape(text)
    for name, sign in signs.items():
        text = text.replace("\\" + name, sign)
    text = re.sub(r"\^\{?([-\d]+)\}?", r"<sup>\1</sup>", text)
    text = re.sub(r"_(\w)", r"<sub>\1</sub>", text)
    text = re.sub(r"\$\{(.*?)\}\$", r"\1", text)  # a number stays upright
    return re.sub(r"\$(.*?)\$", r"<em>\1</em>", text)


# -- speed ----------------------------------------------------------------------------


def copied(canvas):
    """A function like canvas, which returns a figure and axes: each made once, copied.

    Matplotlib makes axes slowly, and copies them in a third of the time.
    """

    @functools.lru_cache(maxsize=64)
    def blank(recipe):
        args, options, _ = pickle.loads(recipe)
        return pickle.dumps(canvas(*args, **options))

    def make(*args, **options):
        settings = dict(matplotlib.rcParams)
        return pickle.loads(blank(pickle.dumps((args, options, settings))))

    return make
