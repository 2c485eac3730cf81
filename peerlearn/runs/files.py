"""Files that a crash or a full disk leaves whole: small texts and folders replaced at once, JSON lines, hashes."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a small file as a whole: it is either the old or the new text, never half of it.

    ``durable`` waits until it is on the disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(temporary: Path, final: Path) -> None:
    """Make a finished temporary folder appear as ``final`` at once, durably; an older ``final`` goes."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hex.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def numbered_files(folder: Path, before: str, after: str = "") -> dict[int, Path]:
    """The files and folders below ``folder`` whose names are a number between two texts, by their numbers."""
    named = {
        path.name.removeprefix(before).removesuffix(after): path
        for path in folder.glob(f"{before}*{after}")
    }
    return {int(number): path for number, path in named.items() if number.isdecimal()}


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order; lines that cannot be read are left out, of a file that is not there all."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue


def append_json_line(path: Path, row: Mapping[str, Any], *, durable: bool = False) -> None:
    """Add an object; ``durable`` waits until it is on the disk.

    Raises:
        OSError: the disk does not take it; the file is as it was.
    """
    append_text(path, json.dumps(row) + "\n", durable=durable)


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Add whole lines: all of them or, if the disk does not take them, nothing.

    A last line that a crash cut short is first ended, so that it does not swallow this one.

    Raises:
        OSError: the disk does not take them.
    """
    # Unbuffered: a buffer would try again when it is closed, and write the rest of a line whose start is gone.
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        content = (b"\n" if _lacks_newline(path, size) else b"") + text.encode()
        try:
            written = file.write(content)
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
        if durable:
            os.fsync(file.fileno())


def _lacks_newline(path: Path, size: int) -> bool:
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) != b"\n"
