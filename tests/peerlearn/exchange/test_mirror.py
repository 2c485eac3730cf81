"""Mirrors of runs in real stores: what these hold is read back, and every step is there once."""

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.exchange.wandb_files import records_of, steps_of
from peerlearn.runs.directory import RunDirectory
from tests import warm

RESULT = "knn-digits-00000003-0-0123456789ab"
ROOT = Path(__file__).parents[3]


class Store(ABC):
    """A tracker's store, as its users find it.

    Attributes:
        words: words after `--to`.
    """

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder = folder
        self.words = words

    def mirror(self, run: RunDirectory, *more: str) -> int:
        return main(["mirror", str(run.root), "--to", *self.words, *more])

    @abstractmethod
    def losses(self) -> list[tuple[int, float]]:
        """Steps and losses, as often as it has them."""

    @abstractmethod
    def top1(self) -> list[float]:
        """The kNN accuracy of each of its results."""

    @abstractmethod
    def events(self) -> str:
        """What it shows of the events."""

    @abstractmethod
    def lr(self) -> str:
        """The learning rate in its config."""


def empty_mlflow(folder: Path) -> str:
    """A new data base of MLflow. To make one takes seconds, so that the tests of a process copy one."""
    from mlflow import MlflowClient

    made = folder.parent / "empty-mlflow.db"
    if not made.exists():
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments()
    shutil.copy(made, folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


class MlflowStore(Store):
    def __init__(self, folder: Path, uri: str = "") -> None:
        self.uri = uri or empty_mlflow(folder)
        super().__init__(folder, ["mlflow", "--uri", self.uri])

    def _run(self):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name("peerlearn")
        (run,) = client.search_runs([experiment.experiment_id])
        return client, run

    def losses(self) -> list[tuple[int, float]]:
        client, run = self._run()
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]

    def top1(self) -> list[float]:
        client, run = self._run()
        history = client.get_metric_history(run.info.run_id, f"results/{RESULT}/top1")
        return [metric.value for metric in history]

    def events(self) -> str:
        return self._run()[1].data.tags["events"]

    def lr(self) -> str:
        return self._run()[1].data.params["optimizer.base_lr"]


class TrackioStore(Store):
    def __init__(self, folder: Path) -> None:
        # It reads its folder when it is imported: the tests of a process share one, and have a project each.
        self.home = folder.parent / "trackio"
        self.project = folder.name
        super().__init__(folder, ["trackio", "--uri", str(self.home), "--project", self.project])

    def _rows(self, words: str) -> list[tuple]:
        with sqlite3.connect(self.home / f"{self.project}.db") as connection:
            return connection.execute(words).fetchall()

    def losses(self) -> list[tuple[int, float]]:
        rows = self._rows("SELECT step, metrics FROM metrics ORDER BY id")
        # It writes what is no number as a text.
        return [(s, float(json.loads(m)["loss"])) for s, m in rows if "loss" in json.loads(m)]

    def top1(self) -> list[float]:
        rows = self._rows("SELECT metrics FROM metrics ORDER BY id")
        each = (json.loads(metrics) for (metrics,) in rows)
        return [m[f"results/{RESULT}/top1"] for m in each if f"results/{RESULT}/top1" in m]

    def events(self) -> str:
        return "\n".join(" ".join(row) for row in self._rows("SELECT title, text FROM alerts"))

    def lr(self) -> str:
        ((config,),) = self._rows("SELECT config FROM configs")
        return str(json.loads(config)["optimizer.base_lr"])


