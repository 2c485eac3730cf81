"""Images of many classes without a download: characters drawn in this machine's fonts.

    sudo apt-get install -y --no-install-recommends fonts-aenigma fonts-dejavu fonts-freefont-ttf
    python scripts/character_images.py runs/characters
    peerlearn pretrain supervised_fashion_mnist --data.name folder --data.root runs/characters/60 --data.shots 16

Writes two data sets of PNG files: ``60`` with all classes and ``10`` with A to J alone. Every font family draws either
training or test images. Characters that mirror another one (b and d, brackets) are left out: supervised training flips.
The data set `characters` needs no files; it has other characters, in four styles, and splits them by class.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from peerlearn.data.characters import FONTS, draw, font_files, open_font
from peerlearn.runs.progress import progress

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "aefghikmnrty" + "23456789" + "!#$%&*+-:;=?@~"
FEW = 10
_TEST_SHARE = 0.4


class Font(NamedTuple):
    """The family and the file name of a font, and its images, one per character."""

    family: str
    name: str
    images: list[Image.Image]


def read_fonts(folder: Path) -> list[Font]:
    """The fonts below ``folder`` that have all characters."""
    files = font_files(folder)
    fonts = []
    with progress(len(files), "fonts", name="reading") as report:
        for file in files:
            report.advance()
            try:
                opened = open_font(file)
                images = draw(opened, CHARACTERS)
            except (OSError, ValueError):  # A font that Pillow cannot read or draw.
                continue
            if images is not None:
                fonts.append(Font(str(opened.getname()[0]), file.stem, images))
    return fonts


def split_families(fonts: Sequence[Font]) -> dict[str, list[Font]]:
    """Training and test fonts, with no family in both. The choice is random, but always the same."""
    families = sorted({font.family for font in fonts})
    random.Random(0).shuffle(families)
    place = {family: number for number, family in enumerate(families)}
    tests = round(len(families) * _TEST_SHARE)
    ordered = sorted(fonts, key=lambda font: place[font.family])
    return {
        "train": [font for font in ordered if place[font.family] >= tests],
        "test": [font for font in ordered if place[font.family] < tests],
    }


def write(fonts: Sequence[Font], characters: str, folder: Path) -> None:
    """Write one data set: split/class/font.png. The name of a class is its character's number in Unicode."""
    for split, chosen in split_families(fonts).items():
        for place, character in enumerate(characters):
            images = folder / split / f"{ord(character):04x}"
            images.mkdir(parents=True)
            for number, font in enumerate(chosen):
                font.images[place].save(images / f"{number:05d}-{font.name}.png")
        families = len({font.family for font in chosen})
        print(f"{split}: {len(characters)} classes x {len(chosen)} fonts of {families} families")


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="is created")
    parser.add_argument("--fonts", type=Path, default=FONTS)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there already: name another folder")
    fonts = read_fonts(arguments.fonts)
    if not all(split_families(fonts).values()):
        sys.exit(f"{arguments.fonts} has too few fonts with all characters: install more")
    try:
        arguments.folder.parent.mkdir(parents=True, exist_ok=True)
        # The data set appears as a whole, because a part would be taken for the whole.
        with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as scratch:
            whole = Path(scratch) / "whole"
            for characters in (CHARACTERS, CHARACTERS[:FEW]):
                write(fonts, characters, whole / str(len(characters)))
            whole.rename(arguments.folder)
    except OSError as error:
        sys.exit(f"{arguments.folder} cannot be written ({error.strerror}): name another folder")
    print(f"written: {arguments.folder}")


if __name__ == "__main__":
    main()
