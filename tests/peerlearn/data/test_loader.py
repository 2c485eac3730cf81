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
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from peerlearn.data.augment import draw_view_parameters
from peerlearn.data.croppers import _cut_resized, _fits
from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.data.held_images import held_in_memory
from peerlearn.data.image_folders import decode_image
from peerlearn.data.loader import ViewLoader
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation
from peerlearn.data.sampler import class_aware
from peerlearn.data.workers import results, worker_pool
from peerlearn.errors import CrashError, UserError
from peerlearn.runs.heartbeat import process_exists
from tests.view_loaders import BACKENDS, view_loader

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
    return view_loader(dataset, **{**arguments, **changes})


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
        worker.join(timeout=60)
        assert worker.exitcode == 0


def test_killed_workers_are_an_error_and_no_hang(own_workers: Callable[[], list[BaseProcess]]):
    loader = make(load_dataset("digits"), workers=1)
    epoch = loader.epoch(0)
    next(epoch)
    for worker in own_workers():
        worker.kill()
    with pytest.raises(
        CrashError, match=r"a process that reads images (is gone|died \(SIGKILL\)): "
    ):
        list(epoch)


CRASH = """
import multiprocessing
import sys
import time
import torch
from peerlearn.data.recipes import AUGMENTATIONS
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewLoader, sampler_of

if __name__ == "__main__":
    dataset = ImageDataset(
        name="made", split="train", images=torch.zeros((99, 1, 8, 8), dtype=torch.uint8),
        labels=None, class_names=(), mean=(0.5,), std=(0.5,),
    )
    loader = ViewLoader(
        dataset, AUGMENTATIONS["crop_flip"], backend="folder", image_size=8,
        sampler=sampler_of(dataset, batch_size_global=16, seed=0), seed=0,
        device=torch.device("cpu"), workers=2,
    )
    epoch = loader.epoch(0)
    next(epoch)
    if "wait" in sys.argv:
        print([child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(600)
    raise RuntimeError("in the middle of an epoch")
"""


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_main_process(tmp_path: Path):
    """Nor do the process that forks them and the tracker of their resources."""
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, str(script), "wait"], env=environment, stdout=subprocess.PIPE, text=True
    ) as main:
        workers = json.loads(main.stdout.readline())
        assert len(workers) == 2
        server = Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1]
        main.kill()
    left = [*map(str, workers), server]
    deadline = time.monotonic() + 120
    while any(process_exists(int(pid)) for pid in left):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_crash_in_the_middle_of_an_epoch_ends_the_process(tmp_path: Path):
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("RuntimeError: in the middle of an epoch")


