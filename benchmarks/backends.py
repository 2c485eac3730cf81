"""Where batches come from: memory, folder and packed files (ffcv), on one core; and ffcv's own loader against ours.

    python benchmarks/backends.py [--rounds 7] [--output FILE]

All take turns within one run, after one round to warm up. Times are CPU seconds of one process with one thread and no
workers. The images are smooth noise with grain, once as PNG files of 32x32 pixels and once as JPEG files of 400x300
(some 30 KiB each), from which views of 32 and of 224 pixels are cut by the recipe moco_v2. "crops": two crops of each
image, which is all that a CPU does where a GPU does the rest. "views": two finished views.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import alternate
from peerlearn.data.beton_dataset import packed_dataset
from peerlearn.data.beton_file import open_packed
from peerlearn.data.beton_writer import pack
from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.data.loader import ViewLoader, sampler_of
from peerlearn.data.recipes import AUGMENTATIONS
from pretrain.config import Backend

VERSIONS = ("torch", "numpy", "pillow", "simplejpeg", "ffcv", "numba", "opencv-python")


class Case(NamedTuple):
    """A dataset to be made: its files, and the views that are cut from them."""

    name: str
    suffix: str
    width: int
    height: int
    images: int
    batch: int
    view: int


CASES = (
    Case("32x32 PNG, views of 32", "png", 32, 32, 2048, 256, 32),
    Case("400x300 JPEG, views of 224", "jpg", 400, 300, 64, 32, 224),
)


def write_images(folder: Path, case: Case) -> ImageDataset:
    """The image files of a case, as a dataset."""
    random = np.random.default_rng(0)
    for number in range(case.images):
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((case.width, case.height), Image.Resampling.BICUBIC))
        grain = random.normal(0, 6, smooth.shape)
        file = folder / "ab"[number % 2] / f"{number:05}.{case.suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, quality=80)
    return load_dataset("folder", root=str(folder))


def loaders(folder: Path, case: Case) -> dict[str, ViewLoader]:
    """A loader of every backend for the same images."""
    files = write_images(folder / "images", case)
    datasets: dict[str, tuple[ImageDataset, Backend]] = {
        "memory": (files, "memory"),
        "folder": (files, "folder"),
    }
    for kind in ("raw", "jpeg"):
        file = folder / f"{kind}.beton"
        pack(files, file, format=kind)
        datasets[f"ffcv {kind}"] = packed_dataset(file, files.name, files.split), "ffcv"
    return {
        name: ViewLoader(
            dataset,
            AUGMENTATIONS["moco_v2"],
            sampler=sampler_of(dataset, batch_size_global=case.batch, seed=0),
            backend=backend,
            image_size=case.view,
            seed=0,
            device=torch.device("cpu"),
        )
        for name, (dataset, backend) in datasets.items()
    }


def crops(loader: ViewLoader) -> None:
    for _ in loader._cropper.cut(loader._draws(0, 0)):
        pass


def views(loader: ViewLoader) -> None:
    for _ in loader.epoch(0):
        pass


def decoders(folder: Path, case: Case) -> dict[str, Callable[[], None]]:
    """Decoding whole images in order: ffcv's own loader, compiled beforehand, and ours."""
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader

    rivals: dict[str, Callable[[], None]] = {}
    for kind in ("raw", "jpeg"):
        file = folder / f"{kind}.beton"
        theirs = Loader(
            str(file),
            batch_size=case.batch,
            num_workers=1,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": None},
        )
        ours = open_packed(file)

        def by_ffcv(theirs: Any = theirs) -> None:
            for _ in theirs:
                pass

        def by_ours(ours: Any = ours) -> None:
            for numbers in torch.arange(case.images).split(case.batch):
                ours.read_together(numbers)

        rivals |= {f"ffcv's own loader, {kind}": by_ffcv, f"ours, {kind}": by_ours}
    return rivals


def rates(seconds: Mapping[str, list[float]], images: int) -> dict[str, dict[str, float]]:
    """Images per second of each rival: the median, the slowest and the fastest round."""
    found: dict[str, dict[str, float]] = {}
    for name, each in seconds.items():
        rate = sorted(images / one for one in each)
        found[name] = {
            "median": round(statistics.median(rate)),
            "slowest": round(rate[0]),
            "fastest": round(rate[-1]),
        }
    return found


def measure(case: Case, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """The rates of a case: crops, views and decoding."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rivals = loaders(folder, case)
        works: dict[str, dict[str, Callable[[], None]]] = {
            "crops": {name: partial(crops, each) for name, each in rivals.items()},
            "views": {name: partial(views, each) for name, each in rivals.items()},
            "decoding": decoders(folder, case),
        }
        torch.set_num_threads(1)
        found = {}
        for work, each in works.items():
            alternate(each, 1)
            found[work] = rates(alternate(each, rounds), case.images)
    return found


def main() -> None:
    """Print the rates, and write them to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # As in a process that trains: see benchmarks/augment.py.
    torch.ones(30 * 2**18)
    begun = time.monotonic()
    found = {case.name: measure(case, options.rounds) for case in CASES}
    for case, works in found.items():
        for work, each in works.items():
            print(f"{case}, {work}: images/s per core, median of {options.rounds} rounds (range)")
            for name, rate in each.items():
                print(
                    f"  {name:24} {rate['median']:>9,.0f}  ({rate['slowest']:,.0f} to {rate['fastest']:,.0f})"
                )
    whole = {
        "benchmark": "backends",
        "rounds": options.rounds,
        "threads": 1,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "recipe": "moco_v2",
        "images_per_second": found,
        "wall_seconds": round(time.monotonic() - begun, 1),
    }
    if options.output:
        options.output.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
