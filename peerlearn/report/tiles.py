"""Rows of small images as markup of a page: all of them lie in one image, which the page shows piece by piece."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from markupsafe import Markup
from torch import Tensor
from torch.nn.functional import interpolate

from peerlearn.report.svg import svg_number, svg_text

# The side of a tile in the file; a page shows it about as large.
LARGEST_SIDE = 64
_SHOWN_SIDE, _COLUMN, _ROW_GAP = 56, 68, 10
_NAME_WIDTH, _TITLE_HEIGHT, _TEXT_HEIGHT = 92, 28, 13
_JPEG_QUALITY = 80
# What lies beside an image that is no square.
_GREY = 128


class Mark(Enum):
    """What a tile's frame and sign say: a full line and a hook, or a broken line and a cross."""

    NONE = ""
    RIGHT = "M0 3.5l2.5 3L7 0"
    WRONG = "M0.5 0.5l6 6m0-6l-6 6"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An image of a row.

    Attributes:
        image: the image, (channels, height, width) with 1 or 3 channels, uint8 or float in [0, 1].
        mark: what its frame says.
        text: short text below it.
    """

    image: Tensor
    mark: Mark = Mark.NONE
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class TileRow:
    """A row of as many images as there are titles.

    Attributes:
        lines: lines of text to the left of it.
        tiles: images from left to right.
    """

    lines: tuple[str, ...]
    tiles: tuple[Tile, ...]


def tile_picture(key: str, titles: Sequence[tuple[str, ...]], rows: Sequence[TileRow]) -> Markup:
    """The element `svg` of rows of images, below titles of the columns. Equal input gives equal bytes.

    Args:
        key: name of the picture, which no other picture of the page has, of letters, digits and hyphens.
        titles: titles of the columns, of two lines at most.
        rows: rows, at least one.
    """
    images = [tile.image for row in rows for tile in row.tiles]
    side = min(LARGEST_SIDE, max(max(image.shape[1:]) for image in images))
    sheet = torch.stack([thumbnail(image, side) for image in images])
    has_texts = any(tile.text or tile.mark is not Mark.NONE for row in rows for tile in row.tiles)
    pitch = _SHOWN_SIDE + _ROW_GAP + (_TEXT_HEIGHT if has_texts else 0)
    width, height = _NAME_WIDTH + _COLUMN * len(titles), _TITLE_HEIGHT + pitch * len(rows)
    body = [
        _sheet_element(key, sheet, len(titles)),
        *(
            svg_text(
                _NAME_WIDTH + _COLUMN * column + _SHOWN_SIDE / 2, 11 + 11 * line, text, "middle"
            )
            for column, title in enumerate(titles)
            for line, text in enumerate(title)
        ),
    ]
    for number, row in enumerate(rows):
        top = _TITLE_HEIGHT + pitch * number
        first_line = top + _SHOWN_SIDE / 2 + 3 - 6 * (len(row.lines) - 1)
        body += [svg_text(0, first_line + 12 * line, text) for line, text in enumerate(row.lines)]
        for column, tile in enumerate(row.tiles):
            place = (_NAME_WIDTH + _COLUMN * column, top)
            body += _tile(key, tile, place, piece=(column, number), side=side)
    head = f'<svg viewBox="0 0 {width} {height}" font-size="9" fill="currentColor">'
    return Markup(head + "".join(body) + "</svg>")


def thumbnail(image: Tensor, side: int) -> Tensor:
    """An image, (channels, height, width), fitted whole into a grey square: uint8 (channels, side, side)."""
    values = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    longer = max(values.shape[1:])
    height, width = (max(1, round(extent * side / longer)) for extent in values.shape[1:])
    if longer > side:
        values = interpolate(values[None], (height, width), mode="bilinear", antialias=True)[0]
    elif longer < side:
        values = interpolate(values[None], (height, width), mode="nearest")[0]
    square = torch.full((len(values), side, side), _GREY, dtype=torch.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = (
        values.mul(255).round().clamp(0, 255).to(torch.uint8)
    )
    return square


def image_url(sheet: Tensor) -> str:
    """The data URL of an image, uint8 (channels, height, width): a PNG file, or a JPEG file where that is smaller."""
    # Imported here: what only makes texts should not wait for it.
    from PIL import Image

    picture = Image.fromarray((sheet.permute(1, 2, 0) if len(sheet) == 3 else sheet[0]).numpy())
    files = {"png": io.BytesIO(), "jpeg": io.BytesIO()}
    picture.save(files["png"], "PNG", optimize=True)
    picture.save(files["jpeg"], "JPEG", quality=_JPEG_QUALITY, optimize=True)
    kind = min(files, key=lambda name: len(files[name].getvalue()))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind].getvalue()).decode()}"


def _sheet_element(key: str, images: Tensor, columns: int) -> str:
    """All images (N, channels, side, side) as one, to be shown in pieces."""
    channels, side = images.shape[1], images.shape[2]
    rows = len(images) // columns
    sheet = images.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    sheet = sheet.reshape(channels, rows * side, columns * side)
    # Small images show their pixels.
    look = ' style="image-rendering:pixelated"' if side < _SHOWN_SIDE else ""
    return (
        f'<defs><image id="{key}" width="{columns * side}" height="{rows * side}"{look} href="{image_url(sheet)}"/>'
        f'<clipPath id="{key}-clip"><rect width="{side}" height="{side}"/></clipPath></defs>'
    )


def _tile(
    key: str, tile: Tile, place: tuple[int, int], *, piece: tuple[int, int], side: int
) -> list[str]:
    left, top = place
    scale = svg_number(_SHOWN_SIDE / side, 4)
    parts = [
        f'<g transform="translate({left} {top})scale({scale})" clip-path="url(#{key}-clip)">'
        f'<use href="#{key}" x="{-piece[0] * side}" y="{-piece[1] * side}"/></g>'
    ]
    below = top + _SHOWN_SIDE + 11
    if tile.mark is not Mark.NONE:
        broken = ' stroke-dasharray="4 3"' if tile.mark is Mark.WRONG else ""
        frame = f'x="{left - 1}" y="{top - 1}" width="{_SHOWN_SIDE + 2}" height="{_SHOWN_SIDE + 2}"'
        parts += [
            f'<rect {frame} fill="none" stroke="currentColor" stroke-width="2"{broken}/>',
            f'<path transform="translate({left + 8} {below - 7})" d="{tile.mark.value}" fill="none" '
            'stroke="currentColor" stroke-width="1.5"/>',
        ]
    if tile.text:
        centre = left + _SHOWN_SIDE / 2 + (5 if tile.mark is not Mark.NONE else 0)
        parts.append(svg_text(centre, below, tile.text, "middle"))
    return parts
