"""How often a training step makes the host wait for the device.

There may be no device here, so one is imagined: networks, views, labels, and all that is computed from them, are taken
to lie on it, and whatever brings a value of theirs to the host is counted. On a real GPU, CUDA itself is asked.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.config import parse_config
from peerlearn.data.loader import ViewBatch
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.stop import Stop
from pretrain.config import PretrainConfig
from pretrain.state import build
from pretrain.train import train_step

SMALL = [
    *("--data.name", "digits", "--data.limit", "96", "--data.image_size", "16", "--seed", "1"),
    *("--data.augmentation", "crop_flip", "--batch_size", "32", "--cohort.backbones", "conv4"),
    *("--cohort.embedding_dim", "8", "--queue.size", "64", "--monitor.every_epochs", "0"),
]
# Operations whose result, or its shape, the host has to know.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "bincount",
}


class Device(TorchDispatchMode):
    """Follows what is computed from tensors on the imagined device, and counts what waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(on_device(t) for t in tree_leaves((args, kwargs))):
            if name in WAITS or (name in ("index", "index_put_") and indexed_by_mask(args)):
                self.waits.append(name)
            result = func(*args, **(kwargs or {}))
            place(result)
            return result
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Also what leaves for the host without an operation of its own."""
        with pytest.MonkeyPatch.context() as patch, self:
            for name in ("tolist", "numpy"):
                plain = getattr(Tensor, name)
                patch.setattr(
                    Tensor,
                    name,
                    lambda t, *a, plain=plain, name=name, **k: (
                        self.waits.append(name) if on_device(t) else None,
                        plain(t, *a, **k),
                    )[1],
                )
            yield


def on_device(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and getattr(tensor, "is_on_device", False)


def place(tensors: Any) -> None:
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            tensor.is_on_device = True


def indexed_by_mask(args: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1]))


def an_attempt(device: str, *more: str) -> Attempt:
    config, _ = parse_config(
        PretrainConfig, [*SMALL, *more], verb="pretrain", description="", example=""
    )
    training = build(config, RunDirectory(None), Ranks(torch.device(device)))  # type: ignore[arg-type]
    training.cohort.train()
    return Attempt(training, 1, Stop())


CASES = {
    "moco": ("--cohort.networks", "2"),
    "moco in parts": ("--cohort.batch_norm_splits", "4", "--symmetric", "true"),
    "moco with micro-batches": ("--accumulation_steps", "4"),
    "moco in tiles": ("--cohort.networks", "6", "--cohort.share_stages", "0"),
    "simclr": ("--method", "simclr", "--cohort.networks", "3"),
    "moco with a probe": ("--monitor.linear", "true"),
    "supervised dml": ("--method", "supervised", "--supervised.teaching", "dml"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_device_once(case):
    attempt = an_attempt("cpu", *CASES[case])
    training, device = attempt.training, Device()
    for batch in training.loader.epoch(0):
        train_step(attempt, batch)
        training.step += 1
    everything = [*training.cohort.state_dict().values(), *training.cohort.parameters()]
    if training.method.peers is not None:
        everything += [*training.method.peers.parameters(), *training.method.peers.buffers()]
        everything.append(training.method.queue.keys)
    place(everything)
    for batch in training.loader.epoch(1):
        place([batch.views, batch.labels])
        device.waits.clear()
        with device.watching():
            done = train_step(attempt, batch)
        training.step += 1
        assert device.waits == ["tolist"]
        # What was followed reached the terms: the count has seen all that they took.
        assert all(on_device(term) for part in done.terms for term in part if len(term))


def test_a_look_at_every_term_would_be_counted():
    device = Device()
    loss = torch.ones(3)
    place(loss)
    with device.watching():
        doubled = loss * 2
        assert bool(torch.isfinite(doubled).all())
        assert float(doubled[1]) == 2
        assert doubled.tolist() == [2, 2, 2]
        doubled[doubled > 1]
    assert device.waits == ["_local_scalar_dense", "_local_scalar_dense", "tolist", "index"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_cuda_sees_one_wait_too(case):
    import warnings

    attempt = an_attempt("cuda", *CASES[case])
    training = attempt.training
    batches: list[ViewBatch] = [*training.loader.epoch(0), *training.loader.epoch(1)]
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("warn" if number >= len(batches) // 2 else "default")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_step(attempt, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        training.step += 1
        if number >= len(batches) // 2:
            assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1
