"""metrics.jsonl stands, whatever becomes of TensorBoard beside it."""

import builtins
from pathlib import Path

import pytest

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.metrics import CLOCK_WORDS, MetricsLog


def log_two_rows(folder: Path) -> list[dict]:
    folder.mkdir()
    run = RunDirectory(folder)
    log = MetricsLog(run, attempt=1, step=0, steps_per_epoch=2, total_steps=2, writes=True)
    for step in (1, 2):
        log.write(step, {"loss": float(step)})
    log.close()
    return [{key: row[key] for key in ("step", "loss")} for row in run.metric_rows()]


ROWS = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize(
    "error", [ImportError("no tensorboard"), TypeError("Descriptors cannot be created\ndirectly.")]
)
def test_tensorboard_that_cannot_be_imported_is_one_warning(
    error: Exception, tmp_path, monkeypatch, caplog
):
    plain = builtins.__import__

    def broken(name, *rest):
        if name == "torch.utils.tensorboard":
            raise error
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert log_two_rows(tmp_path / "run") == ROWS
    (record,) = caplog.records
    assert record.getMessage() == f"TensorBoard is off: {error}".replace("\n", "\\n")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["__init__", "add_scalar"])
def test_tensorboard_that_fails_is_one_warning(place: str, tmp_path, monkeypatch, caplog):
    from torch.utils.tensorboard import SummaryWriter

    def broken(*_: object, **__: object) -> None:
        raise UnicodeEncodeError("utf-8", "\udcfc", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(SummaryWriter, place, broken)
    assert log_two_rows(tmp_path / "run") == ROWS
    (record,) = caplog.records
    assert record.getMessage().startswith("TensorBoard is off")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gr\udcfcn", "a [red]\n😀 %d", "-x", "r" * 200])
def test_a_run_of_any_name_is_logged(name: str, tmp_path):
    assert log_two_rows(tmp_path / name) == ROWS


def test_pace_is_that_since_the_last_row(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("peerlearn.runs.metrics.time.monotonic", lambda: now[0])
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    log = MetricsLog(run, attempt=1, step=0, steps_per_epoch=9, total_steps=9, writes=True)

    def step(waits: float, works: float) -> None:
        with log.waiting():
            now[0] += waits
        now[0] += works

    step(1.0, 3.0)
    step(0.5, 3.5)
    pace = log.pace(2, 16)
    assert pace == {"images_per_second": 4.0, "data_wait_percent": 18.8}
    log.write(2, {"loss": 1.0, **pace})
    assert log.text == "epoch 0.22  loss 1.000  4 images/s, 19 % waiting for data"
    step(0.0, 2.0)
    assert log.pace(3, 16) == {"images_per_second": 8.0, "data_wait_percent": 0.0}
    log.close()


def test_what_is_waited_for_is_waited_for_too_where_it_fails(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("peerlearn.runs.metrics.time.monotonic", lambda: now[0])
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    log = MetricsLog(run, attempt=1, step=0, steps_per_epoch=9, total_steps=9, writes=False)

    def no_batch() -> None:
        with log.waiting():
            now[0] = 3.0
            raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        no_batch()
    now[0] = 4.0
    assert log.pace(1, 8)["data_wait_percent"] == 75.0


def test_clocks_are_known_by_their_names():
    """What a resumed run and its twin may differ in."""
    fields = ("seconds", "images_per_second", "data_wait_percent", "peak_memory_bytes")
    assert all(any(word in field for word in CLOCK_WORDS) for field in fields)
    assert not any(word in field for word in CLOCK_WORDS for field in ("loss", "net/0/knn_top1"))