class TensorBoardStore(Store):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ["tensorboard", "--uri", str(folder / "board")])

    def _found(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (self.folder / "board").iterdir()
        found = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
        found.Reload()
        return found

    def losses(self) -> list[tuple[int, float]]:
        # Of files of one second, any comes first.
        return sorted((e.step, e.value) for e in self._found().Scalars("loss"))

    def top1(self) -> list[float]:
        return [e.value for e in self._found().Scalars(f"results/{RESULT}/top1")]

    def events(self) -> str:
        texts = self._found().Tensors("events/text_summary")
        return "\n".join(text.tensor_proto.string_val[0].decode() for text in texts)

    def lr(self) -> str:
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        data = self._found().summary_metadata["_hparams_/session_start_info"].plugin_data.content
        hparams = HParamsPluginData.FromString(data).session_start_info.hparams
        return str(hparams["optimizer.base_lr"].number_value)


class WandbStore(Store):
    """Folders of offline runs, read in the order of their starts."""

    def __init__(self, folder: Path, run: Path) -> None:
        super().__init__(folder, ["wandb"])
        self.run = run

    def files(self) -> list[Path]:
        return sorted(self.run.glob("mirror/wandb/offline-run-*/run-*.wandb"))

    def records(self, kind: str) -> list:
        from wandb.proto.wandb_internal_pb2 import Record

        content = (each for file in self.files() for each in records_of(file.read_bytes()))
        records = map(Record.FromString, content)
        return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]

    def losses(self) -> list[tuple[int, float]]:
        rows = self.records("history")
        items = [{"".join(i.nested_key): i.value_json for i in row.item} for row in rows]
        return [(int(i["_step"]), float(json.loads(i["loss"]))) for i in items]

    def _summary(self) -> dict[str, str]:
        updates = self.records("summary")
        return {
            i.key or "".join(i.nested_key): i.value_json
            for update in updates
            for i in update.update
        }

    def top1(self) -> list[float]:
        return [float(self._summary()[f"results/{RESULT}/top1"])]

    def events(self) -> str:
        return sorted(self.run.glob("mirror/wandb/offline-run-*/files/events.jsonl"))[
            -1
        ].read_text()

    def lr(self) -> str:
        configs = [u for run in self.records("run") for u in run.config.update]
        found = {u.key or "".join(u.nested_key): u.value_json for u in configs}
        return found["optimizer.base_lr"]


TRACKERS = ("mlflow", "trackio", "tensorboard", "wandb")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = RunDirectory(tmp_path / "run")
    run.create_folder()
    run.write_config("seed: 3\noptimizer:\n  base_lr: 0.25\nqueue: null\n")
    run.event("started", attempt=1, step=0)
    return run


def store_of(tracker: str, tmp_path: Path) -> Store:
    kinds = {"mlflow": MlflowStore, "trackio": TrackioStore, "tensorboard": TensorBoardStore}
    if tracker == "wandb":
        return WandbStore(tmp_path, tmp_path / "run")
    return kinds[tracker](tmp_path)


def train(run: RunDirectory, first: int, last: int, attempt: int = 1) -> None:
    """Rows as a training writes them; the loss of step 2 is not finite."""
    for step in range(first, last + 1):
        loss = float("nan") if step == 2 else 8.0 - step / 4
        clock = {"seconds": step + attempt / 8, "attempt": attempt}
        run.append_metrics({"step": step, "epoch": step / 10, **clock, "loss": loss})


def expected(last: int) -> list[tuple[int, float]]:
    return [(step, 8.0 - step / 4) for step in range(last + 1)]


def assert_holds(store: Store, last: int) -> None:
    found = store.losses()
    assert [step for step, _ in found] == list(range(last + 1))
    assert math.isnan(found[2][1])
    assert [x for x in found if x[0] != 2] == [x for x in expected(last) if x[0] != 2]


