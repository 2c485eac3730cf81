"""The evaluation of landing exports: each once, whoever watches and whenever one is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.errors import UserError
from peerlearn.evaluation.selection import select_networks
from peerlearn.runs.stop import Stop
from slurm.executors import undisturbed
from studies import watch_command
from studies.landed import landed_exports
from studies.ledger import EVALUATIONS, Entry, Ledger
from studies.watch import Pass, Survey, resolve_evaluation
from tests.e2e.runs import command, environment, flip_last_byte, pretrain
from tests.owners import beating
from tests.slurm.cluster import Cluster
from tests.warm import Process
from tests.warm import run as run_process

DRIVER = Path(__file__).parent / "killed_while_submitting.py"
KNN = "knn --k 5 --data.limit 200"
# Refused by the job itself, before it loads anything large.
REFUSED = "knn --network 7"
STEPS = (6, 12)


@pytest.fixture(scope="session")
def trained(once: Callable[..., Path]) -> Path:
    """A run with exports at steps 6 and 12; not to be changed."""

    def make(run: Path) -> None:
        assert pretrain(run, "--checkpoint.export_every_epochs", "1") == 0
        shutil.rmtree(run / "tb")

    return once("two-exports", make)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return copy_of(trained, tmp_path / "run")


def copy_of(trained: Path, run: Path) -> Path:
    return Path(shutil.copytree(trained, run))


def watch_words(run: Path, *evaluations: str, cluster: str = "local") -> list[str]:
    return [
        *("watch", str(run), "--cluster", cluster, "--interval_seconds", "0.3"),
        *("--evaluate", *evaluations),
    ]


def watch(run: Path, *evaluations: str, cluster: str = "local", **variables: str) -> str:
    """What a watch prints, which is to end well."""
    found = run_process(
        command(*watch_words(run, *evaluations, cluster=cluster)),
        env=environment(**variables),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def entries(run: Path) -> list[Entry]:
    return list(Ledger(run / EVALUATIONS).entries().values())


def wait_until_ended(run: Path, jobs: int) -> list[dict]:
    """How each job's process ended; as many as there are to be, and none more."""
    deadline = time.monotonic() + 120
    while len(outcomes(run)) < jobs:
        assert time.monotonic() < deadline, list(run.glob("slurm/*/*.out"))
        time.sleep(0.1)
    time.sleep(0.5)
    found = outcomes(run)
    assert len(found) == jobs
    return found


def outcomes(run: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in run.glob("slurm/*/outcomes/[0-9]*.json")]


def results(run: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(run.glob("results/*.json"))]


@pytest.mark.slow(15)
def test_each_export_is_evaluated_once_and_a_failure_stops_nobody(run: Path):
    flip_last_byte(run / "export" / "step-00000006" / "net-1" / "model.safetensors")
    printed = watch(run, KNN, REFUSED)
    assert printed.count("job ") == 4
    wait_until_ended(run, 4)
    # Nothing is left to do; how the jobs ended is written down.
    assert watch(run, KNN, REFUSED) == ""
    kinds = {(e.facts["evaluation"], e.facts["step"]): e.kind for e in entries(run)}
    assert kinds == {
        (KNN, 6): "failed",
        (KNN, 12): "done",
        (REFUSED, 6): "failed",
        (REFUSED, 12): "failed",
    }
    done = next(entry for entry in entries(run) if entry.kind == "done")
    assert [path.name for path in done.results] == sorted(p.name for p in run.glob("results/*.js*"))
    assert {(r["step"], r["job"], r["protocol"]["k"]) for r in results(run)} == {(12, done.name, 5)}
    # A failed evaluation is no failure of the run, and its jobs are listed with the run's.
    assert (run / "DONE").exists()
    assert not (run / "FAILED").exists()
    listed = [json.loads(line) for line in (run / "slurm" / "jobs.jsonl").read_text().splitlines()]
    assert Counter(record["verb"] for record in listed) == {"knn": 4}


@pytest.mark.slow(60)
def test_killed_at_every_point_of_a_submission_the_next_watch_finds_or_makes_the_job(
    trained: Path, tmp_path: Path
):
    one_export = copy_of(trained, tmp_path / "whole")
    shutil.rmtree(one_export / "export" / "step-00000006")
    found = killed_watch(copy_of(one_export, tmp_path / "count"), number=0)
    things = int(found.stdout.split("things done: ")[1])
    assert things >= 12

    def kill_and_watch_again(number: int) -> tuple[int, str]:
        run = copy_of(one_export, tmp_path / str(number))
        killed = killed_watch(run, number=number)
        assert killed.returncode == -signal.SIGKILL
        before = (run / EVALUATIONS).read_text() if (run / EVALUATIONS).exists() else ""
        printed = watch(run, REFUSED)
        known = '"event": "job"' in before
        assert printed.count("job ") == (not known), printed
        return number, printed

    with ThreadPoolExecutor(2) as pool:
        printed = dict(pool.map(kill_and_watch_again, range(1, things + 1)))
    for number in printed:
        run = tmp_path / str(number)
        wait_until_ended(run, 1)
        assert watch(run, REFUSED) == ""
        (entry,) = entries(run)
        assert entry.kind == "failed"
        assert entry.reason.startswith("--network 7: not in ")
        lines = (run / "slurm" / "jobs.jsonl").read_text().splitlines()
        assert [json.loads(line)["job"] for line in lines] == [entry.job["job"]]
    # Both ways out were taken.
    again = [number for number, text in printed.items() if "found again" in text]
    anew = [n for n, text in printed.items() if "job " in text and "found again" not in text]
    assert again
    assert anew
    assert max(anew) < min(again)


