"""`peerlearn data build`: the images of a data set in one file, which `--data.backend ffcv` reads."""

import argparse
from pathlib import Path
from typing import Any

from peerlearn.data.published import DATASET_NAMES
from peerlearn.errors import DONE, UsageError


def add_build(actions: "argparse._SubParsersAction[Any]") -> None:
    """Add the action to those of `peerlearn data`."""
    about = "pack the images of a data set into one file, for --data.backend ffcv"
    build = actions.add_parser(
        "build",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. Beside FILE.beton lies FILE.beton.json, with its SHA-256 and the "
        "images that could not be read.",
        epilog="examples:\n"
        "  peerlearn data build --data.name cifar10 --format raw --output cifar10.beton\n"
        "  peerlearn data build --data.name folder --data.root photos --format jpeg --shorter_side 256 --output "
        "photos.beton\n\n"
        "then: peerlearn pretrain ... --data.name folder --data.backend ffcv --data.packed photos.beton",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument(
        "--data.name",
        dest="name",
        required=True,
        choices=DATASET_NAMES,
        metavar="NAME",
        help=f"name of the data set: {', '.join(DATASET_NAMES)}",
    )
    build.add_argument(
        "--data.root",
        dest="root",
        metavar="DIR",
        help="folder of the data set (default: the usual places)",
    )
    build.add_argument(
        "--data.split",
        dest="split",
        default="train",
        metavar="SPLIT",
        help="split to pack (default: train)",
    )
    build.add_argument(
        "--format",
        required=True,
        choices=["raw", "jpeg"],
        help="raw: pixels, large and fast to read; jpeg: JPEG files as they are, other images at quality 90",
    )
    build.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.beton",
        help="file to write, which must not be there yet",
    )
    build.add_argument(
        "--shorter_side",
        type=int,
        metavar="PIXELS",
        help="length to which the shorter side of larger images is resized (default: all keep their size)",
    )
    build.add_argument(
        "--data.workers",
        dest="workers",
        type=int,
        default=2,
        metavar="N",
        help="processes that read (default: 2)",
    )
    build.add_argument(
        "--data.max_unreadable_percent",
        dest="max_unreadable_percent",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="largest percentage of the images that may be unreadable (default: 1)",
    )
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    if arguments.shorter_side is not None and arguments.shorter_side < 1:
        raise UsageError(f"--shorter_side must be at least 1, got {arguments.shorter_side}")
    if arguments.workers < 0:
        raise UsageError(f"--data.workers must be at least 0, got {arguments.workers}")
    # Imported here: --help should not wait for torch.
    from peerlearn.data.beton_writer import pack
    from peerlearn.data.datasets import load_dataset

    dataset = load_dataset(arguments.name, arguments.split, root=arguments.root)
    facts = pack(
        dataset,
        arguments.output,
        format=arguments.format,
        shorter_side=arguments.shorter_side,
        workers=arguments.workers,
        max_unreadable_percent=arguments.max_unreadable_percent,
    )
    print(
        f"{arguments.output}: {facts.images:,} images of {facts.title} {facts.split}, {facts.format}, "
        f"{facts.size_bytes / 2**20:,.1f} MiB, SHA-256 {facts.sha256}"
    )
    root = f" --data.root {arguments.root}" if arguments.root else ""
    split = f" --data.split {arguments.split}" if arguments.split != "train" else ""
    print(
        f"use it: --data.name {arguments.name}{root}{split} --data.backend ffcv --data.packed {arguments.output}"
    )
    return DONE
