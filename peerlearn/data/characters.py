"""Characters drawn in this machine's fonts: hundreds of classes without a download.

A class is a character in a style, and a font gives it at most one image. The same font files give the same images,
wherever they lie and however the file system lists them. Another version of Pillow, or of the FreeType in it, may draw
other pixels.

Dimensions: C characters, S styles; H = W = `PIXELS`.
"""

import io
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from peerlearn.data.files import Content
from peerlearn.errors import UserError
from peerlearn.runs.files import file_sha256

FONTS = Path("/usr/share/fonts")
PIXELS = 32
# Shares of the image's side: the size of an em, and the height of the baseline.
_EM = 0.75
_BASELINE = 0.75
_EM_PIXELS = round(_EM * PIXELS)

# Drawn by lot from capitals, digits and signs. Left out are small letters, which many fonts draw as capitals; mirror
# images of others (3 of E, 5 of 2, brackets), because training flips; and - and ., which look the same leaning.
SPLITS = {
    "train": '"#$%&(+/467:=?ABEFHKLMOPRUV~',
    "validation": ";<@DGIJNSX[^",
    "test": "!*289CQTWYZ{",
}
CHARACTERS = "".join(SPLITS.values())
# A character that no font has: what is drawn for it is drawn for every other that a font lacks.
_LACKING = "\U0010ffff"

_FEWEST_FONTS = 20
# So that all images together take at most 106 MB.
_MOST_FONTS = 500

Images = NDArray[np.uint8]


