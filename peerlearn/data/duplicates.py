"""Images that are the same, or nearly: by the SHA-256 of their files, and by a perceptual hash.

The perceptual hash is dHash: whether each of 8x8 places of the grey image is brighter than its right neighbour.
Pictures of little texture share hashes with others that look different, so two are near duplicates only if their
small grey versions agree too.

Dimensions: N images.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from peerlearn.data.image_folders import DecodeError, decode_image
from peerlearn.data.workers import results, worker_pool
from peerlearn.runs.files import file_sha256
from peerlearn.runs.progress import phase

_HASH_SIDE = 8
_MOST_BITS = 4
# Of two hashes that differ in four bits, one of five bands is equal.
_BANDS = [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]
_GREY_SIDE = 16
_LEAST_CORRELATION = 0.95
# Below this deviation of grey levels a picture has nothing to correlate; its brightness is compared.
_FLAT = 2.0
_FLAT_LEVELS = 4.0
# Of so many pictures of one hash and split each further one is compared with the first ones alone.
_COMPARED = 50
_CHUNK = 16
_CHUNKS_WORTH_PROCESSES = 40


class Look(NamedTuple):
    """What is known of an image file.

    Attributes:
        path: the file.
        sha256: hash of its bytes.
        width: width in pixels.
        height: height in pixels.
        dhash: perceptual hash of 64 bits.
        grey: levels of a small grey version, 16x16 bytes. They come from other processes as they are, unlike an array.
    """

    path: Path
    sha256: str
    width: int
    height: int
    dhash: int
    grey: bytes


class Pair(NamedTuple):
    """Two images.

    Attributes:
        first: number of the earlier image.
        second: number of the later image.
        exact: whether their files have the same bytes.
    """

    first: int
    second: int
    exact: bool


def look(path: Path) -> Look | str:
    """Decode an image; what is wrong, in a line, if that fails."""
    try:
        image = decode_image(path)
        sha256 = file_sha256(path)
    except DecodeError as error:
        return str(error)
    except OSError as error:
        return f"cannot read {path} ({error.strerror}): restore it"
    height, width = image.shape[1:]
    grey = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
    small = np.asarray(
        grey.resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BILINEAR), np.int16
    )
    bits = np.packbits(small[:, 1:] < small[:, :-1])
    return Look(
        path,
        sha256,
        width,
        height,
        int.from_bytes(bits.tobytes(), "big"),
        grey.resize((_GREY_SIDE, _GREY_SIDE), Image.Resampling.BILINEAR).tobytes(),
    )


def _look_at(paths: Sequence[Path]) -> list[Look | str]:
    return [look(path) for path in paths]


def look_at_all(paths: Sequence[Path], name: str) -> list[Look | str]:
    """`look` at images, by several processes where there are many, and tell how far it is under a name."""
    chunks = [paths[first : first + _CHUNK] for first in range(0, len(paths), _CHUNK)]
    # The start of processes takes longer than the decoding of a few images.
    workers = (os.cpu_count() or 1) if len(chunks) >= _CHUNKS_WORTH_PROCESSES else 0
    pool = worker_pool(_look_at, chunks, workers=workers, device=torch.device("cpu"))
    looks: list[Look | str] = []
    with phase(name, len(paths)) as advance:
        for part in results(pool):
            looks += part
            advance(len(part))
    return looks


def duplicates(looks: Sequence[Look], splits: Sequence[str], *, known: int = 0) -> list[Pair]:
    """Pairs of duplicates: each image with the first earlier one of each split that it is a duplicate of.

    Args:
        looks: images, (N,).
        splits: split of each image, (N,).
        known: number of images, the first ones, that are not asked about: others may be duplicates of them.

    Returns:
        Pairs in the order of the second image. Of files with the same bytes, only the first of a split is asked about
        near duplicates, and only in splits that have no such file.
    """
    pairs: list[Pair] = []
    firsts: list[int] = []
    by_sha256: dict[str, dict[str, int]] = defaultdict(dict)
    for number, (each, split) in enumerate(zip(looks, splits, strict=True)):
        same = by_sha256[each.sha256]
        if number >= known:
            pairs += [Pair(first, number, True) for first in same.values()]
        if split not in same:
            firsts.append(number)
        same.setdefault(split, number)
    asked = [number for number in firsts if number >= known]
    exact = {(pair.second, splits[pair.first]) for pair in pairs}
    pairs += (
        pair
        for pair in _near(looks, splits, firsts, asked)
        if (pair.second, splits[pair.first]) not in exact
    )
    return sorted(pairs, key=lambda pair: (pair.second, pair.first))


def _near(
    looks: Sequence[Look], splits: Sequence[str], numbers: Sequence[int], asked: Sequence[int]
) -> list[Pair]:
    """Each image that is asked about with the first of each split among the ``numbers`` that it looks like."""
    of_hash: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in numbers:
        of_hash[looks[number].dhash][splits[number]].append(number)
    hashes = np.array(sorted(of_hash), dtype=np.uint64)
    neighbours: dict[int, list[int]] = {own: [own] for own in of_hash}
    for one, other in _close_hashes(hashes):
        neighbours[one].append(other)
        neighbours[other].append(one)
    greys = _Greys(looks)
    pairs = []
    for number in asked:
        candidates: dict[str, list[int]] = defaultdict(list)
        for other_hash in neighbours[looks[number].dhash]:
            for split, others in of_hash[other_hash].items():
                candidates[split] += [other for other in others[:_COMPARED] if other < number]
        for others in candidates.values():
            alike = greys.alike(sorted(others), number)
            pairs += [Pair(first, number, False) for first in alike[:1]]
    return pairs


def _close_hashes(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of different hashes that differ in few bits, each once."""
    found: set[tuple[int, int]] = set()
    for start, width in _BANDS:
        band = (hashes >> np.uint64(start)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            members = hashes[group]
            for place in range(len(members) - 1):
                distance = np.bitwise_count(members[place + 1 :] ^ members[place])
                for other in members[place + 1 :][distance <= _MOST_BITS]:
                    found.add((int(members[place]), int(other)))
    yield from sorted(found)


class _Greys:
    """The small grey versions of images, to be compared whatever their brightness and contrast."""

    def __init__(self, looks: Sequence[Look]) -> None:
        levels = np.frombuffer(b"".join(each.grey for each in looks), np.uint8)
        self._levels = levels.reshape(len(looks), _GREY_SIDE**2).astype(np.float32)
        self._deviations = self._levels.std(1)
        centred = self._levels - self._levels.mean(1, keepdims=True)
        norms = np.linalg.norm(centred, axis=1, keepdims=True)
        self._directions = centred / np.maximum(norms, 1)

    def alike(self, others: Sequence[int], number: int) -> list[int]:
        """Those of the others that look like image ``number``."""
        correlation = self._directions[others] @ self._directions[number]
        difference = np.abs(self._levels[others] - self._levels[number]).max(1, initial=0)
        flat = np.minimum(self._deviations[others], self._deviations[number]) < _FLAT
        found = np.where(flat, difference < _FLAT_LEVELS, correlation >= _LEAST_CORRELATION)
        return [other for other, is_alike in zip(others, found, strict=True) if is_alike]
