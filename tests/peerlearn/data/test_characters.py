"""Characters in the fonts of this machine (`scripts/system_packages.sh` installs them) and in small folders of them."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from fewshot.evaluate import evaluate_features
from peerlearn.data import characters
from peerlearn.data.characters import (
    CHARACTERS,
    FONTS,
    PIXELS,
    SPLITS,
    STYLES,
    draw,
    unique_images,
)
from peerlearn.data.datasets import CLASS_SPLITS, ImageDataset, first_images, load_dataset
from peerlearn.data.published import PUBLISHED, is_split_by_class
from peerlearn.errors import UserError

# Fonts of Debian's fonts-dejavu and fonts-freefont-ttf that draw every character, and no two alike.
PLAIN = sorted([*(FONTS / "truetype/dejavu").glob("DejaVuS*"), *FONTS.rglob("Free*.ttf")])


def folder_of_fonts(folder: Path, fonts: list[Path] = PLAIN) -> Path:
    folder.mkdir()
    for font in fonts:
        (folder / font.name).symlink_to(font)
    return folder


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_fonts(tmp_path_factory.mktemp("fonts") / "plain")


@pytest.fixture(autouse=True)
def drawn_anew(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """No test takes an earlier drawing, but the one that is about that, by the function which this returns."""
    kept = characters._drawn
    monkeypatch.setattr(characters, "_drawn", kept.__wrapped__)
    return kept


def load(root: Path, split: str = "test") -> ImageDataset:
    return load_dataset("characters", split, root=str(root))


def images_of(dataset: ImageDataset) -> list[bytes]:
    assert isinstance(dataset.images, torch.Tensor)
    return [image.numpy().tobytes() for image in dataset.images]


def of_class(dataset: ImageDataset, name: str) -> np.ndarray:
    assert dataset.labels is not None
    assert isinstance(dataset.images, torch.Tensor)
    return dataset.images[dataset.labels == dataset.class_names.index(name), 0].numpy()


def drawn(character: str, font: Path) -> np.ndarray:
    image = Image.new("L", (32, 32))
    opened = ImageFont.truetype(font, 24, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(image).text((16, 24), character, fill=255, font=opened, anchor="ms")
    return np.asarray(image)


def error(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is drawn


@pytest.mark.slow(30)
def test_the_fonts_of_the_three_packages_make_hundreds_of_classes_that_few_pixels_tell_apart():
    splits = {split: load_dataset("characters", split) for split in CLASS_SPLITS}
    names = [name for dataset in splits.values() for name in dataset.class_names]
    assert len(set(names)) == len(names) == 208
    assert [len(dataset.class_names) for dataset in splits.values()] == [112, 48, 48]
    images = Counter(image for dataset in splits.values() for image in images_of(dataset))
    assert max(images.values()) == 1
    assert bytes(PIXELS**2) not in images
    for dataset in splits.values():
        assert dataset.labels is not None
        per_class = dataset.labels.bincount(minlength=dataset.num_classes)
        # More than 300 fonts draw every character. Few images are those of another font too.
        assert 250 < per_class.min() <= per_class.max() <= 500
    pixels = splits["train"].images / 255
    assert pixels.mean().item() == pytest.approx(splits["train"].mean[0], abs=0.01)
    assert pixels.std().item() == pytest.approx(splits["train"].std[0], abs=0.01)
    # Raw pixels are far above chance (20) and far below what a network can reach: 40 and 61 were measured.
    test = splits["test"]
    for shots, low, high in ((1, 35, 46), (5, 56, 67)):
        result = evaluate_features(
            test.images.flatten(1) / 255, test.labels, ways=5, shots=shots, episodes=200
        )
        assert low < result.mean < high


def test_a_class_is_a_character_in_a_style_and_no_character_is_in_two_splits(fonts):
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 52
    assert sorted(map(len, SPLITS.values())) == [12, 12, 28]
    assert is_split_by_class("characters")
    known = PUBLISHED["characters"]
    assert known is not None
    assert tuple(known.images) == CLASS_SPLITS
    datasets = [load(fonts, split) for split in CLASS_SPLITS]
    for split, dataset in zip(CLASS_SPLITS, datasets, strict=True):
        assert {name[0] for name in dataset.class_names} == set(SPLITS[split])
        assert dataset.class_names[:5] == (
            *(f"{SPLITS[split][0]} {style}" for style in ("filled", "outlined", "leaning")),
            f"{SPLITS[split][0]} shadowed",
            f"{SPLITS[split][1]} filled",
        )
        assert dataset.images.dtype == torch.uint8
        assert dataset.images.shape[1:] == (known.channels, known.size, known.size)
        assert len(dataset.labels.unique()) == dataset.num_classes
        assert dataset.labels.bincount().min() >= 20
    assert datasets[0].num_classes == known.classes
    images = [image for dataset in datasets for image in images_of(dataset)]
    assert len(set(images)) == len(images)


def test_every_font_draws_every_character_once_white_on_black(fonts):
    dataset = load(fonts)
    for name in ("Q", "2", "*"):
        expected = {drawn(name, font).tobytes() for font in PLAIN}
        assert {image.tobytes() for image in of_class(dataset, f"{name} filled")} == expected
    assert isinstance(dataset.images, torch.Tensor)
    assert (dataset.images.amax((1, 2, 3)) > 100).all()
    assert (dataset.images == 0).float().mean() > 0.7


def test_the_first_images_are_of_all_classes(fonts):
    dataset = load(fonts)
    first = first_images(dataset, 3 * dataset.num_classes)
    assert first.labels is not None
    assert first.labels.bincount(minlength=dataset.num_classes).min() >= 2
    assert first.sources == dataset.sources


def test_styles_by_hand():
    glyph = np.zeros((1, PIXELS, PIXELS), np.uint8)
    # A bar of three columns, from row 6 to row 25.
    glyph[0, 6:26, 14:17] = 200
    styled = {name: style(glyph)[0] for name, style in STYLES.items()}
    assert (styled["filled"] == glyph).all()
    ring = np.zeros((PIXELS, PIXELS), np.uint8)
    ring[5:27, 13:18] = 200
    ring[6:26, 14:17] = 0
    assert (styled["outlined"] == ring).all()
    # A row moves by 0.4 of its distance from the middle, upper rows to the left.
    for row, move in ((6, -4), (10, -2), (16, 0), (20, 2), (25, 4)):
        assert np.flatnonzero(styled["leaning"][row]).tolist() == [14 + move, 15 + move, 16 + move]
    assert styled["leaning"].sum() == glyph.sum()
    shadow = np.zeros((PIXELS, PIXELS), np.uint8)
    shadow[9:29, 17:20] = 100
    assert (styled["shadowed"] == np.maximum(glyph[0], shadow)).all()


def test_styles_lose_what_leaves_the_image_and_nothing_comes_back_on_the_other_side():
    glyph = np.zeros((2, PIXELS, PIXELS), np.uint8)
    glyph[0, 0, :4] = 255
    glyph[1, -1, -1] = 255
    assert not STYLES["leaning"](glyph).any()
    assert STYLES["shadowed"](glyph)[1].sum() == 255
    assert (STYLES["outlined"](glyph).sum((1, 2)) == [6 * 255, 3 * 255]).all()


def test_an_image_of_two_classes_is_in_neither_and_one_of_two_fonts_is_there_once():
    a, b, c, black = (np.full((2, 2), value, np.uint8) for value in (1, 2, 3, 0))
    fonts = [np.stack(images) for images in ([a, b, b], [a, c, black], [b, c, a + 9])]
    assert unique_images(fonts) == [(0, 0), (1, 1), (2, 2)]
    assert unique_images([np.stack([a, b]), np.stack([a, c])]) == [(0, 0), (0, 1), (1, 1)]


# Which fonts


def test_the_same_fonts_give_the_same_bytes_wherever_they_lie_and_however_they_are_listed(
    fonts, tmp_path, monkeypatch
):
    expected = load(fonts)
    assert load(fonts).fingerprint() == expected.fingerprint()
    for place, font in enumerate(PLAIN):
        (tmp_path / f"{place % 3}" / "a").mkdir(parents=True, exist_ok=True)
        shutil.copy(font, tmp_path / f"{place % 3}" / ("a" if place % 2 else "") / font.name)
    (tmp_path / "README.txt").write_text("no font")
    listed = Path.rglob

    def shuffled(folder: Path, pattern: str) -> list[Path]:
        found = sorted(listed(folder, pattern))
        random.Random(3).shuffle(found)
        return found

    monkeypatch.setattr(Path, "rglob", shuffled)
    found = load(tmp_path)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)
    assert found.sources == expected.sources
    assert found.fingerprint() == expected.fingerprint()


def test_fonts_are_drawn_once_for_all_splits_and_anew_when_a_file_changes(
    drawn_anew, tmp_path, monkeypatch
):
    drawings = []

    def counted(font: ImageFont.FreeTypeFont, letters: str) -> object:
        drawings.append(font)
        return draw(font, letters)

    monkeypatch.setattr(characters, "_drawn", drawn_anew)
    monkeypatch.setattr(characters, "draw", counted)
    root = tmp_path / "fonts"
    root.mkdir()
    for font in PLAIN:
        shutil.copy(font, root)
    first = [load(root, split).fingerprint() for split in CLASS_SPLITS]
    assert len(drawings) == len(PLAIN)
    assert [load(root, split).fingerprint() for split in CLASS_SPLITS] == first
    assert len(drawings) == len(PLAIN)
    (root / PLAIN[0].name).write_bytes(PLAIN[0].read_bytes()[:5000])
    changed = load(root)
    assert len(changed.sources) == len(PLAIN) - 1
    assert changed.remarks
    assert len(drawings) == 2 * len(PLAIN) - 1


def test_the_fingerprint_changes_with_the_list_of_fonts_even_where_the_images_stay(fonts, tmp_path):
    whole = load(fonts)
    assert len(whole.sources) == len(PLAIN)
    fewer = load(folder_of_fonts(tmp_path / "fewer", PLAIN[1:]))
    assert len(fewer) < len(whole)
    # A copy under another name adds no image, and neither does a font without the characters.
    copy = folder_of_fonts(tmp_path / "copy")
    (copy / "Copy.TTF").symlink_to(PLAIN[0])
    mathematics = folder_of_fonts(tmp_path / "mathematics")
    (mathematics / "signs.otf").symlink_to(lacking_font())
    more = [load(copy), load(mathematics)]
    for dataset in more:
        assert torch.equal(dataset.images, whole.images)
        assert len(dataset.sources) == len(whole.sources) + 1
    fingerprints = {dataset.fingerprint() for dataset in (whole, fewer, *more)}
    assert len(fingerprints) == 4


def lacking_font() -> Path:
    """A font of matplotlib's that draws the same box for many characters."""
    return Path(matplotlib.get_data_path()) / "fonts/ttf/STIXSizFiveSymReg.ttf"


