"""How exports lie on the disk: names, and which are there. Their content is `peerlearn.export`'s.

RUN/export/step-00001000/  net-0/ (network "0")   net-0-key/ (its momentum network, "key-0")   ...
  each with  model.safetensors   config.json   README.md

A network's folder appears at once (`peerlearn.runs.files.replace_folder`), so what is there was written to its end.
"""

import json
import re
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
# The key of config.json that holds the SHA-256 of the weights and of its own other entries.
SEAL = "sha256"
# Begins the name of a momentum network.
KEY_PREFIX = "key-"


def network_folder(network: str) -> str:
    """The name of a network's folder: "0" lies in net-0, "key-0" in net-0-key."""
    return f"net-{network.removeprefix(KEY_PREFIX)}{'-key' if is_key_network(network) else ''}"


def network_in(folder_name: str) -> str | None:
    """The network whose folder has this name; None for other folders."""
    match = re.fullmatch(r"net-(\d+)(-key)?", folder_name)
    return f"{KEY_PREFIX if match[2] else ''}{match[1]}" if match else None


def is_key_network(network: str) -> bool:
    """Whether it is the momentum network of another."""
    return network.startswith(KEY_PREFIX)


def network_order(network: str) -> tuple[bool, int, str]:
    """What to sort networks by: query networks first, by number."""
    return is_key_network(network), len(network), network


def is_export(folder: Path) -> bool:
    """Whether a network is there, whichever program wrote it."""
    return (folder / WEIGHTS_FILE).is_file()


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The hashes that an export of this project was written with; None where none is there.

    They are not compared with the bytes, which takes reading all of them: `peerlearn.export.is_whole`.
    """
    try:
        seal = json.loads((folder / CONFIG_FILE).read_text())[SEAL]
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return seal if isinstance(seal, dict) and is_export(folder) else None


def exported_networks(folder: Path) -> dict[str, Path]:
    """The exports of a step's folder by their networks' names; query networks first, by number."""
    found = {
        network: path
        for path in folder.glob("net-*")
        if (network := network_in(path.name)) and is_export(path)
    }
    return {network: found[network] for network in sorted(found, key=network_order)}
