"""Submissions: what sbatch is given, what a job finds, and what is refused before anything is left behind."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import slurm.submission
from peerlearn import PACKAGES
from peerlearn.cli import main
from peerlearn.config import load_config
from peerlearn.runs.directory import RunDirectory
from slurm.config import SubmitConfig
from slurm.job import listen
from slurm.submission import jobs_of, read_submission
from slurm.submit_command import CLUSTERS
from tests.e2e.runs import (
    SMALL,
    STEPS,
    assert_same_run,
    command,
    ends,
    environment,
    events,
    launch,
    newest_tensors,
    pretrain,
    rows,
    without_clocks,
)
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import FASHION, PROFILE, logs, peerlearn, step, wait_until
from tests.warm import Process
from tests.warm import run as run_process

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"


def local(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return run_process(command(*words), env=environment(), capture_output=True, text=True, cwd=cwd)


def mirrored_steps(run: Path) -> list[int]:
    """The steps that TensorBoard has of a run, as often as it has them."""
    found = EventAccumulator(str(run / "mirror" / "tensorboard"), {"scalars": 0})
    found.Reload()
    return sorted(event.step for event in found.Scalars("epoch"))


def submission_of(run: Path, name: str = "pretrain-1") -> Path:
    return run / "slurm" / name


def test_the_batch_script(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "a b"
    options = [
        *("--nodes", "2", "--tasks_per_node", "4", "--gpus_per_node", "4", "--cpus_per_task", "6"),
        *("--memory_gb", "64", "--time_minutes", "90", "--signal_seconds", "300"),
        *("--partition", "gpu", "--account", "lab", "--qos", "high", "--constraint", "a100"),
        *("--sbatch", "exclusive", "mail-type=FAIL", "--srun", "mpi=none"),
        *("--setup", "module load cuda", "--environment", "NCCL_DEBUG=INFO", "NOTE=two words"),
        *("--dependency", "afterok:7", "--name", "mine"),
    ]
    words = ["--", "pretrain", *SMALL, "--run", str(run)]
    assert main(["submit", "--cluster", "slurm", *options, "--dry_run", *words]) == 0
    printed = capsys.readouterr().out
    script = printed[printed.index("#!/bin/bash") :].splitlines()
    asked = {
        name: value
        for name, _, value in (
            line.removeprefix("#SBATCH --").partition("=")
            for line in script
            if line.startswith("#SBATCH")
        )
    }
    folder = submission_of(run, "pretrain-N")
    assert asked == {
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "6",
        "mem": "64GB",
        "time": "90",
        "signal": "USR2@300",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "constraint": "a100",
        "exclusive": "",
        "mail-type": "FAIL",
        "dependency": "afterok:7",
        "job-name": "mine",
        "open-mode": "append",
        "requeue": "",
        "output": f"'{folder}/%j_0_log.out'",
    }
    start = script[script.index(f"# {folder}/start.sh:") + 1 :]
    assert start[: start.index("# the processes")] == [
        "readonly peerlearn_ready=$1",
        "# setup",
        "module load cuda",
        "",
        "# whatever the setup has set",
        "set +eux; umask go-w; trap : USR2",
        'declare -px PATH LD_LIBRARY_PATH SLURM_CONF > "$peerlearn_ready" 2> /dev/null',
        "export NCCL_DEBUG=INFO",
        "export NOTE='two words'",
        "",
    ]
    (srun,) = (line for line in start if line.startswith("srun"))
    assert "--kill-on-bad-exit=1 --cpus-per-task=6 --distribution=block --mpi=none" in srun
    assert f"'{folder}/code' slurm.job '{folder}'" in srun
    assert subprocess.run(["bash", "-n"], input="\n".join(script), text=True).returncode == 0
    assert not run.exists()


@pytest.mark.slow(10)
def test_a_job_on_this_machine(tmp_path: Path) -> None:
    """The submission: private, whole, by path; the run: as without it; the command comes back at once."""
    run, expected = tmp_path / "a", tmp_path / "b"
    words = ["pretrain", *SMALL, *FASHION, "--run", "a"]
    options = ["--cluster", "local", "--wait", "true", "--mirror", "tensorboard"]
    found = local("submit", *options, "--", *words, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert mirrored_steps(run) == list(range(STEPS + 1))
    assert local("pretrain", *SMALL, *FASHION, "--run", str(expected)).returncode == 0
    assert_same_run(run, expected)
    folder = submission_of(run)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in (folder / "code").iterdir()) == sorted(PACKAGES)
    (record,) = jobs_of(run)
    assert found.stdout.startswith(f"job {record['job']}: pretrain ")
    assert f"job {record['job']}: done" in found.stdout
    words = read_submission(folder).command(0)
    assert words[0] == "pretrain"
    assert Path(words[1]) == folder / "configs" / "task-0.yaml"
    assert words[2:] == ["--run", "a", "--auto_resume"]
    written = json.loads((folder / "submission.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", written["git"]["commit"])
    assert events(run, "environment_changed") == []


@pytest.mark.slow(20)
def test_other_verbs_are_jobs_too(tmp_path: Path) -> None:
    run = tmp_path / "a"
    assert pretrain(run) == 0
    words = ["knn", "--checkpoint", str(run), "--k", "5"]
    found = local("submit", "--cluster", "local", "--wait", "true", "--", *words)
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(list((run / "results").glob("knn-digits-*-ensemble-*.json"))) == 1
    failing = local(
        *("submit", "--cluster", "local", "--wait", "true", "--"),
        *("linear", "logistic_regression", "--checkpoint", str(run), "--device", "cuda:9"),
    )
    assert failing.returncode == 1
    assert re.search(r"job \d+: failed \(device 'cuda:9' is not", failing.stdout), failing.stdout


def test_debug_runs_here_and_now(tmp_path: Path) -> None:
    # A mirror that cannot be is a line of the log.
    options = ["--cluster", "debug", "--mirror", "mlflow"]
    found = local("submit", *options, "--", "pretrain", *SMALL, "--run", str(tmp_path / "a"))
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("mirror to mlflow: mlflow needs --uri or MLFLOW_TRACKING_URI") == 1
    assert "kNN top-1" in found.stdout
    assert (tmp_path / "a" / "DONE").exists()
    words = ["pretrain", *SMALL, "--device", "cuda:9", "--run", str(tmp_path / "b")]
    failing = local("submit", "--cluster", "debug", "--", *words)
    assert failing.returncode == 1
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["slurm"]


def test_dry_run_may_stand_on_either_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["submit", "--cluster", "local", "--", "pretrain", *SMALL, "--run", str(tmp_path / "a")]
    assert main([*words, "--dry_run"]) == 0
    assert "# peerlearn pretrain " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["submit", "--cluster", "local", "--", "pretrain", "--help"]) == 0
    assert "--cohort.networks" in capsys.readouterr().out


@pytest.mark.slow(12)
def test_two_submissions_at_the_same_moment(tmp_path: Path) -> None:
    """One run, one job: the other is refused, whichever it is."""
    run = tmp_path / "a"
    words = ["submit", "--cluster", "local", "--", "pretrain", *SMALL, "--epochs", "60"]
    both = [
        Process(
            command(*words, "--run", str(run)),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ends = [(process.communicate(timeout=240), process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 1], ends
    ((_, refused),) = [output for output, code in ends if code == 1]
    assert re.search(r"job \d+ \(running\) works on it already|is in use by|holds a run", refused)
    (record,) = jobs_of(run)
    wait_until(lambda: step(run) >= 1, "step 1")
    os.kill(int(record["job"]), signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{record['job']}").exists(), "the end of the job")


def test_a_run_that_a_process_trains_is_not_submitted(tmp_path: Path) -> None:
    run = tmp_path / "a"
    process = Process(
        command("pretrain", *SMALL, "--epochs", "300", "--run", str(run)), env=environment()
    )
    wait_until(lambda: step(run) >= 1, "step 1")
    found = local("submit", "--cluster", "local", "--", "resume", str(run))
    process.kill()
    process.wait()
    assert found.returncode == 1
    assert f"{run} is in use by process {process.pid}" in found.stderr
    assert not (run / "slurm").exists()


@pytest.mark.slow(30)
@pytest.mark.ddp
def test_two_local_processes_told_to_stop(tmp_path: Path) -> None:
    """SIGTERM to the job: both save together, nothing holds on, and `resume` ends as one undisturbed pair would."""
    run, expected, told = tmp_path / "a", tmp_path / "b", tmp_path / "told"
    keys = ["pretrain", *SMALL, *FASHION, "--epochs", "4", "--monitor.every_epochs", "0"]
    options = ["submit", "--cluster", "local", "--tasks_per_node", "2"]
    options += ["--environment", f"PYTHONPATH={FAULTS}", "HOLD_STEP=9", f"HOLD_UNTIL={told}"]
    found = local(*options, "--", *keys, "--run", str(run))
    assert found.returncode == 0, found.stderr
    (record,) = jobs_of(run)
    wait_until(told.with_suffix(".held").exists, "step 9")
    os.kill(int(record["job"]), signal.SIGTERM)
    told.touch()
    wait_until(lambda: bool(events(run, "stopped")), "a save")
    wait_until(lambda: not Path(f"/proc/{record['job']}").exists(), "the end of the job")
    found = local(*options, "--wait", "true", "--", "resume", str(run))
    assert found.returncode == 0, found.stdout + found.stderr
    for code, output in ends(launch(2, *keys, "--run", str(expected))):
        assert code == 0, output
    assert_same_run(run, expected)


KEYS_OF_A_SHARE = [*FASHION, "--cohort.batch_norm_splits", "4", "--monitor.every_epochs", "0"]
DOUBLE = [f"PYTHONPATH={FAULTS}:{ROOT}", "DOUBLE_PRECISION=1", "OMP_NUM_THREADS=1"]


def in_double_precision(run: Path, *keys: str) -> Path:
    """One process, without a job."""
    driver = ROOT / "tests" / "e2e" / "double_precision.py"
    words = ["pretrain", *SMALL, *KEYS_OF_A_SHARE, "--run", str(run), *keys]
    found = run_process(command(*words, driver=driver), env=environment())
    assert found.returncode == 0
    return run


def assert_equal_to_rounding(together: Path, alone: Path) -> None:
    """Several processes and one, in float64: rows, queues, weights, statistics."""
    for mine, expected in zip(rows(together), rows(alone), strict=True):
        for key in without_clocks(expected):
            assert mine[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-9), key
    tensors, expected = newest_tensors(together), newest_tensors(alone)
    for group in expected.keys() - {"rng"}:
        for name, tensor in expected[group].items():
            assert tensor.dtype != torch.float32, (group, name)
            torch.testing.assert_close(tensors[group][name], tensor, rtol=1e-9, atol=1e-9)


def on_two_nodes(cluster: Cluster, run: Path, *keys: str, processes_per_node: int) -> None:
    """A job in double precision, to its end."""
    options = ["--nodes", "2", "--tasks_per_node", str(processes_per_node), "--wait", "true"]
    options += ["--environment", "GLOO_SOCKET_IFNAME=lo", *DOUBLE]
    words = ["--", "pretrain", *SMALL, *KEYS_OF_A_SHARE, "--run", str(run), *keys]
    found = peerlearn(cluster, "submit", *PROFILE, *options, *words)
    assert found.returncode == 0, logs(run)


@pytest.mark.slow(30)
def test_half_the_batch_on_each_of_two_nodes_equals_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "together"
    on_two_nodes(cluster, run, processes_per_node=1)
    assert events(run, "started")[0]["processes"] == 2
    assert_equal_to_rounding(run, in_double_precision(tmp_path / "alone"))


@pytest.mark.slow(40)
def test_a_network_on_each_of_two_nodes_equals_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Two processes a node: those of one network share a node, and the log says where they are."""
    run = tmp_path / "apart"
    on_two_nodes(cluster, run, "--parallel.cohort", "2", processes_per_node=2)
    assert "network 0: processes 0 to 1 on " in logs(run)
    assert "though" not in logs(run)
    assert events(run, "started")[0]["processes"] == 4
    assert_equal_to_rounding(run, in_double_precision(tmp_path / "alone"))


