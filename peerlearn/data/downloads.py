"""The folder for data sets when the user names none, and downloads into it."""

import logging
import os
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from http.client import HTTPException
from pathlib import Path

from peerlearn.data.files import folder_with
from peerlearn.errors import UserError

# The limit of each single wait. torchvision sets none. A firewall that drops packets, as on many
# compute nodes, would then hold up a run for minutes.
_SOCKET_TIMEOUT_SECONDS = 10.0
# How long another process may take that downloads the same files.
_LOCK_SECONDS = 2 * 3600.0

logger = logging.getLogger(__name__)

_may_download = ContextVar("may_download", default=True)


class NotHereError(UserError):
    """A data set that would have to be downloaded, where that is not wanted."""


@contextmanager
def without_downloads() -> Iterator[None]:
    """Where a data set is not on this machine, `NotHereError` is raised in place of a download."""
    before = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(before)


def cache_folder() -> Path:
    """This user's folder for data sets, which need not exist yet.

    It is $XDG_CACHE_HOME/peerlearn, or else ~/.cache/peerlearn.

    Raises:
        UserError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that relative paths are to be ignored.
    if os.path.isabs(base):
        return Path(base, "peerlearn")
    try:
        return Path.home() / ".cache" / "peerlearn"
    except RuntimeError as error:
        raise UserError("this user has no home folder to keep data in: set data.root") from error


def find_or_download(
    name: str, root: Path, *, marker: str, published: str, url: str, md5: str, advice: str
) -> Path:
    """The folder that holds the file ``marker``: root or root/published.

    If neither holds it, the archive is downloaded and unpacked in root. An archive that already lies
    there is used.

    Args:
        name: name of the data set, for messages.
        root: folder to look in.
        marker: name of a file that the data set has.
        published: name of the folder in the archive.
        url: address of the archive.
        md5: MD5 of the archive.
        advice: what the user can do instead, for messages.

    Raises:
        UserError: root is not writable, or the files cannot be had.
    """

    def fetch(target: str) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(url, root, extract_root=os.path.dirname(target), md5=md5)

    folder = folder_with(marker, root, root / published)
    return folder or download(name, root, published, fetch, advice)


def download(
    name: str, root: Path, published: str, fetch: Callable[[str], None], advice: str
) -> Path:
    """Make the folder root/published by a download.

    Args:
        name: name of the data set, for messages.
        root: folder to download into; it is created if need be.
        published: name of the folder to make.
        fetch: function that downloads the files into the path that it is given.
        advice: what the user can do instead, for messages.

    Raises:
        UserError: root is not writable, or the files cannot be had. The message ends with ``advice``.
        NotHereError: nothing is to be downloaded (`without_downloads`).
    """
    if not _may_download.get():
        raise NotHereError(f"{root} lacks the files of {name}: {advice}")
    from filelock import FileLock

    lock = FileLock(root / ".download.lock", timeout=_LOCK_SECONDS)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise UserError(f"{root} lacks the files of {name} and is not writable: {advice}")
        # All ranks of a run come here at the same time. One of them downloads, and the folder appears complete.
        with lock, tempfile.TemporaryDirectory(dir=root) as scratch:
            if not (root / published).exists():
                logger.info("downloading %s to %s", name, root)
                with _socket_timeout(_SOCKET_TIMEOUT_SECONDS):
                    fetch(os.path.join(scratch, published))
                (root / published).parent.mkdir(exist_ok=True)
                os.rename(os.path.join(scratch, published), root / published)
    except (
        OSError,
        RuntimeError,
        EOFError,
        HTTPException,
        tarfile.TarError,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{root} lacks the files of {name}, and the download failed ({reason}): {advice}"
        ) from error
    return root / published


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
