"""Checkpoints: one folder per saved step, safetensors and JSON only, so nothing is ever unpickled.

    checkpoints/step-00001000/{NAME.safetensors ..., state.json, manifest.json}   checkpoints/latest

The manifest holds the SHA-256 of every other file and is written last: a folder without a valid one is no save.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peerlearn.errors import UserError
from peerlearn.run_dir import replace_folder, write_text

FORMAT_VERSION = 1


def step_folder(step: int) -> str:
    """The name of a step's folder, the same under checkpoints/ and export/."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Save a step: every group of tensors in a file of its own, ``state`` as JSON, then ``latest``.

    The folder appears under its name only when every file in it is on the disk.
    """
    final = root / step_folder(step)
    temporary = root / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, group in tensors.items():
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
        save_file(contiguous, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    hashes = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "sha256": hashes}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    replace_folder(temporary, final)
    write_text(root / "latest", final.name + "\n")
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the state of one save, every file checked against the manifest.

    Raises:
        UserError: a file is missing or its bytes are not those that were saved.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        version, hashes = manifest["format_version"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: no readable manifest.json, so this save is not whole"
        ) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder}: format {version} is newer than this program's "
            f"{FORMAT_VERSION}: update peerlearn"
        )
    for name, sha256 in hashes.items():
        file = folder / name
        if not file.is_file() or _sha256(file) != sha256:
            raise UserError(f"{file}: missing or damaged, its SHA-256 is not the manifest's")
    try:
        tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    except SafetensorError as error:
        raise UserError(f"{folder}: {error}") from error
    return tensors, json.loads((folder / "state.json").read_text())


def saved_steps(root: Path) -> list[Path]:
    """The folders of all saves, the newest first, whole or not."""
    return sorted(root.glob("step-*"), reverse=True)


def drop_old_checkpoints(root: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` saves."""
    for folder in saved_steps(root)[keep_last:]:
        shutil.rmtree(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
