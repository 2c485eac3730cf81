"""Whole pipelines: seeds x pretraining, evaluations, a summary, whatever is killed on the way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from peerlearn.cli import main
from peerlearn.commands.configs_command import read_header
from peerlearn.commands.verbs import VERBS, Verb
from peerlearn.runs.directory import RunDirectory
from studies.ledger import EVALUATIONS, PIPELINE, Entry, Ledger
from studies.pipeline import load_pipeline, name_of
from studies.pipeline_command import SHIPPED
from studies.watch import resolve_evaluation
from tests.detection_trees import write_jpeg
from tests.e2e.runs import SMALL, command, environment
from tests.slurm.cluster import Cluster
from tests.warm import run as run_process

DRIVER = Path(__file__).parent / "killed_while_submitting.py"
ROOT = Path(__file__).parents[2]
PRETRAIN = "mine = " + " ".join([*SMALL, "--epochs", "1", "--checkpoint.export_every_epochs", "1"])
KNN = "knn --k 5 --data.limit 200"
LINEAR = "linear logistic_regression --data.limit 200"
# Refused by the job itself, before it loads anything large.
REFUSED = "knn --network 7"
STEP = 6


def write_config(folder: Path, **keys: object) -> Path:
    """FILE.yaml of a small pipeline in ``folder``/p."""
    content = {
        "folder": str(folder / "p"),
        "seeds": [0, 1],
        "pretrain": [PRETRAIN],
        "evaluate": [KNN, LINEAR, REFUSED],
        "interval_seconds": 0.2,
        **keys,
    }
    folder.mkdir(exist_ok=True)
    file = folder / "file.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def write_profile(folder: Path) -> str:
    """The file of a profile for the real cluster."""
    file = folder / "profile.yaml"
    file.write_text(
        "executor: slurm\npartition: main\ntime_minutes: 10\n"
        "environment: [GLOO_SOCKET_IFNAME=lo, OMP_NUM_THREADS=1]\n"
    )
    return str(file)


def summed_up(root: Path, cluster: Cluster) -> Entry:
    """The summary's job, once it has come to a good end."""

    def summary() -> Entry | None:
        return next((e for key, e in jobs(root).items() if key.startswith("summary ")), None)

    wait_for(lambda: summary() and summary().job, "summary job")
    assert cluster.wait_for_state(summary().job["job"], "COMPLETED", "FAILED") == "COMPLETED"
    return summary()


