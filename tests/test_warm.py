"""Warm processes behave like those of subprocess."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import environment
from tests.warm import Process, run

SCRIPT = """
import os, sys, time
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("WORD"), sys.stdin.read(), flush=True)
print("error", file=sys.stderr)
if "wait" in sys.argv:
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def test_words_folder_variables_files_and_exit_code(script: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(script), "7"]
    options = {
        "env": environment(WORD="said"),
        "cwd": tmp_path,
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "text": True,
    }
    found, expected = run(words, **options), subprocess.run(words, **options)
    assert (found.returncode, found.stdout, found.stderr) == (
        *(expected.returncode, expected.stdout, expected.stderr),
    )
    assert found.returncode == 7
    assert "said" in found.stdout


def test_a_module_and_an_uncaught_error(script: Path) -> None:
    found = run(
        [sys.executable, "-m", "peerlearn", "--version"], env=environment(), capture_output=True
    )
    assert (found.returncode, found.stdout[:10]) == (0, b"peerlearn ")
    found = run([sys.executable, str(script), "x"], env=environment(), stderr=subprocess.PIPE)
    assert found.returncode == 1


def test_signals_end_it_and_are_told(script: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        with Process(
            [sys.executable, str(script), "0", "wait"],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert process.pid != os.getpid()
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            os.kill(process.pid, number)
            assert process.wait(60) == -number
        assert not Path(f"/proc/{process.pid}").exists()
