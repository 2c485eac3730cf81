"""The steps that are timed: which of them count, and that they are those of the run."""

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peerlearn.config import load_config, parse_config
from pretrain.config import PretrainConfig
from pretrain.state import Training
from pretrain.step_seconds import time_steps, unwatched
from tests.e2e.runs import SMALL, newest_tensors, pretrain


def small(folder: Path, *words: str) -> Training:
    """A training with 6 steps an epoch."""
    config, _ = parse_config(
        PretrainConfig, [*SMALL, *words], verb="pretrain", description="", example=""
    )
    return unwatched(config, folder)


def fake_clock(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    times = itertools.accumulate(seconds, initial=50.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))


def test_two_steps_warm_up_and_eight_count_over_the_end_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = small(tmp_path)
    fake_clock(monkeypatch, [100, 90, 1, 2, 3, 4, 5, 6, 7, 8])
    assert time_steps(training) == ([1, 2, 3, 4, 5, 6, 7, 8], 12)
    assert training.step == 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "counted"), [("64", [100, 90]), ("128", [1, 2])], ids=["two steps", "four steps"]
)
def test_a_short_run_has_what_steps_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, counted: list[float]
) -> None:
    training = small(tmp_path, "--data.limit", images, "--epochs", "1")
    fake_clock(monkeypatch, [100, 90, 1, 2])
    assert time_steps(training) == (counted, len(counted) if images == "64" else 4)


def test_the_timed_steps_are_those_of_the_run_without_its_monitor(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(run, "--epochs", "1", "--monitor.linear", "true") == 0
    config = load_config(PretrainConfig, run / "config.yaml")
    assert config.monitor.every_epochs == 1
    training = unwatched(replace(config, run=None), tmp_path / "none")
    assert training.watch is None
    found = time_steps(training)
    assert (len(found.seconds), found.steps) == (4, 6)
    assert min(found.seconds) > 0
    expected = newest_tensors(run)
    for group, tensors in training.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[group][name]), (group, name)
