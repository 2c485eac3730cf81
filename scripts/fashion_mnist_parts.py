"""Fashion-MNIST in two halves: the five garments for the upper body, which look alike, and all else.

    python scripts/fashion_mnist_parts.py runs/fashion_mnist_parts
    peerlearn pretrain supervised_fashion_mnist --data.name folder --data.root runs/fashion_mnist_parts/distinct

Writes the folders ``garments`` (T-shirt, pullover, dress, coat, shirt) and ``distinct`` (trouser, sandal, sneaker, bag,
ankle boot) as PNG files, training and test split, with the images' own 28 pixels.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

from peerlearn.datasets import load_dataset
from peerlearn.progress import progress

PARTS = {"garments": (0, 2, 3, 4, 6), "distinct": (1, 5, 7, 8, 9)}


def write(split: str, folder: Path, root: str | None) -> None:
    """One split of both halves: part/split/class/index.png."""
    dataset = load_dataset("fashion_mnist", split, root=root)
    assert isinstance(dataset.images, torch.Tensor)
    assert dataset.labels is not None
    place = {label: part for part, labels in PARTS.items() for label in labels}
    labels = dataset.labels.tolist()
    for label, part in place.items():
        (folder / part / split / str(label)).mkdir(parents=True)
    with progress(len(labels), f"{split} images") as report:
        for index, label in enumerate(labels):
            image = Image.fromarray(dataset.images[index, 0].numpy())
            image.save(folder / place[label] / split / str(label) / f"{index:05d}.png")
            report.advance()


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="is created")
    parser.add_argument("--root", help="where Fashion-MNIST lies; default: the usual places")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there already: name another folder")
    for split in ("train", "test"):
        write(split, arguments.folder, arguments.root)


if __name__ == "__main__":
    main()