@pytest.mark.gpu
@pytest.mark.ddp
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_half_the_batch_on_each_of_two_gpus_equals_one(tmp_path: Path) -> None:
    """By NCCL, each process on the GPU of its local rank."""
    together = tmp_path / "together"
    alone = in_double_precision(tmp_path / "alone", "--device", "cuda")
    options = ["--tasks_per_node", "2", "--gpus_per_node", "2", "--wait", "true"]
    words = ["--", "pretrain", *SMALL, *KEYS_OF_A_SHARE, "--run", str(together)]
    found = local(
        *("submit", "--cluster", "local", *options, "--environment", *DOUBLE),
        *(*words, "--device", "cuda"),
    )
    assert found.returncode == 0, logs(together)
    assert_equal_to_rounding(together, alone)


def test_a_taken_port_is_passed_over() -> None:
    with listen("41", 0) as first, listen("41", 0) as second, listen("41", 1) as later:
        ports = [each.getsockname()[1] for each in (first, second, later)]
    assert ports[1] == ports[0] + 1
    assert ports[2] not in ports[:2]


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        (
            ["--cluster", "slum"],
            ["pretrain"],
            "'slum' is neither a file nor a shipped config; did you mean 'slurm'?",
        ),
        (
            [],
            ["pretrain"],
            "--cluster is missing: local, debug, slurm, or the YAML file",
        ),
        (
            ["--cluster", "local"],
            ["pretrian"],
            "after -- comes a verb to run as a job, got 'pretrian'; did you mean 'pretrain'?",
        ),
        (
            ["--cluster", "local"],
            ["pretrain", "--sed", "1"],
            "unknown key --sed; did you mean 'seed'",
        ),
        (
            ["--cluster", "local", "--partitoin", "x"],
            ["pretrain"],
            "unknown key --partitoin; did you mean 'partition'?",
        ),
        (
            ["--cluster", "local", "--nodes", "2"],
            ["pretrain"],
            "nodes must be 1 with executor local",
        ),
        (
            ["--cluster", "slurm", "--time_minutes", "1"],
            ["pretrain"],
            "signal_seconds 120 must be less than time_minutes 1",
        ),
        (
            ["--cluster", "slurm", "--environment", "A B"],
            ["pretrain"],
            "environment: expected NAME=value, entry 1 is not",
        ),
        (
            ["--cluster", "slurm", "--name", "a;b"],
            ["pretrain"],
            "name may hold letters, digits",
        ),
        (
            ["--cluster", "slurm", "--sweep", "seed=1,2"],
            ["pretrain"],
            "unknown key --sweep; `peerlearn study --pretrain WORDS --grid KEY=V1,V2 --folder FOLDER` runs grids",
        ),
        (["--cluster", "slurm"], ["pretrain", "--run"], "--run: its value is missing"),
        (["--cluster", "local"], ["study", "x"], "study is done here and now, not as a job"),
        (
            ["--cluster", "slurm", "--sbatch", "array=0-3"],
            ["pretrain"],
            "sbatch: array is set by the submission itself",
        ),
        (
            ["--cluster", "slurm", "--time_minutes", "86400"],
            ["pretrain"],
            "time_minutes 86400 is 60 days: give minutes",
        ),
        (
            ["--cluster", "debug", "--tasks_per_node", "2"],
            ["pretrain"],
            "tasks_per_node must be 1 with executor debug",
        ),
        (["--cluster", "local"], ["status", "runs/a"], "status is done here and now, not as a job"),
    ],
)
def test_usage_errors(
    options: list[str],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *options, "--", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_sbatch_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = tmp_path / "a"
    assert main(["submit", "--cluster", "slurm", "--", "pretrain", *SMALL, "--run", str(run)]) == 1
    assert capsys.readouterr().err == (
        "peerlearn: `sbatch` is not on this machine: submit from a login node of the cluster, or use --cluster local\n"
    )
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--partition", "gpus"),
            "sbatch: invalid partition specified: gpus; "
            "Batch job submission failed: Invalid partition name specified",
        ),
        (
            ("--gpus_per_node", "2"),
            "sbatch: Invalid generic resource (gres) specification",
        ),
        (("--sbatch", "begin=never"), "sbatch: Invalid time specification"),
    ],
)
def test_what_sbatch_refuses_is_told_in_its_words_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    run = tmp_path / "a"
    found = peerlearn(
        cluster, "submit", *PROFILE, *options, "--", "pretrain", *SMALL, "--run", str(run)
    )
    assert found.returncode == 1
    assert words in found.stderr
    assert found.stderr.count("\n") == 1, found.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_cluster_behind_the_programs(cluster: Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "slurm.conf"
    wrong.write_text("Nonsense=1\n")
    words = [sys.executable, "-m", "peerlearn", "submit", *PROFILE, "--", "pretrain", *SMALL]
    found = subprocess.run(
        [*words, "--run", str(tmp_path / "a")],
        env={**cluster.environment, "SLURM_CONF": str(wrong)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert found.stderr.startswith("peerlearn: sbatch: ")
    assert "Parsing error at unrecognized key: Nonsense" in found.stderr
    assert found.stderr.count("\n") == 1, found.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "a"
    assert main(["submit", "--cluster", "local", "--", "pretrain", *SMALL, "--run", str(run)]) == 1
    error = capsys.readouterr().err
    assert error == (
        f"peerlearn: {run}/slurm: cannot be written (Not a directory): choose another folder for the run by --run\n"
    )


def test_what_is_to_be_evaluated_must_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--cluster", "local", "--", "knn", "--checkpoint", "runs/a"]) == 1
    assert "--checkpoint runs/a is not there" in capsys.readouterr().err
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "study.yaml").write_text("")
    assert main(["submit", "--cluster", "local", "--", "resume", "p"]) == 2
    assert "`peerlearn resume p`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cohort.backbones", "nonsense"], "no network is called 'nonsense'"),
        (
            ["--data.name", "folder", "--data.root", "/nowhere"],
            "data.root /nowhere is not a folder",
        ),
        (["--data.limit", "8"], "fewer than one batch"),
        (["--batch_size", "12"], "batch_size 12 must divide into 8 processes"),
    ],
)
def test_networks_images_and_sizes_are_checked_before_anything_is_submitted(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "a"
    submit = ["submit", "--cluster", "gpu_node"]
    for start in ([*submit, "--dry_run"], submit):
        assert main([*start, "--", "pretrain", *SMALL, *words, "--run", str(run)]) == 1
        printed, error = capsys.readouterr()
        assert message in error
        assert error.count("\n") == 1
    assert not run.exists()
    assert main([*submit, "--dry_run", "--", "pretrain", *SMALL, "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    for line in ("# images: ", "# steps: ", "# parameters: ", "# memory: about "):
        assert f"\n{line}" in printed


def test_code_that_cannot_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(slurm.submission, "HOME", tmp_path / "gone")
    run = tmp_path / "runs" / "a"
    assert main(["submit", "--cluster", "local", "--", "pretrain", *SMALL, "--run", str(run)]) == 1
    error = capsys.readouterr().err
    assert (
        f"the submission cannot be written there (No such file or directory: {tmp_path}/gone/peerlearn)"
        in error
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_there_is_not_submitted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "a"
    assert pretrain(run) == 0
    capsys.readouterr()
    assert main(["submit", "--cluster", "local", "--", "pretrain", *SMALL, "--run", str(run)]) == 1
    assert (
        f"{run} holds a run already: `peerlearn resume {run}` continues it"
        in capsys.readouterr().err
    )
    assert not (run / "slurm").exists()


@pytest.mark.slow(10)
def test_auto_resume_starts_goes_on_and_is_content(tmp_path: Path) -> None:
    run, expected = tmp_path / "a", tmp_path / "b"
    words = ["pretrain", *SMALL, "--run", str(run), "--auto_resume"]
    slowly = environment(STEP_SECONDS="0.1")
    process = Process(command(*words, "--epochs", "5"), env=slowly)
    wait_until(lambda: step(run) >= 8, "step 8")
    process.kill()
    process.wait()
    for _ in range(2):
        done = run_process(command(*words, "--epochs", "5"), env=environment())
        assert done.returncode == 0
    assert RunDirectory(run).newest_attempt() == 2
    found = run_process(
        command("pretrain", *SMALL, "--epochs", "5", "--run", str(expected)), env=environment()
    )
    assert found.returncode == 0
    assert_same_run(run, expected)
    changed = run_process(
        command(*words, "--epochs", "5", "--seed", "9"), env=environment(), capture_output=True, text=True
    )  # fmt: skip
    assert changed.returncode == 1
    assert "seed" in changed.stderr


def test_every_shipped_profile_can_be_read_and_is_listed(capsys: pytest.CaptureFixture) -> None:
    profiles = {path.stem: load_config(SubmitConfig, path) for path in CLUSTERS.glob("*.yaml")}
    assert set(profiles) == {"slurm", "gpu_node", "local", "debug"}
    assert main(["configs"]) == 0
    _, listed = capsys.readouterr().out.split("cluster profiles (for --cluster):\n")
    rows = [line for line in listed.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in rows] == sorted(profiles)
    assert profiles["gpu_node"].tasks_per_node == profiles["gpu_node"].gpus_per_node == 8


@pytest.mark.slow(10)
def test_a_command_that_waits_for_nothing_lets_go_of_its_pipe(tmp_path: Path) -> None:
    """`peerlearn submit ... | tee` ends when the submission has, not when the job does."""
    run = tmp_path / "a"
    begun = time.monotonic()
    words = ["pretrain", *SMALL, "--epochs", "300", "--run", str(run)]
    found = local("submit", "--cluster", "local", "--", *words)
    assert found.returncode == 0
    assert not (run / "DONE").exists()
    assert time.monotonic() - begun < 60
    (record,) = jobs_of(run)
    wait_until(lambda: step(run) >= 1, "step 1")
    os.kill(int(record["job"]), signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{record['job']}").exists(), "the end of the job")
