"""Damaged files of a study: each is at most a line of what is missing, and all other rows stand."""

import json
import math
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peerlearn.cli import main
from peerlearn.runs import lock
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.heartbeat import Heartbeat
from peerlearn.runs.lock import LOCK_FILES
from peerlearn.runs.standing import StandingLog
from peerlearn.runs.step_folders import step_folder, write_best, write_latest
from peerlearn.runs.training_facts import TrainingFacts, write_env
from slurm import status as status_module
from slurm.find_runs import find_runs
from slurm.jobs import JobWatch
from slurm.status import CANCELLED_FILE, read_statuses
from slurm.status_command import _table
from slurm.submission import JOBS_FILE
from studies.due import Jobs, Work, ask_again, look, problems
from studies.evaluations import (
    Outcome,
    Problem,
    fixed_evaluations,
    order_folder,
    orders,
    write_order,
    write_outcome,
)
from studies.formats import as_csv, as_json, as_latex, as_markdown, as_text, problem_text
from studies.runner import work_of
from studies.scores import Score, score_study
from studies.study import Study, write_study
from studies.table import tables, unknown_scores
from tests.study_folders import LAST_STEP, begin, finish, make_study, write_scores

KNN = "knn --k 20"
LABELS = ("vanilla", "MCL (x2)")
DEAD = {"host": "gone", "pid": 3, "started": 4, "since": "then", "time_seconds": 1.0, "beats": 3}
JOB = {"job": "9", "verb": "pretrain", "executor": "local", "folder": "gone", "time": "2026"}


def write_export(run: Path, step: int) -> Path:
    """The exports of two networks, as far as studies look at them."""
    folder = RunDirectory(run).exports / step_folder(step)
    for network in range(2):
        own = folder / f"net-{network}"
        own.mkdir(parents=True)
        (own / "model.safetensors").write_text("")
        seal = {"model.safetensors": f"{step}", "config.json": f"{network}"}
        (own / "config.json").write_text(json.dumps({"sha256": seal}))
    write_latest(folder)
    return folder


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of four runs that are done and measured, with every file that studies and `status` read."""
    study = make_study(tmp_path_factory.mktemp("home"), evaluate=[KNN], seeds=[0, 1], exports=5)
    values = {(label, seed): (50.0, 51.0 + seed, 52.0) for label in LABELS for seed in (0, 1)}
    finish(study, values)
    evaluations = fixed_evaluations(study.root, study.config.evaluate)
    write_study(study, evaluations)
    facts = TrainingFacts(
        dataset="digits",
        data_root=None,
        images=200,
        seed=0,
        lr=0.1,
        processes=1,
        steps_per_epoch=LAST_STEP,
    )
    for run in study.runs:
        directory = RunDirectory(run.folder)
        logs = directory.logs(1)
        logs.mkdir(parents=True)
        write_env(directory.env, "pretrain", facts)
        directory.event("started", attempt=1, step=0, total_steps=LAST_STEP)
        directory.event("exported", step=LAST_STEP)
        directory.event("exported", step=LAST_STEP, best=True)
        directory.event("done", attempt=1, step=LAST_STEP)
        beat = Heartbeat(logs, 0)
        beat.at_step(LAST_STEP)
        beat.end()
        directory.append_metrics({"step": LAST_STEP, "loss": 2.0})
        StandingLog(logs, directory.metric_rows(), step=LAST_STEP, total_steps=LAST_STEP)
        write_best(write_export(run.folder, LAST_STEP))
        directory.jobs.mkdir()
        (run.folder / JOBS_FILE).write_text(json.dumps(JOB) + "\n")
        (run.folder / CANCELLED_FILE).write_text(json.dumps({"job": "9", "time": "2025"}) + "\n")
        (run.folder / LOCK_FILES[1]).write_text(json.dumps(DEAD))
        (order,) = orders(run.folder, evaluations, 5, live=False)[0]
        folder = write_order(run.folder, order)
        files = write_scores(
            run, {"0": 70.0, "1": 71.0 + run.seed}, task="knn", protocol={"line": KNN}
        )
        results = [str(file.relative_to(run.folder)) for file in files]
        write_outcome(folder, Outcome(line=KNN, step=LAST_STEP, kind="done", results=results))
    return study


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners and ranks of other machines are looked at for moments."""
    for module, name in (
        *((lock, each) for each in ("_LOOK_SECONDS", "_POLL_SECONDS")),
        *((status_module, each) for each in ("SILENT_SECONDS", "_POLL_SECONDS")),
    ):
        monkeypatch.setattr(module, name, 0.02)