def test_a_font_that_lacks_one_character_is_left_out(fonts, tmp_path):
    root = folder_of_fonts(tmp_path / "fonts")
    font = TTFont(PLAIN[0])
    codes = font["cmap"].tables
    for name, glyph in (("box", None), ("blank", font.getBestCmap()[ord(" ")])):
        for table in codes:
            table.cmap.pop(ord("Q"), None)
            if glyph:
                table.cmap[ord("Q")] = glyph
        font.save(root / f"{name}.ttf")
        assert drawn("Q", root / f"{name}.ttf").any() == (name == "box")
    found, expected = load(root), load(fonts)
    assert len(found.sources) == len(expected.sources) + 2
    assert torch.equal(found.images, expected.images)


def test_damaged_fonts_are_skipped_and_told(fonts, tmp_path):
    expected = load(fonts)
    assert expected.remarks == ()
    root = folder_of_fonts(tmp_path / "fonts")
    (root / "cut.ttf").write_bytes(PLAIN[0].read_bytes()[:5000])
    (root / "empty.otf").touch()
    (root / "gone.ttf").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe.ttf")
    (root / "folder.ttf").mkdir()
    found = load(root)
    assert found.fingerprint() == expected.fingerprint()
    assert found.remarks == (
        f"{root}: skipped 2 font files that cannot be read or drawn, cut.ttf first",
    )


