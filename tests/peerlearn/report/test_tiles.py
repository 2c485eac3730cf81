"""Rows of small images as markup."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from peerlearn.report.svg import svg_number, svg_text
from peerlearn.report.tiles import Mark, Tile, TileRow, image_url, thumbnail, tile_picture


def decoded(markup: str) -> np.ndarray:
    data = re.search(r'data:image/\w+;base64,([^"]*)', markup)
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))))


def test_a_small_image_stays_as_it_is():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    assert torch.equal(thumbnail(image, 8), image)
    assert torch.equal(thumbnail(image.float() / 255, 8), image)
    assert torch.equal(thumbnail(image, 16), image.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_a_wide_image_is_fitted_whole_into_a_square():
    image = torch.full((3, 40, 80), 200, dtype=torch.uint8)
    tile = thumbnail(image, 64)
    assert (tile[:, 16:48] == 200).all()
    assert (tile[:, :16] == 128).all()
    assert (tile[:, 48:] == 128).all()


def test_pieces_of_the_sheet_are_the_images():
    images = [torch.full((1, 8, 8), 10 * n, dtype=torch.uint8) for n in range(6)]
    rows = [
        TileRow(lines=("a",), tiles=tuple(Tile(image=each) for each in images[first : first + 3]))
        for first in (0, 3)
    ]
    markup = tile_picture("k", [("x",)] * 3, rows)
    sheet = decoded(markup)
    assert sheet.shape == (16, 24)
    pieces = re.findall(r'<use href="#k" x="(-?\d+)" y="(-?\d+)"/>', markup)
    shown = [sheet[-int(y), -int(x)] for x, y in pieces]
    assert shown == [0, 10, 20, 30, 40, 50]
    assert "pixelated" in markup


def test_marks_differ_in_more_than_colour_and_names_are_escaped():
    tile = torch.zeros(3, 70, 70, dtype=torch.uint8)
    row = TileRow(
        lines=("<script>",),
        tiles=(Tile(image=tile, mark=Mark.RIGHT), Tile(image=tile, mark=Mark.WRONG, text="0.5")),
    )
    markup = tile_picture("k", [("a",), ("b",)], [row])
    assert markup.count("stroke-dasharray") == 1
    assert Mark.RIGHT.value in markup
    assert Mark.WRONG.value in markup
    assert "<script>" not in markup
    assert decoded(markup).shape == (64, 128, 3)


def test_the_smaller_file_is_taken():
    flat = torch.zeros(3, 64, 64, dtype=torch.uint8)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8))
    assert image_url(flat).startswith("data:image/png")
    assert image_url(noise).startswith("data:image/jpeg")


def test_numbers_and_text():
    assert [svg_number(value) for value in (3.0, -0.01, 2.55, 100)] == ["3", "0", "2.5", "100"]
    assert svg_text(1, 2.25, "a" * 30).count("a") < 30
