"""Image files as they come: what lies beside their pixels must not cost the pixels."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from peerlearn.data.image_folders import DecodeError, decode_image, image_extent

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)


def chunk(kind: bytes, content: bytes, *, sound: bool = True) -> bytes:
    check = zlib.crc32(kind + content) ^ (0 if sound else 1)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_with(path: Path, *chunks: bytes, before: bytes = b"IDAT") -> Path:
    """A PNG file with these chunks before its first one of a kind."""
    Image.fromarray(PIXELS).save(path)
    content = path.read_bytes()
    place = content.index(before) - 4
    path.write_bytes(content[:place] + b"".join(chunks) + content[place:])
    return path


LARGE = zlib.compress(b"x" * 5_000_000)


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"zTXt", b"Comment\0\0" + LARGE)],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)],
        [chunk(b"tEXt", b"Comment\0" + b"x" * 900_000)] * 80,
        [chunk(b"iCCP", b"profile\0\0" + LARGE)],
        [chunk(b"iCCP", b"profile\0\0" + b"no zlib")],
        [chunk(b"tEXt", b"Comment\0abc", sound=False)],
        [chunk(b"eXIf", b"no exif")],
        [chunk(b"pHYs", b"")],
    ],
    ids=[
        "zTXt",
        "iTXt",
        "80 texts",
        "large profile",
        "spoilt profile",
        "checksum",
        "exif",
        "short",
    ],
)
def test_texts_and_profiles_of_a_png_cost_no_pixels(chunks: list[bytes], before: bytes, tmp_path):
    path = png_with(tmp_path / "a.png", *chunks, before=before)
    assert torch.equal(decode_image(path), EXPECTED)


def test_a_text_that_pillow_compresses_itself(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 5_000_000, zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="too large"), Image.open(tmp_path / "a.png") as image:
        image.load()
    assert torch.equal(decode_image(tmp_path / "a.png"), EXPECTED)


def test_a_png_whose_pixels_are_damaged_is_refused_with_the_first_reason(tmp_path):
    path = png_with(tmp_path / "a.png", chunk(b"zTXt", b"Comment\0\0" + LARGE))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DecodeError, match="Decompressed data too large"):
        decode_image(path)


@pytest.mark.parametrize("largest", [1023, 4095, 65535])
def test_16_bit_pgm_keeps_its_high_byte(largest: int, tmp_path):
    """Pillow scales each range to 16 bits."""
    grey = np.array([[0, largest // 2, largest]], dtype=">u2")
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 3 1 %d\n" % largest + grey.tobytes())
    assert decode_image(path)[0].tolist() == [[0, 127, 255]]


def test_the_first_frame_of_a_gif_and_of_a_webp(tmp_path):
    frames = [Image.new("RGB", (7, 5), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        image = decode_image(tmp_path / name)
        assert image.flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0], name


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_the_content_counts_and_not_the_name(kind: str, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", format=kind)
    assert decode_image(tmp_path / "a.png").shape == (3, 5, 7)


def test_a_jpeg_of_several_pictures_is_its_first(tmp_path):
    """As phones write them (MPO)."""
    images = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    images[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=images[1:])
    assert int(decode_image(tmp_path / "a.jpg").min()) == 255


def test_the_extent_is_read_from_the_head_alone(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert image_extent(tmp_path / "a.png") == (7, 5)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    assert image_extent(tmp_path / "a.png") == (7, 5)
    (tmp_path / "b.png").write_bytes(b"")
    assert image_extent(tmp_path / "b.png") is None
