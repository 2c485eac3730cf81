"""From JPEG files to two views of 224 pixels on one core: MoCo's PIL chain against the work of `folder`'s processes.

    python benchmarks/folder.py [--rounds 9] [--batch 32] [--output FILE]

The files are about 400 x 300 pixels and 30 KiB, made here: smooth shapes with finer ones on them and noise. All rivals
alternate within one run. Times are CPU seconds of one thread.

A process of `folder` decodes a file once and cuts both crops, uint8, ready for the device, which does the rest for the
whole batch. MoCo's chain does all of it in the process, but it is also measured with its crops alone. The last rival
does on this core what would be the device's work.
"""

import argparse
import tempfile
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.image_rates import keep, moco_chain, report, two_views
from benchmarks.timing import alternate
from peerlearn.data import image_folders
from peerlearn.data.augment import distort, normalise, pixels
from peerlearn.data.croppers import Draws, Recipe, _crop_job, _CropResult, _cut
from peerlearn.data.recipes import AUGMENTATIONS

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE, _RECIPE = 224, "moco_v2"
_PIL, _CROPS = "PIL, as MoCo: everything", "PIL, crops alone"
_PILLOW, _OURS = "folder, decoded by Pillow", "folder"
_WHOLE = "folder, and the device's work on this core"


def _photo(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    def noise(step: int, channels: int) -> np.ndarray:
        shape = (height // step + 2, width // step + 2, channels)
        coarse = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8).squeeze())
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        return smooth.reshape(height, width, channels).astype(np.float64)

    content = 0.75 * noise(24, 3) + 0.25 * noise(3, 1) + generator.normal(0, 3, (height, width, 3))
    return Image.fromarray(content.clip(0, 255).astype(np.uint8))


def _write_photos(folder: Path, number: int) -> list[Path]:
    generator = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(number)]
    for file in files:
        height, width = generator.integers(280, 320), generator.integers(380, 420)
        _photo(generator, int(height), int(width)).save(file, quality=80)
    return files


def _measure(files: list[Path], rounds: int) -> dict[str, list[float]]:
    augmentation = AUGMENTATIONS[_RECIPE]
    recipe = Recipe(views=(augmentation, augmentation), image_size=_SIZE, seed=0)
    index, draw = torch.arange(len(files)), torch.zeros(len(files), dtype=torch.int64)
    epochs = count()

    def draws() -> Draws:
        return Draws(epoch=next(epochs), index=index, draw=draw)

    def opened() -> list[Image.Image]:
        return [Image.open(file).convert("RGB") for file in files]

    def ours(now: Draws) -> _CropResult:
        return _cut(_crop_job(tuple(files), now), recipe=recipe)

    def by_pillow() -> None:
        with mock.patch.object(image_folders, "_decoded_jpeg", return_value=None):
            ours(draws())

    def whole() -> None:
        now = draws()
        cut = ours(now)
        parameters = recipe.parameters(now, height=cut.height, width=cut.width)
        for crops, one in zip(cut.crops, parameters, strict=True):
            images = pixels(crops, torch.device("cpu"))
            normalise(distort(images, one, augmentation), _MEAN, _STD)

    chain = moco_chain(augmentation, _SIZE, _MEAN, _STD)
    crops_alone = transforms.Compose([chain.transforms[0], transforms.PILToTensor()])
    rivals = {
        _PIL: lambda: two_views(chain, opened()),
        _CROPS: lambda: two_views(crops_alone, opened()),
        _PILLOW: by_pillow,
        _OURS: lambda: ours(draws()),
        _WHOLE: whole,
    }
    alternate(rivals, 1)
    return alternate(rivals, rounds)


def main() -> None:
    """Print rates and ratios, and write them to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # As in benchmarks/augment.py.
    torch.ones(30 * 2**18)
    with tempfile.TemporaryDirectory() as folder:
        files = _write_photos(Path(folder), options.batch)
        mean_bytes = sum(file.stat().st_size for file in files) / len(files)
        title = f"two views of {_SIZE} from JPEG files of {mean_bytes / 1024:.0f} KiB, {_RECIPE}"
        measured = report(_measure(files, options.rounds), options.batch, title=title)
    if options.output:
        keep(options.output, "folder", [measured])


if __name__ == "__main__":
    main()
