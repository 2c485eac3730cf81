"""Where data is kept, and giving up soon where it cannot be had."""

import os
import socket
import time
from pathlib import Path

import pytest
from filelock import FileLock

from peerlearn.data import downloads
from peerlearn.errors import UserError


def test_the_cache_follows_the_xdg_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert downloads.cache_folder() == tmp_path / "cache" / "peerlearn"
    at_home = tmp_path / "home" / ".cache" / "peerlearn"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert downloads.cache_folder() == at_home
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert downloads.cache_folder() == at_home
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(UserError, match=r"no home.*data\.root"):
        downloads.cache_folder()


@pytest.mark.parametrize("before", [None, 77.0])
def test_a_server_that_never_answers_is_given_up(
    before: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(downloads, "_SOCKET_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    initial = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    try:
        # The system completes the connection; nobody ever reads from it.
        with socket.create_server(("127.0.0.1", 0)) as server:
            start = time.monotonic()
            with pytest.raises(UserError, match=r"made.*timed out.*: say please") as caught:
                downloads.find_or_download(
                    "made",
                    tmp_path,
                    marker="marker",
                    published="folder",
                    url=f"http://127.0.0.1:{server.getsockname()[1]}/folder.zip",
                    md5="0" * 32,
                    advice="say please",
                )
            assert time.monotonic() - start < 60
        assert "\n" not in str(caught.value)
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(initial)
    assert {path.name for path in tmp_path.iterdir()} <= {".download.lock"}


def test_another_download_of_the_same_files_is_waited_for_so_long_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(downloads, "_LOCK_SECONDS", 0.2)
    with (
        FileLock(tmp_path / ".download.lock"),
        pytest.raises(UserError, match=r"made.*lock.*could not be acquired.*: say please"),
    ):
        downloads.download("made", tmp_path, "folder", lambda target: None, "say please")


@pytest.mark.parametrize("nested", ["", "folder"])
def test_what_is_there_is_not_fetched(nested: str, tmp_path: Path):
    (tmp_path / nested).mkdir(exist_ok=True)
    (tmp_path / nested / "marker").write_text("")
    found = downloads.find_or_download(
        "made",
        tmp_path,
        marker="marker",
        published="folder",
        url="no-protocol",
        md5="0" * 32,
        advice="",
    )
    assert found == tmp_path / nested
