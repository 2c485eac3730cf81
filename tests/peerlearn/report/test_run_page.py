"""What a page tells of runs: scores against closed forms, curves with all that happened, runs that are damaged."""

import math
import shutil

import numpy as np
import pytest

from peerlearn.report.config_parts import config_section
from peerlearn.report.curves import curve_sections
from peerlearn.report.page import render_page
from peerlearn.report.parts import Picture, Table
from peerlearn.report.run_facts import read_facts
from peerlearn.report.run_page import run_sections
from peerlearn.report.score_parts import score_section
from peerlearn.report.series import Series
from peerlearn.report.standing_parts import problem_section, standing_section
from peerlearn.report.thinning import COLUMNS, thinned
from peerlearn.runs.directory import RunDirectory
from tests.peerlearn.report.run_folders import make_run, measured, write_top1

LOSSES = [{"step": step, "attempt": 1, "loss": 8 - step / 500} for step in range(0, 101, 10)]


def curves(*runs):
    return {each.anchor: each for each in curve_sections(read_facts(runs))}


def scores(*runs):
    return score_section(read_facts(runs))


def tables(section):
    return [part for part in section.parts if isinstance(part, Table)]


def table(section, start):
    (found,) = [each for each in tables(section) if each.caption.startswith(start)]
    return [dict(zip(found.headings, cells, strict=True)) for cells in found.rows]


def picture(section, title):
    (found,) = [p for p in section.parts if isinstance(p, Picture) and p.caption.startswith(title)]
    return found


def test_the_standing_of_a_run(tmp_path):
    (found,) = table(standing_section(read_facts([make_run(tmp_path / "a")])), "How each run")
    assert found == {"run": "a", "state": "done", "step": 100, "epoch": 2.0, "starts": 0}


def test_scores_while_training_stand_beside_their_baselines(tmp_path):
    found = table(scores(make_run(tmp_path / "a")), "Accuracies while")
    (ensemble,) = [each for each in found if each["network"] == "ensemble"]
    assert ensemble == {
        "run": "a",
        "score": "kNN top-1 (%)",
        "network": "ensemble",
        "untrained": 72.0,
        "raw pixels": 60.0,
        "last": 82.0,
        "step": 100,
        "best": 82.0,
        "best step": 100,
        "s.e. of last": pytest.approx(100 * math.sqrt(0.82 * 0.18 / 400)),
        "protocol": "P1",
    }


def test_a_result_stands_with_its_interval_and_protocol(tmp_path):
    run = make_run(tmp_path / "a")
    write_top1(run, 71.5)
    section = scores(run)
    (found,) = table(section, "Results of")
    shown = ("score", "network", "metric", "value", "low", "high", "n", "step", "seed")
    assert [found[key] for key in shown] == [
        *("knn on digits", "ensemble", "top-1 (%)", 71.5, 67.5, 75.5, 400, 100, 0)
    ]
    protocols = {each["protocol"]: each["how"] for each in table(section, "Protocols")}
    assert protocols[found["protocol"]] == "k 200, temperature 0.1"


def test_runs_that_differ_by_their_seed_are_averaged_and_paired(tmp_path):
    top1 = {"moco": (70.0, 72.0, 77.0), "simclr": (71.0, 74.0, 76.0)}
    runs = []
    for method, values in top1.items():
        for seed, value in enumerate(values):
            run = make_run(tmp_path / f"{method}{seed}", method=method, seed=seed)
            write_top1(run, value, seed=seed)
            runs.append(run)
    section = scores(*runs)
    means = [each for each in table(section, "Means over") if each["score"].startswith("knn on")]
    assert [each["runs"] for each in means] == ["method moco", "method simclr"]
    assert [each["mean"] for each in means] == pytest.approx([73.0, 221 / 3])
    assert means[0]["std"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    # Student's t for two degrees of freedom is 4.302653.
    assert means[0]["half of 95 %"] == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)
    difference = table(section, "Differences to method moco")
    (own,) = [each for each in difference if each["score"].startswith("knn on")]
    # +1, +2, -1.
    assert (own["mean"], own["std"], own["n (seeds)"]) == pytest.approx(
        (2 / 3, math.sqrt(7 / 3), 3)
    )


def test_only_keys_that_differ_stand_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name, epochs=n) for n, name in enumerate("ab", start=2)]
    assert table(config_section(read_facts(runs)), "Keys whose") == [
        {"key": "epochs", "a": "2", "b": "3"}
    ]


