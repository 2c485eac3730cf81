"""What a bar and plain lines say, how long they say it takes, and that nothing else gets onto the bar's lines."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from peerlearn.runs import progress as module
from peerlearn.runs.logs import log_to, log_to_terminal
from peerlearn.runs.progress import TimeLeft, phase, progress
from peerlearn.runs.terminal import wrapped

HOME = Path(__file__).parents[3]


@pytest.mark.parametrize("at_start", [0, 40])
def test_the_time_left_is_right_after_the_first_tenth(at_start):
    """10 epochs of 10 steps of 2 s, the first of 12 s as it warms up; each is followed by 30 s of measuring, and so is
    the start."""
    now, left = 100.0, TimeLeft(at_start, 100.0)
    assert left.seconds(100, 11, now) is None
    now += 30
    left.pause(30)
    assert left.seconds(100, 10, now) is None
    for step in range(1, 11):
        now += 12 if step == 1 else 2
        left.advance(at_start + step, now)
        if step > 1:
            assert left.seconds(100 - step, 10, now) == pytest.approx((100 - step) * 2 + 10 * 30)
    now += 30
    left.pause(30)
    assert left.seconds(90, 9, now) == pytest.approx(90 * 2 + 9 * 30)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_plain_lines_name_the_phase_every_ten_seconds(clock, capsys):
    with progress(200, "steps", name="training", pauses_left=lambda done: 2) as report:
        with report.pause(), phase("measuring", 15_000) as advance:
            for _ in range(15):
                clock.now += 2
                advance(1000)
        for step in range(1, 21):
            clock.now += 1
            report.advance(1, f"epoch {step / 100:.2f}  loss 1.5")
    assert capsys.readouterr().out.splitlines() == [
        "measuring 5,000 of 15,000 images  0:10, ? left",
        "measuring 10,000 of 15,000 images  0:20, ? left",
        "measuring 15,000 of 15,000 images  0:30, ? left",
        # 190 steps of 1 s, and two pauses of 30 s.
        "training 10 of 200 steps  epoch 0.10  loss 1.5  0:40, 4:10 left",
        "training 20 of 200 steps  epoch 0.20  loss 1.5  0:50, 4:00 left",
    ]


def test_a_phase_of_its_own_counts_its_images(clock, capsys):
    with phase("reading", 100_000) as advance:
        for _ in range(4):
            clock.now += 6
            advance(20_000)
    assert capsys.readouterr().out.splitlines() == [
        "reading 40,000 of 100,000 images  0:12, 0:18 left",
        "reading 80,000 of 100,000 images  0:24, 0:06 left",
    ]


def test_a_quiet_phase_says_nothing(clock, capsys):
    with phase("reading", 10, quiet=True) as advance:
        clock.now += 60
        advance(10)
    assert capsys.readouterr().out == ""


class Terminal:
    """What 80 columns show of what is written, as far as bars need it."""

    def __init__(self, written: str) -> None:
        self.lines = [""]
        row = column = 0
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n|\r", written, re.DOTALL):
            while len(self.lines) <= row:
                self.lines.append("")
            line = self.lines[row]
            if token == "\n":
                row += 1
            elif token == "\r":
                column = 0
            elif token == "\x1b[2K":
                self.lines[row] = ""
            elif re.fullmatch(r"\x1b\[\d+A", token):
                row -= int(token[2:-1])
            elif not token.startswith("\x1b"):
                self.lines[row] = line.ljust(column)[:column] + token + line[column + 1 :]
                column += 1
        self.lines = [line.rstrip() for line in self.lines]


def on_a_terminal(script: str, columns: int = 80) -> list[str]:
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**environment, "TERM": "xterm", "PYTHONPATH": str(HOME)},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            more = os.read(main_end, 65536)
        except OSError:
            break
        if not more:
            break
        written += more
    os.close(main_end)
    assert process.wait(60) == 0, written
    return Terminal(written.decode()).lines


TRAINS = """
import logging, os, signal, time
from peerlearn.runs.logs import log_to_terminal
from peerlearn.runs.progress import phase, progress
from peerlearn.runs.stop import stop_signals
from peerlearn.runs import progress as module

module._BAR_AFTER_SECONDS = 0.0
log_to_terminal(main=True)
with stop_signals((signal.SIGTERM,), "saving after this step"):
    with progress(50, "steps", name="training") as report:
        with phase("measuring", 15000) as advance:
            advance(3000)
            time.sleep(0.4)
        for step in range(20):
            report.advance(1, "epoch 0.20  loss 5.123 (5.101, 5.145)  1,234 images/s  kNN 70.1, 71.2, ensemble 72.3")
            time.sleep(0.02)
        logging.getLogger("x").warning(
            "a warning of %d words that is longer than the eighty columns of this terminal", 9
        )
        time.sleep(0.3)
        report.say("epoch 1  kNN top-1 %: net/0 70.12  net/1 71.21  ensemble 72.34  epoch 1.00  loss 5.123")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)
print("saved")
"""


def test_messages_stand_on_lines_of_their_own_above_the_bar():
    lines = on_a_terminal(TRAINS)
    assert [line for line in lines if line] == [
        "a warning of 9 words that is longer than the eighty columns of this terminal",
        "epoch 1  kNN top-1 %: net/0 70.12  net/1 71.21  ensemble 72.34  epoch 1.00  loss",
        "5.123",
        "SIGTERM: saving after this step",
        *[line for line in lines if "training 20 of 50 steps" in line],
        "epoch 0.20  loss 5.123 (5.101, 5.145)  1,234 images/s  kNN 70.1, 71.2, ensemble",
        "72.3",
        "saved",
    ]
    (bar,) = [line for line in lines if "training 20 of 50 steps" in line]
    assert re.fullmatch(r"━+[╸╺]?━+  training 20 of 50 steps  0:0\d, 0:0\d left", bar)


@pytest.mark.parametrize("columns", [40, 60])
def test_narrow_terminals_break_between_words(columns):
    lines = on_a_terminal(TRAINS, columns)
    assert all(len(line) <= columns for line in lines)
    text = " ".join(line.strip() for line in lines)
    for words in ("a warning of 9 words that", "kNN top-1 %: net/0 70.12", "(5.101, 5.145)"):
        assert words in re.sub(r" +", " ", text)
    assert "SIGTERM: saving after this step" in lines


def test_text_for_a_file_is_not_broken(tmp_path):
    with (tmp_path / "file").open("w") as file:
        assert wrapped("word " * 100, file) == "word " * 100
    # Closed, and missing.
    assert wrapped("word " * 100, file) == wrapped("word " * 100, None) == "word " * 100


def test_the_loader_of_faiss_is_silent(tmp_path, capsys):
    """A library's loader tells at INFO of what it tries; ours is the level that would let it through."""
    before = logging.getLogger().handlers
    try:
        log_to_terminal(main=True)
        log_to(tmp_path / "rank-0.log")
        logging.getLogger("faiss.loader").info("Loading faiss with AVX512 support.")
        logging.getLogger("peerlearn").info("ours")
        logging.getLogger("peerlearn").warning("said")
    finally:
        logging.getLogger().handlers = before
    text = (tmp_path / "rank-0.log").read_text()
    assert "AVX512" not in text
    assert "ours" in text
    assert capsys.readouterr().err == "said\n"