def few_labelled(labels: list[int], size: tuple[int, int] = (9, 7)) -> ImageDataset:
    """Random colour images, held in memory, that normalisation leaves as they are."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 3, *size), dtype=np.uint8)
    return ImageDataset(
        name="made",
        split="train",
        images=torch.from_numpy(images),
        labels=torch.tensor(labels),
        class_names=(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


CLASS_AWARE = {"batch_size_global": 8, "images_per_class": 2}
# The last class has to give the same image twice to a group.
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, -1, 3, 0, 1, -1, 2, 0, 1, 2, 0, 1, 2, 0, -1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_batches_of_the_class_aware_sampler(backend: str, world_size: int):
    dataset = few_labelled(LABELS)
    order = class_aware(dataset.labels, batch_size=8, images_per_class=2, seed=3, epoch=5)
    arguments = {**CLASS_AWARE, "backend": backend, "seed": 3, "views": 1}
    alone = list(make(dataset, **arguments).epoch(5))
    for start_step in range(4):
        ranks = [
            list(make(dataset, **arguments, rank=rank, world_size=world_size).epoch(5, start_step))
            for rank in range(world_size)
        ]
        together = list(zip(*ranks, strict=True))
        assert len(together) == 3 - start_step
        for step, parts in enumerate(together, start_step):
            index = torch.cat([part.index for part in parts])
            assert torch.equal(index, order.index[step])
            assert torch.equal(torch.cat([part.labels for part in parts]), dataset.labels[index])
            views = torch.cat([part.views[0] for part in parts])
            torch.testing.assert_close(views, alone[step].views[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("backend", "workers"), [("memory", 0), ("folder", 0), ("folder", 2)])
def test_an_image_drawn_again_is_seen_otherwise(backend: str, workers: int):
    # So large that no two boxes are the same by chance.
    dataset = few_labelled(LABELS, (50, 60))
    loader = make(dataset, **CLASS_AWARE, backend=backend, workers=workers, views=1)
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in loader.epoch(0):
        for image, view in zip(batch.index.tolist(), batch.views[0], strict=True):
            seen.setdefault(image, []).append(view)
    # Image 13 alone is of class 3, which comes once in each of the three batches.
    assert len(seen[13]) == 6
    for views in seen.values():
        for i, view in enumerate(views):
            assert all((view - other).abs().max() > 0.01 for other in views[:i])


def test_class_aware_views_are_those_of_the_draw_numbers():
    dataset = few_labelled(LABELS)
    order = class_aware(dataset.labels, batch_size=8, images_per_class=2, seed=0, epoch=2)
    for step, batch in enumerate(make(dataset, **CLASS_AWARE, backend="memory").epoch(2)):
        for view, pixels in enumerate(batch.views):
            parameters = draw_view_parameters(
                AUGMENTATIONS["crop_flip"],
                seed=0,
                epoch=2,
                index=order.index[step],
                draw=order.draw[step],
                view=view,
                height=9,
                width=7,
            )
            for row, image in enumerate(order.index[step].tolist()):
                expected = tv.resized_crop(
                    dataset.images[image] / 255,
                    *parameters.box[row].tolist(),
                    size=[8, 8],
                    antialias=True,
                )
                if parameters.flip[row]:
                    expected = expected.flip(2)
                torch.testing.assert_close(pixels[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_substitute_brings_its_own_label_into_a_group(backend: str, tmp_path: Path):
    dataset = image_folder(tmp_path, *[(3, 4)] * 8)
    dataset.images[5].write_bytes(b"")
    dataset = replace(dataset, labels=torch.arange(8) % 2, mean=(0.0,) * 3, std=(1.0,) * 3)
    loader = make(dataset, **CLASS_AWARE, backend=backend, views=1, max_unreadable_percent=50)
    for epoch in range(4):
        (batch,) = loader.epoch(epoch)
        shown = (batch.views[0][:, 0, 0, 0] * 255).round().long()
        assert torch.equal(batch.labels, shown % 2)
        readable = batch.index != 5
        assert torch.equal(batch.index[readable], shown[readable])
        assert {image.index for image in batch.unreadable} == {5}


def test_class_aware_batches_of_a_dataset_without_labels_are_refused():
    dataset = replace(few_labelled(LABELS), labels=None)
    with pytest.raises(
        UserError,
        match=r"\Amade train has no labels, [^\n]*images_per_class[^\n]*data.name[^\n]*\Z",
    ):
        make(dataset, **CLASS_AWARE)
    with pytest.raises(UserError, match="no image has one"):
        make(replace(dataset, labels=torch.full((26,), -1)), **CLASS_AWARE)


def test_class_aware_batches_without_whole_groups_are_refused():
    with pytest.raises(UserError, match="whole groups of images_per_class 3"):
        make(few_labelled(LABELS), batch_size_global=8, images_per_class=3)


def padded_crop(image: torch.Tensor, box: list[int]) -> torch.Tensor:
    """The box of the image on black ground, by torchvision's functions."""
    top, left, height, width = box
    return tv.crop(tv.pad(image, [40] * 4, fill=0), top + 40, left + 40, height, width)


