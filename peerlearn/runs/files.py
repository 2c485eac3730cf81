"""Files that stay whole through a crash or a full disk: small texts, folders and JSON lines; and hashes of files."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

# The mode of a file that others may read, as far as the umask lets them, and of one that holds secrets.
_READABLE, PRIVATE = 0o644, 0o600
_OTHERS_WRITE = 0o022


@contextmanager
def changed_by_owner_alone() -> Iterator[None]:
    """Within it, what this process and its children make can be changed by no other account, whatever the umask."""
    before = os.umask(_OTHERS_WRITE)
    os.umask(before | _OTHERS_WRITE)
    try:
        yield
    finally:
        os.umask(before)


def write_text(path: Path, text: str, *, durable: bool = True, mode: int = _READABLE) -> None:
    """Replace a small file as a whole: it holds the text of one writer, old or new, never a part.

    Args:
        path: the file.
        text: its new content.
        durable: whether to wait until the text is on the disk.
        mode: mode of the new file, which the umask may narrow.

    Raises:
        OSError: the disk does not take the text. The file is as it was.
    """
    # Not as the locale has it: others read the file too. What is no text (a byte in a file's name) is escaped.
    with replacing(path, durable=durable, mode=mode) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextmanager
def replacing(path: Path, *, durable: bool = False, mode: int = _READABLE) -> Iterator[BinaryIO]:
    """A file to write, which replaces another as a whole if the block ends well, and else goes.

    Args:
        path: the other file.
        durable: whether to wait until the new content is on the disk.
        mode: mode of the new file, which the umask may narrow.

    Raises:
        OSError: the disk does not take the content. The file is as it was.
    """
    # Two processes may write one file at once: each has a temporary file of its own, made by itself under a name that
    # nobody can guess, so that no link lies there which would lead what is written elsewhere.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished temporary folder to ``final`` at once and durably. An older ``final`` is removed."""
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


def load_tensors(file: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is damaged.
    """
    # Imported here: most of what lies in this file needs no torch.
    import safetensors.torch

    try:
        os.fspath(file).encode()
    except UnicodeEncodeError:
        # Some folder above is named in other bytes than UTF-8, which the library's reader of files does not take.
        return safetensors.torch.load(file.read_bytes())
    return safetensors.torch.load_file(file)


def numbered_files(folder: Path, before: str, after: str = "") -> dict[int, Path]:
    """The files and folders below ``folder`` whose names are a number between two texts, by their numbers."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    named = {
        name.removeprefix(before).removesuffix(after): name
        for name in names
        if name.startswith(before) and name.endswith(after)
    }
    return {int(number): folder / name for number, name in named.items() if number.isdecimal()}


def read_json_lines(path: Path, *, naming: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order. Lines that cannot be read are left out; a missing file has no objects.

    Args:
        path: the file.
        naming: values that are looked for. A line that holds none of them is left out before it is parsed, which saves
            time with long files. Empty = all lines.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return
    texts = [json.dumps(text).encode() for text in naming]
    for line in lines:
        if texts and not any(text in line for text in texts):
            continue
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue


def append_json_line(path: Path, row: Mapping[str, Any], *, durable: bool = False) -> None:
    """Add an object as a line.

    Args:
        path: the file.
        row: the object.
        durable: whether to wait until the line is on the disk.

    Raises:
        OSError: the disk does not take the line. The file is as it was.
    """
    append_text(path, json.dumps(row) + "\n", durable=durable)


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Add whole lines: all of them or, if the disk does not take them, nothing.

    If a crash cut the last line of the file short, a newline is added first, so that the two do not become one.

    Args:
        path: the file.
        text: the lines.
        durable: whether to wait until the lines are on the disk.

    Raises:
        OSError: the disk does not take the lines, or the path is a link. The file is as it was.
    """
    # Unbuffered: a buffer would try again when it is closed, and write the end of a line without its start.
    with open(path, "ab", buffering=0, opener=open_no_link) as file:
        size = file.tell()
        content = (b"\n" if _lacks_newline(path, size) else b"") + text.encode(
            errors="backslashreplace"
        )
        try:
            written = file.write(content)
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
        if durable:
            os.fsync(file.fileno())


def open_no_link(path: str, flags: int) -> int:
    """Open a file to write to it, but not what a link leads to: another may have put the link there."""
    return os.open(path, flags | os.O_NOFOLLOW, _READABLE)


def open_regular(path: Path, *, follows_links: bool = True) -> BinaryIO:
    """Open a file to read it. Of a run's folder nobody knows who wrote in it: opening a pipe would wait for a writer.

    Args:
        path: file to open.
        follows_links: whether the last part of the path may be a link.

    Raises:
        OSError: the file is not there, cannot be read, or is no regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follows_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def _lacks_newline(path: Path, size: int) -> bool:
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) != b"\n"
