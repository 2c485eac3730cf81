"""Studies on a real SLURM: each result is measured once and none is missing, whoever is killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peerlearn.runs.directory import RunDirectory
from tests.e2e.runs import command, environment
from tests.slurm.cluster import Cluster
from tests.studies.small_studies import (
    KNN,
    PRETRAIN,
    REFUSED,
    ROOT,
    STEP,
    kinds,
    measurements,
    outcomes,
    peerlearn,
    results,
    run_of,
    wait_for,
    write_config,
    write_profile,
)
from tests.warm import Process
from tests.warm import run as run_process

FAULTS = ROOT / "tests" / "slurm" / "faults"
DRIVER = Path(__file__).parent / "killed_while_submitting.py"


def variables(cluster: Cluster) -> dict[str, str]:
    return {**environment(), **cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def watch_words(run: Path, *lines: str) -> list[str]:
    # A run whose earlier export was taken away is watched for its last one.
    exports = "all" if (run / "export" / "step-00000006").exists() else "last"
    return [
        *("watch", str(run), "--cluster", write_profile(run), "--interval_seconds", "0.5"),
        *("--exports", exports, "--evaluate", *lines),
    ]


def watch(cluster: Cluster, run: Path, *lines: str, code: int) -> str:
    """What a watch prints that is not disturbed."""
    found = run_process(
        command(*watch_words(run, *lines)), env=variables(cluster), capture_output=True, text=True
    )
    assert found.returncode == code, found.stdout + found.stderr
    return str(found.stdout)


def killed(cluster: Cluster, number: str, run: Path, *lines: str, ends: int) -> str:
    """What a watch prints that is killed at its n-th operation."""
    found = run_process(
        [sys.executable, str(DRIVER), number, str(run), *watch_words(run, *lines), "--once"],
        env=variables(cluster),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert found.returncode == ends, found.stderr
    return str(found.stdout)


def wait_for_all_jobs(cluster: Cluster) -> None:
    """A job's log is whole once it has ended, and what has ended writes nothing into the next test."""
    wait_for(
        lambda: not cluster.call("squeue", "--noheader", "--format=%i").split(), "end of the jobs"
    )


def with_last_export(trained: Path, run: Path) -> Path:
    shutil.copytree(trained, run)
    shutil.rmtree(run / "export" / "step-00000006")
    return run


@pytest.mark.slow(120)
def test_killed_at_every_operation_each_evaluation_ends_once(
    cluster: Cluster, trained: Path, tmp_path: Path
):
    printed = killed(cluster, "0", with_last_export(trained, tmp_path / "0"), REFUSED, ends=0)
    things = int(printed.split("things done: ")[1])
    assert things >= 10
    runs = {n: with_last_export(trained, tmp_path / str(n)) for n in range(1, things + 1)}
    for number, run in runs.items():
        killed(cluster, str(number), run, REFUSED, ends=-signal.SIGKILL)
    for run in runs.values():
        assert "missing: " in watch(cluster, run, REFUSED, code=1)
        ((place, outcome),) = outcomes(run).items()
        assert place == (REFUSED, 12)
        assert outcome.reason.startswith("--network 7: not in ")


@pytest.mark.slow(60)
def test_a_job_that_nobody_recorded_is_known_by_its_name(
    cluster: Cluster, trained: Path, tmp_path: Path
):
    """The submitter dies when sbatch has ended: its job is waited for, and no second one measures."""
    run = with_last_export(trained, tmp_path / "run")
    killed(cluster, "started", run, KNN, ends=-signal.SIGKILL)
    assert not list(run.glob("evaluations/*/measure-1/jobs.json"))
    assert cluster.call("squeue", "--noheader", "--format=%i").split()
    watch(cluster, run, KNN, code=0)
    wait_for_all_jobs(cluster)
    assert kinds(run) == {KNN: "done"}
    assert measurements(run) == 1
    (key,) = {result["job"] for result in results(run)}
    assert (run / "evaluations" / key / "outcome.json").is_file()


