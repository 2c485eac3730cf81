"""Means over seeds: which runs enter, at which step; and what a page says of step 0, of n and of values left out."""

import math

import pytest

from peerlearn.report.curves import curve_sections
from peerlearn.report.metric_kinds import Metric, kind
from peerlearn.report.run_facts import read_facts
from peerlearn.report.score_parts import score_section
from tests.peerlearn.report.run_folders import make_run, measured, write_top1


def table(runs, start):
    section = score_section(read_facts(runs))
    (found,) = [each for each in section.parts if each.caption.startswith(start)]
    return [dict(zip(found.headings, cells, strict=True)) for cells in found.rows]


def steps(last, top1, *, end=True):
    rows = [{"step": n, "attempt": 1, "net/0/knn_top1": top1} for n in range(0, last + 1, 10)]
    if not end:
        rows[-1]["net/0/knn_top1"] = None
    return rows


def test_only_runs_at_the_same_step_enter_a_mean(tmp_path):
    of_seed = [steps(200, 70.0), steps(200, 74.0), steps(10, 10.0), steps(200, 20.0, end=False)]
    runs = [make_run(tmp_path / f"r{seed}", rows, seed=seed) for seed, rows in enumerate(of_seed)]
    (found,) = table(runs, "Means over")
    assert (found["mean"], found["n (seeds)"], found["step"]) == (72.0, 2, 200)
    assert (found["seeds"], found["left out"]) == ("0, 1", "r2 (step 10), r3 (step 190)")
    remarks = [each["remark"] for each in table(runs, "Accuracies while")]
    assert remarks == [None] * 3 + ["newest finite value; that of step 200 is not finite"]


def test_seeds_whose_epoch_validation_chose_enter_one_mean(tmp_path):
    runs = []
    for seed, epoch in enumerate((2, 3, 5)):
        runs.append(make_run(tmp_path / f"r{seed}", [], seed=seed))
        protocol = {"split": "test", "epoch": epoch, "epoch_chosen_by": "validation"}
        write_top1(runs[-1], 70.0 + epoch, seed=seed, step=10 * epoch, protocol=protocol)
    (found,) = table(runs, "Means over")
    assert found["mean"] == pytest.approx(70 + 10 / 3)
    assert (found["seeds"], found["step"]) == ("0, 1, 2", "chosen: 20, 30, 50")
    assert found["protocol"] == "P1, P2, P3"


@pytest.mark.parametrize(
    ("init", "heading", "told"),
    [(None, "untrained", "Step 0: untrained networks."), ("a.safetensors", "at step 0", "At step")],
)
def test_networks_that_start_from_weights_are_not_untrained(tmp_path, init, heading, told):
    rows = [{"step": n, "attempt": 1} | measured(n, 70.0) for n in (0, 10)]
    run = make_run(tmp_path / "a", rows, cohort={"init": init})
    assert heading in table([run], "Accuracies while")[0]
    (accuracy,) = [e for e in curve_sections(read_facts([run])) if e.title == "Accuracy"]
    assert told in accuracy.parts[0].caption
    assert ("untrained" in accuracy.parts[0].caption) is (init is None)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_accuracies_of_classifiers_have_their_n_and_standard_error(tmp_path, split):
    rows = [
        {"step": n, "attempt": 1, f"net/0/{split}_top1": 80.0, f"{split}/images": 400}
        for n in (0, 10)
    ]
    run = make_run(tmp_path / "a", rows)
    (found,) = table([run], "Accuracies while")
    assert found["s.e. of last"] == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 400))
    assert table([run], "Protocols")[0]["how"] == f"{split} images (n) 400"
    titles = {e.title: len(e.parts) for e in curve_sections(read_facts([run]))}
    assert (titles["Accuracy"], titles["Other metrics"]) == (1, 0)


def test_figures_of_classifiers_have_kinds_and_units():
    names = ("test_top5", "cross_entropy", "ensemble_weight", "teaching")
    assert [kind(Metric(name, "0"))[:2] for name in names] == [
        ("Accuracy", "Test top-5 (%)"),
        ("Loss", "Cross-entropy, cross_entropy"),
        ("Training", "Weight in the weighted ensemble"),
        ("Other metrics", "teaching"),
    ]


@pytest.mark.parametrize(("values", "is_told"), [([70.0, 72.0], False), ([70.0, 72.0, 74.0], True)])
def test_a_mean_of_two_runs_has_no_interval(tmp_path, values, is_told):
    run = make_run(tmp_path / "a", [])
    mean = {"mean": 72.0, "std": 2.0, "ci95": 5.0, "values": values}
    write_top1(run, 0.0, metrics={"top1": mean, "n": 400})
    (found,) = table([run], "Results of")
    assert ("low" in found) is is_told