def peerlearn(*words: str, driver: tuple[str, ...] = (), **variables: str) -> str:
    """What the command prints, which is to end well, or to be killed by its driver."""
    start = [str(DRIVER), *driver] if driver else ["-m", "peerlearn"]
    found = run_process(
        [sys.executable, *start, *words],
        env=environment(**{"PYTHONPATH": str(ROOT), **variables}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert found.returncode == (-signal.SIGKILL if driver else 0), found.stderr
    return found.stdout


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


def run_of(root: Path, seed: int) -> Path:
    return root / "runs" / f"{name_of(PRETRAIN)}-seed-{seed}"


def evaluations(root: Path, seed: int) -> dict[str, Entry]:
    """By their lines."""
    found = Ledger(run_of(root, seed) / EVALUATIONS).entries().values()
    return {entry.facts["evaluation"]: entry for entry in found}


def jobs(root: Path) -> dict[str, Entry]:
    """Of the pipeline itself: pretraining, watches, summaries."""
    return Ledger(root / PIPELINE).entries()


def starts(root: Path, seed: int) -> dict[str, int]:
    """How often each verb was run by a job on a run."""
    files = run_of(root, seed).glob("slurm/*/outcomes/[0-9]*.json")
    verbs = [file.parents[1].name.rsplit("-", 1)[0] for file in files]
    return {verb: verbs.count(verb) for verb in sorted(set(verbs))}


def processes_with(*words: str) -> list[int]:
    """Those that have all of these among their words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if set(map(os.fsencode, words)) <= set(line):
            found.append(int(process.name))
    return found


def summary_of(root: Path) -> dict:
    return json.loads((root / "summary.json").read_text())


@pytest.fixture(scope="session")
def killed_twice(once: Callable[..., Path]) -> Path:
    """A pipeline that came to its end though it was killed while it began, and its watch later."""
    return once("pipeline", kill_twice) / "p"


def kill_twice(folder: Path) -> None:
    file, root = write_config(folder, throttle=1), folder / "p"
    peerlearn("pipeline", str(file), driver=("started", str(root)))
    printed = peerlearn("resume", str(root))
    assert "found again" in printed
    assert printed.count("job ") == 2, "the first pretraining, and the watch"
    wait_for(lambda: REFUSED in evaluations(root, 0), "evaluation")
    watch = processes_with("submitit.local._local", str(root / "slurm" / "watch-1"))
    for pid in [*watch, *processes_with("peerlearn", "watch", str(root))]:
        os.kill(pid, signal.SIGKILL)
    printed = peerlearn("resume", str(root))
    assert f": watch {root}" in printed
    assert jobs(root)["watch"].attempt == 2
    wait_for((root / "summary.json").is_file, "summary")
    # A watch that lives on does nothing more.
    wait_for(lambda: not processes_with("peerlearn", "watch", str(root)), "end of the watch")


def test_every_run_and_evaluation_was_made_once(killed_twice: Path):
    for seed in (0, 1):
        assert (run_of(killed_twice, seed) / "DONE").exists()
        entries = evaluations(killed_twice, seed)
        assert {line: entry.kind for line, entry in entries.items()} == {
            KNN: "done",
            LINEAR: "done",
            # Of the first seed it had failed before a resume, which asks for it again.
            REFUSED: "failed",
        }
        assert entries[KNN].attempt == entries[LINEAR].attempt == 1
        refused = entries[REFUSED].attempt
        expected = {"knn": 1 + refused, "linear": 1, "pretrain": 1}
        assert starts(killed_twice, seed) == expected
        config = yaml.safe_load((run_of(killed_twice, seed) / "config.yaml").read_text())
        assert (config["seed"], config["epochs"]) == (seed, 1)
    assert evaluations(killed_twice, 1)[REFUSED].attempt == 1


def test_throttled_pretraining_waits_for_its_turn(killed_twice: Path):
    first = json.loads(next(run_of(killed_twice, 0).glob("slurm/pretrain-1/jobs.json")).read_text())
    assert len(first) == 1
    ended = next(run_of(killed_twice, 0).glob("slurm/pretrain-1/outcomes/*.json")).stat().st_mtime
    second = jobs(killed_twice)[f"pretrain {run_of(killed_twice, 1).name}"]
    assert second.begun_seconds > ended


def test_the_summary_is_that_of_the_result_files(killed_twice: Path):
    scores = summary_of(killed_twice)["scores"]
    networks = {(score["evaluation"], score["network"]) for score in scores}
    assert {(KNN, "0"), (KNN, "1"), (KNN, "ensemble"), (LINEAR, "0")} <= networks
    for score in scores:
        values = [result_value(run_of(killed_twice, seed), score) for seed in (0, 1)]
        assert score["values"] == {"0": values[0], "1": values[1]}
        assert score["mean"] == pytest.approx(np.mean(values))
        assert score["std"] == pytest.approx(np.std(values, ddof=1))
        if score["std"]:
            low, high = stats.t.interval(
                0.95, df=1, loc=np.mean(values), scale=np.std(values, ddof=1) / np.sqrt(2)
            )
            assert score["mean"] - score["ci95"] == pytest.approx(low)
            assert score["mean"] + score["ci95"] == pytest.approx(high)
    rows = list(csv.DictReader((killed_twice / "summary.csv").open()))
    assert [(float(row["mean"]), row["network"], row["metric"], row["seeds"]) for row in rows] == [
        (score["mean"], score["network"], score["metric"], "2") for score in scores
    ]
    assert json.loads(rows[0]["protocol"])["k"] == 5
    assert (killed_twice / "summary.png").read_bytes().startswith(b"\x89PNG")


def result_value(run: Path, score: dict) -> float:
    """As the run's own result file has it."""
    results = [json.loads(file.read_text()) for file in run.glob("results/*.json")]
    keys = ("task", "network", "step")
    (found,) = (r for r in results if all(r[key] == score[key] for key in keys))
    return found["metrics"][score["metric"]]


def test_the_summary_names_what_failed(
    killed_twice: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    problems = summary_of(killed_twice)["problems"]
    assert [(p["run"], p["what"]) for p in problems] == [
        (run_of(killed_twice, seed).name, f"{REFUSED}, step {STEP}") for seed in (0, 1)
    ]
    assert all("--network 7: not in" in problem["why"] for problem in problems)
    root = Path(shutil.copytree(killed_twice, tmp_path / "p", symlinks=True))
    assert main(["summary", str(root)]) == 0
    printed = capsys.readouterr().out
    assert f"missing: {problems[0]['run']}: {REFUSED}, step {STEP}: job" in printed
    assert "2 of 2" in printed


def test_resume_submits_what_is_missing_and_nothing_else(killed_twice: Path, tmp_path: Path):
    root = tmp_path / "p"
    shutil.copytree(killed_twice, root, symlinks=True)
    # The folder has moved: it is its own folder still.
    run = run_of(root, 0)
    evaluations(root, 0)[KNN].results[0].unlink()
    forget(run_of(root, 1) / EVALUATIONS, evaluations(root, 1)[LINEAR].key)
    (run_of(root, 1) / "DONE").unlink()
    assert run.name in {problem["run"] for problem in summarised(root)["problems"]}
    printed = peerlearn("resume", str(root), "--watch", "here", "--throttle", "2")
    submitted = [line.split(": ", 1)[1] for line in printed.splitlines() if line[:4] == "job "]
    exports = [run_of(root, seed) / "export" / f"step-{STEP:08d}" for seed in (0, 1)]
    assert sorted(submitted) == sorted(
        [
            str(run_of(root, 1)),
            f"{KNN} on {exports[0]}",
            f"{LINEAR} on {exports[1]}",
            *(f"{REFUSED} on {export}" for export in exports),
        ]
    )
    assert (run_of(root, 1) / "DONE").exists()
    assert {problem["what"] for problem in summary_of(root)["problems"]} == {
        f"{REFUSED}, step {STEP}"
    }
    before = summary_of(killed_twice)["scores"]
    assert [s["values"] for s in summary_of(root)["scores"]] == [s["values"] for s in before]


def forget(file: Path, key: str) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if key not in line))


def summarised(root: Path) -> dict:
    assert main(["summary", str(root)]) == 0
    return summary_of(root)


def test_a_dead_pretraining_is_told_and_its_exports_count(killed_twice: Path, tmp_path: Path):
    root = tmp_path / "p"
    shutil.copytree(killed_twice, root, symlinks=True)
    run = run_of(root, 1)
    (run / "DONE").unlink()
    (run / "FAILED").write_text("the disk is full\n")
    shutil.rmtree(run_of(root, 0))
    found = summarised(root)
    assert {(p["run"], p["why"]) for p in found["problems"] if p["what"] == "pretraining"} == {
        (run.name, "the disk is full"),
        (run_of(root, 0).name, "it has not begun"),
    }
    assert {tuple(score["values"]) for score in found["scores"]} == {("1",)}
    assert {(score["std"], score["ci95"]) for score in found["scores"]} == {(None, None)}


def test_more_seeds_and_evaluations_can_be_asked_for(killed_twice: Path, tmp_path: Path):
    root = tmp_path / "p"
    shutil.copytree(killed_twice, root, symlinks=True)
    words = ["resume", str(root), "--seeds", "0", "1", "2", "--evaluate", KNN, "knn --k 7"]
    printed = peerlearn(*words, "--dry_run")
    assert printed.count("# peerlearn pretrain") == 3
    assert load_pipeline(root).config.seeds == [0, 1]
    assert main([*words, "--folder", "elsewhere"]) == 2
    assert main(["resume", str(root), "--evaluate", "knn --kk 7"]) == 2
    # Another line under a name that has runs already would mix two kinds of them.
    assert main(["resume", str(root), "--pretrain", "mine = --epochs 9"]) == 2


@pytest.mark.slow(30)
def test_cancel_ends_the_watch_and_the_runs(tmp_path: Path):
    """The watch first: nothing new is submitted for what it would find dead; and `resume` brings all of it back."""
    file, root = (
        write_config(tmp_path, seeds=[0], pretrain=[f"{PRETRAIN} --epochs 400"]),
        tmp_path / "p",
    )
    peerlearn("pipeline", str(file))
    run = run_of(root, 0)
    wait_for(lambda: list(run.glob("logs/attempt-1/rank-0.step")), "first step")
    printed = peerlearn("cancel", str(root)).splitlines()
    assert [line.split(":")[0] for line in printed] == [str(root), str(run)]
    assert "(watch, running) is told to end" in printed[0]
    wait_for(lambda: not processes_with("peerlearn", "watch", str(root)), "end of the watch")
    wait_for(
        lambda: not processes_with("submitit.local._local", str(run / "slurm" / "pretrain-1")),
        "end of the run",
    )
    assert [entry["event"] for entry in RunDirectory(run).events()][-1] == "stopped"
    assert not (root / "summary.json").exists()
    assert "nothing to cancel" in peerlearn("cancel", str(root))


def test_a_variant_may_have_a_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = write_config(
        tmp_path, pretrain=["mine = --epochs 1", "other = --epochs 2 --beta 0", "--epochs 3"]
    )
    assert main(["pipeline", str(file), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    runs = [line.split("--run ")[1] for line in printed.splitlines() if "# peerlearn pret" in line]
    names = [f"{name}-seed-{seed}" for seed in (0, 1) for name in ("mine", "other", "epochs-3")]
    assert runs == [str(tmp_path / "p" / "runs" / name) for name in names]


def test_the_summary_is_made_where_no_slurm_answers(
    killed_twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "p"
    shutil.copytree(killed_twice, root, symlinks=True)
    file = run_of(root, 0) / "slurm" / "jobs.jsonl"
    file.write_text(file.read_text().replace('"local"', '"slurm"'))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert summarised(root) == summary_of(killed_twice)


def test_an_export_that_is_gone_leaves_its_results(killed_twice: Path, tmp_path: Path):
    root = tmp_path / "p"
    shutil.copytree(killed_twice, root, symlinks=True)
    for seed in (0, 1):
        shutil.rmtree(run_of(root, seed) / "export")
    assert summarised(root) == summary_of(killed_twice)
    # What cannot be evaluated any more is not asked for.
    printed = peerlearn("resume", str(root), "--watch", "here")
    assert "job " not in printed.split("missing: ")[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"evaluate": ["knn --kk 5"]}, "evaluate: 'knn --kk 5': unknown key --kk; did you mean"),
        ({"evaluate": ["knm"]}, "unknown verb 'knm'; did you mean 'knn'"),
        ({"evaluate": ["knn --checkpoint runs/a"]}, "--checkpoint is set by the pipeline"),
        ({"evaluate": []}, "evaluate must hold at least one entry"),
        ({"evaluate": ["knn --k '5"]}, "cannot be split into words"),
        ({"pretrain": ["mcl_fashion_mnist_dem"]}, "did you mean 'mcl_fashion_mnist_demo'"),
        ({"pretrain": ["mcl_fashion_mnist_demo --seed 3"]}, "--seed is set by the pipeline"),
        ({"pretrain": ["--epochs 1", "--epochs=1"]}, "two of its lines have the same name"),
        ({"pretrain": ["--epochs 1", "--epochs 1"]}, "holds an entry twice"),
        ({"cluster": "nonsense"}, "cluster: 'nonsense' is neither a file nor a shipped config"),
        ({"seeds": [1, 1]}, "seeds holds an entry twice"),
        ({"throttle": 0}, "throttle must be at least 1"),
        ({"evalute": [KNN]}, "unknown key 'evalute'; did you mean 'evaluate'"),
    ],
)
def test_a_wrong_pipeline_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, keys: dict, message: str
):
    file = write_config(tmp_path, **keys)
    assert main(["pipeline", str(file), "--dry_run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_refused_by_the_cluster_it_leaves_nothing(tmp_path: Path):
    file = write_config(tmp_path, cluster="slurm")
    found = run_process(
        command("pipeline", str(file)),
        env={**environment(), "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert "`sbatch` is not on this machine" in found.stderr
    assert not (tmp_path / "p").exists()


def test_a_pipeline_is_made_once(killed_twice: Path, capsys: pytest.CaptureFixture):
    assert main(["pipeline", str(killed_twice.parent / "file.yaml")]) == 1
    assert f"`peerlearn resume {killed_twice}` continues it" in capsys.readouterr().err


def test_resume_of_anything_else_is_that_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["resume", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["summary", str(tmp_path)]) == 1
    assert "is no pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_pipelines_are_whole(
    file: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    # A small ImageNet, of no fewer images than a batch.
    write_jpeg(Path("image.JPEG"), 0)
    for split, number in (("train", 128), ("val", 1)):
        for wnid in ("n01", "n02"):
            folder = Path("data/imagenet") / split / wnid
            folder.mkdir(parents=True)
            for each in range(number):
                (folder / f"{each}.JPEG").hardlink_to("image.JPEG")
    assert main(["pipeline", file.stem, "--folder", str(tmp_path / "p"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    content = yaml.safe_load(file.read_text())
    runs = len(content["seeds"]) * len(content["pretrain"])
    assert printed.count("# peerlearn pretrain") == runs >= 3
    assert set(read_header(file)) == {"source", "command", "hardware", "hours", "expected metric"}


def test_a_new_evaluator_needs_nothing_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(VERBS, "fewshot", Verb("linear_eval.command", "main", "", True))
    found = resolve_evaluation("fewshot logistic_regression --seed 3")
    assert (found.config["method"], found.config["seed"]) == ("logistic_regression", 3)


@pytest.mark.slow(90)
def test_on_slurm_with_the_watch_as_a_job_that_is_requeued(cluster: Cluster, tmp_path: Path):
    root = tmp_path / "p"
    file = write_config(tmp_path, cluster=write_profile(tmp_path), evaluate=[KNN, REFUSED])
    printed = peerlearn("pipeline", str(file), **cluster.environment)
    assert printed.count("job ") == 3
    wait_for(lambda: any(evaluations(root, seed) for seed in (0, 1)), "evaluation")
    watch = jobs(root)["watch"].job["job"]
    cluster.call("scontrol", "requeue", watch)
    summary = summed_up(root, cluster)
    assert cluster.wait_for_state(watch, "COMPLETED", "FAILED") == "COMPLETED"
    assert cluster.restarts(watch) == 1
    for seed in (0, 1):
        entries = evaluations(root, seed)
        assert {line: entry.kind for line, entry in entries.items()} == {
            KNN: "done",
            REFUSED: "failed",
        }
        assert starts(root, seed) == {"knn": 2, "pretrain": 1}
        # A failed evaluation is no failure of the run.
        assert not (run_of(root, seed) / "FAILED").exists()
        for entry in entries.values():
            listed = ("sacct", "--noheader", "--allocations", "--format=JobID")
            named = cluster.call(*listed, f"--name={entry.name}").split()
            assert named == [entry.job["job"]]
    found = summary_of(root)
    assert {tuple(score["values"]) for score in found["scores"]} == {("0", "1")}
    assert {problem["what"] for problem in found["problems"]} == {f"{REFUSED}, step {STEP}"}
    submission = json.loads((summary.folder / "submission.json").read_text())
    after = submission["config"]["dependency"]
    ended_before = {e.job["job"] for s in (0, 1) for e in evaluations(root, s).values()}
    assert after is None or set(after.removeprefix("afterany:").split(":")) <= ended_before
