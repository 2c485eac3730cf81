"""Fashion-MNIST in two halves: the five garments for the upper body, which look alike, and the other classes.

    python scripts/fashion_mnist_parts.py runs/fashion_mnist_parts
    peerlearn pretrain supervised_fashion_mnist --data.name folder --data.root runs/fashion_mnist_parts/distinct

Writes the folders ``garments`` (T-shirt, pullover, dress, coat, shirt) and ``distinct`` (trouser, sandal, sneaker, bag,
ankle boot) as PNG files, training and test split, with the images' own 28 pixels.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.errors import UserError
from peerlearn.runs.progress import progress

PARTS = {"garments": (0, 2, 3, 4, 6), "distinct": (1, 5, 7, 8, 9)}


def write(dataset: ImageDataset, folder: Path) -> None:
    """Write one split of both halves: part/split/class/index.png."""
    assert isinstance(dataset.images, torch.Tensor)
    assert dataset.labels is not None
    place = {label: part for part, labels in PARTS.items() for label in labels}
    labels = dataset.labels.tolist()
    for label, part in place.items():
        (folder / part / dataset.split / str(label)).mkdir(parents=True)
    with progress(len(labels), f"{dataset.split} images", name="writing") as report:
        for index, label in enumerate(labels):
            image = Image.fromarray(dataset.images[index, 0].numpy())
            image.save(folder / place[label] / dataset.split / str(label) / f"{index:05d}.png")
            report.advance()


def main() -> None:
    """Read Fashion-MNIST and write both halves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="is created")
    parser.add_argument("--root", help="where Fashion-MNIST lies; default: the usual places")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there already: name another folder")
    try:
        datasets = [
            load_dataset("fashion_mnist", split, root=arguments.root) for split in ("train", "test")
        ]
        arguments.folder.parent.mkdir(parents=True, exist_ok=True)
        # The data set appears as a whole, because a part would be taken for the whole.
        with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as scratch:
            whole = Path(scratch) / "whole"
            for dataset in datasets:
                write(dataset, whole)
            whole.rename(arguments.folder)
    except UserError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{arguments.folder} cannot be written ({error.strerror}): name another folder")
    print(f"written: {arguments.folder}")


if __name__ == "__main__":
    main()
