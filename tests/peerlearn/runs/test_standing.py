"""How a training stands, in one small file: what rows make of it, and what is left of it where it is damaged."""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from peerlearn.runs import standing as module
from peerlearn.runs.standing import Standing, StandingLog, integer, number, read_standing


def row(step: int, seconds: float, **figures: float) -> dict[str, object]:
    return {"step": step, "epoch": step / 10, "seconds": seconds, "attempt": 1, **figures}


def knn(step: int, seconds: float, score: float) -> dict[str, object]:
    protocol = {"knn/k": 5, "knn/temperature": 0.1}
    return row(step, seconds, **{"ensemble/knn_top1": score, **protocol})


KNN = {
    "knn_top1": 71.5,
    "knn_network": "ensemble",
    "knn_epoch": 2.0,
    "knn_k": 5,
    "knn_temperature": 0.1,
}


def known(logs: Path) -> dict[str, object]:
    found = read_standing(logs)
    assert found is not None
    return {name: value for name, value in asdict(found).items() if value is not None}


def test_rate_pace_and_scores_of_the_newest_rows(tmp_path: Path) -> None:
    log = StandingLog(tmp_path, [], step=0, total_steps=100)
    assert known(tmp_path) == {"step": 0, "total_steps": 100}
    for step, rate in ((10, 1.0), (12, 50.0), (14, 10.0), (16, 30.0), (18, 20.0)):
        log.add(row(step, step * 2.0, images_per_second=rate))
    log.add(knn(20, 60.0, 71.5) | {"images_per_second": 40.0, "net/0/knn_top1": 1.0})
    # The last five rates; ten steps took 40 s, the kNN among them; of the networks the ensemble.
    expected = {"step": 20, "total_steps": 100, "images_per_second": 30.0, "seconds_left": 320.0}
    assert known(tmp_path) == {**expected, **KNN}


@pytest.mark.parametrize(
    ("figures", "scores"),
    [
        (
            {"net/0/knn_top1": 3.0, "net/1/knn_top1": 4.0, "knn/k": 20, "knn/temperature": 0.07},
            {"knn_top1": 3.0, "knn_network": "net/0", "knn_k": 20, "knn_temperature": 0.07},
        ),
        (
            {"ensemble/knn_top1": 3.0, "ensemble/linear_top1": 2.0, "net/0/linear_top1": 1.0},
            {
                "knn_top1": 3.0,
                "knn_network": "ensemble",
                "linear_top1": 2.0,
                "linear_network": "ensemble",
            },
        ),
        (
            {"ensemble/episode_top1": 3.0, "episode/ways": 5, "episode/shots": 1},
            {
                "few_shot_top1": 3.0,
                "few_shot_network": "ensemble",
                "few_shot_ways": 5,
                "few_shot_shots": 1,
            },
        ),
        (
            {"ensemble/test_top1": 3.0},
            {
                "classifier_top1": 3.0,
                "classifier_network": "ensemble",
                "classifier_split": "test",
            },
        ),
        (
            {"net/0/validation_top1": 3.0},
            {
                "classifier_top1": 3.0,
                "classifier_network": "net/0",
                "classifier_split": "validation",
            },
        ),
        ({"ensemble/knn_top1": float("nan"), "net/1/knn_top1": 4.0, "loss": 1.0}, {}),
    ],
)
def test_each_kind_of_score_has_its_protocol(
    figures: dict[str, float], scores: dict[str, object], tmp_path: Path
) -> None:
    log = StandingLog(tmp_path, [], step=0, total_steps=100)
    log.add(row(20, 1.0, **figures))
    log.write()
    epoch = {f"{name.removesuffix('_top1')}_epoch": 2.0 for name in scores if "_top1" in name}
    assert known(tmp_path) == {"step": 20, "total_steps": 100, **scores, **epoch}


def test_a_later_start_begins_with_what_the_rows_before_it_tell(tmp_path: Path) -> None:
    """Not with their pace: their clock was another."""
    (tmp_path / "2").mkdir()
    rows = [
        knn(10, 1.0, 50.0),
        row(15, 2.0, images_per_second=9.0),
        knn(20, 8.0, 71.5),
        row(21, 9.0, loss=1.0),
    ]
    log = StandingLog(tmp_path / "2", rows, step=25, total_steps=100)
    begun = {"step": 25, "total_steps": 100, "images_per_second": 9.0}
    assert known(tmp_path / "2") == {**begun, **KNN}
    log.add(row(27, 1.0))
    log.add(row(29, 2.0))
    log.write()
    assert known(tmp_path / "2") == {**begun, **KNN, "step": 29, "seconds_left": 35.5}
    # Back to a save from before the newest score, in the same start.
    StandingLog(tmp_path / "2", rows[:2], step=16, total_steps=100)
    before = {"knn_top1": 50.0, "knn_epoch": 1.0}
    assert known(tmp_path / "2") == {**begun, **KNN, **before, "step": 16}


def test_it_is_written_for_scores_and_else_once_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = StandingLog(tmp_path, [], step=0, total_steps=100)
    for step, clock, written in ((1, 100.5, 0), (2, 101.9, 0), (3, 102.0, 3), (4, 103.0, 3)):
        now[0] = clock
        log.add(row(step, clock))
        assert known(tmp_path)["step"] == written
    log.add(knn(5, 103.1, 71.5))
    assert known(tmp_path)["step"] == 5
    log.add(row(6, 103.2))
    assert known(tmp_path)["step"] == 5
    log.write()
    assert known(tmp_path)["step"] == 6


def test_a_disk_that_is_full_or_gone_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandingLog(tmp_path / "gone", [], step=0, total_steps=100).add(knn(1, 1.0, 5.0))
    log = StandingLog(tmp_path, [], step=0, total_steps=100)
    log.add(knn(1, 1.0, 50.0))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(module, "write_text", full)
        log.add(knn(2, 2.0, 60.0))
        log.write()
    assert known(tmp_path)["knn_top1"] == 50.0
    log.add(knn(20, 3.0, 71.5))
    assert known(tmp_path) == {"step": 20, "total_steps": 100, "seconds_left": 8.4, **KNN}


@pytest.mark.parametrize("content", ["", '{"step": 3', "[1]", "null", "\0" * 40, "[" * 100_000])
def test_a_file_that_is_no_standing_is_none(content: str, tmp_path: Path) -> None:
    assert read_standing(tmp_path) is None
    StandingLog(tmp_path, [], step=0, total_steps=1)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert read_standing(tmp_path) is None


def test_of_a_damaged_standing_the_sound_part_is_read(tmp_path: Path) -> None:
    StandingLog(tmp_path, [], step=0, total_steps=1)
    (file,) = tmp_path.iterdir()
    content = {"step": True, "total_steps": "9", "seconds_left": float("nan"), "knn_k": 2.5}
    file.write_text(json.dumps({**content, "knn_top1": 3.0, "of_a_later_version": 1}))
    assert read_standing(tmp_path) == Standing(knn_top1=3.0)


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("inf"), float("nan"), True, "1", None]
)
def test_what_measures_nothing_is_no_number(value):
    assert number(value) is None
    assert integer(value) is None


def test_a_number_is_a_number():
    assert (number(3), number(2.5), integer(2**63)) == (3.0, 2.5, 2**63)