def font_files(folder: Path) -> list[Path]:
    """The TrueType and OpenType files below a folder, in the order of their names."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    # A pipe would keep its reader waiting for ever.
    return sorted(filter(os.path.isfile, files), key=lambda file: (file.name, file))


def open_font(file: Path, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """The font in a file.

    Raises:
        OSError: the file cannot be read, or holds no font.
    """
    # By its content: for a damaged file Pillow would take an installed font of the same file name.
    content = io.BytesIO(file.read_bytes())
    return ImageFont.truetype(content, _EM_PIXELS, layout_engine=layout)


def draw(font: ImageFont.FreeTypeFont, characters: str) -> list[Image.Image] | None:
    """Images of the characters, white on black and centred; None if two of them look the same in the font.

    Raises:
        OSError: the font is damaged.
        ValueError: likewise.
    """
    images = []
    for character in characters:
        image = Image.new("L", (PIXELS, PIXELS))
        where = (PIXELS / 2, _BASELINE * PIXELS)
        ImageDraw.Draw(image).text(where, character, fill=255, font=font, anchor="ms")
        images.append(image)
    distinct = {image.tobytes() for image in images}
    return images if len(distinct) == len(characters) else None


def _outlined(glyphs: Images) -> Images:
    """What surrounds a glyph, one pixel wide, and not the glyph."""
    thick = glyphs
    for down, right in np.ndindex(3, 3):
        thick = np.maximum(thick, _moved(glyphs, down - 1, right - 1))
    return thick - glyphs


def _leaning(glyphs: Images) -> Images:
    """Leaning to the left, as italics do not."""
    row = np.arange(PIXELS)[:, None]
    source = np.arange(PIXELS) - np.rint(0.4 * (row - PIXELS / 2)).astype(int)
    inside = (source >= 0) & (source < PIXELS)
    leaning: Images = glyphs[..., row, source.clip(0, PIXELS - 1)] * inside
    return leaning


def _shadowed(glyphs: Images) -> Images:
    """A glyph before its shadow: itself once more, three pixels lower and to the right and half as bright."""
    return np.maximum(glyphs, _moved(glyphs, 3, 3) // 2)


def _moved(images: Images, down: int, right: int) -> Images:
    """Black enters; what leaves is lost."""
    margin = max(abs(down), abs(right))
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    moved: Images = np.roll(padded, (down, right), (1, 2))
    return moved[:, margin : margin + PIXELS, margin : margin + PIXELS]


# Functions from glyphs to images, (C, H, W) each.
STYLES: dict[str, Callable[[Images], Images]] = {
    "filled": np.copy,
    "outlined": _outlined,
    "leaning": _leaning,
    "shadowed": _shadowed,
}


def class_names(split: str) -> tuple[str, ...]:
    return tuple(f"{character} {style}" for character in SPLITS[split] for style in STYLES)


def characters(split: str, root: Path) -> Content:
    """Characters of one split in all styles, drawn in the fonts below root.

    An image that two classes share is in neither, and one that two fonts share is there once. Fonts that lack one of
    the characters or draw two of them alike are left out. Of the others at most 500 are taken, always in one order.

    Raises:
        UserError: too few fonts have all characters.
    """
    fonts = _read_fonts(root)
    if len(fonts.glyphs) < _FEWEST_FONTS:
        raise UserError(
            f"{root} holds {len(fonts.glyphs)} fonts that draw every character, and characters needs {_FEWEST_FONTS}: "
            "install Debian's packages fonts-dejavu, fonts-freefont-ttf and fonts-aenigma, or point data.root to a "
            "folder of .ttf and .otf fonts"
        )
    images = [_styled(glyphs) for glyphs in fonts.glyphs]
    names = class_names(split)
    first = CHARACTERS.index(SPLITS[split][0]) * len(STYLES)
    chosen = [
        (font, place)
        for font, place in unique_images(images)
        if first <= place < first + len(names)
    ]
    return Content(
        torch.from_numpy(np.stack([images[font][place] for font, place in chosen])).unsqueeze(1),
        torch.tensor([place - first for _, place in chosen]),
        names,
        remarks=fonts.remarks(root),
        sources=fonts.sources,
    )


def unique_images(images: Sequence[Images]) -> list[tuple[int, int]]:
    """Font and class of the images that are of one class alone, without repetitions and black ones, in rising order."""
    places = defaultdict(list)
    for font, of_font in enumerate(images):
        for place, image in enumerate(of_font):
            if image.any():
                places[blake2b(image.tobytes()).digest()].append((font, place))
    return sorted(found[0] for found in places.values() if len({place for _, place in found}) == 1)


class _Fonts(NamedTuple):
    """The fonts below a folder.

    Attributes:
        glyphs: images of all characters, (C, H, W), in each font that draws them all differently.
        sources: name and SHA-256 of each font that can be read, also of those without all characters.
        damaged: names of font files that cannot be read.
    """

    glyphs: list[Images]
    sources: tuple[str, ...]
    damaged: list[str]

    def remarks(self, folder: Path) -> tuple[str, ...]:
        if not self.damaged:
            return ()
        return (
            f"{folder}: skipped {len(self.damaged)} font files that cannot be read or drawn, {self.damaged[0]} first",
        )


def _read_fonts(folder: Path) -> _Fonts:
    """Fonts in the order of their hashes, so that the first ones are of all kinds, and the same on every machine."""
    files, damaged = [], []
    for file in font_files(folder):
        try:
            status = file.stat()
            files.append((file, status.st_size, status.st_mtime_ns))
        except OSError:
            damaged.append(file.name)
    drawn = _drawn(tuple(files))
    return drawn._replace(damaged=[*damaged, *drawn.damaged])


# Drawing takes seconds, and a run asks for three splits of the same fonts.
@lru_cache(maxsize=1)
def _drawn(files: tuple[tuple[Path, int, int], ...]) -> _Fonts:
    """The fonts of some files, each with its size and time, by which a changed one is drawn anew."""
    glyphs: dict[str, Images] = {}
    sources, damaged = [], []
    hashed = []
    for file, *_ in files:
        try:
            hashed.append((file_sha256(file), file))
        except OSError:
            damaged.append(file.name)
    for digest, file in sorted(hashed, key=lambda entry: (entry[0], entry[1].name)):
        try:
            # Pillow's own layout: whether the other one is there depends on the machine.
            font = open_font(file, ImageFont.Layout.BASIC)
            images = draw(font, CHARACTERS + _LACKING) if len(glyphs) < _MOST_FONTS else None
        except (OSError, ValueError):
            damaged.append(file.name)
            continue
        sources.append(f"{file.name} {digest}")
        if images is not None and all(image.getbbox() for image in images[:-1]):
            glyphs[digest] = np.stack([np.asarray(image) for image in images[:-1]])
    return _Fonts(list(glyphs.values()), tuple(sources), damaged)


def _styled(glyphs: Images) -> Images:
    """All classes' images in one font, (C * S, H, W)."""
    styled = np.stack([style(glyphs) for style in STYLES.values()], axis=1)
    return styled.reshape(-1, PIXELS, PIXELS)
