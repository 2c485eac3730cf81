"""A picture of a network's feature maps."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from peerlearn.data.datasets import ImageDataset
from peerlearn.evaluation.plots import series_style
from peerlearn.report.feature_maps import (
    TSNE_COMPONENTS,
    TSNE_SEED,
    TSNE_STEPS,
    FeatureMap,
    Points,
    chance_percent,
    nearest_on_map,
    neighbour_percent,
)
from peerlearn.report.parts import Picture
from peerlearn.report.svg import svg_number, svg_text

# Beyond so many classes, colours and markers can no longer be told apart.
_MOST_NAMED_CLASSES = 10
# In units of the picture.
_PANEL, _GAP, _TOP, _MARGIN = 245, 10, 18, 6
_LEGEND_ROW, _LEGEND_COLUMNS = 15, 5

# Markers around the origin as SVG paths, by matplotlib's names.
_SHAPES = {
    "o": "m-2.2 0a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0",
    "s": "m-2-2h4v4h-4z",
    "^": "m0-2.6l2.5 4.4h-5z",
    "D": "m0-2.8l2.5 2.8-2.5 2.8-2.5-2.8z",
    "v": "m0 2.6l2.5-4.4h-5z",
    "P": "m-.9-2.6h1.8v1.7h1.7v1.8h-1.7v1.7h-1.8v-1.7h-1.7v-1.8h1.7z",
    "X": "m-2.3-1.2l1.1-1.1 1.2 1.2 1.2-1.2 1.1 1.1-1.2 1.2 1.2 1.2-1.1 1.1-1.2-1.2-1.2 1.2-1.1-1.1 1.2-1.2z",
}


def map_picture(
    key: str, found: FeatureMap, images: ImageDataset, *, who: str, drawn_from: str
) -> Picture:
    """The picture of a network's maps.

    Args:
        key: name of the picture, which no other one of the page has.
        found: maps of the images.
        images: images, with labels.
        who: name of the network with its step.
        drawn_from: number of the images and what they are drawn from.
    """
    assert images.labels is not None
    labels, names = images.labels.numpy(), images.class_names
    first, second = found.explained_percent
    shares = [neighbour_percent(each, labels) for each in (found.components, found.neighbours)]
    counted = (
        f"the nearest neighbour on the map is of the same class for {shares[0]:.0f} % of the images by PCA and "
        f"{shares[1]:.0f} % by t-SNE ({chance_percent(labels):.1f} % if the classes lay at random)"
    )
    what = f"{who}: features of {drawn_from}, drawn at random, pooled and of length 1"
    looks = (
        f"Each class has a colour and a marker: {', '.join(names)}"
        if len(names) <= _MOST_NAMED_CLASSES
        else f"{len(names):,} classes are too many for a legend: a disc is an image whose nearest neighbour on that "
        "map is of its class, a cross one whose neighbour is of another"
    )
    return Picture(
        image=map_markup(key, found, labels, names),
        caption=f"{what}. Left: the first two principal components, which explain {first:.1f} % and {second:.1f} % of "
        f"the variance. Right: t-SNE of the first {TSNE_COMPONENTS} components (scikit-learn, perplexity "
        f"{found.perplexity:.4g}, seed {TSNE_SEED}, {TSNE_STEPS} steps); its distances between groups mean little. "
        f"{counted[0].upper()}{counted[1:]}. {looks}.",
        alternative=f"{what}, as two maps, by PCA and by t-SNE: {counted}. {looks}.",
    )


def map_markup(
    key: str, found: FeatureMap, labels: NDArray[np.int64], class_names: Sequence[str]
) -> Markup:
    """The element `svg` of both maps side by side.

    Up to 10 classes each have a colour and a marker, which a legend names. Where there are more, a disc is an image
    whose nearest neighbour on the map is of its class, and a cross one whose neighbour is not.

    Args:
        key: name of the picture, which no other one of the page has, of letters, digits and hyphens.
        found: maps of N images.
        labels: classes of the images, (N,).
        class_names: names of all classes.
    """
    first, second = found.explained_percent
    maps = {
        f"PCA: {first:.1f} % and {second:.1f} % of variance": found.components,
        f"t-SNE, perplexity {found.perplexity:.4g}": found.neighbours,
    }
    is_named = len(class_names) <= _MOST_NAMED_CLASSES
    looks = [series_style(number) for number in range(len(class_names))]
    if not is_named:
        looks = [{**series_style(0), "marker": "o"}, {**series_style(1), "marker": "X"}]
    body = [_marker(f"{key}-{number}", look) for number, look in enumerate(looks)]
    for number, (title, points) in enumerate(maps.items()):
        shown = labels if is_named else (labels[nearest_on_map(points)] != labels).astype(np.int64)
        left = number * (_PANEL + _GAP)
        frame = f'x="{left + 0.5}" y="{_TOP + 0.5}" width="{_PANEL - 1}" height="{_PANEL - 1}"'
        body += [
            f'<text x="{left}" y="11">{title}</text>',
            f'<rect {frame} fill="none" stroke="currentColor" stroke-opacity=".25"/>',
            *_marks(key, _placed(points) + np.array([left, _TOP]), shown),
        ]
    height = _TOP + _PANEL + _MARGIN
    width = 2 * _PANEL + _GAP
    for number, name in enumerate(class_names if is_named else ()):
        column, row = number % _LEGEND_COLUMNS, number // _LEGEND_COLUMNS
        x, y = 5 + column * width // _LEGEND_COLUMNS, height + 6 + _LEGEND_ROW * row
        body += [_points(f"{key}-{number}", f"{x} {y}"), svg_text(x + 7, y + 3, name)]
    if is_named:
        height += _LEGEND_ROW * math.ceil(len(class_names) / _LEGEND_COLUMNS)
    head = f'<svg viewBox="0 0 {width} {height}" font-size="9" fill="currentColor">'
    return Markup(head + "".join(body) + "</svg>")


def _placed(points: Points) -> Points:
    """The points within a panel, both axes in one unit, in its middle and upwards."""
    low, extent = points.min(0), np.ptp(points, axis=0).max()
    inner = _PANEL - 2 * _MARGIN
    places: Points = (points - low) * (inner / extent)
    places += _MARGIN + (inner - places.max(0)) / 2
    places[:, 1] = _PANEL - places[:, 1]
    return places


def _marks(key: str, places: Points, looks: NDArray[np.int64]) -> list[str]:
    """All points by their looks; those of later looks lie above."""
    return [
        _points(
            f"{key}-{look}",
            " ".join(f"{svg_number(x)} {svg_number(y)}" for x, y in places[looks == look]),
        )
        for look in np.unique(looks)
    ]


def _marker(key: str, look: dict[str, str]) -> str:
    color = "currentColor" if look["color"] == "#000000" else look["color"]
    return (
        f'<marker id="{key}" markerUnits="userSpaceOnUse" overflow="visible">'
        f'<path fill="{color}" fill-opacity=".8" d="M0 0{_SHAPES[look["marker"]]}"/></marker>'
    )


def _points(marker: str, places: str) -> str:
    # A few bytes for each point: the browser repeats the marker.
    ends = " ".join(f'marker-{where}="url(#{marker})"' for where in ("start", "mid", "end"))
    return f'<polyline fill="none" {ends} points="{places}"/>'