def all_verbs(study: Study, work: Work) -> tuple[list[Score], list[Problem]]:
    """What `table`, `study`, `resume`, `watch` and `status` do with the files of a study. Nothing is to be raised."""
    found = look(work, Jobs())
    scores, unread = score_study(study)
    missing = list(dict.fromkeys([*problems(work, found), *unread, *unknown_scores(study, scores)]))
    shown = tables(study, scores)
    for table in shown:
        as_text(table)
    as_csv(study, shown, scores), as_markdown(shown, missing), as_latex(shown)
    assert "NaN" not in as_json(study, shown, scores, missing)
    statuses = read_statuses(find_runs([study.root]), JobWatch())
    _table(statuses)
    assert [each.state for each in statuses][1:] == ["done"] * 3
    assert all("\n" not in problem_text(each) for each in missing)
    return scores, missing


def unharmed(scores: list[Score], run: Path) -> set[tuple[Any, ...]]:
    """The values of all runs but one."""
    return {
        (each.cell.labels, each.key, each.metric, each.step, seed, value)
        for each in scores
        for seed, value in each.values.items()
        if f"{each.cell.variant.name}-seed-{seed}" != run.name
    }


TEXTS = [
    *(b"", b"null", b"[]", b"7", b'"x"', b"\xff\xfe\x00", b'{"a":', b"NaN", b"{}", b"- a\n- b\n"),
    *(b"[" * 10**5, b'{"a":' * 10**5, b"1" * 5000, b"\x00" * 99, b'{"event": [{}]}', b"a: &x [*x]"),
]
VALUES = [
    *(None, "x", [], {}, -1, True, math.nan, math.inf, 1e308, 10**400, [[]], [None], "\0", "a\nb"),
    ["/etc/passwd", "../../x"],
]