@pytest.mark.slow(120)
def test_watchers_killed_at_random_miss_nothing_and_measure_nothing_twice(
    cluster: Cluster, run: Path
):
    lines = (KNN, "knn --k 7 --data.limit 200", REFUSED)
    moments = random.Random(16)
    for _ in range(4):
        # Two at once, as of two shells.
        watchers = [
            Process(
                command(*watch_words(run, *lines)),
                env=variables(cluster),
                stdout=subprocess.DEVNULL,
            )
            for _ in range(2)
        ]
        time.sleep(moments.uniform(0.2, 3))
        for watcher in watchers:
            watcher.send_signal(signal.SIGKILL)
            watcher.communicate()
    watch(cluster, run, *lines, code=1)
    wait_for_all_jobs(cluster)
    assert {place: each.kind for place, each in outcomes(run).items()} == {
        (line, step): "failed" if line == REFUSED else "done" for line in lines for step in (6, 12)
    }
    assert measurements(run) == 4


@pytest.mark.slow(120)
def test_a_whole_study(cluster: Cluster, tmp_path: Path):
    """Its watch is requeued, and two hosts `resume` at once: every run and result once, failures in the table."""
    root = tmp_path / "s"
    file = write_config(tmp_path, cluster=write_profile(tmp_path), throttle=2)
    printed = peerlearn("study", str(file), **cluster.environment)
    assert printed.count("job ") == 3
    assert f"peerlearn table {root}" in printed
    for seed in (0, 1):
        (record,) = (run_of(root, seed) / "slurm" / "jobs.jsonl").read_text().splitlines()
        assert json.loads(record)["job"].endswith(f"_{seed}")
        assert f"job {json.loads(record)['job']}: " in printed
    watcher = json.loads((root / "slurm" / "jobs.jsonl").read_text())["job"]
    wait_for(lambda: list(root.glob("*/evaluations/*/measure-1")), "evaluation")
    cluster.call("scontrol", "requeue", watcher)
    told = on_two_hosts("resume", str(root), code=1, **variables(cluster))
    wait_for_all_jobs(cluster)
    for seed in (0, 1):
        run = run_of(root, seed)
        assert RunDirectory(run).done
        assert RunDirectory(run).newest_attempt() == 1
        assert kinds(run) == {KNN: "done", REFUSED: "failed"}
        assert measurements(run) == 1
        said = f"missing: {run.name}: {REFUSED}, step {STEP}: --network 7: not in"
        assert all(said in " ".join(text.split()) for text in told)
    content = json.loads((root / "table.json").read_text())
    values = [score["values"] for score in content["scores"] if score["network"] == "ensemble"]
    assert set(values[0]) == {"0", "1"}


