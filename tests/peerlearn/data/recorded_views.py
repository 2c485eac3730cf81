"""The views of fixed images by every recipe, as hashes: what old runs saw and must see again when they are resumed.

    python -m tests.peerlearn.data.recorded_views      # writes recorded_views.json, for a recipe that is new

Parameters are equal on every machine. Pixels are equal where products and exponentials round alike, which the hash
``arithmetic`` tells; elsewhere the mean and the mean square of each view stand in for them. Machines that are alike in
that may still round the blur in two ways, as two machines did: ``pixels`` holds a hash for each.
"""

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from peerlearn.counter_random import random_bits
from peerlearn.data.augment import draw_view_parameters
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewLoader, sampler_of
from peerlearn.data.recipes import AUGMENTATIONS, SECOND_VIEWS, Augmentation

FILE = Path(__file__).with_suffix(".json")
SEED, EPOCH = 7, 3
# name: backend, channels, height, width, images, side of the views
SOURCES = {
    "memory, 32 x 32": ("memory", 3, 32, 32, 300, 32),
    "memory, grey 28 x 28": ("memory", 1, 28, 28, 40, 28),
    "memory, 40 x 30": ("memory", 3, 40, 30, 40, 24),
    "folder, PNG": ("folder", 3, 57, 75, 12, 32),
    "folder, JPEG": ("folder", 3, 75, 57, 12, 32),
}


def images_of(channels: int, height: int, width: int, number: int) -> Tensor:
    """Smooth images with some noise, of integers alone: uint8 (number, channels, height, width)."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    phase = random_bits(99, torch.arange(number * channels)).abs() % 255
    phase = phase.view(number, channels, 1, 1)
    noise = random_bits(98, torch.arange(number * channels * height * width)).abs() % 21
    slope = 1 + phase % 5
    ramp = (phase + slope * rows * 3 + (6 - slope) * columns * 2) % 470
    return (235 - (ramp - 235).abs() + noise.view(number, channels, height, width)).to(torch.uint8)


def sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for each in tensors:
        digest.update(str((each.dtype, tuple(each.shape))).encode())
        digest.update(each.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def arithmetic() -> str:
    """How this machine rounds products, exponentials and JPEG files."""
    values = images_of(3, 32, 32, 8).flatten(1, 2) / 255
    stored = io.BytesIO()
    Image.fromarray(images_of(3, 64, 64, 1)[0].permute(1, 2, 0).numpy()).save(stored, "JPEG")
    products = torch.bmm(values, values.mT)
    return sha256(
        products,
        torch.bmm(values[:, :5].contiguous(), values.mT),
        products.softmax(1),
        torch.frombuffer(bytearray(stored.getvalue()), dtype=torch.uint8),
    )


def recipes(name: str) -> list[Augmentation]:
    """The recipes of both views."""
    first = AUGMENTATIONS[name]
    return [first, SECOND_VIEWS.get(name, first)]


def parameters(name: str) -> str:
    """The hash of what a recipe draws, in the fields that it had from the beginning."""
    drawn = [
        draw_view_parameters(
            recipe,
            seed=SEED,
            epoch=EPOCH,
            index=torch.arange(200),
            draw=torch.arange(200) % 3,
            view=view,
            height=torch.arange(200) % 40 + 20,
            width=torch.arange(200) % 31 + 30,
        )
        for view, recipe in enumerate(recipes(name))
    ]
    return sha256(*(value for one in drawn for value in one[:11]))


def views(name: str, source: str, folder: Path) -> list[Tensor]:
    """All views of an epoch: (N, channels, size, size) for each."""
    backend, channels, height, width, number, size = SOURCES[source]
    images: Any = images_of(channels, height, width, number)
    if backend == "folder":
        suffix = source[-3:].lower()
        files = [folder / f"{i}.{suffix}" for i in range(number)]
        for file, image in zip(files, images, strict=True):
            if not file.exists():
                kind = {"peg": "JPEG", "png": "PNG"}[suffix]
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, kind)
        images = tuple(files)
    dataset = ImageDataset(
        name="made",
        split="train",
        images=images,
        labels=None,
        class_names=(),
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.3, 0.25)[:channels],
    )
    loader = ViewLoader(
        dataset,
        recipes(name),
        sampler=sampler_of(dataset, batch_size_global=number, seed=SEED),
        backend=backend,
        image_size=size,
        seed=SEED,
        device=torch.device("cpu"),
    )
    (batch,) = loader.epoch(EPOCH)
    return list(batch.views)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """What is recorded of a recipe."""
    found: dict[str, Any] = {"parameters": parameters(name)}
    for source in SOURCES:
        pixels = views(name, source, folder)
        means = [round(float(each.double().mean()), 9) for each in pixels]
        squares = [round(float(each.double().square().mean()), 9) for each in pixels]
        found[source] = {"pixels": [sha256(*pixels)], "means": means, "squares": squares}
    return found


def main() -> None:
    torch.set_num_threads(1)
    known = json.loads(FILE.read_text())["recipes"] if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        new = {name: measured(name, Path(folder)) for name in AUGMENTATIONS if name not in known}
    recorded = {"arithmetic": arithmetic(), "recipes": {**known, **new}}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