def write_result(run: RunDirectory) -> None:
    run.results.mkdir(exist_ok=True)
    result = {"step": 3, "metrics": {"top1": 62.5, "n": 360}, "protocol": {"k": 20}}
    (run.results / f"{RESULT}.json").write_text(json.dumps(result))


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.slow(6)
def test_each_step_is_there_once(
    tracker: str, run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    store = store_of(tracker, tmp_path)
    train(run, 0, 4)
    assert store.mirror(run) == 0
    assert f"{run.root}: 5 rows up to step 4, 1 event sent to {tracker}\n" in capfd.readouterr().out
    assert_holds(store, 4)
    assert store.lr() == "0.25"

    train(run, 5, 6)
    with run.metrics.open("a") as file:
        file.write('{"step": 7, "epo')  # a machine that lost its power
    write_result(run)
    run.event("collapse", step=6, network="net/0")
    assert store.mirror(run) == 0
    assert "2 rows up to step 6, 1 event, 1 result sent" in capfd.readouterr().out
    assert_holds(store, 6)
    assert store.top1() == [62.5]

    # A requeue that goes on from the save of step 3.
    run.cut_metrics(3)
    run.event("started", attempt=2, step=3)
    assert store.mirror(run) == 0
    behind = "the run went back to step 3: its rows up to step 6 were sent before"
    assert behind in capfd.readouterr().out
    train(run, 4, 9, attempt=2)
    assert store.mirror(run) == 0
    assert store.mirror(run) == 0
    assert f"{run.root}: nothing new\n" in capfd.readouterr().out
    assert_holds(store, 9)
    assert store.top1() == [62.5]
    assert store.events().count("started") == 2
    assert store.events().count("collapse") == 1


def kill_a_mirror(store: Store, run: RunDirectory, where: str, after_seconds: int = 0) -> None:
    """Have a mirror killed in a function of peerlearn/exchange, MODULE.NAME."""
    code = (
        f"import os, time; from peerlearn.exchange import {where.partition('.')[0]}\n"
        "from peerlearn.cli import main\n"
        f"{where} = lambda *_: (time.sleep({after_seconds}), os.kill(os.getpid(), 9))\n"
        f"main({['mirror', str(run.root), '--to', *store.words]!r})"
    )
    # Not by the process that wandb has started for these tests.
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=alone, timeout=120)
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("tracker", "killed_in"),
    [
        ("mlflow", "mirror_mlflow._of_result"),
        ("trackio", "mirror._State.write"),
        ("tensorboard", "mirror._State.write"),
        ("wandb", "mirror._State.write"),
        ("wandb", "mirror_wandb.Wandb.close"),
    ],
)
@pytest.mark.slow(5)
def test_a_mirror_that_is_killed_sends_nothing_twice(
    tracker: str, killed_in: str, run: RunDirectory, tmp_path: Path
):
    store = store_of(tracker, tmp_path)
    train(run, 0, 5)
    write_result(run)
    kill_a_mirror(store, run, killed_in)
    train(run, 6, 8)
    assert store.mirror(run) == 0
    assert_holds(store, 8)
    assert store.top1() == [62.5]
    assert store.events().count("started") == 1


@pytest.mark.slow(4)
def test_every_offline_folder_of_wandb_is_of_the_same_run(run: RunDirectory, tmp_path: Path):
    store = WandbStore(tmp_path, run.root)
    for last in (3, 6):
        train(run, last - 3, last - 1)
        assert store.mirror(run) == 0
        time.sleep(1.1)  # The names of the folders have the second in which each was begun.
    own = (run.root / "mirror" / "id").read_text().strip()
    assert [file.name for file in store.files()] == [f"run-{own}.wandb"] * 2
    assert {record.run_id for record in store.records("run")} == {own}
    assert [steps_of(file) for file in store.files()] == [[0, 1, 2], [3, 4, 5]]


