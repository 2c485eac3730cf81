"""Canvases: real items of clothing on drawn textures, with boxes. All of it is a function of counters, in integers.

An item is a grey image of Fashion-MNIST, bright on black. It is enlarged, and pasted where it is not black. Textures
have an item's grey levels, and edges of their own, so that brightness alone finds no item.

Dimensions: H height, W width, of a canvas or of an item.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from peerlearn.counter_random import MINI_VOC, random_bits, uniform

MOST_ITEMS = 6
_SIDES = (96, 112, 128, 144, 160)
_EMPTY_PERCENT = 6
# Of an item: the side that its image of 28x28 pixels gets, and its brightness.
_ITEM_SIDES = (24, 72)
_GAIN_PERCENT = (60, 100)
# Darker pixels of an item's image are background.
_ITEM_LEVEL = 12
# Half of the items are whole and cover nothing. The others may lie anywhere, by a third beyond a border.
_APART_PERCENT = 50
_ATTEMPTS = 12
# Share of an item that the border and other items hide: more makes it truncated, or else difficult; most is the limit.
_TRUNCATED_PERCENT, _DIFFICULT_PERCENT, _MOST_PERCENT = 5, 60, 85
# Noise has so many cells across and down, and at most so large an amplitude.
_NOISE = {2: 70, 4: 70, 9: 60, 20: 50, 45: 25}
# More than a canvas needs.
_DRAWS = 400

Levels = NDArray[np.uint8]


class Placed(NamedTuple):
    """An item on a canvas.

    Attributes:
        item: number of the item.
        box: corners x1, y1, x2, y2 around its pixels within the canvas, covered or not, in pixels from 0.
        truncated: whether more than 5 % of it is hidden, by the border or by other items.
        difficult: whether more than 60 % of it is hidden.
    """

    item: int
    box: tuple[int, int, int, int]
    truncated: bool
    difficult: bool


class Canvas(NamedTuple):
    """A picture, uint8 (H, W), and the items on it, each of which may cover those before it."""

    pixels: Levels
    placed: list[Placed]


def draw_canvas(items: Sequence[Levels], *words: int) -> Canvas:
    """Draw a canvas.

    Args:
        items: `MOST_ITEMS` images, uint8 (28, 28), the first of which come on the canvas.
        words: integers that tell this canvas from all others, as in `random_bits`.
    """
    draws = iter(uniform(MINI_VOC, *words, torch.arange(_DRAWS)).tolist())
    width, height = (_SIDES[_between(draws, 0, len(_SIDES) - 1)] for _ in range(2))
    pixels = _texture(height, width, draws, words)
    wanted = _between(draws, 1, MOST_ITEMS)
    if _between(draws, 1, 100) <= _EMPTY_PERCENT:
        wanted = 0
    scene, pasted = _Scene(np.full((height, width), -1), {}), dict[int, _Item]()
    for number, image in enumerate(items[:wanted]):
        item = _enlarged(image, draws)
        found = _with_item(scene, number, item, draws)
        if found is not None:
            scene, pasted[number] = found, item
            _paste(pixels, item, scene.spots[number])
    return Canvas(pixels, [_placed(scene, number, item) for number, item in pasted.items()])


def _between(draws: Iterator[float], low: int, high: int) -> int:
    """A random integer, both ends included."""
    return low + int(next(draws) * (high - low + 1))


def _texture(height: int, width: int, draws: Iterator[float], words: Sequence[int]) -> Levels:
    """A gradient, smooth noise of several scales, and up to two kinds of bent stripes."""
    y, x = np.mgrid[:height, :width]
    total = _between(draws, -70, 70) * (2 * x - width) // width
    total += _between(draws, -70, 70) * (2 * y - height) // height
    noise = [_noise(cells, height, width, words) for cells in _NOISE]
    for layer, most in zip(noise, _NOISE.values(), strict=True):
        total += layer * _between(draws, 0, most) // 128
    for _ in range(_between(draws, 0, 2)):
        bend = noise[_between(draws, 0, 2)] * _between(draws, 0, 40) // 128
        place = _between(draws, -4, 4) * x + _between(draws, -4, 4) * y + bend
        period = _between(draws, 12, 80)
        wave = 4 * np.abs(2 * (place % period) - period) - 2 * period
        total += wave * _between(draws, 5, 35) // (2 * period)
    levels: Levels = (total + _between(draws, 50, 170)).clip(0, 255).astype(np.uint8)
    return levels


def _noise(cells: int, height: int, width: int, words: Sequence[int]) -> NDArray[np.int64]:
    """Random levels from -128 to 127 in so many cells across and down, blended into each other."""
    bits = random_bits(MINI_VOC, *words, cells, torch.arange(cells**2)) & 255
    grid = bits.numpy().astype(np.uint8).reshape(cells, cells)
    return _resized(grid, (width, height)).astype(np.int64) - 128


def _resized(levels: Levels, size: tuple[int, int]) -> Levels:
    """Resized to a width and a height."""
    return np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BILINEAR))


class _Item(NamedTuple):
    """An enlarged item: its levels, and which share of a pixel it fills, 0 to 255; both uint8 (H, W)."""

    levels: Levels
    fill: Levels

    @property
    def solid(self) -> NDArray[np.bool_]:
        """The pixels that count as the item's."""
        return self.fill >= 128