def test_a_damaged_font_is_not_replaced_by_an_installed_one_of_its_name(fonts, tmp_path):
    root = folder_of_fonts(tmp_path / "fonts", PLAIN[1:])
    expected = load(root)
    (root / PLAIN[0].name).write_bytes(PLAIN[0].read_bytes()[:5000])
    found = load(root)
    assert found.fingerprint() == expected.fingerprint()
    assert f"{PLAIN[0].name} first" in found.remarks[0]


def test_no_fonts_and_too_few_are_one_line_with_the_packages(tmp_path, monkeypatch):
    packages = "install Debian's packages fonts-dejavu, fonts-freefont-ttf and fonts-aenigma"
    (tmp_path / "none").mkdir()
    assert f"{tmp_path / 'none'} holds 0 fonts" in error(tmp_path / "none")
    few = folder_of_fonts(tmp_path / "few", PLAIN[:19])
    # The same font again is no further font.
    (few / "again.ttf").symlink_to(PLAIN[0])
    message = error(few)
    assert f"{few} holds 19 fonts that draw every character, and characters needs 20" in message
    assert packages in message
    (few / "another.ttf").symlink_to(PLAIN[19])
    assert load(few).labels.bincount().min() > 10
    monkeypatch.setattr(characters, "FONTS", tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"nowhere holds 0 fonts .*{packages}"):
        load_dataset("characters")


def test_of_very_many_fonts_the_first_by_hash_are_drawn_and_all_are_listed(fonts, monkeypatch):
    whole = load(fonts)
    monkeypatch.setattr(characters, "_MOST_FONTS", 21)
    found = load(fonts)
    assert found.sources == whole.sources
    assert 0.9 * 21 * 48 < len(found) <= 21 * 48
    assert set(images_of(found)) <= set(images_of(whole))
