"""`peerlearn data`: what is done to data sets before anything is trained on them.

build: the images of a data set become one packed file.
convert: pickles of few-shot data sets become folders of PNG files.
verify: what is wrong with detection data or a folder of images.
show: the random views of a run as a picture (`pretrain.data_show`).
"""

import argparse
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peerlearn.commands.data_build import add_build
from peerlearn.commands.data_verify import add_verify
from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UserError
from peerlearn.runs.files import sync
from peerlearn.runs.progress import phase
from peerlearn.runs.text import file_name_part, listed

if TYPE_CHECKING:
    from peerlearn.data.few_shot_pickles import PickledSplit


def main(argv: Sequence[str]) -> int:
    """`peerlearn data build`, `data convert SOURCE --output DIR`, `data verify SOURCE` and `data show CONFIG`.

    Returns:
        The exit code.
    """
    if argv[:1] == ["show"]:
        return int(importlib.import_module("pretrain.data_show").main(argv[1:]))
    parser = ArgumentParser(prog="peerlearn data", description="Prepare and check data sets.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    about = "turn the pickles of a few-shot data set into folders of PNG files"
    convert = actions.add_parser(
        "convert",
        help=about,
        description=f"{about[0].upper()}{about[1:]}, train/ val/ test/ with a folder for each class. Read are "
        "mini-imagenet-cache-*.pkl, MetaOptNet's miniImageNet_category_split_*.pickle and CIFAR_FS_*.pickle, and "
        "tieredImageNet's *_images.npz or *_images_png.pkl with *_labels.pkl. Nothing in the files is run. "
        "Example: peerlearn data convert downloads/mini-imagenet --output data/miniimagenet",
    )
    convert.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder with the files of all three splits"
    )
    convert.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write, which must not be there yet"
    )  # fmt: skip
    convert.set_defaults(run=_convert)
    add_verify(actions)
    add_build(actions)
    actions.add_parser("show", help="draw the random views of a run as a picture")
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    # Imported here: --help should not wait for numpy.
    from peerlearn.data.few_shot_pickles import find_pickles

    output: Path = arguments.output
    dataset, readers = find_pickles(arguments.source)
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} is there already: choose another folder by --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as scratch:
            whole = Path(scratch) / "whole"
            split_of: dict[str, str] = {}
            said = [
                _write_split(read(), split, whole / split, split_of)
                for split, read in readers.items()
            ]
            # All splits at once, or none. So many files are not waited for one by one.
            os.sync()
            whole.rename(output)
            sync(output.parent)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}): choose another folder by --output"
        ) from error
    print(*said, sep="\n")
    print(f"use it: --data.name {dataset} --data.root {output}")
    return DONE


def _write_split(split: "PickledSplit", name: str, folder: Path, split_of: dict[str, str]) -> str:
    """Write the images of a split.

    Args:
        split: the images.
        name: name of the split.
        folder: folder to make.
        split_of: the split of each class name so far; this one's are added.

    Returns:
        What was written, in a line.

    Raises:
        UserError: a class is in an earlier split too, or an image is damaged.
    """
    from PIL import Image

    from peerlearn.data.image_folders import DecodeError, decode_image

    present = sorted(set(split.labels))
    folders = folder_names({label: split.names[label] for label in present})
    for label in present:
        other = split_of.setdefault(folders[label], name)
        if other != name:
            raise UserError(
                f"{split.source} ({name} split) holds the class {split.names[label]!r}, which is in the {other} "
                "split too: put the file of other classes in its place"
            )
        (folder / folders[label]).mkdir(parents=True)
    with phase(f"writing {name}", len(split.labels)) as advance:
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = folder / folders[label] / f"{index:08d}.png"
            if isinstance(image, bytes):
                path.write_bytes(image)
                try:
                    decode_image(path)
                except DecodeError as error:
                    raise UserError(
                        f"{split.source}: image {index} cannot be decoded ({error.reason}): fetch the file again"
                    ) from error
            else:
                # The least compression is many times as fast, and as lossless.
                Image.fromarray(image).save(path, compress_level=1)
            advance(1)
    changed = [
        f"{split.names[label]!r} to {folders[label]}"
        for label in present
        if folders[label] != split.names[label]
    ]
    renamed = f"; classes renamed: {listed(changed)}" if changed else ""
    return f"{name}: {len(split.labels):,} images of {len(present):,} classes{renamed}"


def folder_names(names: dict[int, str]) -> dict[int, str]:
    """A folder's name for each class, which leads nowhere else and is not hidden; two are never the same."""
    # With a plus it could be lost+found, which readers pass over as they do hidden folders.
    plain = {
        label: file_name_part(name).replace("+", "_").strip("._") or "class"
        for label, name in names.items()
    }
    if len({name.lower() for name in plain.values()}) < len(plain):
        return {label: f"{name}-{label:03d}" for label, name in plain.items()}
    return plain
