"""Figures of matplotlib as markup of a page: in the page's own colours and font, small, and the same each time.

They are drawn in the style of the other pictures. What is black there, text and axes above all, takes the colour of the
page's text, so that both themes can be read.
"""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from peerlearn.evaluation.plots import plain_style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width of a figure, and height of its axes with their title and labels, in inches. A page shows it a little larger.
WIDTH_INCHES, HEIGHT_INCHES = 3.9, 2.1
# What lies around the axes: labels of ticks on the left, half of one on the right, the title above, the name below.
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.5, 0.15, 0.25, 0.4
_NUMBERS = re.compile(r"-?\d+\.\d+")
_PATH = re.compile(r' d="([^"]*)"')


def inline_svg(key: str, draw: Callable[["Figure"], object], *, height_inches: float) -> Markup:
    """The element `svg` of a figure. Equal keys and equal drawings give equal bytes.

    Args:
        key: name of the figure, which no other figure of the page has: ids within it are made of it.
        draw: function that draws into a figure.
        height_inches: height of the figure.
    """
    with plain_style():
        import matplotlib
        from matplotlib.figure import Figure

        # Curves are thinned before, and stay as they are.
        own: Any = {"svg.hashsalt": key, "path.simplify": False, "axes.unicode_minus": True}
        with matplotlib.rc_context(own):
            figure = Figure(figsize=(WIDTH_INCHES, height_inches))
            figure.patch.set_visible(False)
            draw(figure)
            stream = io.BytesIO()
            write_figure(figure, stream, "svg")
    return Markup(_for_a_page(stream.getvalue().decode()))


def _for_a_page(svg: str) -> str:
    """The element alone, without what is for a file, and with what a page has in its place."""
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    for unwanted in (
        r"<!--.*?-->",
        r"<metadata>.*?</metadata>",
        # They would be styles of the whole page.
        r"<style.*?</style>",
        r"<defs>\s*</defs>",
    ):
        body = re.sub(unwanted, "", body, flags=re.DOTALL)
    # Ids of groups are the same in each figure. Those that are referred to are made of the key.
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    body = body.replace("#000000", "currentColor")
    body = _PATH.sub(lambda m: f' d="{_short_path(m[1])}"', body)
    body = re.sub(r">\s+<", "><", body)
    # What has no colour of its own is black in a file.
    look = 'fill="currentColor" stroke-linejoin="round" stroke-linecap="butt"'
    return f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} {look}>{body.strip()}'


def _short_path(path: str) -> str:
    """A path with one decimal, a tenth of a point, and without breaks."""
    path = _NUMBERS.sub(lambda m: f"{float(m[0]):z.1f}".removesuffix(".0"), path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", path).strip()


def plain_axes(figure: "Figure", title: str) -> "Axes":
    """Axes with few lines at the top of a figure: the title names the vertical axis, steps run along the other."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    # At a place of its own: to have one computed takes as long as all the drawing.
    width, height = figure.get_size_inches()
    inches = (
        *(_LEFT, height - HEIGHT_INCHES + _BOTTOM),
        *(WIDTH_INCHES - _LEFT - _RIGHT, HEIGHT_INCHES - _TOP - _BOTTOM),
    )
    axes = figure.add_axes(tuple(np.divide(inches, (width, height, width, height))))
    axes.patch.set_visible(False)
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.grid(axis="y", color="#000000", alpha=0.13)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    # Every number as a whole: none is split into a small one and one at the end of the axis.
    whole = ScalarFormatter(useOffset=False)
    whole.set_scientific(False)
    axes.yaxis.set_major_formatter(whole)
    return axes