def cut_resized(image: torch.Tensor, box: list[int], size: int) -> torch.Tensor:
    out = torch.empty(len(image), size, size, dtype=torch.uint8)
    _cut_resized(image, box, out)
    return out


@pytest.mark.parametrize("shape", [(5, 5), (4, 6)])
def test_one_image_is_cut_at_every_shift_as_by_torchvision(shape: tuple[int, int]):
    image = few_labelled([0], shape).images[0]
    for top in range(-7, 8):
        for left in range(-7, 8):
            box = [top, left, *shape]
            expected = padded_crop(image, box)
            if shape == (5, 5):
                assert torch.equal(cut_resized(image, box, 5), expected)
            resized = tv.resize(expected.float(), [9, 9], antialias=True)
            assert torch.equal(
                cut_resized(image, box, 9), resized.round().clamp(0, 255).to(torch.uint8)
            )


@pytest.mark.parametrize("size", [9, 12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_crops_are_torchvision_s_pad_and_crop(backend: str, size: int):
    """Exactly where nothing is resized; every shift occurs."""
    dataset = few_labelled([0] * 300, (9, 9))
    recipe = Augmentation(crop_padding=2)
    loader = make(
        dataset, backend=backend, augmentation=recipe, image_size=size, batch_size_global=300
    )
    (batch,) = loader.epoch(1)
    for view, pixels in enumerate(batch.views):
        parameters = draw_view_parameters(
            recipe,
            seed=0,
            epoch=1,
            index=batch.index,
            draw=torch.zeros(300, dtype=torch.int64),
            view=view,
            height=9,
            width=9,
        )
        boxes = parameters.box.tolist()
        assert len(set(map(tuple, boxes))) == 25
        for row, image in enumerate(batch.index.tolist()):
            expected = padded_crop(dataset.images[image], boxes[row])
            if parameters.flip[row]:
                expected = expected.flip(2)
            if size == 9:
                assert torch.equal((pixels[row] * 255).round().to(torch.uint8), expected)
                torch.testing.assert_close(pixels[row], expected / 255, atol=1e-7, rtol=0)
            else:
                expected = tv.resize(expected / 255, [size, size], antialias=True)
                atol = 0.5 / 255 + 1e-5 if backend == "folder" else 1e-6
                torch.testing.assert_close(pixels[row], expected, atol=atol, rtol=0)


def test_padded_crops_of_files_of_several_sizes(tmp_path: Path):
    """Outside of each image is black, whatever its size, also where it is smaller than the shift."""
    sizes = [(1, 1), (2, 9), (9, 2), (5, 5), (6, 30)]
    dataset = image_folder(tmp_path, *sizes)
    for file, (height, width) in zip(dataset.images, sizes, strict=True):
        Image.fromarray(np.full((height, width, 3), 255, dtype=np.uint8)).save(file)
    dataset = replace(dataset, mean=(0.0,) * 3, std=(1.0,) * 3)
    loader = make(
        dataset, augmentation=AUGMENTATIONS["supervised_cifar"], image_size=6, batch_size_global=5
    )
    for epoch in range(20):
        (batch,) = loader.epoch(epoch)
        index = batch.index
        for view, pixels in enumerate(batch.views):
            box = draw_view_parameters(
                AUGMENTATIONS["supervised_cifar"],
                seed=0,
                epoch=epoch,
                index=index,
                draw=torch.zeros_like(index),
                view=view,
                height=torch.tensor([sizes[i][0] for i in index.tolist()]),
                width=torch.tensor([sizes[i][1] for i in index.tolist()]),
            ).box.tolist()
            for row, image in enumerate(index.tolist()):
                cut = padded_crop(torch.ones(3, *sizes[image]), box[row])
                expected = tv.resize(cut, [6, 6], antialias=True)
                difference = torch.minimum(
                    (pixels[row] - expected).abs().max(),
                    (pixels[row] - expected.flip(2)).abs().max(),
                )
                assert difference <= 0.5 / 255 + 1e-5
