"""Settings for images of one's own, where no config is named: a function of what is found, and told line by line.

What is chosen are words of the command line, before the config is made from them. Keys that the user gives stay as they
are; config.yaml holds all of them, so that nothing is chosen again when the run goes on.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peerlearn.config import parse_config
from peerlearn.data.titles import FOLDER, dataset_title
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.text import file_name_part
from pretrain.config import PretrainConfig

# The methods whose settings are chosen; those that learn from labels are published for data sets of their own.
_METHODS = ("moco", "simclr")
# Fewer images than these leave hardly anything to tell an image from.
_FEWEST_IMAGES = 16
# Images up to this side get the stem of small images, which keeps their resolution.
_SMALL_SIDE = 64
# Largest views and batches, with a GPU and without.
_LARGEST_VIEW = {True: 224, False: 96}
_LARGEST_BATCH = {True: 256, False: 64}
_SMALLEST_BATCH, _FEWEST_STEPS = 8, 8
_LARGEST_QUEUE = 65536
# Multiplications in the forward pass of a ResNet-18 for each pixel of a view: with the usual stem, with the small one.
_WORK_OF_PIXEL = {False: 36e3, True: 545e3}
# Multiplications of all images of a run. Without a GPU: 60,000 views of 96 pixels, half an hour or so on two cores.
_WORK_OF_RUN = {True: 2e16, False: 2e13}
_FEWEST_EPOCHS, _MOST_EPOCHS = 5, 200
# A momentum network follows over 1 / (1 - momentum) steps, which must be few of all.
_STEPS_OF_SLOW_KEYS = 20_000
_MEASUREMENTS = 20
# Files that are decoded to see whether the images are grey.
_DECODED_FILES = 32


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is found in a folder of images and on the machine.

    Attributes:
        name: name of the folder.
        images: number of training images.
        side: usual length of their shorter side in pixels, at most 224.
        is_grey: whether the images are grey.
        has_labels: whether each training image lies in the folder of its class.
        has_test: whether there is a labelled test split too.
        has_gpu: whether the run computes on a GPU.
        cores: number of CPU cores.
        processes: number of processes that train together.
    """

    name: str
    images: int
    side: int
    is_grey: bool = False
    has_labels: bool = False
    has_test: bool = False
    has_gpu: bool = False
    cores: int = 2
    processes: int = 1


class Choice(NamedTuple):
    """A key, the value that is chosen for it, as words of the command line, and why."""

    key: str
    words: tuple[str, ...]
    why: str