def on_two_hosts(*words: str, code: int, **environment: str) -> list[str]:
    """What the same command prints that runs on two hosts at once."""
    # A namespace of its own gives a process the name of another host.
    elsewhere = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]
    if subprocess.run([*elsewhere, "true"]).returncode:
        elsewhere = []  # Who is not root may not.
    both = [
        subprocess.Popen(
            [*start, *command(*words)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for start in ([], elsewhere)
    ]
    told = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [code, code], told
    return told


@pytest.mark.slow(120)
def test_two_hosts_whose_locks_do_not_hold(cluster: Cluster, tmp_path: Path):
    """`study` on one folder from both, each with the same view of Slurm: jobs come twice, and runs and results once."""
    root, together = tmp_path / "s", tmp_path / "together"
    together.mkdir()
    file = write_config(tmp_path, cluster=write_profile(tmp_path), evaluate=[KNN])
    unlocked = {
        **variables(cluster),
        "PYTHONPATH": f"{FAULTS}:{ROOT}",
        "SUBMIT_TOGETHER": str(together),
    }
    on_two_hosts("study", str(file), code=0, **unlocked)
    # Both have submitted all runs.
    assert len(list(root.glob("slurm/pretrain-*"))) == 2
    wait_for_all_jobs(cluster)
    on_two_hosts("resume", str(root), code=0, **unlocked)
    wait_for_all_jobs(cluster)
    for seed in (0, 1):
        run = run_of(root, seed)
        assert RunDirectory(run).done
        started = [
            event["step"] for event in RunDirectory(run).events() if event["event"] == "started"
        ]
        assert started == [0]
        assert kinds(run) == {KNN: "done"}
        assert measurements(run) == 1


@pytest.mark.slow(60)
def test_cancel_while_resume_submits(cluster: Cluster, tmp_path: Path):
    """`cancel` waits until the jobs of the other shell are known, and ends them all."""
    root, together = tmp_path / "s", tmp_path / "together"
    together.mkdir()
    (together / "locked").touch()
    profile = Path(write_profile(tmp_path))
    profile.write_text(profile.read_text() + "sbatch: [hold]\n")
    file = write_config(tmp_path, cluster=str(profile), evaluate=[KNN])
    held = {
        **variables(cluster),
        "PYTHONPATH": f"{FAULTS}:{ROOT}",
        "SUBMIT_TOGETHER": str(together),
    }
    study = subprocess.Popen(command("study", str(file)), env=held, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(together.glob("seen-by-*")), "a submitter that has asked Slurm")
    cancel = subprocess.Popen(
        command("cancel", str(root)), env=variables(cluster), stdout=subprocess.PIPE, text=True
    )
    time.sleep(2)
    assert cancel.poll() is None
    (together / "go").touch()
    assert study.wait(timeout=240) == 0
    printed = cancel.communicate(timeout=240)[0]
    assert cancel.returncode == 0
    assert cluster.call("squeue", "--noheader", "--format=%i %j").split() == [], printed


@pytest.mark.slow(60)
def test_an_array_that_nobody_recorded_is_taken_over(cluster: Cluster, tmp_path: Path):
    """The submitter dies when sbatch has ended: `resume` finds the array by its name, and trains nothing twice."""
    root = tmp_path / "s"
    file = write_config(tmp_path, cluster=write_profile(tmp_path), evaluate=[KNN])
    found = run_process(
        [sys.executable, str(DRIVER), "started", str(root), "study", str(file)],
        env=variables(cluster),
        capture_output=True,
    )
    assert found.returncode == -signal.SIGKILL
    assert not list(root.glob("*/slurm/jobs.jsonl"))
    peerlearn("resume", str(root), **cluster.environment)
    wait_for_all_jobs(cluster)
    for seed in (0, 1):
        run = run_of(root, seed)
        assert RunDirectory(run).newest_attempt() == 1
        assert kinds(run) == {KNN: "done"}
        (record,) = (run / "slurm" / "jobs.jsonl").read_text().splitlines()[:1]
        assert json.loads(record)["job"].endswith(f"_{seed}")
    assert [folder.name for folder in (root / "slurm").glob("pretrain-*")] == ["pretrain-1"]


@pytest.mark.slow(60)
def test_a_job_that_is_cancelled_ends_in_the_table_and_resume_measures(cluster: Cluster, run: Path):
    shutil.rmtree(run / "export" / "step-00000006")
    held = run / "held.yaml"
    held.write_text(Path(write_profile(run)).read_text() + "sbatch: [hold]\n")
    words = ["watch", str(run), "--evaluate", KNN, "--interval_seconds", "0.5", "--cluster"]
    watcher = Process(
        command(*words, str(held)), env=variables(cluster), stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: list(run.glob("evaluations/*/measure-1/jobs.json")), "job")
    cluster.call("scancel", "--user", "root")
    printed = watcher.communicate(timeout=240)[0]
    assert watcher.returncode == 1
    ((_, outcome),) = outcomes(run).items()
    assert outcome.kind == "failed"
    assert f"step 12: {outcome.reason}" in printed
    assert "cancelled" in outcome.reason
    # What has failed is not tried again by itself.
    assert "missing: " in watch(cluster, run, KNN, code=1)


@pytest.mark.slow(60)
def test_cancel_ends_the_watch_and_the_runs_and_resume_goes_on(cluster: Cluster, tmp_path: Path):
    root = tmp_path / "s"
    file = write_config(
        tmp_path,
        cluster=write_profile(tmp_path),
        seeds=[0],
        pretrain=f"{PRETRAIN} --epochs 40 --checkpoint.every_steps 5",
        evaluate=[KNN],
    )
    peerlearn("study", str(file), **cluster.environment)
    run = run_of(root, 0)
    wait_for(lambda: list(run.glob("logs/attempt-1/rank-0.step")), "first step")
    printed = peerlearn("cancel", str(root), **cluster.environment).splitlines()
    assert [line.split(":")[0] for line in printed] == [str(root), str(run)]
    wait_for_all_jobs(cluster)
    assert not RunDirectory(run).done
    peerlearn("resume", str(root), **cluster.environment)
    wait_for_all_jobs(cluster)
    assert RunDirectory(run).done
    assert kinds(run) == {KNN: "done"}
    events = [event["event"] for event in RunDirectory(run).events()]
    assert events.count("started") == 2
