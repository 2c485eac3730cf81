"""The image files below a folder, and what else lies there: it is skipped, and counted by suffix and reason."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from peerlearn.data.files import unreadable
from peerlearn.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
# Image formats of cameras and the web that are skipped. They are named apart from files that are no images.
_OTHER_IMAGE_SUFFIXES = frozenset(
    (
        *(
            ".heic",
            ".heif",
            ".avif",
            ".jxl",
            ".jp2",
            ".svg",
            ".psd",
            ".ico",
            ".tga",
            ".exr",
            ".hdr",
        ),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    )
)
# What file managers, cameras and unpackers leave behind; thumbnails of these folders would pass for images.
_JUNK_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
_UNREAD = "a format that is not read: convert them to JPEG or PNG"
_NO_IMAGE = "no images"
_HIDDEN = "hidden"
_NO_FILE = "broken links or no plain files"


class FoundFiles(NamedTuple):
    """The files below a folder.

    Attributes:
        folder: the folder.
        images: image files, in sorted order.
        skipped: number of other files by (why they were skipped, suffix).
    """

    folder: Path
    images: tuple[Path, ...]
    skipped: Counter[tuple[str, str]]

    def remarks(self) -> tuple[str, ...]:
        """What was skipped, in one line; nothing if nothing was."""
        if not self.skipped:
            return ()
        return (f"{self.folder}: skipped {_skipped_text(self.skipped)}",)


def subfolders(folder: Path) -> tuple[str, ...]:
    """The names of the folders directly in a folder, sorted; hidden ones are left out."""
    return tuple(
        entry.name
        for entry in _entries(folder)
        if _holds(entry.is_dir) and not _is_hidden(entry.name)
    )


def find_images(folder: Path) -> FoundFiles:
    """The images below a folder, and what else is there.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    found = search(folder)
    if not found.images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        there = f", only {_skipped_text(found.skipped)}" if found.skipped else ""
        raise UserError(f"no images ({suffixes}) below {folder}{there}: mend data.root")
    return found


def search(folder: Path) -> FoundFiles:
    """The images below a folder, of which there may be none, and what else is there."""
    skipped: Counter[tuple[str, str]] = Counter()
    return FoundFiles(folder, tuple(_walk(folder, frozenset(), skipped)), skipped)


def _walk(
    folder: Path, ancestors: frozenset[str], skipped: Counter[tuple[str, str]]
) -> Iterator[Path]:
    # Links are followed, so that a folder of links can select classes. A link to a folder above
    # itself must not be walked for ever.
    resolved = os.path.realpath(folder)
    if resolved in ancestors:
        return
    for entry in _entries(folder):
        suffix = os.path.splitext(entry.name)[1].lower()
        if _is_hidden(entry.name):
            skipped[_HIDDEN, ""] += 1
        elif _holds(entry.is_dir):
            yield from _walk(folder / entry.name, ancestors | {resolved}, skipped)
        elif suffix not in IMAGE_SUFFIXES:
            skipped[_UNREAD if suffix in _OTHER_IMAGE_SUFFIXES else _NO_IMAGE, suffix] += 1
        elif _holds(entry.is_file):
            yield folder / entry.name
        else:
            # A pipe would keep its reader waiting for ever.
            skipped[_NO_FILE, suffix] += 1


def _holds(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link to itself, which has none, is of no kind."""
    try:
        return kind()
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _JUNK_FOLDERS


def _skipped_text(skipped: Counter[tuple[str, str]]) -> str:
    """``12 .heic (a format that is not read ...), 2 .txt, 1 .db (no images), 3 (hidden)``."""
    by_reason: dict[str, list[str]] = {}
    for (reason, suffix), count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])):
        kind = suffix or ("" if reason == _HIDDEN else "without a suffix")
        by_reason.setdefault(reason, []).append(f"{count:,} {kind}".rstrip())
    return "; ".join(f"{', '.join(kinds)} ({reason})" for reason, kinds in by_reason.items())


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries directly in the folder, sorted by name."""
    try:
        with os.scandir(folder) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(folder, error) from error