def _enlarged(image: Levels, draws: Iterator[float]) -> _Item:
    """An item at its size on the canvas, without the margins of its image."""
    side, gain = _between(draws, *_ITEM_SIDES), _between(draws, *_GAIN_PERCENT)
    if _between(draws, 0, 1):
        image = np.ascontiguousarray(image[:, ::-1])
    inside = image >= _ITEM_LEVEL
    fill = _resized(inside * np.uint8(255), (side, side))
    # The item's own level where a pixel is partly background, or a black rim would tell where items are.
    shown = _resized(image * inside, (side, side)).astype(np.int64) * 255 // np.maximum(fill, 1)
    levels = (shown.clip(0, 255) * gain // 100).astype(np.uint8)
    cut = _tight(fill >= 128)
    return _Item(levels[cut], fill[cut])


def _tight(pixels: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The rows and columns from the first to the last pixel that is set; there must be one."""
    rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


class _Spot(NamedTuple):
    """Where an item lies.

    Attributes:
        on_canvas: rows and columns of the canvas within the item's rectangle.
        of_item: the same part of the item; the rest is beyond the border.
        pixels: number of the item's pixels, all together.
    """

    on_canvas: tuple[slice, slice]
    of_item: tuple[slice, slice]
    pixels: int


def _spot(item: _Item, upper_left: tuple[int, int], shape: tuple[int, ...]) -> _Spot:
    """An item on a canvas of this shape."""
    ends = [
        (max(start, 0), min(start + length, limit))
        for start, length, limit in zip(upper_left, item.fill.shape, shape, strict=True)
    ]
    rows, columns = (slice(*end) for end in ends)
    of_rows, of_columns = (
        slice(first - start, stop - start)
        for start, (first, stop) in zip(upper_left, ends, strict=True)
    )
    return _Spot((rows, columns), (of_rows, of_columns), int(item.solid.sum()))


class _Scene(NamedTuple):
    """What lies where.

    Attributes:
        owner: number of the item that is seen at each pixel, (H, W); -1 = the texture.
        spots: where each item lies, by its number.
    """

    owner: NDArray[np.int64]
    spots: dict[int, _Spot]

    def hidden_percent(self, number: int) -> float:
        seen = int((self.owner == number).sum())
        return 100 - 100 * seen / self.spots[number].pixels


def _with_item(scene: _Scene, number: int, item: _Item, draws: Iterator[float]) -> _Scene | None:
    """The scene with another item at a random place; None if none is found where nothing is hidden too much."""
    shape, sides = scene.owner.shape, item.fill.shape
    apart = _between(draws, 1, 100) <= _APART_PERCENT
    before = {each: scene.hidden_percent(each) for each in scene.spots}
    for _ in range(_ATTEMPTS):
        # How far it may lie beyond each border.
        beyond = [0 if apart else side // 3 for side in sides]
        top, left = (
            _between(draws, -out, limit - side + out)
            for out, limit, side in zip(beyond, shape, sides, strict=True)
        )
        spot = _spot(item, (top, left), shape)
        owner = scene.owner.copy()
        owner[spot.on_canvas][item.solid[spot.of_item]] = number
        after = _Scene(owner, {**scene.spots, number: spot})
        limits = before if apart else {}
        if all(
            after.hidden_percent(each) <= limits.get(each, _MOST_PERCENT) for each in after.spots
        ):
            return after
    return None


def _paste(pixels: Levels, item: _Item, spot: _Spot) -> None:
    fill = item.fill[spot.of_item].astype(np.int64)
    blended = item.levels[spot.of_item] * fill + pixels[spot.on_canvas] * (255 - fill)
    pixels[spot.on_canvas] = (blended + 127) // 255


def _placed(scene: _Scene, number: int, item: _Item) -> Placed:
    spot = scene.spots[number]
    part = _tight(item.solid[spot.of_item])
    (top, bottom), (left, right) = (
        (canvas.start + within.start, canvas.start + within.stop)
        for canvas, within in zip(spot.on_canvas, part, strict=True)
    )
    hidden_percent = scene.hidden_percent(number)
    return Placed(
        number,
        (left, top, right, bottom),
        hidden_percent > _TRUNCATED_PERCENT,
        hidden_percent > _DIFFICULT_PERCENT,
    )
