"""Small whole runs on scikit-learn's digits, and what to read from them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from peerlearn.cli import main
from peerlearn.runs.checkpoint import load_checkpoint, saved_steps
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.metrics import CLOCK_WORDS
from peerlearn.runs.standing import Standing, read_standing
from tests.warm import Process

SMALL = [
    *("--data.name", "digits", "--data.image_size", "16", "--data.limit", "200"),
    *("--data.augmentation", "crop_flip", "--batch_size", "32", "--epochs", "2"),
    *("--cohort.backbones", "conv4", "--cohort.embedding_dim", "16", "--queue.size", "80"),
    *("--base_lr", "0.1", "--monitor.k", "5", "--monitor.log_every_steps", "1", "--device", "cpu"),
    # Encoding all 1,437 training images would take longer than the training.
    *("--monitor.train_limit", "300"),
]
STEPS = 12


def pretrain(run: Path, *more: str) -> int:
    return main(["pretrain", *SMALL, "--run", str(run), *more])


def rows(run: Path) -> list[dict]:
    return list(RunDirectory(run).metric_rows())


def events(run: Path, name: str) -> list[dict]:
    return [event for event in RunDirectory(run).events() if event["event"] == name]


def standing(run: Path) -> Standing:
    """As its newest start has written it."""
    directory = RunDirectory(run)
    found = read_standing(directory.logs(directory.newest_attempt()))
    assert found is not None
    return found


def without_clocks(row: dict) -> dict:
    return {
        key: value
        for key, value in row.items()
        if key != "attempt" and not any(word in key for word in CLOCK_WORDS)
    }


def newest_tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(saved_steps(run / "checkpoints")[0])[0]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Byte for byte: metrics (clocks apart), every saved tensor, every file of every export."""
    assert [without_clocks(row) for row in rows(ours)] == [
        without_clocks(row) for row in rows(theirs)
    ]
    mine, expected = newest_tensors(ours), newest_tensors(theirs)
    assert mine.keys() == expected.keys()
    for group, tensors in expected.items():
        assert mine[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            same = torch.equal(mine[group][name].nan_to_num(), tensor.nan_to_num())
            assert same, (group, name)
    assert exported_files(ours) == exported_files(theirs)


def assert_same_to_rounding(ours: Path, theirs: Path, *, besides: Collection[str] = ()) -> None:
    """Metrics and saved tensors of two runs in float64, whose sums differ in their order.

    Ours has the metrics ``besides`` too.
    """
    for mine, expected in zip(rows(ours), rows(theirs), strict=True):
        assert mine.keys() == {*expected, *besides}
        for key in without_clocks(expected):
            assert mine[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-9), key
    assert_same_tensors_to_rounding(ours, theirs)


def assert_same_tensors_to_rounding(ours: Path, theirs: Path) -> None:
    """The newest saves of two runs in float64."""
    tensors, expected = newest_tensors(ours), newest_tensors(theirs)
    assert tensors.keys() == expected.keys()
    for group in expected.keys() - {"rng"}:
        for name, tensor in expected[group].items():
            torch.testing.assert_close(
                tensors[group][name], tensor, rtol=1e-9, atol=1e-9, msg=f"{group} {name}"
            )


def assert_same_exports_to_rounding(ours: Path, theirs: Path) -> None:
    """The weights of all exported networks of two runs in float64."""
    files = sorted((theirs / "export").rglob("*.safetensors"))
    assert files
    for file in files:
        expected = load_file(file)
        tensors = load_file(ours / file.relative_to(theirs))
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def exported_files(run: Path) -> dict[str, bytes]:
    folder = run / "export"
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def environment(**more: str) -> dict[str, str]:
    """One thread each: the sums of a layer are then added in one order, whoever runs beside.

    STEP_SECONDS: the rest that a warm process takes at each step, so that a signal finds it before its end.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def command(*words: str, driver: Path | None = None) -> list[str]:
    """A process of its own that runs the command, or a script that prepares something and then does."""
    start = [str(driver)] if driver else ["-m", "peerlearn"]
    return [sys.executable, *start, *words]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(processes: int, *words: str, driver: Path | None = None, **more: str) -> list[Process]:
    """Start the ranks of a job by hand, each process ours to watch and to kill."""
    port = free_port()
    return [
        Process(
            command(*words, driver=driver),
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                **more,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def ends(processes: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str]]:
    """Exit code and output of each; none outlives the test."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, output) for process, output in zip(processes, outputs, strict=True)
    ]


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    """Until it holds; at once if a process ends before."""
    deadline = time.monotonic() + 600
    while not condition():
        assert all(process.poll() is None for process in processes), "a process ended early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def write_noise(root: Path, folders: dict[str, int]) -> None:
    """So many 16-pixel images of noise in each folder below the root: 000.png, 001.png, ..."""
    noise = np.random.default_rng(0)
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of so many MiB, gone afterwards."""
    disk = folder / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(disk)]
    mounted = subprocess.run(words, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        # Lazily: the log of the run may still be open in this process.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
