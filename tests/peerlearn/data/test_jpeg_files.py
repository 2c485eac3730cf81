"""JPEG files: whichever library decodes them, the pixels and the refusals are Pillow's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from peerlearn.data import image_folders
from peerlearn.data.image_folders import DecodeError, decode_image


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with edges and noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + generator.normal(0, 6, smooth.shape)
    noisy[height // 3 : height // 2, width // 4 : width // 2] += 60
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def stored(image: Image.Image, path: Path, **how: object) -> Path:
    image.save(path, "JPEG", **how)
    return path


def by_pillow(path: Path) -> Tensor | str:
    """Pillow's pixels, or why it has none."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:
        return " ".join(str(error).split())


def ours(path: Path) -> Tensor | str:
    try:
        return decode_image(path)
    except DecodeError as error:
        return error.reason


@pytest.fixture
def decoded_fast(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each file that simplejpeg is asked for: whether it took it."""
    asked: list[bool] = []
    decode = image_folders.decode_jpeg

    def noting(*arguments: object) -> np.ndarray:
        asked.append(False)
        pixels = decode(*arguments)
        asked[-1] = True
        return pixels

    monkeypatch.setattr(image_folders, "decode_jpeg", noting)
    return asked


SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (8, 8), (15, 17), (16, 16), (33, 31), (75, 57), (101, 203)]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "grey"])
def test_pixels_are_pillow_s(subsampling, progressive, decoded_fast, tmp_path):
    for height, width in SIZES:
        for quality in (20, 75, 95):
            image = photo(height, width)
            how = {"quality": quality, "progressive": progressive}
            if subsampling == "grey":
                image = image.convert("L")
            else:
                how["subsampling"] = subsampling
            path = stored(image, tmp_path / "a.jpg", **how)
            pixels = ours(path)
            assert torch.equal(pixels, by_pillow(path))
            assert pixels.dtype == torch.uint8
            assert pixels.is_contiguous()
    assert decoded_fast == [True] * len(SIZES) * 3


def test_odd_kinds_are_pillow_s(decoded_fast, tmp_path):
    image = photo(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "CMYK": stored(image.convert("CMYK"), tmp_path / "cmyk.jpg"),
        "stored as RGB": stored(image, tmp_path / "rgb.jpg", keep_rgb=True),
        "restart markers": stored(image, tmp_path / "rst.jpg", restart_marker_blocks=2),
        "turned by EXIF": stored(image, tmp_path / "exif.jpg", exif=exif),
        "profile": stored(image, tmp_path / "icc.jpg", icc_profile=b"x" * 70_000),
        "named .png": stored(image, tmp_path / "a.png"),
    }
    for path in kinds.values():
        assert torch.equal(ours(path), by_pillow(path))
    # CMYK is not asked for.
    assert decoded_fast == [True] * 5
    assert ours(kinds["turned by EXIF"]).shape == (3, 40, 30)


def test_more_than_the_end_is_no_harm(tmp_path):
    path = stored(photo(40, 30), tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + b"trailing")
    assert torch.equal(ours(path), by_pillow(path))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_cut_anywhere_is_refused_for_pillow_s_reason(progressive, tmp_path):
    path = stored(photo(80, 60), tmp_path / "a.jpg", quality=50, progressive=progressive)
    whole = path.read_bytes()
    for length in [0, 1, 2, 3, 20, *range(100, len(whole), len(whole) // 25), len(whole) - 1]:
        path.write_bytes(whole[:length])
        pillow = by_pillow(path)
        if isinstance(pillow, Tensor):
            # All of the picture is there.
            assert length == len(whole) - 1
            assert torch.equal(ours(path), pillow)
            continue
        unknown = "cannot identify" in pillow
        assert ours(path) == ("no image in any known format" if unknown else pillow)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_damaged_file_is_what_pillow_makes_of_it(mode, progressive, decoded_fast, tmp_path):
    path = stored(photo(64, 48).convert(mode), tmp_path / "a.jpg", progressive=progressive)
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(2, len(whole), generator.integers(1, 4)):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        pillow, own = by_pillow(path), ours(path)
        refused += isinstance(pillow, str)
        if isinstance(pillow, str):
            assert isinstance(own, str), pillow
        else:
            assert torch.equal(own, pillow)
    assert refused > 3
    # Both decoders have had their share.
    assert {*decoded_fast} == {True, False}


def test_an_image_beyond_pillow_s_limit_is_not_decoded(decoded_fast, tmp_path, monkeypatch):
    path = stored(photo(40, 30), tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "decompression bomb" in ours(path)
    assert decoded_fast == []
