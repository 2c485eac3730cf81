"""Checkpoints: one folder per saved step, safetensors and JSON only, so nothing is ever unpickled.

    checkpoints/step-00001000/{NAME.safetensors ..., state.json, manifest.json}   checkpoints/latest

The manifest holds the SHA-256 of every other file and is written last: a folder without a valid manifest is no save.
A damaged save is set aside as ``step-00001000.bad``.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from peerlearn.errors import UserError
from peerlearn.runs.files import file_sha256, load_tensors, replace_folder
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.step_folders import step_folder, step_folders, write_latest

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
# Ends the name of a save that was set aside.
_BAD = ".bad"

logger = logging.getLogger(__name__)


class DamagedSaveError(UserError):
    """A save that is not whole: a file is missing, cut short or changed."""


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Save a step: every group of tensors in a file of its own, ``state`` as JSON, then ``latest``.

    The folder appears under its name only when every file in it is on the disk. If the disk fails, the unfinished
    folder is removed and the older saves stay.

    Args:
        root: folder of all saves.
        step: number of the step.
        tensors: tensors to save: name of the file -> name in the file -> tensor.
        state: plain values to save.

    Returns:
        The folder of the save.

    Raises:
        OSError: the disk is full, or fails otherwise.
    """
    final = root / step_folder(step)
    temporary = root / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            # Not save_file: only their owner could read its files, and its errors have no number.
            (temporary / f"{name}.safetensors").write_bytes(safetensors.torch.save(contiguous))
        (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n")
        hashes = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        manifest = {"format_version": FORMAT_VERSION, "step": step, "sha256": hashes}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        replace_folder(temporary, final)
        write_latest(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the state of one save, every file checked against the manifest.

    Raises:
        DamagedSaveError: a file is missing or its bytes are not those that were saved.
        UserError: a newer program wrote it.
    """
    names = check_whole(folder)
    try:
        # A file that the manifest does not name is no part of this save.
        tensors = {
            name.removesuffix(".safetensors"): load_tensors(folder / name)
            for name in names
            if name.endswith(".safetensors")
        }
        return tensors, json.loads((folder / _STATE).read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedSaveError(f"{folder}: {error}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The state of one save, without its tensors and unchecked.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON object.
    """
    return read_json_object(folder / _STATE)


def check_whole(folder: Path) -> list[str]:
    """Check every file of a save against its manifest, without loading it.

    Returns:
        The names of the files.

    Raises:
        DamagedSaveError: a file is missing or its bytes are not those that were saved.
        UserError: a newer program wrote it.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        version, hashes = int(manifest["format_version"]), dict(manifest["sha256"])
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedSaveError(
            f"{folder}: no readable {_MANIFEST}, so this save is not whole"
        ) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder}: format {version} is newer than this program's "
            f"{FORMAT_VERSION}: update peerlearn, or move that folder away to go on from an older save"
        )
    if step_folder(step) != folder.name:
        raise DamagedSaveError(f"{folder}: its {_MANIFEST} is that of step {step}")
    for name, sha256 in hashes.items():
        file = folder / name
        if file.parent != folder or not file.is_file() or file_sha256(file) != sha256:
            raise DamagedSaveError(f"{file}: missing or damaged, its SHA-256 is not the manifest's")
    if _STATE not in hashes:
        raise DamagedSaveError(f"{folder}: its {_MANIFEST} names no {_STATE}")
    return sorted(hashes)


def saved_steps(root: Path) -> list[Path]:
    """The folders of all saves, newest first, whole or not. Saves set aside are left out."""
    return [folder for _, folder in step_folders(root)]


def set_aside(folder: Path) -> Path:
    """Rename a damaged save so that it is never taken for a save again.

    Returns:
        The new path.
    """
    bad = folder.with_name(folder.name + _BAD)
    number = 1
    while bad.exists():
        number += 1
        bad = folder.with_name(f"{folder.name}{_BAD}{number}")
    os.rename(folder, bad)
    return bad


def saves_set_aside(root: Path) -> list[Path]:
    """What `set_aside` has renamed there."""
    return list(root.glob(f"*{_BAD}*"))


def drop_old_checkpoints(
    root: Path, *, keep_last: int, keep_every_steps: int | None = None
) -> None:
    """Delete all saves but the newest ``keep_last`` and those of every ``keep_every_steps``-th step.

    A save that cannot be deleted stays, with a warning: training must not stop for it.
    """
    for step, folder in step_folders(root)[keep_last:]:
        if keep_every_steps is None or step % keep_every_steps:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", folder, error)


def remove_stumps(root: Path) -> None:
    """Delete the unfinished folders of saves that were killed midway."""
    for stump in root.glob(".tmp-*"):
        shutil.rmtree(stump, ignore_errors=True)