def with_choices(argv: Sequence[str], *, auto_resume: bool) -> list[str]:
    """The words of `peerlearn pretrain`, with the choices for images of one's own before them where no config is named.

    A run that is there already goes on by its own config.

    Raises:
        UsageError: a key or a value is wrong.
        UserError: there are no images, or too few to choose by.
    """
    words = list(argv)
    given = {word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")}
    if {"-h", "--help"} & set(words) or not {"data.name", "data.root"} <= given:
        return words
    config, dry_run = parse_config(
        PretrainConfig, words, verb="pretrain", description="", example="", tells=False
    )
    data = config.data
    if data.name != FOLDER or data.packed is not None or config.method not in _METHODS:
        return words
    if config.run is None:
        title = file_name_part(dataset_title(FOLDER, data.root))
        run = os.path.join("runs", title.strip(".") or "pretrain")
        words += ["--run", run]
    else:
        run = config.run
    saved = RunDirectory(Path(run)).config
    if auto_resume and saved.is_file():
        return [str(saved), *words]
    found = look(config)
    choices = choose(found, config, given)
    if os.environ.get("RANK", "0") == "0":
        for line in told(found, choices):
            print(f"# {line}" if dry_run else line)
    return [word for each in choices for word in (f"--{each.key}", *each.words)] + words


def look(config: PretrainConfig) -> Found:
    """What the folder of the config holds, and what the machine has.

    Raises:
        UserError: there are no images, or the folder cannot be read.
    """
    # Imported here: reading a config does not wait for torch.
    from peerlearn.compute.device import choose_device
    from peerlearn.data.datasets import ImageDataset, load_dataset
    from pretrain.training_data import native_size

    data = config.data

    def labelled(dataset: ImageDataset) -> bool:
        return dataset.labels is not None

    train = load_dataset(data.name, data.split, root=data.root, limit=data.limit)
    try:
        has_test = labelled(load_dataset(data.name, "test", root=data.root))
    except UserError:
        has_test = False
    return Found(
        name=train.title,
        images=len(train),
        side=native_size(train),
        is_grey=_are_grey(
            [Path(each) for each in train.images[:: len(train) // _DECODED_FILES + 1]]
        ),
        has_labels=labelled(train),
        has_test=has_test,
        has_gpu=choose_device(config.device).type == "cuda",
        cores=len(os.sched_getaffinity(0)),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def _are_grey(files: Sequence[Path]) -> bool:
    """Whether all that can be decoded of the files are grey."""
    from peerlearn.data.image_folders import DecodeError, decode_image

    grey = []
    for file in files:
        try:
            red, green, blue = decode_image(file)
        except DecodeError:
            continue
        grey.append(bool((red == green).all() and (green == blue).all()))
    return bool(grey) and all(grey)


def choose(found: Found, config: PretrainConfig, given: Collection[str]) -> list[Choice]:
    """The settings for what was found.

    Args:
        found: what was found.
        config: config of the keys that the user gives.
        given: those keys; they are not chosen, and the others are chosen to fit them.

    Raises:
        UserError: there are too few images.
    """
    if found.images < _FEWEST_IMAGES and "batch_size" not in given:
        raise UserError(
            f"{found.name} has {found.images} images, too few to tell one from others: give at least {_FEWEST_IMAGES}, "
            "or choose --batch_size yourself"
        )
    return [each for each in _choices(found, config, given) if each.key not in given]


def _choices(found: Found, config: PretrainConfig, given: Collection[str]) -> Iterator[Choice]:
    where = "with a GPU" if found.has_gpu else "without a GPU"
    view = min(found.side, _LARGEST_VIEW[found.has_gpu])
    why = "as large as the shorter side usually is"
    if view < found.side:
        why = f"{where} views of {found.side} pixels would take {(found.side / view) ** 2:.1f} times as long"
    yield Choice("data.image_size", (str(view),), why)
    view = config.data.image_size or view
    is_small = view <= _SMALL_SIDE
    if "cohort.backbones" not in given:
        yield from _network(is_small)
    if "data.augmentation" not in given:
        yield from _views(found, is_small)
    yield from _steps(found, config, given, view, where)
    yield from _watch(found)
    workers = min(found.cores, 8 if found.has_gpu else 2)
    yield Choice("data.workers", (str(workers),), f"{found.cores} CPU cores, {where}")


def _network(is_small: bool) -> Iterator[Choice]:
    yield Choice("cohort.backbones", ("resnet18",), "the smallest of the usual networks")
    stem = "keeps the resolution of views of at most" if is_small else "is for views of at most"
    why = f"the 3x3 stem {stem} {_SMALL_SIDE} pixels"
    yield Choice("cohort.small_images", (str(is_small).lower(),), why)


def _views(found: Found, is_small: bool) -> Iterator[Choice]:
    recipe, why = "moco_v2", "the recipe of MoCo v2"
    if is_small:
        recipe, why = "moco_cifar", "MoCo's recipe for small images, which a blur would blot out"
    yield Choice("data.augmentation", (recipe,), why)
    if found.is_grey:
        jitter = ("0.4", "0.4", "0", "0")
        yield Choice("data.views.jitter", jitter, "grey images have no saturation and no hue")
        yield Choice("data.views.grayscale_probability", ("0",), "the images are grey")


def _steps(
    found: Found, config: PretrainConfig, given: Collection[str], view: int, where: str
) -> Iterator[Choice]:
    """Batches, epochs, and what depends on how many steps there are."""
    images = found.images
    batch = _power_of_two(images // _FEWEST_STEPS, _SMALLEST_BATCH, _LARGEST_BATCH[found.has_gpu])
    parts = config.accumulation_steps * found.processes
    # Each part of a batch takes two images, for batch norm.
    batch = max(2 * parts, batch // parts * parts)
    batch = config.batch_size if "batch_size" in given else batch
    steps = max(1, images // batch)
    yield Choice(
        "batch_size", (str(batch),), f"{steps:,} steps in each epoch of {images:,} images, {where}"
    )
    if not {"base_lr_batch_size", "optimizer.name"} & set(given):
        why = "for 256 images, as in the demo: short runs need more than 0.03"
        yield Choice("base_lr", ("0.12",), why)
    is_small = view <= _SMALL_SIDE
    if "cohort.small_images" in given:
        is_small = config.cohort.small_images
    work = images * view**2 * _WORK_OF_PIXEL[is_small]
    epochs = min(max(_FEWEST_EPOCHS, int(_WORK_OF_RUN[found.has_gpu] / work)), _MOST_EPOCHS)
    epochs = config.epochs if "epochs" in given else epochs
    total = epochs * steps
    yield Choice(
        "epochs",
        (str(epochs),),
        f"{total:,} steps in all; `peerlearn resume` takes more, by --epochs",
    )
    if config.method == "moco":
        yield from _queue(found, config, batch, total)
    every = max(1, epochs // _MEASUREMENTS)
    yield Choice(
        "monitor.every_epochs",
        (str(every),),
        f"measurements of the features: {epochs // every}",
    )


def _queue(found: Found, config: PretrainConfig, batch: int, total: int) -> Iterator[Choice]:
    """The settings of MoCo alone, for ``total`` steps of ``batch`` images."""
    queue = _power_of_two(found.images // 2, 1, _LARGEST_QUEUE)
    why = "at most half of the images, so that few meet keys of their own"
    yield Choice("queue.size", (str(queue),), why)
    momentum = "0.999" if total >= _STEPS_OF_SLOW_KEYS else "0.99"
    within = 1 / (1 - float(momentum))
    why = f"the momentum networks follow within {within:,.0f} steps of {total:,}"
    yield Choice("queue.momentum", (momentum,), why)
    at_once = batch // config.accumulation_steps
    fitting = [
        parts
        for parts in (8, 4, 2)
        if at_once % parts == 0
        and at_once // parts >= _SMALLEST_BATCH
        and parts % found.processes == 0
    ]
    if fitting and not config.cohort.sync_batch_norm:
        why = "batch norm over parts of a batch does not tell a query its key"
        yield Choice("cohort.batch_norm_splits", (str(fitting[0]),), why)


def _watch(found: Found) -> Iterator[Choice]:
    if found.has_labels and found.has_test:
        k = min(20, found.images // 2) if found.images < 10_000 else 200
        yield Choice("monitor.k", (str(k),), f"neighbours among {found.images:,} labelled images")
        if not found.has_gpu and found.images > 10_000:
            why = "more images would take longer than they tell, without a GPU"
            yield Choice("monitor.train_limit", ("10000",), why)
            yield Choice("monitor.test_limit", ("5000",), why)


def told(found: Found, choices: Sequence[Choice]) -> list[str]:
    """What was found and what was chosen, a line for each."""
    colour = "grey" if found.is_grey else "in colour"
    labels = "in class folders" if found.has_labels else "without labels"
    lines = [
        f"{found.name}: {found.images:,} images {labels}, {colour}; for what you do not give is chosen:"
    ]
    lines += [f"  --{each.key} {' '.join(each.words)}: {each.why}" for each in choices]
    if not (found.has_labels and found.has_test):
        lines.append(
            "  no kNN: it needs class folders in train/ and val/ (docs/your_images.md); other figures are logged"
        )
    return lines


def _power_of_two(most: int, least: int, largest: int) -> int:
    """The largest power of two up to ``most``, within the bounds."""
    return int(min(max(least, 2 ** (max(1, most).bit_length() - 1)), largest))
