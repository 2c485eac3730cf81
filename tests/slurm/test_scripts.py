"""The scripts of a job, and who submits and cancels it, with other programs in the place of Slurm's."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import slurm.executors
from peerlearn.cli import main
from slurm.config import SubmitConfig
from slurm.executors import adopt, batch_script, start_script
from slurm.jobs import JobWatch
from slurm.outcome import (
    Outcome,
    add_to_history,
    is_decided,
    read_history,
    read_outcomes,
    write_outcome,
)
from slurm.status import read_statuses
from slurm.submission import (
    NUMBERS_FILE,
    START_SCRIPT,
    Submission,
    Task,
    create_submission,
    job_numbers,
    jobs_of,
    record_jobs,
)

FACTS = {"job": "7", "restart": 0, "reason": "why", "attempt": 1, "nodes": "n1"}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts scripts in the place of Slurm's programs: ``programs(squeue="exit 1")``."""

    def make(**scripts: str) -> None:
        folder = tmp_path / "programs"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/programs:{os.environ['PATH']}")
    make(squeue="", sacct="", scancel="exit 1", sbatch="echo 7")
    return make


def submission_with(tmp_path: Path, *setup: str) -> tuple[Submission, Path]:
    """A submission of a command without a run, and its batch script."""
    config = SubmitConfig(executor="slurm", setup=list(setup), max_crashes=0)
    submission = create_submission(tmp_path / "slurm", [Task(words=["configs"])], config)
    script = submission.folder / "batch-1.sh"
    (submission.folder / START_SCRIPT).write_text(start_script(submission))
    script.write_text(batch_script(submission, script, "a"))
    return submission, script


