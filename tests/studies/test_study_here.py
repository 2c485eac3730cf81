"""Studies on this machine: nothing is done twice, failures stop nothing, and what is stopped goes on."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from studies.due import Jobs, Work, look
from studies.evaluations import (
    Evaluation,
    orders,
    read_order,
    read_outcome,
    read_outcomes,
    resolve_evaluation,
    write_order,
)
from tests.e2e.runs import command, environment, flip_last_byte
from tests.owners import beating
from tests.studies.small_studies import (
    KNN,
    PRETRAIN,
    REFUSED,
    STEP,
    kinds,
    measurements,
    outcomes,
    peerlearn,
    results,
    run_of,
    wait_for,
    write_config,
)
from tests.warm import Process


@pytest.fixture(scope="session")
def finished(once: Callable[..., Path]) -> Path:
    """A study that is done, but for an evaluation that cannot be; not to be changed."""

    def make(folder: Path) -> None:
        printed = peerlearn("study", str(write_config(folder)), code=1)
        (folder / "printed.txt").write_text(printed)

    return once("study-here", make) / "s"


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def logged(root: Path) -> dict[str, str]:
    """What every process of the study has printed, by file."""
    logs = [*root.glob("logs/*.log"), *root.glob("*/evaluations/*/log.txt")]
    return {str(file.relative_to(root)): file.read_text() for file in logs}


@pytest.mark.slow(20)
def test_every_run_and_evaluation_is_done_once(finished: Path) -> None:
    for seed in (0, 1):
        run = run_of(finished, seed)
        assert RunDirectory(run).done
        assert kinds(run) == {KNN: "done", REFUSED: "failed"}
        found = {each.results[0] for each in outcomes(run).values() if each.results}
        assert len(found) == 1
        keys = {result["job"] for result in results(run)}
        assert keys <= {folder.name for folder in (run / "evaluations").iterdir()}
        assert {result["seed"] for result in results(run)} == {seed}
    printed = (finished.parent / "printed.txt").read_text()
    assert "base-seed-0: training: done (" in printed
    assert f"base-seed-1, step {STEP}: {KNN}: done (" in printed
    assert printed.count(": done (") == 4
    assert f"missing: base-seed-0: {REFUSED}, step {STEP}: --network 7: not in" in printed
    scores = json.loads((finished / "table.json").read_text())["scores"]
    (ensemble,) = [s for s in scores if s["network"] == "ensemble" and s["metric"] == "top1"]
    for seed in (0, 1):
        (result,) = [r for r in results(run_of(finished, seed)) if r["network"] == "ensemble"]
        assert ensemble["values"][str(seed)] == result["metrics"]["top1"]


@pytest.mark.slow(10)
def test_study_again_does_nothing_and_resume_tries_what_failed(study: Path) -> None:
    before = logged(study)
    assert "missing: " in peerlearn("study", str(study), code=1)
    assert logged(study) == before
    peerlearn("resume", str(study), code=1)
    changed = {name for name, text in logged(study).items() if text != before[name]}
    failed = [
        f"base-seed-{seed}/evaluations/{folder.name}/log.txt"
        for seed in (0, 1)
        for folder in (run_of(study, seed) / "evaluations").iterdir()
        if json.loads((folder / "order.json").read_text())["line"] == REFUSED
    ]
    assert changed == set(failed)


@pytest.mark.slow(10)
def test_what_is_gone_is_measured_again_by_resume_alone(study: Path) -> None:
    run = run_of(study, 0)
    ensemble = next(run.glob("results/knn-*-ensemble-*.json"))
    content = json.loads(ensemble.read_text())
    ensemble.unlink()
    said = " ".join(peerlearn("table", str(study)).split())
    assert said.count(f"its result results/{ensemble.name} is gone") == 1
    peerlearn("study", str(study), code=1)
    assert not ensemble.exists()
    peerlearn("resume", str(study), code=1)
    assert json.loads(ensemble.read_text())["metrics"] == content["metrics"]
    assert measurements(run) == 2
    ensemble.write_text("{")
    said = " ".join(peerlearn("table", str(study)).split())
    assert said.count(f"results/{ensemble.name} is damaged: restore or remove it") == 1
    peerlearn("resume", str(study), code=1)
    assert json.loads(ensemble.read_text())["metrics"] == content["metrics"]
    assert measurements(run_of(study, 1)) == 1


@pytest.mark.slow(20)
def test_another_seed_and_line_add_their_own_work_alone(study: Path) -> None:
    before = logged(study)
    line = "knn --k 7 --data.limit 200"
    peerlearn("study", str(study), "--seeds", "1", "2", "--evaluate", KNN, line)
    assert {name: text for name, text in logged(study).items() if name in before} == before
    assert kinds(run_of(study, 2)) == {KNN: "done", line: "done"}
    assert kinds(run_of(study, 1)) == {KNN: "done", line: "done", REFUSED: "failed"}
    # A part of the study, which writes no tables: seed 0 lacks the new line.
    assert line not in kinds(run_of(study, 0))
    assert "seeds:\n- 0\n- 1\n- 2\n" in (study / "study.yaml").read_text()


@pytest.mark.slow(30)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_and_resume_goes_on(tmp_path: Path, number: int) -> None:
    words = f"{PRETRAIN} --epochs 4"
    file = write_config(tmp_path, pretrain=words, seeds=[0], evaluate=[KNN])
    root = tmp_path / "s"
    process = Process(
        command("study", str(file)),
        env=environment(STEP_SECONDS="0.1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    run = run_of(root, 0)
    wait_for(lambda: list(run.glob("logs/attempt-1/rank-0.step")), "first step")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 75, printed
    assert f"saved; `peerlearn resume {root}` goes on" in printed
    assert [event["event"] for event in RunDirectory(run).events()][-1] == "stopped"
    peerlearn("resume", str(root))
    assert RunDirectory(run).newest_attempt() == 2
    assert kinds(run) == {KNN: "done"}


@pytest.mark.slow(30)
def test_two_at_once_share_the_work_and_a_killed_one_costs_nothing(tmp_path: Path) -> None:
    root = tmp_path / "s"
    file = write_config(tmp_path, seeds=[0, 1, 2, 3], evaluate=[KNN])
    killed = Process(command("study", str(file)), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: list(root.glob("*/logs/attempt-1/rank-0.step")), "first step")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [
        Process(command("study", str(root)), env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    for seed in range(4):
        run = run_of(root, seed)
        assert RunDirectory(run).newest_attempt() == 1
        assert measurements(run) == 1


@pytest.mark.slow(20)
def test_keep_results_drops_saves_and_exports(study: Path) -> None:
    file = study / "study.yaml"
    file.write_text(file.read_text().replace(REFUSED, "knn --k 7 --data.limit 200"))
    peerlearn("study", str(study), "--keep", "results")
    for seed in (0, 1):
        run = RunDirectory(run_of(study, seed))
        assert not run.checkpoints.exists()
        assert not list(run.exports.glob("step-*"))
    # What is dropped is not missed.
    before = logged(study)
    peerlearn("resume", str(study))
    assert logged(study) == before
    # But it cannot be measured otherwise any more.
    said = peerlearn("study", str(study), "--evaluate", "knn --k 9", code=1)
    assert "exports: step 6: export/step-00000006 is gone" in " ".join(said.split())


@pytest.mark.slow(20)
def test_what_is_measured_already_is_dropped_and_what_has_lost_its_result_is_not(
    study: Path,
) -> None:
    next((run_of(study, 1) / "results").glob("*.json")).unlink()
    peerlearn("study", str(study), "--keep", "results", "--evaluate", KNN, code=1)
    dropped = [not RunDirectory(run_of(study, seed)).checkpoints.exists() for seed in (0, 1)]
    assert dropped == [True, False]


@pytest.mark.slow(20)
def test_in_the_background_of_this_machine(tmp_path: Path) -> None:
    root = tmp_path / "s"
    file = write_config(tmp_path, cluster="local", evaluate=[KNN], mirror="trackio")
    printed = peerlearn("study", str(file), TRACKIO_DIR=str(tmp_path / "trackio"))
    job = json.loads((root / "slurm" / "jobs.jsonl").read_text())["job"]
    assert f"job {job}: {root}" in printed
    # It goes on there already.
    assert "job " not in peerlearn("study", str(root)).replace(str(root), "")
    wait_for((root / "table.json").is_file, "table")
    assert all(kinds(run_of(root, seed)) == {KNN: "done"} for seed in (0, 1))
    wait_for(lambda: not Path(f"/proc/{job}").exists(), "end of the job")
    for seed in (0, 1):
        noted = json.loads((run_of(root, seed) / "mirror" / "trackio.json").read_text())
        assert noted["step"] == STEP
        assert set(noted["results"]) == {f.stem for f in run_of(root, seed).glob("results/*.json")}
    said = peerlearn("logs", str(root))
    assert f"base-seed-1, step {STEP}: {KNN}: done (" in said


@pytest.mark.slow(20)
def test_a_single_run_is_watched(run: Path) -> None:
    flip_last_byte(run / "export" / "step-00000006" / "net-1" / "model.safetensors")
    said = peerlearn("watch", str(run), "--evaluate", KNN, REFUSED, code=1)
    assert said.count("missing: ") == 3
    found = {place: each.kind for place, each in outcomes(run).items()}
    assert found == {
        (KNN, 6): "failed",
        (KNN, 12): "done",
        (REFUSED, 6): "failed",
        (REFUSED, 12): "failed",
    }
    before = logged(run.parent)
    peerlearn("watch", str(run), "--evaluate", KNN, REFUSED, code=1)
    assert logged(run.parent) == before
    # Other weights at a step are another evaluation.
    for network in ("net-0", "net-1"):
        config = run / "export" / "step-00000012" / network / "config.json"
        content = json.loads(config.read_text())
        content["sha256"]["model.safetensors"] = "0" * 64
        config.write_text(json.dumps(content))
    peerlearn("watch", str(run), "--evaluate", REFUSED, code=1)
    assert len(list(run.glob("evaluations/*/outcome.json"))) == 5


def steps(run: Path, exports: str | int, *, live: bool = False) -> list[int]:
    line = Evaluation(line="knn", config={})
    return [order.step for order in orders(run, [line], exports, live=live)[0]]


def test_exports_count_when_all_networks_are_there(run: Path) -> None:
    assert steps(run, "all") == [6, 12]
    # What is written first is not yet named by `latest`.
    (run / "export" / "latest").write_text("step-00000006\n")
    assert steps(run, "all", live=True) == [6]
    hidden = run / "export" / "step-00000012" / "net-1"
    hidden.rename(hidden.with_name(".net-1.tmp"))
    assert steps(run, "all") == [6]
    (run / "export" / "latest").unlink()
    assert steps(run, "all", live=True) == []


def test_an_interval_counts_epochs_and_always_the_last_of_a_run_that_is_done(run: Path) -> None:
    for step in (18, 24, 30):
        shutil.copytree(run / "export" / "step-00000012", run / "export" / f"step-{step:08d}")
    (run / "export" / "latest").write_text("step-00000030\n")
    assert steps(run, 2, live=True) == [12, 24]
    assert steps(run, 2) == [12, 24, 30]
    assert steps(run, 7) == steps(run, "last") == [30]
    assert steps(run, "last", live=True) == []
    # Of a run whose validation chooses, the step that it chose in the end.
    (run / "export" / "best").write_text("step-00000018\n")
    assert steps(run, 2) == [12, 18, 24, 30]
    assert steps(run, "last") == [18, 30]
    (run / "DONE").unlink()
    assert steps(run, 2) == [12, 24]
    assert steps(run, "last") == []


def test_a_run_of_another_machine_is_waited_for(run: Path) -> None:
    (run / "DONE").unlink()
    work = Work(root=run, runs=[run], evaluations=[], exports="all")
    assert look(work, Jobs()).training == {run: "dead"}
    with beating(run, {"host": "elsewhere", "pid": 1, "time_seconds": time.time() + 3600}):
        wait_for((run / "owner.json").is_file, "owner")
        assert look(work, Jobs()).training == {run: "live"}
    (run / "owner.json").unlink()
    (run / "FAILED").write_text("the disk is full\n")
    assert look(work, Jobs()).training == {run: "failed"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("knm --k 5", "unknown verb 'knm'; did you mean 'knn'"),
        ("knn --kk 5", "evaluate: 'knn --kk 5': unknown key --kk; did you mean 'k'"),
        ("knn --k 0", "k must be at least 1"),
        ("pretrain mcl_fashion_mnist_demo", "pretrain is no evaluation"),
        ("study table_1_digits", "study is no evaluation"),
    ],
)
def test_a_wrong_evaluation_is_refused_at_once(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        resolve_evaluation(line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}"], "--evaluate is missing: {run} is not of a study that would tell"),
        (["{run}/export"], "is no run that has begun"),
        (["{run}", "--evaluate", "knn", "--cluster", "slrum"], "'slrum' is neither"),
        (["{run}", "--evaluate", "knn", "--interval_seconds", "0"], "--interval_seconds"),
        (
            ["{run}", "--evaluate", "knn", "--exports", "some"],
            "--exports: expected one of last, all or",
        ),
        (
            ["{run}", "--evaluate", "knn", "--exports", "0"],
            "--exports: expected at least 1 epoch, got 0",
        ),
        (["{run}", "--evaluate", "knn --checkpoint a"], "--checkpoint has no place here"),
        (["{run}", "--evaluate", "knn 'a"], "cannot be split into words"),
        (["{run}", "--evaluate", "knn", "--seeds", "1"], "{run} is no study: --seeds and --only"),
        (["{run}", "--evaluate", "knn", "--only", "g"], "{run} is no study: --seeds and --only"),
    ],
)
def test_wrong_words_of_watch_are_one_line(
    run: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert main(["watch", *(word.format(run=run) for word in words)]) in (1, 2)
    error = capsys.readouterr().err
    assert message.format(run=run) in " ".join(error.split())


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"line": 5, "step": 6, "kind": "done", "results": []}',
        '{"line": "knn", "step": "6", "kind": "done", "results": []}',
        '{"line": "knn", "step": 6, "kind": "odd", "results": []}',
        '{"line": "knn", "step": 6, "kind": "done", "results": null}',
        '{"line": "knn", "step": 6, "kind": "done", "results": [1]}',
    ],
)
def test_a_damaged_outcome_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "outcome.json").write_text(content)
    assert read_outcome(tmp_path) is None


ORDER = {"config": {}, "step": 6, "export": "e", "sha256": "s"}


@pytest.mark.parametrize("line", ["knn --k 5", "linear logistic_regression", "fewshot", "detect"])
def test_an_order_is_read(tmp_path: Path, line: str) -> None:
    (tmp_path / "order.json").write_text(json.dumps({**ORDER, "line": line}))
    assert read_order(tmp_path).line == line


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        json.dumps({**ORDER, "line": "knn", "step": "6"}),
        *(
            json.dumps({**ORDER, "line": line})
            for line in ("submit --cluster x", "study", "pretrain", "measure", "rm", "", "'")
        ),
    ],
)
def test_a_damaged_order_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "order.json").write_text(content)
    with pytest.raises(UserError, match="is no evaluation that a study ordered"):
        read_order(tmp_path)


def test_measure_takes_what_was_ordered_alone(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["measure", str(run)]) == 1
    assert "is no evaluation that a study ordered" in capsys.readouterr().err
    assert not os.path.lexists(run / "evaluations")


@pytest.mark.parametrize("instead", [None, "step-00000006"])
def test_measure_takes_no_other_export_than_the_one_that_was_ordered(
    run: Path, instead: str | None, capsys: pytest.CaptureFixture
) -> None:
    line = Evaluation(line=KNN, config={})
    (order,) = orders(run, [line], "last", live=False)[0]
    folder = write_order(run, order)
    export = run / order.export
    export.rename(run / "export" / "elsewhere")
    if instead:
        shutil.copytree(run / "export" / instead, export)
    what = "holds other networks than were ordered" if instead else "is gone"
    why = f"{export} {what}: nothing is measured in its place"
    assert main(["measure", str(folder)]) == 1
    assert capsys.readouterr().err == f"peerlearn: {why}\n"
    (outcome,) = read_outcomes(run)
    assert (outcome.kind, outcome.reason, outcome.step) == ("failed", why, 12)
    assert not (run / "results").exists()
