"""Duplicates of images: the same bytes, and near duplicates by a perceptual hash."""

import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from peerlearn.data.duplicates import (
    Look,
    Pair,
    _close_hashes,
    duplicates,
    look,
    look_at_all,
)
from tests.detection_trees import write_jpeg


def look_of(path: Path) -> Look:
    found = look(path)
    assert isinstance(found, Look)
    return found


def test_the_hash_says_where_a_picture_is_brighter_than_to_the_right(tmp_path: Path):
    ramp = np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))
    Image.fromarray(ramp).save(tmp_path / "rising.png")
    Image.fromarray(ramp[:, ::-1].copy()).save(tmp_path / "falling.png")
    assert look_of(tmp_path / "rising.png").dhash == 0
    assert look_of(tmp_path / "falling.png").dhash == 2**64 - 1
    ramp[0, 0] = 30
    Image.fromarray(ramp).save(tmp_path / "one.png")
    assert look_of(tmp_path / "one.png").dhash == 2**63
    assert (look_of(tmp_path / "one.png").width, look_of(tmp_path / "one.png").height) == (9, 8)


CHANGES = {
    "compressed": lambda image: image,
    "smaller": lambda image: image.resize((150, 100)),
    "wider": lambda image: image.resize((640, 400)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_near_duplicates_and_others_are_not(change: str, tmp_path: Path):
    paths = [tmp_path / f"{seed}.jpg" for seed in range(12)]
    for seed, path in enumerate(paths):
        write_jpeg(path, seed, (300, 200))
    copy = tmp_path / "copy.jpg"
    with Image.open(paths[7]) as image:
        CHANGES[change](image).save(copy, quality=60)
    looks = [look_of(path) for path in (*paths, copy)]
    assert duplicates(looks, ["train"] * 12 + ["test"]) == [Pair(7, 12, False)]


def made(sha256: str, dhash: int, seed: int = 0) -> Look:
    grey = np.random.default_rng(seed).integers(0, 256, 256, dtype=np.uint8).tobytes()
    return Look(Path(sha256), sha256, 1, 1, dhash, grey)


def test_each_image_is_reported_with_the_first_of_each_split():
    looks = [made(name, 0) for name in ("a", "a", "a", "b", "c")]
    splits = ["train", "train", "test", "test", "train"]
    assert duplicates(looks, splits) == [
        Pair(0, 1, True),
        Pair(0, 2, True),
        Pair(0, 3, False),
        Pair(2, 3, False),
        Pair(0, 4, False),
        Pair(2, 4, False),
    ]


def test_known_images_are_not_asked_about():
    looks = [made("a", 0), made("a", 0), made("b", 0), made("a", 0)]
    splits = ["other", "other", "other", "train"]
    assert duplicates(looks, splits, known=3) == [Pair(0, 3, True)]
    assert duplicates(looks, ["other", "other", "other2", "train"], known=3) == [
        Pair(0, 3, True),
        Pair(2, 3, False),
    ]


def test_four_bits_are_near_and_five_are_not():
    looks = [made("a", 0), made("b", 0b1 << 60 | 0b1 << 40 | 0b11)]
    assert duplicates(looks, ["", ""]) == [Pair(0, 1, False)]
    looks[1] = looks[1]._replace(dhash=looks[1].dhash | 1 << 20)
    assert duplicates(looks, ["", ""]) == []


def test_pictures_of_one_hash_that_look_different_are_no_duplicates():
    assert not duplicates([made("a", 0, seed=1), made("b", 0, seed=2)], ["", ""])


def test_flat_pictures_are_compared_by_their_brightness():
    levels = (0, 255, 3)
    looks = [made(str(level), 0)._replace(grey=bytes([level]) * 256) for level in levels]
    assert duplicates(looks, [""] * 3) == [Pair(0, 2, False)]


def test_close_hashes_are_those_of_all_pairs():
    noise = np.random.default_rng(0)
    hashes = noise.integers(0, 2**64, 60, dtype=np.uint64)
    # Of each hash three that differ from it in up to six bits anywhere.
    flips = [
        np.uint64(sum(1 << int(bit) for bit in noise.choice(64, bits, replace=False)))
        for bits in (3, 4, 5, 6)
    ]
    every = np.unique(np.concatenate([hashes, *(hashes ^ flip for flip in flips)]))
    all_pairs = {
        (int(one), int(other))
        for one, other in combinations(every, 2)
        if int(one ^ other).bit_count() <= 4
    }
    assert len(all_pairs) > 100
    assert {tuple(sorted(pair)) for pair in _close_hashes(every)} == all_pairs


@pytest.mark.parametrize("equal", range(5))
def test_one_equal_band_of_five_is_enough(equal: int):
    other = sum(1 << 13 * band + 5 for band in range(5) if band != equal)
    assert list(_close_hashes(np.array([0, other], np.uint64))) == [(0, other)]


@pytest.mark.parametrize("alike", [False, True])
def test_many_images_take_seconds(alike: bool):
    noise = np.random.default_rng(0)
    hashes = noise.integers(0, 2**64, 20_000, dtype=np.uint64)
    looks = [
        made(str(number), 5 if alike else int(value), seed=number)
        for number, value in enumerate(hashes)
    ]
    looks[-1] = looks[3]._replace(sha256="copy")
    begun = time.monotonic()
    assert duplicates(looks, ["train"] * 20_000) == [Pair(3, 19_999, False)]
    assert time.monotonic() - begun < 60


def test_processes_find_what_one_finds(tmp_path: Path, monkeypatch):
    paths = [tmp_path / f"{seed}.jpg" for seed in range(20)]
    for seed, path in enumerate(paths):
        write_jpeg(path, seed)
    paths[5].write_bytes(b"no picture")
    alone = look_at_all(paths, "decoding")
    monkeypatch.setattr("peerlearn.data.duplicates._CHUNKS_WORTH_PROCESSES", 1)
    assert look_at_all(paths, "decoding") == alone
    assert alone[5] == (
        f"cannot decode {paths[5]} (no image in any known format): replace or remove the file"
    )
    assert alone[6] == look_of(paths[6])
