"""metrics.jsonl stands, whatever becomes of TensorBoard beside it."""

import builtins
from pathlib import Path

import pytest

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.metrics import MetricsLog


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
