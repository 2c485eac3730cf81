"""Test images that a detector has seen in training."""

from pathlib import Path
from typing import NamedTuple

from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.data.duplicates import Look, duplicates, look_at_all
from peerlearn.runs.text import listed


class Leaks(NamedTuple):
    """Duplicates between training and test images, each test image with the first training image it is one of.

    Attributes:
        same: pairs (test image, training image) of the same bytes.
        near: pairs of images that look alike.
        test_images: number of test images.
        undecodable: number of images, of both, that cannot be decoded and are not compared.
    """

    same: tuple[tuple[Path, Path], ...]
    near: tuple[tuple[Path, Path], ...]
    test_images: int
    undecodable: int

    def line(self) -> str:
        """What was found and how to mend it, in one line; "" if nothing was."""
        pairs = (*self.same, *self.near)
        if not pairs:
            return ""
        named = listed([f"{test} ({train})" for test, train in pairs])
        return (
            f"{len(pairs):,} of {self.test_images:,} test images are copies of training images, which makes the score "
            f"too good ({len(self.same):,} of the same bytes, {len(self.near):,} that look alike): {named}: "
            "remove them from one of the splits"
        )

    def counts(self) -> dict[str, int]:
        """Counts for the protocol of a score."""
        return {
            "same": len(self.same),
            "near": len(self.near),
            "undecodable": self.undecodable,
        }


def leaks(train: DetectionDataset, test: DetectionDataset) -> Leaks:
    """Look for the test images among the training images, by their bytes and by how they look."""
    found = {
        split: look_at_all(dataset.images, f"looking for duplicates, {split} images")
        for split, dataset in (("train", train), ("test", test))
    }
    looks = [(each, split) for split in found for each in found[split] if isinstance(each, Look)]
    images, splits = [each for each, _ in looks], [split for _, split in looks]
    known = splits.count("train")
    pairs = [
        pair for pair in duplicates(images, splits, known=known) if splits[pair.first] == "train"
    ]
    same, near = (
        tuple(
            (images[pair.second].path, images[pair.first].path)
            for pair in pairs
            if pair.exact == exact
        )
        for exact in (True, False)
    )
    return Leaks(same, near, len(test), len(train) + len(test) - len(images))
