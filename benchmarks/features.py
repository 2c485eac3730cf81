"""Features of a data set by two networks: ours, against a loop over torchvision's DataLoader for each network.

    python -m benchmarks.features [--rounds 5] [--output benchmarks/results/features.json]

Ours reads each image once for all networks and cuts views in batches; the loop is what people write: Pillow images, a
torchvision transform, a DataLoader, one network after another. Both see the same views and take turns within one run.
Times are CPU seconds of one thread, without workers.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.timing import alternate, times_as_fast, write_results
from peerlearn.backbones import create_backbone
from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.evaluation.features import extract_features

CPU = torch.device("cpu")
BATCH = 128


class _Pictures(Dataset[Tensor]):
    """What a data set holds, as Pillow images through a transform."""

    def __init__(self, dataset: ImageDataset, transform: transforms.Compose) -> None:
        self._dataset, self._transform = dataset, transform

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Tensor:
        image = self._dataset.images[index]
        picture = (
            transforms.functional.to_pil_image(image)
            if isinstance(image, Tensor)
            else Image.open(image).convert("RGB")
        )
        transformed: Tensor = self._transform(picture)
        return transformed


def _ours(networks: Sequence[nn.Module], dataset: ImageDataset, size: int) -> list[Tensor]:
    return extract_features(
        networks,
        dataset,
        image_size=size,
        batch_size=BATCH,
        device=CPU,
        workers=0,
        progress=lambda images: None,
    )


@torch.no_grad()
def _loop(
    networks: Sequence[nn.Module], dataset: ImageDataset, transform: transforms.Compose
) -> list[Tensor]:
    pictures = _Pictures(dataset, transform)
    return [
        torch.cat([network(images) for images in DataLoader(pictures, batch_size=BATCH)])
        for network in networks
    ]


def _photographs(root: Path, count: int) -> ImageDataset:
    """JPEG files of 400 x 300 pixels with structure at all scales."""
    folder = root / "train" / "one"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        sheets = [
            Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize(
                (400, 300)
            )
            for h, w in ((4, 6), (30, 40), (150, 200))
        ]
        mixed = np.mean([np.asarray(sheet, dtype=float) for sheet in sheets], axis=0)
        Image.fromarray(mixed.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return load_dataset("folder", "train", root=str(root))


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = load_dataset("fashion_mnist", "test", limit=2048)
    normalise = transforms.Normalize(small.mean, small.std)
    plain = transforms.Compose([transforms.ToTensor(), normalise])
    measured = []
    with tempfile.TemporaryDirectory() as place:
        large = _photographs(Path(place), 48)
        chain = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize(large.mean, large.std),
            ]
        )
        for title, name, dataset, size, transform in (
            ("2,048 images of 28 px, two conv4", "conv4", small, 28, plain),
            ("48 JPEG files to 224 px, two resnet18", "resnet18", large, 224, chain),
        ):
            networks = [
                create_backbone(name, in_chans=dataset.channels, image_size=size).eval()
                for _ in range(2)
            ]
            sides = {
                "ours": partial(_ours, networks, dataset, size),
                "loop": partial(_loop, networks, dataset, transform),
            }
            first, second = (run()[0] for run in sides.values())
            gap = float((first - second).norm() / second.norm())
            seconds = alternate(sides, options.rounds)
            print(
                f"{title}: ours is {times_as_fast(seconds['loop'], seconds['ours'])} times as fast; "
                f"features differ by {gap:.1e}"
            )
            measured.append({"title": title, "seconds": seconds, "features_differ_by": gap})
    write_results(options.output, "features", measured, rounds=options.rounds)


if __name__ == "__main__":
    main()
