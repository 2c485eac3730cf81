"""`peerlearn import`: turn the networks of another program's checkpoint into exports."""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.runs.export_folders import network_folder
from peerlearn.runs.files import file_sha256, replace_folder

if TYPE_CHECKING:
    from peerlearn.exchange.foreign_checkpoints import ForeignCheckpoint, ForeignNetwork


class _Images(NamedTuple):
    """The images that a network expects, and the source of that knowledge."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


_LARGEST_SIZE = 8192
_IMAGENET = _Images(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet's, assumed")
# The numbers in the MCL authors' main_cifar.py.
_CIFAR100 = _Images(
    32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "CIFAR-100's, assumed of a 3x3 stem"
)


def main(argv: Sequence[str]) -> int:
    """`peerlearn import FILE [--output DIR] [--architecture NAME] [--image_size N] [--mean ...] [--std ...]`.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    file: Path = arguments.file
    # Imported here: --help should not wait for torch.
    from peerlearn.exchange.foreign_checkpoints import read_foreign

    if arguments.image_size is not None and not 1 <= arguments.image_size <= _LARGEST_SIZE:
        raise UsageError(
            f"--image_size must be within 1..{_LARGEST_SIZE}, got {arguments.image_size}"
        )
    checkpoint = read_foreign(
        file, architecture=arguments.architecture, image_size=arguments.image_size
    )
    images = [_expected_images(network, arguments) for network in checkpoint.networks]
    output: Path = arguments.output or Path("imported") / _plain_stem(file)
    sha256 = file_sha256(file)
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} is there already: choose another folder by --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".import-") as scratch:
            whole = Path(scratch) / output.name
            for network, expected in zip(checkpoint.networks, images, strict=True):
                folder = whole / network_folder(network.name)
                _save(folder, file, sha256, checkpoint, network, expected)
            # All networks at once, or none: a part would be taken for the whole.
            replace_folder(whole, output)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}): choose another folder by --output"
        ) from error
    _report(file, sha256, checkpoint, images, output)
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn import",
        description="Turn the networks of another program's checkpoint into exports: ResNets and wide ResNets of MoCo, "
        "of the MCL authors, of SwAV, SimSiam, Barlow Twins, DINO, VISSL, solo-learn, lightly, torchvision and timm. "
        "Nothing in the file is run. Example: peerlearn import moco_v2.pth.tar",
    )
    parser.add_argument("file", type=Path, help="a .pth, .pt, .tar, .ckpt or .safetensors file")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="name of the network, where tensors do not tell it: resnetblur18, resnet18_small_padding2 "
        "(solo-learn's 3x3 stem), resnet18_small_pooled, or any network of timm "
        "(default: what the tensors tell, compared with a name beside them)",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the exports (default: imported/ and the file's name)"
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="height and width of the images that the networks expect, in pixels "
        "(default: 224, or 32 for 3x3 stems)",
    )
    for name, words in (("mean", "mean"), ("std", "standard deviation")):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            help=f"{words} per channel of images in [0, 1] (default: ImageNet's, or CIFAR-100's for 3x3 stems)",
        )
    return parser.parse_args(argv)


def _expected_images(network: "ForeignNetwork", arguments: argparse.Namespace) -> _Images:
    """The size and normalisation that the user gave, else those of the data set that such a stem is made for.

    Raises:
        UsageError: the numbers do not fit the network's channels, or are out of range.
    """
    from peerlearn.networks.cifar import CIFAR_NETWORKS

    small = "_small" in network.architecture or network.architecture in CIFAR_NETWORKS
    images = _CIFAR100 if small or network.small_images else _IMAGENET
    if network.image_size is not None:
        images = images._replace(size=network.image_size)
    if arguments.image_size is not None:
        images = images._replace(size=arguments.image_size)
    if (arguments.mean is None) != (arguments.std is None):
        raise UsageError("--mean and --std belong together: give both, or neither")
    if arguments.mean is not None:
        images = images._replace(
            mean=tuple(arguments.mean), std=tuple(arguments.std), source="as given by --mean, --std"
        )
    if not len(images.mean) == len(images.std) == network.in_chans:
        raise UsageError(
            f"{network.source} takes {network.in_chans} channels: give as many numbers by --mean and --std"
        )
    if not all(0 < value < math.inf for value in images.std):
        raise UsageError(f"--std must be positive and finite, got {arguments.std}")
    if not all(map(math.isfinite, images.mean)):
        raise UsageError(f"--mean must be finite, got {arguments.mean}")
    return images


def _plain_stem(file: Path) -> str:
    """The file's name without its endings: moco_v2 for moco_v2.pth.tar."""
    name = file
    while name.suffix in (".pth", ".pt", ".tar", ".safetensors", ".bin", ".ckpt"):
        name = name.with_suffix("")
    return name.name


def _save(
    folder: Path,
    file: Path,
    sha256: str,
    checkpoint: "ForeignCheckpoint",
    network: "ForeignNetwork",
    images: _Images,
) -> None:
    from peerlearn.export import save_export
    from peerlearn.runs.model_card import CardFacts

    save_export(
        network.backbone,
        folder,
        architecture=network.architecture,
        in_chans=network.in_chans,
        small_images=network.small_images,
        image_size=images.size,
        mean=images.mean,
        std=images.std,
        provenance={
            "layout": checkpoint.layout,
            "file": file.name,
            "SHA-256 of the file": sha256,
            "network in the file": network.source,
            "mean and standard deviation": images.source,
            **({} if network.counted else {"batch counters": "not in the file, set to 0"}),
            **({"prefix of its names in the file": network.prefix} if network.prefix else {}),
            **({"not told by the tensors": network.untold} if network.untold else {}),
        },
        origin=f"imported from {file.name}",
        facts=CardFacts(tags=["imported"]),
    )


def _report(
    file: Path,
    sha256: str,
    checkpoint: "ForeignCheckpoint",
    images: Sequence[_Images],
    output: Path,
) -> None:
    print(f"{file}: {file.stat().st_size:,} bytes, SHA-256 {sha256}")
    print(f"layout: {checkpoint.layout}")
    for network, expected in zip(checkpoint.networks, images, strict=True):
        print(
            f"{output / network_folder(network.name)}: {network.source} is {network.architecture}, matched "
            f"{network.matched} of {network.matched} tensors"
            + ("" if network.counted else ", batch counters are not in the file: set to 0")
            + (", with a 3x3 stem" if network.small_images else "")
            + f"; {network.in_chans} x {expected.size} x {expected.size} pixels, mean and standard deviation "
            + expected.source
        )
    left_out = (f"{group} {count}" for group, count in checkpoint.left_out.items())
    print(f"left out, in tensors: {', '.join(left_out) or 'nothing'}")
    if checkpoint.not_read:
        print(f"not read, beside the state dict: {', '.join(checkpoint.not_read)}")
    prefixes = dict.fromkeys(network.prefix for network in checkpoint.networks if network.prefix)
    if prefixes:
        print(f"stripped from the names: {', '.join(prefixes)}")
    for untold in dict.fromkeys(filter(None, (network.untold for network in checkpoint.networks))):
        print(f"not told by the tensors: {untold}")
    print(f"use them: peerlearn knn --checkpoint {output} --data.name DATASET")