def killed_watch(run: Path, *, number: int) -> subprocess.CompletedProcess:
    return run_process(
        [sys.executable, str(DRIVER), str(number), str(run), *watch_words(run, REFUSED)],
        env=environment(PYTHONPATH=str(Path(__file__).parents[2])),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow(15)
def test_watches_at_the_same_time_share_the_work(run: Path):
    watches = [
        Process(
            command(*watch_words(run, REFUSED, "knn --network 8")),
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    printed = "".join(process.communicate(timeout=240)[0] for process in watches)
    assert [process.returncode for process in watches] == [0] * 4
    assert printed.count("job ") == 4
    assert len({entry.job["job"] for entry in entries(run)}) == 4
    wait_until_ended(run, 4)
    assert all(entry.attempt == 1 for entry in entries(run))


def test_a_damaged_ledger_costs_its_damaged_lines_only(run: Path):
    watch(run, REFUSED)
    wait_until_ended(run, 2)
    file = run / EVALUATIONS
    first, *rest = file.read_text().splitlines()
    # As a full disk or a crash leaves them.
    file.write_text("\n".join([first, "", "nonsense", '{"event": "job"}', *rest, rest[0][:30]]))
    assert watch(run, REFUSED) == ""
    # The line cut short has not swallowed the next.
    assert [entry.kind for entry in entries(run)] == ["failed", "failed"]


def test_a_refused_submission_is_made_later(run: Path):
    words = watch_words(run, REFUSED, cluster="slurm")
    nowhere = {"PATH": "/nonexistent"}
    found = run_process(
        command(*words, "--once"),
        env={**environment(), **nowhere},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert "`sbatch` is not on this machine" in found.stderr
    assert all(entry.refused and entry.job is None for entry in entries(run))
    assert not list(run.glob("slurm/knn-*"))
    watch(run, REFUSED)
    wait_until_ended(run, 2)
    # After the first the pass ended.
    assert [entry.attempt for entry in entries(run)] == [2, 1]


def test_watch_is_light(run: Path):
    """It may run for days beside others on a login node."""
    words = [*watch_words(run, REFUSED), "--once"]
    code = (
        "import sys; from peerlearn.cli import main;"
        f"assert main({words!r}) == 0; assert 'torch' not in sys.modules;"
        "print(open('/proc/self/status').read())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    peak_kib = int(found.stdout.split("VmHWM:")[1].split()[0])
    assert peak_kib < 100 * 1024
    wait_until_ended(run, 2)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_told_to_stop_it_asks_to_be_run_again(run: Path, number: int):
    alive = {"host": "elsewhere", "pid": 1, "time_seconds": time.time() + 3600}
    (run / "DONE").unlink()
    with beating(run, alive):
        process = Process(
            command(*watch_words(run, REFUSED)),
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("job ")
        process.send_signal(number)
        process.communicate(timeout=240)
    assert process.returncode == 75
    wait_until_ended(run, len(entries(run)))


def test_exports_count_when_all_networks_are_there(run: Path):
    def steps(**options) -> list[int]:
        options = {"training": "done", "every_epochs": None} | options
        return [export.step for export in landed_exports(run, **options)]

    assert steps() == [6, 12]
    # What is written first is not yet named by `latest`.
    (run / "export" / "latest").write_text("step-00000006\n")
    assert steps(training="live") == [6]
    hidden = run / "export" / "step-00000012" / "net-1"
    hidden.rename(hidden.with_name(".net-1.tmp"))
    assert steps() == [6]
    (run / "export" / "latest").unlink()
    assert steps(training="live") == []


def test_every_epochs_counts_epochs_and_always_the_last(run: Path):
    for step in (18, 24, 30):
        shutil.copytree(run / "export" / "step-00000012", run / "export" / f"step-{step:08d}")
    (run / "export" / "latest").write_text("step-00000030\n")

    def steps(every_epochs: int, training: str) -> list[int]:
        found = landed_exports(run, training=training, every_epochs=every_epochs)
        return [export.step for export in found]

    assert steps(2, "live") == [12, 24]
    assert steps(2, "done") == [12, 24, 30]
    assert steps(2, "dead") == [12, 24]
    assert steps(7, "done") == [30]
    assert steps(1, "live") == [6, 12, 18, 24, 30]
    # Of a run whose validation chooses, the step that it chose in the end.
    (run / "export" / "best").write_text("step-00000018\n")
    assert steps(2, "live") == [12, 24]
    assert steps(2, "done") == [12, 18, 24, 30]


@pytest.mark.slow(15)
def test_other_weights_at_a_step_are_evaluated_anew(run: Path):
    watch(run, REFUSED)
    wait_until_ended(run, 2)
    for network in ("net-0", "net-1"):
        config = run / "export" / "step-00000012" / network / "config.json"
        content = json.loads(config.read_text())
        content["sha256"]["model.safetensors"] = "0" * 64
        config.write_text(json.dumps(content))
    assert watch(run, REFUSED).count("step-00000012") == 1
    wait_until_ended(run, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("knm --k 5", "unknown verb 'knm'; did you mean 'knn'"),
        ("knn --kk 5", "evaluate: 'knn --kk 5': unknown key --kk; did you mean 'k'"),
        ("knn --k 0", "k must be at least 1"),
        ("linear nonsense", "'nonsense' is neither a file nor a shipped config"),
        ("pretrain mcl_fashion_mnist_demo", "pretrain is no evaluation"),
        ("doctor", "doctor is no evaluation"),
    ],
)
def test_a_wrong_evaluation_is_refused_at_once(line: str, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        resolve_evaluation(line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--evaluate is missing"),
        (["--evaluate", KNN], "--cluster is missing"),
        (["--evaluate", KNN, "--cluster", "nonsense"], "neither a file nor a shipped config"),
        (["--evaluate", "knn --kk 5", "--cluster", "local"], "did you mean 'k'"),
        (["--interval_seconds", "0"], "expected a positive number"),
        (["--evrey_epochs", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_words_are_one_line(
    run: Path, words: Sequence[str], message: str, capsys: pytest.CaptureFixture
):
    assert main(["watch", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run_is_not_watched(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(watch_words(tmp_path, KNN)) == 1
    assert "nothing to watch" in capsys.readouterr().err


def test_trouble_is_said_once_and_given_up_after_a_day_without_any_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    clock = 0.0

    def sleep(seconds: float, stop: Stop) -> None:
        nonlocal clock
        clock += 3600

    monkeypatch.setattr(watch_command.time, "monotonic", lambda: clock)
    monkeypatch.setattr(watch_command, "_sleep", sleep)
    looks = 0

    def look(stop: Stop) -> Pass:
        nonlocal looks
        looks += 1
        trouble = UserError("sbatch: too many jobs")
        if looks == 101:
            return Pass(finished=False)
        return Pass(finished=False, training=looks < 101, troubles=[trouble])

    with pytest.raises(UserError, match="too many jobs"):
        watch_command.watch(look, 30.0, once=False)
    assert looks == 101 + 25
    said = "sbatch: too many jobs; it is tried again every 30 s"
    assert capsys.readouterr().out.count(said) == 2


def test_sbatch_does_not_hear_the_signals_that_stop_the_watch():
    show = [sys.executable, "-c", "print(open('/proc/self/status').read())"]

    def blocked() -> int:
        text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        return int(text.split("SigBlk:")[1].split()[0], 16)

    with undisturbed("slurm"):
        inside = blocked()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        assert inside >> (number - 1) & 1
        assert not blocked() >> (number - 1) & 1
    with undisturbed("local"):
        assert not blocked() >> (signal.SIGTERM - 1) & 1


def test_a_job_nobody_was_asked_about_is_not_taken_for_ended():
    assert Survey().live(("local", "7", 5))
    assert not Survey(asked=frozenset({("local", "7", 5)})).live(("local", "7", 5))


def test_on_slurm_a_job_is_found_again_by_its_name(cluster: Cluster, run: Path, tmp_path: Path):
    shutil.rmtree(run / "export" / "step-00000006")
    profile = tmp_path / "small.yaml"
    profile.write_text("executor: slurm\ntime_minutes: 10\n")
    words = watch_words(run, KNN, cluster=str(profile))
    driver = [sys.executable, str(DRIVER)]
    variables = {
        **cluster.environment,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    killed = run_process([*driver, "started", str(run), *words], env=variables)
    assert killed.returncode == -signal.SIGKILL
    (entry,) = entries(run)
    assert entry.in_doubt
    assert not (entry.folder / "jobs.json").exists()
    (job,) = cluster.call("squeue", "--noheader", "--format=%i").split()
    found = run_process(command(*words), env=variables, capture_output=True, text=True, check=True)
    assert f"job {job}, found again" in found.stdout
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert len(outcomes(run)) == 1
    assert {result["job"] for result in results(run)} == {entry.name}
    assert select_networks(run, "all").step == 12
    assert os.path.isdir(entry.folder / "code")
