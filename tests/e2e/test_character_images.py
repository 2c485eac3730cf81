"""The script that draws a data set of many classes, with the fonts that matplotlib brings."""

import subprocess
import sys
from pathlib import Path

import matplotlib
from PIL import ImageFont

from peerlearn.datasets import load_dataset

SCRIPT = Path(__file__).parents[2] / "scripts" / "character_images.py"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def draw(folder: Path, fonts: Path = FONTS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "--fonts", str(fonts)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def families(folder: Path) -> set[str]:
    names = {file.stem.partition("-")[2] for file in folder.rglob("*.png")}
    return {str(ImageFont.truetype(FONTS / f"{name}.ttf").getname()[0]) for name in names}


def test_no_family_is_in_both_splits_and_few_classes_are_the_first_of_many(tmp_path: Path) -> None:
    root = tmp_path / "characters"
    done = draw(root)
    assert done.returncode == 0, done.stderr
    train, test = (families(root / "60" / split) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    for split in ("train", "test"):
        many, few = (load_dataset("folder", split, root=str(root / n)) for n in ("60", "10"))
        assert len(many.class_names) == 60
        assert few.class_names == tuple(f"{ord(letter):04x}" for letter in "ABCDEFGHIJ")
        assert many.labels is not None
        per_class = many.labels.bincount()
        assert per_class.unique().numel() == 1
        assert len(few) == 10 * per_class[0]
        # A font without the characters draws boxes, all alike: it is left out.
        for font in (root / "60" / split / "0041").iterdir():
            images = {
                (root / "60" / split / name / font.name).read_bytes() for name in many.class_names
            }
            assert len(images) == 60
        for name in few.class_names:
            for image in (root / "10" / split / name).iterdir():
                twin = root / "60" / split / name / image.name
                assert image.read_bytes() == twin.read_bytes()


def test_nothing_is_drawn_without_fonts_or_over_files(tmp_path: Path) -> None:
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "broken.ttf").write_bytes(b"\x00\x01\x00\x00 no font")
    found = draw(tmp_path / "a", tmp_path / "fonts")
    assert (found.returncode, (tmp_path / "a").exists()) == (1, False)
    assert "too few fonts" in found.stderr
    found = draw(tmp_path / "fonts")
    assert found.returncode == 1
    assert "is there already" in found.stderr