def test_nothing_is_noted_while_wandb_writes(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its process may write the last records after `finish` has returned, as one that holds the file does here."""
    from wandb.sdk.wandb_run import Run

    store = WandbStore(tmp_path, run.root)
    state = run.root / "mirror" / "wandb.json"
    finish, noted_while_written = Run.finish, []

    def finish_early(wandb_run: Run, **words: int) -> None:
        finish(wandb_run, **words)
        file = store.files()[0].open("rb")

        def end() -> None:
            noted_while_written.append(state.exists())
            file.close()

        threading.Timer(0.5, end).start()

    monkeypatch.setattr(Run, "finish", finish_early)
    train(run, 0, 3)
    assert store.mirror(run) == 0
    assert noted_while_written == [False]
    assert state.exists()


def test_records_of_wandb_files_lie_in_blocks():
    """As the log format of LevelDB has it: a block's last bytes are empty where no header fits."""

    def piece(content: bytes, kind: int) -> bytes:
        return struct.pack("<IHB", 0, len(content), kind) + content

    # Up to three bytes before the end of the first block; then a record in three pieces, in three blocks.
    first, long = bytes(32768 - 7 - 7 - 3), bytes(32768 - 7)
    content = b":W&B\xe1\xbe\x00" + piece(first, 1) + bytes(3)
    content += piece(b"a", 1) + piece(long[:-8], 2) + piece(long, 3) + piece(b"end", 4)
    assert list(records_of(content)) == [first, b"a", long[:-8] + long + b"end"]
    assert list(records_of(content[:-1])) == [first, b"a"]


@pytest.mark.slow(5)
def test_what_a_killed_wandb_has_written_is_not_sent_again(run: RunDirectory, tmp_path: Path):
    # It writes by blocks of 32 KiB, which cut records in two.
    for step in range(200):
        run.append_metrics({"step": step, "epoch": 0.0} | {f"net/{n}/loss": n for n in range(30)})
    store = WandbStore(tmp_path, run.root)
    kill_a_mirror(store, run, "mirror_wandb.Wandb.close", after_seconds=1)
    assert store.mirror(run) == 0
    written, rest = map(steps_of, store.files())
    assert written + rest == list(range(200))
    assert 50 < len(written) < 200


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["server", "--backend-store-uri", empty_mlflow(tmp_path), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.slow(20)
def test_a_server_of_mlflow(run: RunDirectory, tmp_path: Path, server: str):
    store = MlflowStore(tmp_path, server)
    train(run, 0, 4)
    assert store.mirror(run) == 0
    # As if a kill had come before it was noted.
    (run.root / "mirror" / "mlflow.json").unlink()
    train(run, 5, 6)
    write_result(run)
    run.event("done", attempt=1, step=6)
    run.mark_done()
    assert store.mirror(run) == 0
    assert_holds(store, 6)
    assert store.top1() == [62.5]
    assert store._run()[1].info.status == "FINISHED"


def test_following_ends_with_the_run(run: RunDirectory, tmp_path: Path):
    store = TensorBoardStore(tmp_path)

    def work() -> None:
        for step in range(4):
            train(run, step, step)
            time.sleep(0.1)
        run.mark_done()

    train_thread = threading.Thread(target=work)
    train_thread.start()
    assert store.mirror(run, "--follow", "--interval_seconds", "0.05") == 0
    train_thread.join()
    assert_holds(store, 3)


def test_a_signal_has_the_rest_sent(run: RunDirectory, tmp_path: Path):
    store = TensorBoardStore(tmp_path)
    words = ["mirror", str(run.root), "--to", *store.words, "--follow", "--interval_seconds", "900"]
    train(run, 0, 2)
    mirror = warm.Process(
        [sys.executable, "-m", "peerlearn", *words], stdout=subprocess.PIPE, text=True
    )
    assert mirror.stdout.readline().endswith("3 rows up to step 2, 1 event sent to tensorboard\n")
    train(run, 3, 4)
    mirror.terminate()
    assert mirror.wait(60) == 0
    assert_holds(store, 4)


class TestRefused:
    def test_what_is_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        assert main(["mirror", str(tmp_path), "--to", "tensorboard"]) == 1
        assert "is not a run directory" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_an_unknown_tracker(self, run: RunDirectory, capsys: pytest.CaptureFixture[str]):
        assert main(["mirror", str(run.root), "--to", "comet"]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_a_missing_package(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr("peerlearn.cli.check_siblings", lambda: None)
        assert main(["mirror", str(run.root), "--to", "wandb"]) == 1
        assert (
            capsys.readouterr().err
            == "peerlearn: wandb is not installed: pip install 'wandb>=0.31'\n"
        )

    def test_another_project_than_before(
        self, run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        train(run, 0, 1)
        store = TensorBoardStore(tmp_path)
        assert store.mirror(run) == 0
        assert store.mirror(run, "--project", "other") == 1
        assert "mirrored to the project 'peerlearn'" in capsys.readouterr().err
        # As before, without a word.
        assert main(["mirror", str(run.root), "--to", "tensorboard"]) == 0

    def test_a_second_mirror_at_once(self, run: RunDirectory, capsys: pytest.CaptureFixture[str]):
        from filelock import FileLock

        (run.root / "mirror").mkdir()
        with FileLock(run.root / "mirror" / "tensorboard.lock"):
            assert main(["mirror", str(run.root), "--to", "tensorboard"]) == 1
        assert "another process mirrors it" in capsys.readouterr().err

    def test_a_server_of_mlflow_that_nobody_names(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert main(["mirror", str(run.root), "--to", "mlflow"]) == 1
        assert "mlflow needs --uri or MLFLOW_TRACKING_URI" in capsys.readouterr().err


def test_a_password_is_not_noted():
    from peerlearn.exchange.mirror import without_secrets

    assert without_secrets("https://me:secret@host:5000/a") == "https://host:5000/a"
    assert without_secrets("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert without_secrets("/a/b") == "/a/b"
