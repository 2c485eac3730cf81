"""Loading beyond the contract of the backends: ranks, processes and signals."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from peerlearn.augment import AUGMENTATIONS
from peerlearn.datasets import ImageDataset, load_dataset
from peerlearn.errors import UserError
from peerlearn.heartbeat import process_exists
from peerlearn.image_folders import decode_image
from peerlearn.loader import ViewLoader, _fits, held_in_memory
from peerlearn.workers import results, worker_pool

CPU = torch.device("cpu")


def make(dataset: ImageDataset, **changes: object) -> ViewLoader:
    arguments = {
        "augmentation": AUGMENTATIONS["crop_flip"],
        "backend": "folder",
        "image_size": 8,
        "batch_size_global": 16,
        "seed": 0,
        "device": CPU,
    }
    return ViewLoader(dataset, **{**arguments, **changes})


def image_folder(folder: Path, *sizes: tuple[int, int]) -> ImageDataset:
    """PNG files of these heights and widths, image i having i as its first value."""
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(np.full((height, width, 3), i, dtype=np.uint8)).save(folder / f"{i:03}.png")
    return load_dataset("folder", root=str(folder))


@settings(max_examples=30, deadline=None)
@given(
    per_rank=st.integers(1, 5),
    world_size=st.integers(1, 4),
    extra=st.integers(0, 30),
    start_step=st.integers(0, 3),
)
def test_blocks_of_the_ranks_tile_the_epoch(
    per_rank: int, world_size: int, extra: int, start_step: int
):
    batch_size_global = per_rank * world_size
    dataset = load_dataset("digits", limit=batch_size_global + extra)
    loaders = [
        make(
            dataset,
            backend="memory",
            batch_size_global=batch_size_global,
            rank=rank,
            world_size=world_size,
            views=1,
        )
        for rank in range(world_size)
    ]
    steps = len(dataset) // batch_size_global
    start_step = min(start_step, steps)
    blocks = [[batch.index for batch in loader.epoch(4, start_step)] for loader in loaders]
    assert {len(of_rank) for of_rank in blocks} == {steps - start_step}
    assert {len(block) for of_rank in blocks for block in of_rank} <= {per_rank}
    tiled = [i for step in zip(*blocks, strict=True) for block in step for i in block.tolist()]
    (alone,) = [make(dataset, backend="memory", batch_size_global=len(dataset), views=1)]
    (whole,) = (batch.index.tolist() for batch in alone.epoch(4))
    # The permutation is that of (seed, epoch), whatever the batch.
    first = start_step * batch_size_global
    assert tiled == whole[first : steps * batch_size_global]


def test_memory_refuses_images_of_several_sizes(tmp_path: Path):
    sizes = [(5, 7)] * 70 + [(7, 5)]
    dataset = image_folder(tmp_path, *sizes)
    with pytest.raises(
        UserError, match=r"070.png is 5x7 and .*000.png is 7x5.*data.backend folder"
    ):
        make(dataset, backend="memory")


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_held_in_memory_in_order(workers: int, tmp_path: Path):
    dataset = image_folder(tmp_path, *[(3, 4)] * 150)
    held = held_in_memory(dataset, seed=0, max_unreadable_percent=0, workers=workers)
    assert held.images.shape == (150, 3, 3, 4)
    assert held.images[:, 0, 0, 0].tolist() == held.source.tolist() == list(range(150))
    assert held.unreadable == {}


def test_images_in_memory_stay_where_they_are():
    dataset = load_dataset("digits")
    held = held_in_memory(dataset, seed=0, max_unreadable_percent=0)
    assert held.images is dataset.images


@pytest.mark.parametrize("workers", [0, 2])
def test_a_user_error_of_a_job_is_raised_as_it_is(workers: int, tmp_path: Path):
    dataset = image_folder(tmp_path, *[(3, 4)] * 5)
    dataset.images[3].write_bytes(b"")
    pool = worker_pool(decode_image, dataset.images, workers=workers, device=CPU)
    done = results(pool)
    assert [next(done)[0, 0, 0].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"\Acannot decode [^\n]*003.png [^\n]*\Z"):
        next(done)


def test_unknown_backend(tmp_path: Path):
    with pytest.raises(ValueError, match="'tape'"):
        make(load_dataset("digits"), backend="tape")


def test_images_stay_on_cuda_up_to_a_quarter_of_its_free_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 10**9))
    fits = [_fits(torch.zeros(n, dtype=torch.uint8), torch.device("cuda")) for n in (1000, 1001)]
    assert fits == [True, False]
    assert _fits(torch.zeros(1001, dtype=torch.uint8), CPU)


@pytest.fixture
def own_workers() -> Callable[[], list[BaseProcess]]:
    """The worker processes that have come up since the test began: an earlier one's may wait for a collection."""
    gc.collect()
    before = multiprocessing.active_children()
    return lambda: [child for child in multiprocessing.active_children() if child not in before]


def test_workers_outlive_the_signals_of_a_job(own_workers: Callable[[], list[BaseProcess]]):
    dataset = load_dataset("digits")
    expected = list(make(dataset).epoch(0))
    loader = make(dataset, workers=2)
    epoch = loader.epoch(0)
    ours = [next(epoch)]
    workers = own_workers()
    assert len(workers) == 2
    # SLURM signals every process of a job step, the one that forks the workers too.
    server = int(Path(f"/proc/{workers[0].pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert server != os.getpid()
    for process_id in (server, *(worker.pid for worker in workers)):
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT):
            # Sent by a process that is not their parent: SIGTERM from here means the end.
            subprocess.run(["kill", f"-{number}", str(process_id)], check=True)
    ours += epoch
    assert all(worker.is_alive() for worker in workers)
    assert len(ours) == len(expected) == 89
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(map(torch.equal, one.views, other.views))
    for worker in workers:
        worker.terminate()
        worker.join(timeout=10)
        assert worker.exitcode == 0


def test_killed_workers_are_an_error_and_no_hang(own_workers: Callable[[], list[BaseProcess]]):
    loader = make(load_dataset("digits"), workers=1)
    epoch = loader.epoch(0)
    next(epoch)
    for worker in own_workers():
        worker.kill()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(epoch)


CRASH = """
import multiprocessing
import sys
import time
import torch
from peerlearn.augment import AUGMENTATIONS
from peerlearn.datasets import ImageDataset
from peerlearn.loader import ViewLoader

if __name__ == "__main__":
    dataset = ImageDataset(
        name="made", split="train", images=torch.zeros((99, 1, 8, 8), dtype=torch.uint8),
        labels=None, class_names=(), mean=(0.5,), std=(0.5,),
    )
    loader = ViewLoader(
        dataset, AUGMENTATIONS["crop_flip"], backend="folder", image_size=8,
        batch_size_global=16, seed=0, device=torch.device("cpu"), workers=2,
    )
    epoch = loader.epoch(0)
    next(epoch)
    if "wait" in sys.argv:
        print([child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(600)
    raise RuntimeError("in the middle of an epoch")
"""


def test_workers_do_not_outlive_a_killed_main_process(tmp_path: Path):
    """Nor do the process that forks them and the tracker of their resources."""
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, str(script), "wait"], env=environment, stdout=subprocess.PIPE, text=True
    ) as main:
        workers = json.loads(main.stdout.readline())
        assert len(workers) == 2
        server = Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1]
        main.kill()
    left = [*map(str, workers), server]
    deadline = time.monotonic() + 30
    while any(process_exists(int(pid)) for pid in left):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


def test_a_crash_in_the_middle_of_an_epoch_ends_the_process(tmp_path: Path):
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("RuntimeError: in the middle of an epoch")