def test_every_numeric_metric_has_a_picture_and_no_other(tmp_path):
    rows = [
        {"step": step, "loss": 1.0, "lr": 0.1, "mystery": step / 7, "text": "x", "flag": True}
        for step in (10, 20)
    ]
    found = curves(make_run(tmp_path / "a", rows))
    titles = [p.caption.split(".")[0] for p in found["curves-other-metrics"].parts]
    assert titles == ["mystery"]
    assert not found["curves-accuracy"].parts
    assert [len(found[f"curves-{name}"].parts) for name in ("loss", "training")] == [1, 1]


def test_what_happened_to_a_run_is_in_its_curves(tmp_path):
    rows = [dict(each) for each in LOSSES]
    rows[3]["loss"] = None
    for later in rows[6:]:
        later["attempt"] = 2
    run = make_run(tmp_path / "a", rows, events=[{"event": "step_skipped", "step": 42}])
    loss = picture(curves(run)["curves-loss"], "Total loss")
    for word in ("restart 1 times", "skipped step 1 times", "not finite 1 times"):
        assert word in loss.alternative
    assert all(
        f">{word}</text>" in loss.image for word in ("restart", "skipped step", "not finite")
    )
    assert math.isnan(dict(loss.numbers.rows)[30])


def test_the_numbers_below_a_curve_are_those_of_its_file(tmp_path):
    numbers = picture(curves(make_run(tmp_path / "a", LOSSES))["curves-loss"], "Total loss").numbers
    assert numbers.rows == tuple((step, 8 - step / 500) for step in range(0, 101, 10))


def test_thinning_keeps_spikes_ends_and_what_is_not_finite():
    steps = np.arange(100_000)
    values = np.sin(steps / 5000)
    values[54_321], values[777] = 9.0, -9.0
    values[20_000:22_000] = np.nan
    thin = thinned(Series(steps=steps, values=values), 0, 99_999)
    assert len(thin.steps) <= 2 * COLUMNS + 2
    assert {0, 777, 54_321, 99_999} <= {*thin.steps.tolist()}
    assert np.isnan(thin.values).any()
    np.testing.assert_array_equal(thin.values, values[thin.steps])


def test_few_values_stay_as_they_are():
    series = Series(steps=np.arange(COLUMNS), values=np.ones(COLUMNS))
    assert thinned(series, 0, COLUMNS) is series


def test_equal_runs_give_equal_bytes(tmp_path):
    run = make_run(tmp_path / "a", LOSSES)
    assert render_page("T", run_sections([run])) == render_page("T", run_sections([run]))


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", None, "config.yaml is not there"),
        ("env.json", "{", "env.json is damaged"),
        ("env.json", None, "env.json is not there"),
        (
            "metrics.jsonl",
            '{"step": 1}\nnonsense\n',
            "metrics.jsonl has 1 line that cannot be read",
        ),
        ("metrics.jsonl", None, "metrics.jsonl is not there"),
        ("results/knn.json", "{", "results/knn.json is damaged, or no result"),
        ("events.jsonl", "nonsense\n", None),
    ],
)
def test_of_a_damaged_run_the_rest_is_shown(tmp_path, file, content, told):
    run = make_run(tmp_path / "a", events=[{"event": "saved", "step": 1}])
    run.results.mkdir()
    if content is None:
        (run.root / file).unlink()
    else:
        (run.root / file).write_text(content)
    facts = read_facts([run])
    section = problem_section(facts)
    problems = [each["problem"] for each in table(section, "What")] if told else []
    assert [problem[: len(told or "")] for problem in problems] == ([told] if told else [])
    assert standing_section(facts).parts
    assert bool(facts[0].series.by_name) is (file != "metrics.jsonl")


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = make_run(tmp_path / "a", [], done=False)
    run.metrics.unlink()
    shutil.rmtree(run.root / "logs", ignore_errors=True)
    (found,) = table(run_sections([run])[0], "How each run")
    assert found == {"run": "a", "state": "stopped", "starts": 0}


@pytest.mark.parametrize("runs", [2, 10])
def test_many_runs_have_one_curve_each(tmp_path, runs):
    rows = [{"step": step, "attempt": 1} | measured(step, 70 + step / 50) for step in (0, 50)]
    made = [make_run(tmp_path / str(n), rows) for n in range(runs)]
    knn = picture(curves(*made)["curves-accuracy"], "kNN")
    assert len(knn.numbers.headings) == 1 + (6 if runs == 2 else 10)
    # The ensemble's, of each run.
    assert knn.numbers.rows[-1][-1] == 73.0


def test_a_run_named_twice_stands_once(tmp_path):
    run = make_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(run.root)
    assert len(read_facts([run, RunDirectory(tmp_path / "link")])) == 1