def _written(text: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(text)


def _a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def damages(content: bytes, kind: str) -> Iterator[Callable[[Path], object]]:
    """Ways to damage a file: another content, none, half of it, no file, and each of its values in turn."""
    yield from map(_written, TEXTS)
    yield from (_a_folder, _a_loop, Path.unlink, _written(content[: len(content) // 2]))
    lines = content.splitlines() if kind == ".jsonl" else [content]
    for number, line in enumerate(lines if kind.startswith(".json") else ()):
        whole = json.loads(line)
        places = [(whole, key) for key in whole]
        places += [(part, key) for part in whole.values() if isinstance(part, dict) for key in part]
        for part, key in places:
            before = part[key]
            for value in VALUES:
                part[key] = value
                changed = [*lines[:number], json.dumps(whole).encode(), *lines[number + 1 :]]
                yield _written(b"\n".join(changed) + b"\n")
            part[key] = before


FILES = [
    *("DONE", "config.yaml", "env.json", "events.jsonl", "metrics.jsonl", "owner.json"),
    *("export/best", "export/latest", "export/*/net-1/config.json"),
    *("export/*/net-0/model.safetensors", "logs/attempt-1/rank-0.heartbeat.json"),
    *("logs/attempt-1/rank-0.step", "logs/attempt-1/standing.json", "slurm/jobs.jsonl"),
    *("slurm/cancelled.jsonl", "evaluations/*/order.json", "evaluations/*/outcome.json"),
    *("results/classification-*-0-*.json", "results/knn-*-1-*.json"),
]


@pytest.mark.slow(10)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", FILES)
def test_no_damage_of_a_file_touches_the_rows_of_other_runs(
    measured: Study, name: str, tmp_path: Path
) -> None:
    work = work_of(measured)
    whole, missing = all_verbs(measured, work)
    assert missing == []
    run = sorted(run.folder for run in measured.runs)[0]
    (file,) = run.glob(name)
    content = file.read_bytes()
    found = list(damages(content, file.suffix))
    # All that are no single value, and a draw of those.
    few = found[: len(TEXTS) + 4]
    few += random.Random(name).sample(found[len(few) :], min(10, len(found) - len(few)))
    shutil.copytree(measured.root, tmp_path / "s")
    for damage in few:
        damage(file)
        try:
            scores, missing = all_verbs(measured, work)
        finally:
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "s" / run.name, run)
        assert unharmed(scores, run) == unharmed(whole, run)
        assert {each.run for each in missing} <= {run.name}
        # Nothing that is damaged is taken for a score.
        values = [value for each in scores for value in each.values.values()]
        assert all(0 <= value <= 100 for value in values)
        assert len(values) == sum(len(each.values) for each in whole) or missing


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"top1": 70.0', '"top1": NaN'),
        ('"top1": 70.0', '"top1": -Infinity'),
        ('"top1": 70.0', '"top1": 1e999'),
        ('"top1": 70.0', '"top1": 700.0'),
        ('"n": 360', '"n": "360"'),
        ('"step": 12', '"step": true'),
        ('"network": "0"', '"network": 0'),
        ('"metrics": {', '"metrics": null, "others": {'),
        ('"seconds": 1.0', '"seconds": NaN'),
        # Not what the file's name says.
        ('"network": "0"', '"network": "2"'),
        ('"dataset": "digits"', '"dataset": "x"'),
    ],
)
def test_a_damaged_result_is_one_line_that_names_it_and_is_measured_again_by_resume(
    tmp_path: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path, evaluate=[KNN], seeds=[0, 1])
    evaluations = fixed_evaluations(study.root, study.config.evaluate)
    write_study(study, evaluations)
    for run in study.runs:
        begin(run)
        write_scores(run, {"0": 50.0, "1": 51.0})
        write_export(run.folder, LAST_STEP)
        (order,) = orders(run.folder, evaluations, "last", live=False)[0]
        files = write_scores(run, {"0": 70.0, "1": 71.0, "ensemble": 72.0}, task="knn")
        results = [str(file.relative_to(run.folder)) for file in files]
        outcome = Outcome(line=KNN, step=LAST_STEP, kind="done", results=results)
        write_outcome(write_order(run.folder, order), outcome)
    run = study.runs[0]
    (file,) = run.folder.glob("results/knn-*-0-*.json")
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    name = f"results/{file.name}"
    line = f"missing: {run.folder.name}: {KNN}, step 12: {name} is damaged: restore or remove it\n"
    capsys.readouterr()
    assert main(["table", str(study.root)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("missing: ") == printed.count(line) == 1
    scores, _ = score_study(study)
    knn = {
        (each.cell.labels, each.key.network): each.values
        for each in scores
        if (each.key.task, each.metric) == ("knn", "top1")
    }
    # The ensemble's own file is whole.
    assert knn[(LABELS[0],), "ensemble"] == {0: 72.0, 1: 72.0}
    assert knn[(LABELS[0],), "individual"] == {1: 70.5}
    assert knn[(LABELS[1],), "individual"] == {0: 70.5, 1: 70.5}
    assert main(["status", str(study.root)]) == 0

    work = work_of(study)
    assert look(work, Jobs()).with_standing("due") == []
    ask_again(look(work, Jobs()))
    (due,) = look(work, Jobs()).with_standing("due")
    assert (due.run, due.order.line) == (run.folder, KNN)
    assert not (order_folder(run.folder, due.order) / "outcome.json").exists()


def test_a_score_that_is_no_number_is_a_line_and_not_left_out_in_silence(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=[0, 1])
    finish(study, {(label, seed): (50.0, 52.0) for label in LABELS for seed in (0, 1)})
    run = study.runs[0]
    (file,) = run.folder.glob("results/*-1-*.json")
    for value in ("null", '"52.0"', "52", "[52.0]"):
        file.write_text(file.read_text().replace('"top1": 52.0', f'"top1": {value}'))
        scores, missing = score_study(study)
        why = f"network 1: its top1 is {value}: remove the result, and measure it again"
        assert missing == [Problem(run=run.folder.name, what="its own accuracy", why=why)]
        individual = [
            each.values
            for each in scores
            if (each.metric, each.key.network) == ("top1", "individual")
        ]
        assert individual == [{1: 51.0}, {0: 51.0, 1: 51.0}]
        file.write_text(file.read_text().replace(f'"top1": {value}', '"top1": 52.0'))
    # top5 of data of few classes has no value anywhere.
    for each in study.root.glob("*/results/*.json"):
        each.write_text(each.read_text().replace('"top5": 75.0', '"top5": null'))
        each.write_text(each.read_text().replace('"top5": 76.0', '"top5": null'))
    assert score_study(study)[1] == []


# Exports


def evaluated(tmp_path: Path, exports: object, *steps: int) -> tuple[Study, Work, Path]:
    """A study of one run with exports of these steps, of which nothing is measured."""
    study = make_study(
        tmp_path, evaluate=[KNN], seeds=[0], exports=exports, grids={"g": {"terms": {"all": ""}}}
    )
    evaluations = fixed_evaluations(study.root, study.config.evaluate)
    write_study(study, evaluations)
    (run,) = study.runs
    begin(run, done=False)
    write_scores(run, {"0": 50.0, "1": 51.0})
    directory = RunDirectory(run.folder)
    for step in steps:
        write_export(run.folder, step)
        directory.event("exported", step=step)
    directory.event("done", step=LAST_STEP)
    directory.mark_done()
    return study, work_of(study), run.folder


def due_and_missing(work: Work) -> tuple[list[int], list[str]]:
    found = look(work, Jobs())
    listed = problems(work, found)
    why = [each.why for each in listed if each.what == "exports"]
    return [each.order.step for each in found.with_standing("due")], why


@pytest.mark.parametrize("exports", ["last", "all", 1])
@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_no_older_export_takes_the_place_of_one_that_is_gone(
    tmp_path: Path, exports: object, pointer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study, work, run = evaluated(tmp_path, exports, 4, 8, 12)
    facts = {"dataset": "d", "data_root": None, "images": 9, "seed": 0, "lr": 0.1, "processes": 1}
    RunDirectory(run).env.write_text(json.dumps({"training": facts | {"steps_per_epoch": 4}}))
    if pointer == "best":
        write_best(run / "export" / step_folder(8))
    gone = 8 if pointer == "best" else 12
    every = {4, 8, 12} if exports != "last" else {12, gone}
    assert due_and_missing(work) == (sorted(every), [])
    shutil.rmtree(run / "export" / step_folder(gone))
    restore = "restore it, if there is a copy: no save of that step is left"
    why = f"step {gone}: export/{step_folder(gone)} is gone: {restore}"
    assert due_and_missing(work) == (sorted(every - {gone}), [why])
    assert not look(work, Jobs()).is_measured(run)
    assert main(["table", str(study.root)]) == 0
    assert f"missing: {run.name}: exports: {why}\n" in capsys.readouterr().out
    # What is measured already needs no export.
    results = [f"results/{file.name}" for file in (run / "results").iterdir()]
    outcome = Outcome(line=KNN, step=gone, kind="done", results=results)
    (run / "evaluations" / "of-old").mkdir(parents=True)
    write_outcome(run / "evaluations" / "of-old", outcome)
    assert due_and_missing(work) == (sorted(every - {gone}), [])


def test_a_network_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    _, work, run = evaluated(tmp_path, "last", 6, 12)
    own = run / "export" / step_folder(12) / "net-1"
    (run / "checkpoints" / step_folder(9)).mkdir(parents=True)
    fix = f"restore it, or `peerlearn resume {run}` writes it again"
    (own / "config.json").write_text("{")
    why = f"step 12: export/step-00000012/net-1 is damaged: {fix}"
    assert due_and_missing(work) == ([], [why])
    shutil.rmtree(own)
    (run / "checkpoints" / step_folder(12)).mkdir()
    fix = f"`peerlearn export {run} --step 12` writes it from its save"
    why = f"step 12: export/step-00000012/net-1 is gone: {fix}"
    assert due_and_missing(work) == ([], [why])
    # Without `latest` too.
    (run / "export" / "latest").unlink()
    assert due_and_missing(work) == ([], [why])


def test_an_export_that_the_disk_did_not_take_is_listed_until_it_is_written(tmp_path: Path) -> None:
    _, work, run = evaluated(tmp_path, "all", 6, 12)
    RunDirectory(run).event("export_missed", step=9, reason="No space left on device")
    why = "step 9: export/step-00000009 was never written (No space left on device): "
    why += "restore it, if there is a copy: no save of that step is left"
    assert due_and_missing(work) == ([6, 12], [why])
    write_export(run, 9)
    assert due_and_missing(work) == ([6, 9, 12], [])


@pytest.mark.parametrize(
    "damage",
    [{"started": []}, {"started": {}}, {"job": "9" * 5000}, {"job": None}, {"executor": ["local"]}],
)
def test_a_damaged_record_of_a_job_is_left_out(tmp_path: Path, damage: dict[str, object]) -> None:
    _, work, run = evaluated(tmp_path, "last", 12)
    (run / "slurm").mkdir()
    local = {**JOB, "host": socket.gethostname(), "started": 1}
    lines = [json.dumps({**local, "job": "8"}), json.dumps({**local, **damage})]
    (run / JOBS_FILE).write_text("\n".join(lines) + "\n")
    assert due_and_missing(work) == ([12], [])
    (status,) = read_statuses([run], JobWatch())
    assert (status.state, status.job) == ("done", "8")


def test_twenty_thousand_records_are_read_in_moments(tmp_path: Path) -> None:
    _, work, run = evaluated(tmp_path, "last", 12)
    records = [{**JOB, "job": str(number), "host": "gone"} for number in range(20_000)]
    (run / "slurm").mkdir()
    (run / JOBS_FILE).write_text("".join(json.dumps(each) + "\n" for each in records))
    text = json.dumps({"event": "saved", "step": 3}) + "\n"
    with (run / "events.jsonl").open("r+") as file:
        whole = file.read()
        file.seek(0)
        file.write(text * 20_000 + whole)
    assert due_and_missing(work) == ([12], [])
    (status,) = read_statuses([run], JobWatch())
    assert (status.state, status.job) == ("done", "19999")
