"""The common parts of the readers of published data sets: what they return, and how they read a file."""

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from peerlearn.errors import UserError


class Content(NamedTuple):
    """One split as it was read. The fields are those of ``ImageDataset``."""

    images: Tensor | tuple[Path, ...]
    labels: Tensor | None
    class_names: tuple[str, ...]
    why_unlabelled: str = ""
    remarks: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def folder_with(marker: str, *folders: Path) -> Path | None:
    """The first of the folders that holds the file ``marker``; None if none does."""
    # Not Path.is_file: it raises if a folder above may not be entered.
    return next((folder for folder in folders if os.path.isfile(folder / marker)), None)


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not blank.

    Raises:
        UserError: the file cannot be read.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: the file cannot be read. The message names it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path} ({error.strerror}): restore it or mend data.root")
