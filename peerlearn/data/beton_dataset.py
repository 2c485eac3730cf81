"""Packed files as datasets."""

from pathlib import Path

from peerlearn.data.beton_facts import PackedFacts, checked_facts
from peerlearn.data.beton_file import SUFFIX, open_packed, packed_path, packed_place
from peerlearn.data.beton_writer import content_sha256
from peerlearn.data.datasets import ImageDataset
from peerlearn.errors import UserError


def packed_dataset(file: Path, name: str, split: str, *, quiet: bool = False) -> ImageDataset:
    """The dataset that a packed file holds, after a look whether the file is whole.

    Args:
        file: the packed file.
        name: name of the dataset that it is to hold.
        split: split that it is to hold.
        quiet: whether not to tell that all of it is read.

    Raises:
        UserError: the file is damaged, cannot be read, or holds something else; or ffcv is missing.
    """
    if file.suffix != SUFFIX:
        raise UserError(f"data.packed {file} must end in {SUFFIX}: name it so again")
    facts = checked_facts(file, quiet=quiet)
    if (facts.name, facts.split) != (name, split):
        raise UserError(
            f"{file} holds {facts.name} {facts.split}, not {name} {split}: set data.name and data.split to what it "
            "holds, or data.packed to another file"
        )
    packed = open_packed(file)
    return ImageDataset(
        name=facts.name,
        split=facts.split,
        images=tuple(packed_path(file, number) for number in range(len(packed))),
        labels=packed.labels if facts.labelled else None,
        class_names=facts.class_names,
        mean=facts.mean,
        std=facts.std,
        title=facts.title,
        why_unlabelled=facts.why_unlabelled,
        # The fingerprint covers them, and so every pixel.
        sources=(*facts.sources, facts.sha256),
    )


def is_packed(dataset: ImageDataset) -> bool:
    """Whether the images of a dataset lie in a packed file."""
    images = dataset.images
    return isinstance(images, tuple) and packed_place(images[0]) is not None


def check_packed_from(facts: PackedFacts, file: Path, dataset: ImageDataset) -> None:
    """See that a packed file was made from this dataset.

    Raises:
        UserError: it was not.
    """
    if facts.images != len(dataset):
        found = f"{facts.images:,} images, and {dataset.title} {dataset.split} has {len(dataset):,}"
    elif facts.content_sha256 != content_sha256(dataset):
        found = f"other labels or names of images than {dataset.title} {dataset.split}"
    else:
        return
    raise UserError(
        f"{file} holds {found}: mend data.root, or pack the images anew by `peerlearn data build`"
    )
