"""The folders of exports: their names, and which of them exist. `peerlearn.export` has their content.

RUN/export/step-00001000/  net-0/ (network "0")   net-0-key/ (its momentum network, "key-0")   ...
  each with  model.safetensors   config.json   README.md

A network's folder appears at once (`peerlearn.runs.files.replace_folder`), so an existing folder is complete.
"""

import re
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.runs.json_files import read_json_object

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
# The key of config.json that holds the SHA-256 of the weights and of its own other entries.
SEAL = "sha256"
# The key of config.json by which a folder tells that it holds a detector.
DETECTOR_KEY = "detector"
# The folder of the detector at the end of a training, below that of the training.
LAST_DETECTOR = "detector"
# The beginning of a momentum network's name.
KEY_PREFIX = "key-"


def network_folder(network: str) -> str:
    """The name of a network's folder: "0" lies in net-0, "key-0" in net-0-key."""
    return f"net-{network.removeprefix(KEY_PREFIX)}{'-key' if is_key_network(network) else ''}"


def network_in(folder_name: str) -> str | None:
    """The network whose folder has this name; None for other folders."""
    match = re.fullmatch(r"net-(\d+)(-key)?", folder_name)
    return f"{KEY_PREFIX if match[2] else ''}{match[1]}" if match else None


def is_key_network(network: str) -> bool:
    """Whether the network is the momentum network of another one."""
    return network.startswith(KEY_PREFIX)


def network_order(network: str) -> tuple[bool, int, str]:
    """A key to sort networks by: query networks first, by number."""
    return is_key_network(network), len(network), network


def is_export(folder: Path) -> bool:
    """Whether the folder holds a network, whichever program wrote it."""
    return (folder / WEIGHTS_FILE).is_file()


def is_detector(folder: Path) -> bool:
    """Whether the folder holds a detector, which stands on a network and is more than that."""
    try:
        return DETECTOR_KEY in read_json_object(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return False


def detector_in(folder: Path) -> Path | None:
    """The folder itself if it holds a detector, or that of the last detector of the training in it; None without."""
    return next((each for each in (folder, folder / LAST_DETECTOR) if is_detector(each)), None)


def refuse_detector(folder: Path) -> None:
    """Make sure that the folder holds no detector.

    Raises:
        UserError: it does.
    """
    if is_detector(folder):
        raise UserError(
            f"{folder} holds a detector, which `peerlearn detect` scores: give a run or an export"
        )


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The hashes in an export of this project; None if the folder holds none.

    They are not compared with the files, which would take reading all bytes: `peerlearn.export.is_whole` does that.
    """
    try:
        seal = read_json_object(folder / CONFIG_FILE)[SEAL]
    except (OSError, ValueError, LookupError):
        return None
    return seal if isinstance(seal, dict) and is_export(folder) else None


def why_not_whole(folder: Path, networks: int) -> str:
    """The reason why a step's exports are not whole, as far as it shows without reading all bytes; "" if they are.

    Args:
        folder: folder of the step.
        networks: number of networks that the run trains.
    """
    if not folder.is_dir():
        return f"{folder} is gone"
    for network in range(networks):
        own = folder / network_folder(str(network))
        if read_seal(own) is None:
            return f"{own} is damaged" if own.is_dir() else f"{own} is gone"
    return ""


def exported_networks(folder: Path) -> dict[str, Path]:
    """The exports in a step's folder by the names of their networks: query networks first, by number."""
    found = {
        network: path
        for path in folder.glob("net-*")
        if (network := network_in(path.name)) and is_export(path)
    }
    return {network: found[network] for network in sorted(found, key=network_order)}
