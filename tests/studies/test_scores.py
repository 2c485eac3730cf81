"""The scores of a study: what is read of its runs and evaluations, averaged and compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.step_folders import BEST_FILE
from studies.evaluations import Outcome, Problem, write_outcome
from studies.scores import Score, network_rank, score_study
from studies.study import Study
from tests.study_folders import LAST_STEP, begin, evaluate, finish, make_study, write_scores

KNN = "knn --k 20"


def find(scores: list[Score], label: str, network: str = "individual", **facts: Any) -> Score:
    wanted = {"metric": "top1", "shown": True, "name": "classification/top1", **facts}
    (found,) = [
        score
        for score in scores
        if score.cell.labels[-1] == label
        and score.key.network == network
        and all(getattr(score, name) == value for name, value in wanted.items())
    ]
    return found


def run_of(study: Study, label: str, seed: int = 0):
    (cell,) = [cell for cell in study.cells if cell.labels[-1] == label]
    return study.run_of(cell.variant, seed)


def test_means_over_networks_and_seeds_and_paired_differences(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    vanilla = [(70.0, 72.0, 75.0), (71.0, 71.5, 74.0), (69.0, 72.0, 76.0)]
    mcl = [(74.0, 74.0, 76.0), (73.0, 75.0, 77.5), (76.0, 75.5, 78.0)]
    values = {("vanilla", seed): row for seed, row in enumerate(vanilla)}
    values |= {("MCL (x2)", seed): row for seed, row in enumerate(mcl)}
    finish(study, values)
    scores, problems = score_study(study)
    assert problems == []
    ours, theirs = (np.array(rows)[:, :2].mean(1) for rows in (mcl, vanilla))
    found = find(scores, "MCL (x2)")
    assert found.values == dict(enumerate(ours))
    assert (found.mean, found.std) == (pytest.approx(ours.mean()), pytest.approx(ours.std(ddof=1)))
    interval = stats.t.interval(0.95, 2, loc=ours.mean(), scale=stats.sem(ours))
    assert found.interval == pytest.approx(interval)
    assert (found.n, found.step, found.chosen, found.key.line) == (360, LAST_STEP, False, "")
    assert found.difference is not None
    assert found.difference.mean == pytest.approx((ours - theirs).mean())
    assert found.difference.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert find(scores, "vanilla").difference is None
    assert find(scores, "vanilla", "ensemble").mean == 75.0
    assert find(scores, "vanilla", "1").values == {0: 72.0, 1: 71.5, 2: 72.0}
    other = find(scores, "vanilla", metric="top5", name="classification/top5")
    assert other.mean == pytest.approx(theirs.mean() / 2 + 50)
    assert list(dict.fromkeys(score.key.network for score in scores)) == [
        *("individual", "ensemble", "0", "1")
    ]


def test_no_interval_of_a_percentage_leaves_it_and_two_runs_have_none(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    finish(study, {("vanilla", s): (x, x) for s, x in enumerate((99.0, 60.0, 98.0))})
    run = run_of(study, "MCL (x2)")
    begin(run)
    write_scores(run, {"0": 10.0, "1": 10.0})
    write_scores(run_of(study, "MCL (x2)", 1), {"0": 90.0, "1": 92.0})
    begin(run_of(study, "MCL (x2)", 1))
    scores, _ = score_study(study)
    interval = find(scores, "vanilla").interval
    assert interval is not None
    mean, ci95 = 257 / 3, stats.t.ppf(0.975, 2) * stats.sem([99.0, 60.0, 98.0])
    assert mean + ci95 > 100
    assert interval == (pytest.approx(mean - ci95), 100.0)
    two = find(scores, "MCL (x2)")
    assert (two.interval, two.std) == (None, pytest.approx(np.std([10, 91], ddof=1)))
    # A difference is no percentage: its interval and p stand, whatever they are.
    assert two.difference is not None
    assert two.difference.mean == pytest.approx((10 - 99 + 91 - 60) / 2)
    assert two.difference.ci95 is not None
    assert two.difference.mean - two.difference.ci95 < -100


def test_every_evaluation_data_set_and_variant_is_a_score_of_its_own(tmp_path: Path) -> None:
    lines = [KNN, "fewshot --ways 3"]
    study = make_study(tmp_path, evaluate=lines, seeds=[0])
    for seed, label in enumerate(("vanilla", "MCL (x2)")):
        run = run_of(study, label)
        begin(run)
        write_scores(run, {"0": 1.0, "1": 2.0})
        evaluate(run, KNN, {"0": 50.0 + seed, "1": 52.0, "ensemble": 60.0})
        files = []
        for shots in (1, 5):
            files += write_scores(
                run,
                {"0": 40.0 + shots, "1": 42.0 + shots},
                task="fewshot",
                metrics={"accuracy": 40.0 + shots, "accuracy_ci95": 0.5, "n": 600, "list": [1.0]},
                protocol={"shots": shots},
                variant=f"3-way {shots}-shot",
            )
        outcome = Outcome(
            line=lines[1],
            step=LAST_STEP,
            kind="done",
            results=[str(file.relative_to(run.folder)) for file in files],
        )
        folder = RunDirectory(run.folder).evaluations / "few"
        folder.mkdir()
        write_outcome(folder, outcome)
        # Another study's, or of a line that has been taken out of this one.
        evaluate(run, "knn --k 5", {"0": 1.0, "1": 1.0})
    scores, problems = score_study(study)
    assert problems == []
    found = find(scores, "MCL (x2)", name="knn/top1")
    assert (found.mean, found.key.line) == (51.5, KNN)
    assert found.difference is not None
    assert found.difference.mean == 0.5
    shown = {
        (score.key.variant, score.metric): score.mean
        for score in scores
        if score.key.task == "fewshot" and score.key.network == "individual"
    }
    assert shown == {
        ("3-way 1-shot", "accuracy"): 41.0,
        ("3-way 1-shot", "accuracy_ci95"): 0.5,
        ("3-way 5-shot", "accuracy"): 45.0,
        ("3-way 5-shot", "accuracy_ci95"): 0.5,
    }
    assert {score.key.line for score in scores} == {"", *lines}
    assert find(scores, "MCL (x2)", name="fewshot/accuracy", metric="accuracy", n=600, mean=41.0)


@pytest.mark.parametrize("baseline", ["alone", "cohort"])
def test_a_lone_network_stands_for_its_ensemble_beside_ensembles(
    tmp_path: Path, baseline: str
) -> None:
    study = make_study(
        tmp_path,
        grids={
            "g": {"m": {"alone": "--cohort.networks 1", "cohort": "", "bare": "--alpha 1"}},
            "h": {"m": {"one": "--cohort.networks 1", "two": "--cohort.networks 1 --beta 1"}},
        },
        compare={"baseline": {"g": baseline, "h": "one"}},
    )
    alone, ensembles = [50.0, 51.0, 52.5], [53.0, 56.0, 54.0]
    for seed in study.config.seeds:
        for label in ("alone", "cohort", "bare", "two"):
            run = run_of(study, label, seed)
            begin(run)
            if label == "cohort":
                write_scores(run, {"0": 40.0, "1": 42.0})
                joined = {"split": "test", "epoch": 100, "ensemble": "mean of logits"}
                write_scores(run, {"ensemble": ensembles[seed]}, protocol=joined)
            else:
                # `bare` is a cohort whose ensemble was not measured.
                write_scores(run, {"0": alone[seed], **({"1": 1.0} if label == "bare" else {})})
    scores, problems = score_study(study)
    assert problems == []
    other = {"alone": "cohort", "cohort": "alone"}[baseline]
    assert find(scores, "alone", "ensemble").values == dict(enumerate(alone))
    difference = find(scores, other, "ensemble").difference
    gain = np.subtract(ensembles, alone) * (1 if other == "cohort" else -1)
    assert difference is not None
    assert (difference.mean, difference.p) == (
        pytest.approx(gain.mean()),
        pytest.approx(stats.ttest_1samp(gain, 0).pvalue),
    )
    networks: dict[tuple[str, str], list[str]] = {}
    for score in scores:
        if score.metric == "top1":
            cell = score.cell.grid, score.cell.labels[0]
            networks.setdefault(cell, []).append(score.key.network)
    assert networks == {
        ("g", "alone"): ["individual", "ensemble", "0"],
        ("g", "cohort"): ["individual", "ensemble", "0", "1"],
        ("g", "bare"): ["individual", "0", "1"],
        # Where no run of a grid has an ensemble, nothing is shown twice.
        ("h", "one"): ["individual", "0"],
        ("h", "two"): ["individual", "0"],
    }


def test_individual_needs_every_network(tmp_path: Path) -> None:
    study = make_study(tmp_path, evaluate=[KNN], seeds=[0])
    run = run_of(study, "vanilla")
    begin(run)
    write_scores(run, {"1": 2.0, "ensemble": 3.0})
    evaluate(run, KNN, {"1": 50.0})
    scores, problems = score_study(study)
    assert problems == [
        Problem(run=run.folder.name, what="its own accuracy", why="its network 0 has no result")
    ]
    # What is there stands. Of an evaluation one network may be all that was asked for.
    assert {(s.key.task, s.key.network) for s in scores} == {
        *(("classification", "1"), ("classification", "ensemble"), ("knn", "1"))
    }


def test_the_last_step_is_shown_or_the_one_that_validation_chose(tmp_path: Path) -> None:
    study = make_study(tmp_path, evaluate=[KNN, "linear"], seeds=[0, 1])
    for seed in (0, 1):
        run = run_of(study, "vanilla", seed)
        begin(run)
        for step in (4, 8, LAST_STEP):
            evaluate(run, KNN, {"0": 40.0 + step + seed, "1": 42.0 + step + seed}, step)
        evaluate(run, "linear", {"0": 20.0, "1": 20.0}, 8)
        write_scores(run, {"0": 1.0 + seed, "1": 1.0})
    scores, _ = score_study(study)
    of_knn = [
        s for s in scores if (s.name, s.metric, s.key.network) == ("knn/top1", "top1", "individual")
    ]
    assert [(s.step, s.shown, s.mean) for s in of_knn] == [
        (4, False, 45.5),
        (8, False, 49.5),
        (12, True, 53.5),
    ]
    # Not measured at the last step: an earlier one does not stand in for it.
    assert not any(s.shown for s in scores if s.key.task == "linear")

    for seed, step in ((0, 4), (1, 8)):
        exports = RunDirectory(run_of(study, "vanilla", seed).folder).exports
        exports.mkdir()
        (exports / BEST_FILE).write_text(f"step-{step:08d}\n")
    scores, _ = score_study(study)
    chosen = find(scores, "vanilla", name="knn/top1")
    assert (chosen.chosen, chosen.step, chosen.values) == (True, 8, {0: 45.0, 1: 50.0})
    assert find(scores, "vanilla").step == LAST_STEP
    assert len([s for s in scores if (s.name, s.key.network) == ("knn/top1", "0")]) == 4


def test_trainings_of_different_length_are_compared_at_their_ends(tmp_path: Path) -> None:
    study = make_study(tmp_path, evaluate=[KNN], seeds=[0])
    for label, steps in (("vanilla", (6, 12)), ("MCL (x2)", (6, 12, 24))):
        run = run_of(study, label)
        begin(run, last=steps[-1])
        write_scores(run, {"0": 50.0 + steps[-1], "1": 50.0 + steps[-1]}, steps[-1])
        for step in steps:
            evaluate(run, KNN, {"0": 40.0 + step, "1": 40.0 + step}, step)
    scores, problems = score_study(study)
    assert problems == []
    for name in ("classification/top1", "knn/top1"):
        found = find(scores, "MCL (x2)", name=name)
        assert found.step == 24
        assert found.difference is not None
        assert found.difference.mean == 12
    # Of an earlier step, that which both have.
    earlier = find(scores, "MCL (x2)", name="knn/top1", shown=False, step=12)
    assert earlier.difference is not None
    assert earlier.difference.mean == 0


def test_only_what_was_measured_alike_is_averaged_and_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path, evaluate=[KNN])
    for seed in (0, 1, 2):
        for label in ("vanilla", "MCL (x2)"):
            # Trainings of a study may differ in what their accuracy tells of them.
            run = run_of(study, label, seed)
            begin(run)
            own = {"split": "test", "epoch": len(label), "train_images": len(label)}
            write_scores(run, {"0": 60.0 + seed, "1": 61.0 + 2 * seed}, protocol=own)
            k = 20 if (seed, label) != (1, "MCL (x2)") else 5
            protocol = {"k": k, "test_fingerprint": "f" * 64}
            evaluate(run, KNN, {"0": 50.0 + k, "1": 50.0}, protocol=protocol)
    scores, problems = score_study(study)
    assert find(scores, "MCL (x2)").difference is not None
    found = find(scores, "MCL (x2)", name="knn/top1")
    assert list(found.values) == [0, 2]
    unlike = "it is left out: measured otherwise than seed 0: k 5, not 20"
    assert problems == [
        Problem(run=run_of(study, "MCL (x2)", 1).folder.name, what=f"{KNN}, step 12", why=unlike)
    ]


def test_cells_that_were_measured_otherwise_are_not_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=[0, 1])
    for seed in (0, 1):
        for label, n in (("vanilla", 360), ("MCL (x2)", 359)):
            run = run_of(study, label, seed)
            begin(run)
            write_scores(run, {"0": 60.0, "1": 61.0 + seed}, metrics={"top1": 50.0 + seed, "n": n})
    scores, problems = score_study(study)
    assert find(scores, "MCL (x2)").difference is None
    assert problems == [
        Problem(
            run=run_of(study, "MCL (x2)").variant.name,
            what="its own accuracy",
            why="it is not compared with vanilla: n 359, not 360",
        )
    ]


def test_what_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    study = make_study(
        tmp_path, evaluate=[KNN], seeds=[0], grids={"g": {"alpha": list(range(1, 10))}}
    )
    runs = {label: run_of(study, label) for label in study.config.grids["g"]["alpha"]}
    two = {"0": 50.0, "1": 60.0}
    for label, run in runs.items():
        begin(run, done=label != "2")
        write_scores(run, two, step=8 if label == "3" else LAST_STEP)
    damaged = next((runs["4"].folder / "results").glob("*-0-*.json"))
    damaged.write_text(damaged.read_text()[:50])
    for label, text in (("5", '"top1": NaN'), ("6", '"top1": Infinity')):
        file = next((runs[label].folder / "results").glob("*-0-*.json"))
        file.write_text(file.read_text().replace('"top1": 50.0', text))
    write_scores(runs["7"], {"1": 61.0}, export_hash="another")
    evaluate(runs["8"], KNN, two)[0].unlink()
    evaluate(runs["9"], KNN, two, export_hash="old")
    evaluate(runs["9"], KNN, {"0": 51.0, "1": 60.0}, key="again")
    scores, problems = score_study(study)
    why = {problem.run.removeprefix("alpha-")[0]: problem.why for problem in problems}
    assert why.keys() == {"3", "4", "5", "6", "7", "8", "9"}
    assert why["3"] == "it has no result of its last step 12"
    assert why["4"] == f"results/{damaged.name} is damaged: restore or remove it"
    assert why["5"].endswith("is damaged: restore or remove it")
    assert "network 1 has several results: remove all but the one that counts" in why["7"]
    assert why["8"].startswith("its result results/knn-digits-00000012-0-")
    assert why["8"].endswith(".json is gone")
    assert "it has two results: remove the wrong one" in why["9"]
    assert len(problems) == 7
    # Not done: it has no last step yet.
    assert not any(score.cell.labels == ("2",) for score in scores)
    assert find(scores, "1").mean == 55.0


def test_files_of_earlier_versions_and_a_run_without_its_end(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=[0])
    old, endless = run_of(study, "vanilla"), run_of(study, "MCL (x2)")
    begin(old)
    for file in write_scores(old, {"0": 50.0, "1": 60.0}):
        content = json.loads(file.read_text())
        del content["variant"]
        file.write_text(json.dumps(content))
    begin(endless, done=False).mark_done()
    write_scores(endless, {"0": 50.0, "1": 60.0})
    scores, problems = score_study(study)
    assert find(scores, "vanilla").key.variant == ""
    assert [(each.run, each.why) for each in problems] == [
        (endless.folder.name, "it has no result of its last step (unknown)")
    ]


def test_networks_stand_in_order() -> None:
    names = ["key-0", "10", "9", "ensemble-logits", "weighted-ensemble", "ensemble", "individual"]
    assert sorted(names, key=network_rank) == [
        *("individual", "ensemble", "weighted-ensemble", "9", "10", "ensemble-logits", "key-0")
    ]


def test_a_study_of_nothing_run_has_no_scores(tmp_path: Path) -> None:
    assert score_study(make_study(tmp_path)) == ([], [])
