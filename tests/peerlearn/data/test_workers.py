"""Workers that die, hang or cannot hand over what they made, and folders that sockets do not fit in."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peerlearn.data import workers
from peerlearn.data.workers import results, worker_pool
from peerlearn.errors import CrashError, UserError

HOME = Path(__file__).parents[3]


def square(number: int) -> Tensor:
    return torch.tensor([number**2])


def die(number: int, *, by: signal.Signals) -> Tensor:
    if number == 3:
        os.kill(os.getpid(), by)
        time.sleep(60)
    return square(number)


def leave(number: int, *, code: int) -> Tensor:
    if number == 3:
        os._exit(code)
    return square(number)


def hang(number: int) -> Tensor:
    if number == 3:
        time.sleep(600)
    return square(number)


def hand_over_what_cannot_be(number: int) -> object:
    return (lambda: number) if number == 3 else square(number)


def slow(number: int) -> Tensor:
    time.sleep(1.5 if number == 3 else 0)
    return square(number)


def pool(function, count: int = 2):
    return worker_pool(function, range(6), workers=count, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("by", "advice"),
    [
        (signal.SIGKILL, "memory may have run out; lower --data.workers or --batch_size"),
        (signal.SIGBUS, r"/dev/shm (.* of .* MiB are free) may be full; make it larger, or set"),
        (signal.SIGSEGV, "an image may crash its decoder; --data.workers 0 leaves the place"),
    ],
)
def test_a_worker_that_dies_of_a_signal_is_told_in_one_line(by, advice):
    with pytest.raises(CrashError) as told:
        list(results(pool(partial(die, by=by))))
    start = f"a process that reads images died ({by.name}): "
    assert str(told.value).startswith(start)
    assert re.match(re.escape(advice).replace(r"\.\*", ".*"), str(told.value)[len(start) :])
    assert "\n" not in str(told.value)


def test_a_worker_that_exits_is_told(capfd):
    with pytest.raises(CrashError, match=r"died \(exit code 7\): an image may crash its decoder"):
        list(results(pool(partial(leave, code=7))))


def test_a_result_that_cannot_be_sent_ends_the_wait(capfd):
    with pytest.raises(CrashError, match=r"could not hand them over: --data\.workers 0 does"):
        list(results(pool(hand_over_what_cannot_be)))
    assert "Traceback" not in capfd.readouterr().err


def test_workers_that_hang_are_waited_for_so_long_and_no_longer(monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 2.0)
    made = []
    with pytest.raises(
        CrashError, match=r"have handed over nothing for 2 s: does the disk of data\.root answer\?"
    ):
        made.extend(results(pool(hang)))
    assert [int(result) for result in made] == [0, 1, 4]


def test_a_slow_worker_is_not_taken_for_one_that_hangs(monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.2)
    assert [int(result) for result in results(pool(slow))] == [0, 1, 4, 9, 16, 25]


def test_without_workers_an_error_of_the_work_stays_what_it_is():
    def fail(number: int) -> Tensor:
        raise RuntimeError("of the work")

    with pytest.raises(RuntimeError, match="of the work"):
        list(results(pool(fail, count=0)))


STOPPED = """
import os
import signal
import sys
import time
import torch
from peerlearn.cli import main
from peerlearn.data import workers
from peerlearn.runs.stop import STOP_SIGNALS, StoppedError, stop_signals

def busy(number):
    time.sleep(300)

if __name__ == "__main__":
    from stopped import busy
    pool = workers.worker_pool(busy, range(40), workers=16, device=torch.device("cpu"))
    look = workers._next_result
    def told(iterator):
        os.kill(os.getpid(), signal.SIGTERM)
        return look(iterator)
    workers._next_result = told
    try:
        with stop_signals(STOP_SIGNALS, "saving") as stop, stop.at_once():
            list(workers.results(pool))
    except StoppedError as error:
        print(error)
"""


@pytest.mark.slow(15)
def test_a_stop_does_not_wait_for_busy_workers_one_after_another(tmp_path):
    """DataLoader gives each 5 s to finish what it does."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(tmp_path / "stopped.py")],
        env={**os.environ, "PYTHONPATH": f"{HOME}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr.readline() == "SIGTERM: stopping\n"
        begun = time.monotonic()
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "stopped by SIGTERM\n", "")
        assert time.monotonic() - begun < 20
    finally:
        process.kill()


READS = """
import sys
import torch
from peerlearn.data.workers import results, worker_pool
from peerlearn.errors import UserError

def large(number):
    return (torch.zeros(2**20), {"more": [torch.zeros(3)]})

if __name__ == "__main__":
    from reads import large
    pool = worker_pool(large, range(6), workers=2, device=torch.device("cpu"))
    try:
        print(len([None for result in results(pool)]))
    except UserError as error:
        print(error)
"""


def read_in_a_process(
    folder: Path, *before: str, **environment: str
) -> subprocess.CompletedProcess:
    (folder / "reads.py").write_text(READS)
    return subprocess.run(
        [*before, sys.executable, str(folder / "reads.py")],
        env={**os.environ, "PYTHONPATH": f"{HOME}:{folder}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow(15)
def test_shared_memory_that_is_too_small_is_named_with_the_key_that_does_without(tmp_path):
    words = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    before = ["unshare", "-m", "sh", "-c", words, "sh"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    found = read_in_a_process(tmp_path, *before)
    assert re.fullmatch(
        r"/dev/shm \(\d of 1 MiB are free\) does not take the images that processes hand over "
        r"\(.*No space left on device.*\): make it larger .*, or read images without processes, by --data.workers 0\n",
        found.stdout,
    )
    assert found.stderr == ""


@pytest.mark.slow(15)
def test_a_limit_of_open_files_is_named(tmp_path):
    found = read_in_a_process(tmp_path, "sh", "-c", 'ulimit -n 40 && exec "$@"', "sh")
    assert re.fullmatch(r".*\n|6\n", found.stdout)
    assert "Traceback" not in found.stderr


@pytest.mark.slow(15)
def test_a_long_tmpdir_does_without_a_socket_in_it(tmp_path):
    long = tmp_path / ("long" * 40)
    long.mkdir()
    found = read_in_a_process(tmp_path, TMPDIR=str(long))
    assert (found.stdout, found.stderr) == ("6\n", "")
    assert not list(long.iterdir())


def test_a_long_tmpdir_without_a_short_folder_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(workers.tempfile, "tempdir", "/x" * 60)
    monkeypatch.setattr(workers, "_SHORT_FOLDERS", ("/nowhere", "/not/there"))
    monkeypatch.setattr(workers, "get_temp_dir", lambda: os.mkdir(workers.tempfile.tempdir + "/a"))
    with pytest.raises(
        UserError,
        match=r"\ATMPDIR (/x){60} is too long for a socket's address, and none of /nowhere, /not/there can be written: "
        r"set TMPDIR to a path of at most \d+ bytes, or --data\.workers 0\Z",
    ):
        workers._settle_sockets_folder()
    assert workers.tempfile.tempdir == "/x" * 60