def run_batch(script: Path, **variables: str) -> subprocess.CompletedProcess:
    own = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", **variables}
    # Slurm runs a copy.
    return subprocess.run(
        ["bash", "-s"],
        input=script.read_text(),
        env=os.environ | own,
        cwd=script.parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("variable", ["BASH_ENV", "SHELLOPTS"])
def test_a_shell_that_ends_at_the_first_error_decides_all_the_same(
    tmp_path: Path, programs: Callable[..., None], variable: str
) -> None:
    (tmp_path / "strict.sh").write_text("set -eu\n")
    value = {"BASH_ENV": str(tmp_path / "strict.sh"), "SHELLOPTS": "errexit:nounset"}[variable]
    programs(srun="exit 78")
    submission, script = submission_with(tmp_path)
    # As Slurm runs it: by its first line.
    script.chmod(0o700)
    own = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", variable: value}
    found = subprocess.run(
        [script], env=os.environ | own, cwd=tmp_path, capture_output=True, text=True
    )
    assert [line["decision"] for line in read_history(submission.folder, 0)] == ["failed"], found
    assert found.returncode == 78


@pytest.mark.parametrize("setup", ["set -- other words", "shift", "unset peerlearn_ready"])
def test_a_setup_that_changes_the_words_of_the_shell(
    tmp_path: Path, programs: Callable[..., None], setup: str
) -> None:
    programs(srun="exit 0")
    submission, script = submission_with(tmp_path, setup)
    found = run_batch(script)
    assert [line["decision"] for line in read_history(submission.folder, 0)] == ["done"], found
    assert "setup ended" not in found.stdout
    assert not (tmp_path / "other").exists()


def test_what_was_given_up_does_not_run_in_the_folder_of_the_next(
    tmp_path: Path, programs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch gave no answer, no job appeared, and Slurm starts it all the same once the user has submitted again."""
    monkeypatch.setattr(slurm.executors, "_APPEARS_SECONDS", 0.1)
    kept = tmp_path / "kept.sh"
    programs(srun=f"touch {tmp_path}/ran", sbatch=f'cp "$2" {kept}; echo timed out >&2; exit 1')
    run = tmp_path / "a"
    words = ["submit", "--cluster", "slurm", "--", "pretrain", "mcl_fashion_mnist_demo"]
    assert main([*words, "--run", str(run)]) == 1
    programs(sbatch="echo 8")
    assert main([*words, "--run", str(run)]) == 0
    assert f"{run}/slurm/pretrain-1/" in kept.read_text()
    own = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    found = subprocess.run(
        ["bash", kept], env=os.environ | own, cwd=tmp_path, capture_output=True, text=True
    )
    assert (found.returncode, "this submission was given up" in found.stderr) == (1, True), found
    assert not (tmp_path / "ran").exists()
    assert read_history(run / "slurm" / "pretrain-1", 0) == []


def test_an_sbatch_that_is_killed_leaves_no_ghost(
    tmp_path: Path, programs: Callable[..., None]
) -> None:
    """It may have handed over the job before."""
    programs(
        sbatch=f'echo "$2" > {tmp_path}/script; kill -9 $$',
        squeue=f'case "$*" in *%o*) echo "9|$(cat {tmp_path}/script)";; esac',
    )
    run = tmp_path / "a"
    words = ["submit", "--cluster", "slurm", "--", "pretrain", "mcl_fashion_mnist_demo"]
    assert main([*words, "--run", str(run)]) == 0
    assert [record["job"] for record in jobs_of(run)] == ["9"]


def test_a_fresh_job_that_slurm_does_not_list_yet(
    tmp_path: Path, programs: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is submitted for the run, and it can be cancelled."""
    run = tmp_path / "a"
    words = ["submit", "--cluster", "slurm", "--", "pretrain", "mcl_fashion_mnist_demo"]
    assert main([*words, "--run", str(run)]) == 0
    assert main([*words, "--run", str(run)]) == 1
    why = "job 7 was submitted just now, and Slurm does not list it yet: try again in a minute"
    assert capsys.readouterr().err.endswith(f"{run}: {why}\n")
    programs(scancel=f'echo "$*" >> {tmp_path}/cancelled')
    assert main(["cancel", str(run)]) == 0
    assert f"{run}: job 7 (pretrain, submitted) is told to end" in capsys.readouterr().out
    assert (tmp_path / "cancelled").read_text() == "7\n"
    programs(scancel="echo 'scancel: error: Invalid job id specified' >&2; exit 1")
    assert main(["cancel", str(run)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    # After a minute it is gone.
    numbers = run / "slurm" / "pretrain-1" / NUMBERS_FILE
    os.utime(numbers, (numbers.stat().st_mtime - 61,) * 2)
    assert main([*words, "--run", str(run)]) == 0


def test_jobs_of_which_only_some_were_recorded_are_recorded_once(
    tmp_path: Path, programs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The submitter was killed, or the disk was full, between the records of an array."""
    runs = [tmp_path / name for name in "ab"]
    tasks = [Task(words=["pretrain"], run=str(run)) for run in runs]
    config = SubmitConfig(executor="slurm")
    submission = create_submission(tmp_path / "slurm", tasks, config)
    script = submission.folder / "batch-1.sh"
    script.write_text("")
    (runs[1]).write_text("no folder can be made here")
    with pytest.raises(NotADirectoryError):
        record_jobs(submission, ["7_0", "7_1"])
    runs[1].unlink()
    programs(squeue=f'echo "7|{script}"')
    adopt(tmp_path / "slurm")
    assert [[record["job"] for record in jobs_of(run)] for run in runs] == [["7_0"], ["7_1"]]
    assert job_numbers(submission.folder) == ["7_0", "7_1"]


def test_a_submission_that_was_removed_in_part_keeps_no_other_from_coming(
    tmp_path: Path, programs: Callable[..., None]
) -> None:
    folder = tmp_path / "a" / "slurm" / "pretrain-1"
    folder.mkdir(parents=True, mode=0o700)
    for parent in (tmp_path / "a", tmp_path / "a" / "slurm"):
        parent.chmod(0o755)
    (folder / "batch-1.sh").write_text("")
    words = ["submit", "--cluster", "slurm", "--", "pretrain", "mcl_fashion_mnist_demo"]
    assert main([*words, "--run", str(tmp_path / "a")]) == 0


@pytest.mark.parametrize("line", ["{}", '{"decision": 3}', "[1]", '{"kind": "crashed"}'])
def test_damaged_files_of_a_start(tmp_path: Path, programs: Callable[..., None], line: str) -> None:
    """They count as not written: the job decides, and `status` tells of all runs."""
    programs(srun="exit 75")
    submission, script = submission_with(tmp_path)
    (submission.folder / NUMBERS_FILE).write_text('["7"]')
    failed = Outcome(kind="failed", code=1, reason="no such key")
    add_to_history(submission.folder, 0, failed, decision="requeue", **FACTS)
    with (submission.folder / "outcomes-0.jsonl").open("a") as file:
        file.write(line + "\n")
    write_outcome(submission.folder, task=0, restart=0, rank=0, outcome=failed)
    (submission.outcomes / "0-0-1.json").write_text(line)
    (submission.outcomes / "0-0-x.json").write_text(line)
    assert len(read_history(submission.folder, 0)) == 1
    assert not is_decided(submission.folder, "7")
    assert read_outcomes(submission.folder, task=0, restart=0) == {0: failed}
    run = tmp_path / "a"
    (run / "slurm").mkdir(parents=True)
    record = {"job": "7", "verb": "pretrain", "executor": "slurm", "folder": str(submission.folder)}
    (run / "slurm" / "jobs.jsonl").write_text(json.dumps(record) + "\n")
    assert read_statuses([run], JobWatch())[0].state == "submitted"
    assert run_batch(script).returncode == 75
    (_, last) = read_history(submission.folder, 0)
    assert (last["decision"], last["reason"]) == ("failed", "no such key")
