"""Sweeps: which runs a file makes, what its table says, what is refused, and going on after a stop."""

import csv
import json
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from peerlearn.cli import main
from peerlearn.commands.verbs import VERBS
from peerlearn.config import config_to_yaml
from peerlearn.evaluation.results import write_result
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.stop import Stop
from peerlearn.runs.training_facts import TrainingFacts, write_env
from slurm.plan import plan_tasks
from studies.sweep import Sweep, SweptRun, check_folder, plan_sweep, write_sweep
from studies.sweep_config import read_sweep
from studies.sweep_plot import axis_numbers, doubles
from studies.sweep_run import run_missing
from studies.sweep_scores import Score, paired_difference, score_sweep
from studies.sweep_table import grid_table, report
from tests.e2e.runs import SMALL, command, environment, events
from tests.warm import Process
from tests.warm import run as run_process

LAST_STEP = 12
TERMS = {"all": "", "without scl_hard": "--terms scl_soft icl_hard icl_soft"}
SIZES = {"cohort.embedding_dim": [8, 16, 32]}


def write_file(home: Path, **keys: object) -> Path:
    """FILE.yaml of a small sweep in ``home``/s."""
    content = {
        "folder": str(home / "s"),
        "pretrain": shlex.join([*SMALL, "--method", "simclr"]),
        "seeds": [0, 1],
        "grids": {"terms": {"loss terms": TERMS}, "size": SIZES},
        **keys,
    }
    file = home / "file.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def make(home: Path, **keys: object) -> Sweep:
    return plan_sweep(read_sweep(write_file(home, **keys)))


def names(sweep: Sweep) -> dict[tuple[str, ...], str]:
    return {(cell.grid, *cell.labels): cell.variant.name for cell in sweep.cells}


def begin(run: SweptRun, *, done: bool = True) -> RunDirectory:
    """A run directory as training leaves it, without training."""
    directory = RunDirectory(run.folder)
    directory.create_folder()
    config = replace(run.variant.config, seed=run.seed, run=str(run.folder))
    directory.write_config(config_to_yaml(config))
    if done:
        directory.event("done", attempt=1, step=LAST_STEP)
        directory.mark_done()
    return directory


def classified(
    run: SweptRun, scores: Mapping[str, float], step: int = LAST_STEP, **changes: object
) -> None:
    """Result files of a step."""
    for network, top1 in scores.items():
        facts: dict = {
            "task": "classification",
            "dataset": "digits",
            "metrics": {"top1": top1, "top5": top1 / 2 + 50, "n": 360},
            "protocol": {"split": "test", "network": network},
            "export_hash": "x",
            "seed": run.seed,
            "seconds": 1.0,
        }
        write_result(run.folder / "results", step=step, network=network, **(facts | changes))


def finish(sweep: Sweep, values: Mapping[tuple[str, int], tuple[float, ...]]) -> None:
    """Finished runs: (net 0, net 1, ensemble) by variant and seed."""
    for run in sweep.runs:
        if (run.variant.name, run.seed) in values:
            begin(run)
            scores = values[run.variant.name, run.seed]
            classified(run, dict(zip(("0", "1", "ensemble"), scores, strict=False)))


def find(scores: list[Score], *labels: str, network: str = "individual") -> Score:
    (found,) = [
        score
        for score in scores
        if (score.cell.grid, *score.cell.labels, score.network, score.metric)
        == (*labels, network, "top1")
    ]
    return found


# Which runs


def test_a_grid_is_the_product_of_its_axes_and_equal_configs_are_one_run(tmp_path: Path) -> None:
    sweep = make(
        tmp_path,
        grids={
            "terms": {"loss terms": TERMS},
            "size": SIZES,
            "both": {
                "networks": {"one": "--cohort.networks 1", "two": ""},
                "alpha": {"low": "--alpha 0.25", "as it is": "--alpha 0.5"},
            },
        },
    )
    base, low = "base", "alpha-0.25"
    assert names(sweep) == {
        ("terms", "all"): base,
        ("terms", "without scl_hard"): "terms-scl_soft+icl_hard+icl_soft",
        ("size", "8"): "cohort.embedding_dim-8",
        ("size", "16"): base,
        ("size", "32"): "cohort.embedding_dim-32",
        ("both", "one", "low"): "alpha-0.25_cohort.networks-1",
        ("both", "one", "as it is"): "cohort.networks-1",
        ("both", "two", "low"): low,
        ("both", "two", "as it is"): base,
    }
    assert [(run.seed, run.folder.name) for run in sweep.runs[:2]] == [
        (0, "base-seed-0"),
        (0, "terms-scl_soft+icl_hard+icl_soft-seed-0"),
    ]
    assert len(sweep.runs) == len({run.folder for run in sweep.runs}) == 7 * 2
    by_name = {variant.name: variant.config for variant in sweep.variants}
    assert (by_name[low].alpha, by_name[low].cohort.networks) == (0.25, 2)
    one = by_name["cohort.networks-1"]
    assert (one.alpha, one.cohort.networks) == (0.5, 1)
    assert sweep.config.baseline == {"terms": "all", "size": "8", "both": "low"}


def test_a_new_grid_renames_no_run(tmp_path: Path) -> None:
    before = names(make(tmp_path))
    grids = {"first": {"beta": [0.1, 0.2]}, "terms": {"loss terms": TERMS}, "size": SIZES}
    after = names(make(tmp_path, grids=grids))
    assert {key: after[key] for key in before} == before
    assert after["first", "0.2"] == "beta-0.2"


def test_names_of_odd_and_long_values_are_short_and_differ(tmp_path: Path) -> None:
    names_of_run = ["a b", "a/b", "c" * 100, "c" * 99 + "d"]
    sweep = make(tmp_path, grids={"g": {"data.root": names_of_run}})
    found = [variant.name for variant in sweep.variants]
    assert len(set(found)) == 4
    assert all(len(name) <= 80 and "/" not in name and " " not in name for name in found)


def test_labels_are_as_written_and_values_as_on_the_command_line(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    text = file.read_text()
    text = text[: text.index("grids:")] + (
        "grids:\n"
        "  g:\n"
        "    a: &axis {no: '', 1e-3: --base_lr 1e-3, '2': }\n"
        "    symmetric: [false]\n"
        "    cohort.share_stages: [null, 1]\n"
        "    cohort.backbones: [conv4, [conv4, resnet32]]\n"
        "  h:\n"
        "    a: *axis\n"
    )
    file.write_text(text)
    config = read_sweep(file)
    sweep = plan_sweep(config)
    assert list(config.grids["g"]["a"]) == list(config.grids["h"]["a"]) == ["no", "1e-3", "2"]
    assert list(config.grids["g"]["cohort.backbones"]) == ["conv4", "conv4, resnet32"]
    cells = {cell.labels: cell.variant.config for cell in sweep.cells}
    last = cells["1e-3", "false", "1", "conv4, resnet32"]
    assert (last.base_lr, last.symmetric, last.cohort.share_stages) == (1e-3, False, 1)
    assert last.cohort.backbones == ["conv4", "resnet32"]
    assert cells["2", "false", "null", "conv4"].cohort.share_stages is None
    again = tmp_path / "again.yaml"
    again.write_text(config_to_yaml(config))
    assert read_sweep(again) == config


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    config = read_sweep(file, folder="f", seeds=[7], pretrain="--epochs 3")
    assert (config.folder, config.seeds) == ("f", [7])
    sweep = plan_sweep(config, only=["size"])
    assert sweep.grids == ["size"]
    assert {variant.config.epochs for variant in sweep.variants} == {3}


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("without scl_hard", {"terms": "without scl_hard", "size": "8"}),
        ({"size": 16}, {"terms": "all", "size": "16"}),
        (32, {"terms": "all", "size": "32"}),
    ],
)
def test_the_baseline_is_a_label_of_the_last_axis(
    tmp_path: Path, baseline: object, expected: dict
) -> None:
    assert read_sweep(write_file(tmp_path, baseline=baseline)).baseline == expected


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sedes": [0]}, "unknown key 'sedes'; did you mean 'seeds'?"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": None}, "line 6: seeds: expected a value, got null"),
        ({"seeds": 3}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, True]}, "seeds must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "seeds holds one twice"),
        ({"folder": ""}, "folder must name"),
        ({"folder": 3}, "folder must be a path"),
        ({"grids": {}}, "grids must hold at least one"),
        ({"grids": [1]}, "grids must map names to axes"),
        ({"grids": {"g": {}}}, "grids: g: it has no axis"),
        ({"grids": {"g": "--alpha 1"}}, "grids: g: it must map axes"),
        ({"grids": {"g": {"a": {}}}}, "grids: g: a: it has no label"),
        ({"grids": {"g": {"a": "--alpha 1"}}}, "grids: g: a: an axis maps labels to words"),
        ({"grids": {"g": {"a": {"x": 3}}}}, "grids: g: a: x: words must be a line of text, got 3"),
        ({"grids": {"g": {"alfa": [1, 2]}}}, "this is none; did you mean 'alpha'?"),
        ({"grids": {"g": {"cohort": [1, 2]}}}, "and this is none"),
        ({"grids": {"g": {"alpha": [1, "1"]}}}, "grids: g: alpha: '1' stands twice"),
        ({"grids": {"g": {"a": {"x": "--alpha '1"}}}}, 'g: a: x: "--alpha \'1" cannot be split'),
        ({"grids": {"g": {"a": {"x": "--seed 1"}}}}, "g: a: x: --seed has no place here"),
        ({"pretrain": "--run=a"}, "pretrain: --run has no place here"),
        ({"baseline": "vanila"}, "no grid's last axis has a label 'vanila'"),
        ({"baseline": {"sise": 8}}, "baseline: unknown grid 'sise'; did you mean 'size'?"),
        ({"baseline": {"size": 9}}, "baseline: size: its last axis has no label '9'"),
        ({"grids": {"g": {"a": {"ok": "", "x": "--alfa 1"}}}}, "grids: g: x: unknown key --alfa"),
        ({"grids": {"g": {"a": {"x": "--alpha -1"}}}}, "grids: g: x: alpha must be at least 0"),
        ({"grids": {"g": {"alpha": [0, "x"]}}}, "grids: g: x: "),
        ({"pretrain": "no_such_config"}, "grids: terms: all: 'no_such_config' is neither"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, keys: dict, message: str
) -> None:
    assert main(["sweep", str(write_file(tmp_path, **keys))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "folder: f\nseeds: [0]\ngrids: {g: {a: {x: '',\n x: 1}}}\n",
            "grids.g.a.x stands twice (lines 3 and 4)",
        ),
        (
            "folder: f\nseeds: [0]\ngrids: {g: {alpha: [1]},\n g: {beta: [1]}}\n",
            "grids.g stands twice (lines 3 and 4)",
        ),
        ("folder: f\nseeds: [0]\ngrids: {g: {[a, b]: [1]}}\n", "a key must be a word"),
        ("folder: [\n", "file.yaml, line 2: not a readable YAML file"),
        ("folder\n", "a config file holds `key: value` lines"),
        ("", "holds no keys"),
    ],
)
def test_files_that_are_no_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert main(["sweep", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--only", "sise"], 2, "--only: no grid is named 'sise'; did you mean 'size'?"),
        (["--seeds"], 2, "--seeds"),
        (["--table", "--dry_run"], 2, "not allowed with"),
        (["--sedes", "1"], 2, "--sedes"),
        (["--table"], 1, "nothing of this sweep has been run yet"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], code: int, message: str
) -> None:
    assert main(["sweep", str(write_file(tmp_path)), *words]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sweep", str(tmp_path)]) == 2
    assert "it has no sweep.yaml" in capsys.readouterr().err
    assert main(["sweep", "figure_33"]) == 2
    assert "neither a file nor a shipped config" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    file = write_file(tmp_path, folder=str(tmp_path / "taken" / "s"))
    assert main(["sweep", str(file)]) == 1
    assert "cannot be written (Not a directory): choose another --folder" in capsys.readouterr().err


def test_a_folder_with_runs_of_other_configs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sweep = make(tmp_path)
    begin(sweep.runs[0], done=False)
    check_folder(sweep)
    elsewhere = shlex.join([*SMALL, "--method", "simclr", "--data.root", "there"])
    check_folder(make(tmp_path, pretrain=elsewhere))
    longer = write_file(
        tmp_path, pretrain=shlex.join([*SMALL, "--method", "simclr", "--epochs", "9"])
    )
    assert main(["sweep", str(longer)]) == 1
    error = capsys.readouterr().err
    assert "base-seed-0 is a run of another config: epochs is 2 there and 9 in the sweep" in error
    assert not (tmp_path / "s" / "sweep.yaml").exists()
    sweep.runs[1].folder.mkdir()
    (sweep.runs[1].folder / "notes.txt").write_text("mine")
    assert main(["sweep", str(write_file(tmp_path))]) == 1
    assert f"{sweep.runs[1].folder} is there and no run" in capsys.readouterr().err


# The table


def test_the_numbers_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Against NumPy and SciPy; a seed that one of the two lacks is left out of their difference only."""
    sweep = make(
        tmp_path,
        seeds=[3, 0, 1, 2],
        grids={"g": {"size": {"8": "--cohort.embedding_dim 8", "16": ""}, "alpha": [0.5, 0.7]}},
    )
    random = np.random.default_rng(0)
    values = {
        (variant.name, seed): tuple(random.uniform(50, 90, 3))
        for variant in sweep.variants
        for seed in sweep.config.seeds
    }
    del values["alpha-0.7", 0]
    finish(sweep, values)
    findings = report(sweep, whole=True)
    (problem,) = findings.problems
    assert (problem.run, problem.why) == ("alpha-0.7-seed-0", "it has not begun")
    assert problem.cells == ["g: 16 / 0.7"]

    for size, name in (("8", "cohort.embedding_dim-8"), ("16", "base")):
        other = "alpha-0.7" + ("_cohort.embedding_dim-8" if size == "8" else "")
        common = [seed for seed in sweep.config.seeds if (other, seed) in values]
        for network, of in (("individual", lambda v: np.mean(v[:2])), ("ensemble", lambda v: v[2])):
            theirs = np.array([of(values[name, seed]) for seed in common])
            ours = np.array([of(values[other, seed]) for seed in common])
            baseline = find(findings.scores, "g", size, "0.5", network=network)
            assert baseline.difference is None
            everything = [of(values[name, seed]) for seed in sweep.config.seeds]
            assert baseline.mean == pytest.approx(np.mean(everything))
            assert baseline.std == pytest.approx(np.std(everything, ddof=1))
            score = find(findings.scores, "g", size, "0.7", network=network)
            assert score.mean == pytest.approx(ours.mean())
            assert score.std == pytest.approx(ours.std(ddof=1))
            assert score.difference is not None
            assert score.difference.seeds == common
            assert score.difference.mean == pytest.approx((ours - theirs).mean())
            low, high = stats.t.interval(
                0.95, len(common) - 1, (ours - theirs).mean(), stats.sem(ours - theirs)
            )
            assert score.difference.ci95 == pytest.approx((high - low) / 2)
            assert score.difference.p == pytest.approx(stats.ttest_1samp(ours - theirs, 0).pvalue)
    own = find(findings.scores, "g", "16", "0.5", network="1")
    assert own.values == {seed: values["base", seed][1] for seed in sweep.config.seeds}
    (top5,) = [
        score
        for score in findings.scores
        if (score.cell.labels, score.network, score.metric) == (("16", "0.5"), "ensemble", "top5")
    ]
    assert top5.mean == pytest.approx(
        np.mean([values["base", seed][2] / 2 + 50 for seed in sweep.config.seeds])
    )
    check_files(sweep, findings.scores)
    printed = capsys.readouterr().out
    assert "missing: alpha-0.7-seed-0: it has not begun" in printed
    assert "not corrected for multiple comparisons" in " ".join(printed.split())


def check_files(sweep: Sweep, scores: list[Score]) -> None:
    """The files tell the same."""
    rows = list(csv.DictReader((sweep.root / "sweep.csv").read_text().splitlines()))
    content = json.loads((sweep.root / "sweep.json").read_text())
    assert len(rows) == len(content["scores"]) == len(scores)
    for row, plain, score in zip(rows, content["scores"], scores, strict=True):
        assert (row["grid"], row["labels"]) == (score.cell.grid, " / ".join(score.cell.labels))
        assert float(row["mean"]) == plain["mean"] == score.mean
        by_seed = dict(word.split(":") for word in row["values"].split())
        assert {int(k): float(v) for k, v in by_seed.items()} == score.values
        assert {int(k): v for k, v in plain["values"].items()} == score.values
        if score.difference is None:
            assert (row["difference"], plain["difference"]) == ("", None)
        else:
            assert float(row["p"]) == plain["difference"]["p"] == score.difference.p
    assert [problem["run"] for problem in content["problems"]] == ["alpha-0.7-seed-0"]
    markdown = (sweep.root / "sweep.md").read_text()
    score = find(scores, "g", "8", "0.7", network="ensemble")
    assert score.difference is not None
    row = f"| ensemble | 8 | 0.7 | 4 of 4 | {score.mean:.2f} ± {score.std:.2f} | {score.difference.mean:+.2f} | "
    assert row in markdown
    assert "top-1 on digits test (n 360)" in markdown
    assert (sweep.root / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_80_columns_are_enough_for_the_printed_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    axis = {
        "vanilla": "--alpha 0",
        "EnsTeach + MCL (x2)": "",
        "a [bold]label[/] of many words": "--alpha 1",
    }
    sweep = make(tmp_path, grids={"g": {"method": axis}})
    scores = (69.52, 70.5, 81.25)
    finish(
        sweep,
        {
            (v.name, s): tuple(x + s * n for x in scores)
            for n, v in enumerate(sweep.variants)
            for s in (0, 1)
        },
    )
    findings = report(sweep, whole=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ensemble"] in lines
    assert ["vanilla", "2", "of", "2", "81.25", "+-", "0.00", "baseline"] in lines
    score = find(findings.scores, "g", "EnsTeach + MCL (x2)", network="ensemble")
    assert score.difference is not None
    numbers = f"2 of 2 {score.mean:.2f} +- {score.std:.2f} {score.difference.mean:+.2f}"
    low, high = (score.difference.mean + sign * score.difference.ci95 for sign in (-1, 1))
    row = f"EnsTeach + MCL (x2) {numbers} {low:.2f} .. {high:.2f} {score.difference.p:.3f}"
    assert row.split() in lines
    # A longer label is wrapped between words.
    assert any(line[:3] == ["a", "[bold]label[/]", "of"] and line[3] == "2" for line in lines)


def test_differences_without_spread_have_no_p() -> None:
    first = {0: 70.0, 1: 80.5}
    zero = paired_difference(first, dict(first))
    assert zero is not None
    assert (zero.mean, zero.ci95, zero.p) == (0.0, None, None)
    shifted = paired_difference(first, {0: 69.9, 1: 80.4})
    assert shifted is not None
    assert (shifted.ci95, shifted.p) == (None, None)
    assert shifted.mean == pytest.approx(0.1)
    one = paired_difference(first, {1: 80.0, 7: 1.0})
    assert one is not None
    assert (one.mean, one.ci95, one.p, one.seeds) == (0.5, None, None, [1])
    assert paired_difference(first, {5: 1.0}) is None


def test_networks_of_different_kinds_stand_apart(tmp_path: Path) -> None:
    pair = "--cohort.backbones conv4 resnet32"
    sweep = make(
        tmp_path,
        grids={"same": {"alpha": [0.5, 0.7]}, "pair": {"m": {"a": pair, "b": pair + " --alpha 1"}}},
    )
    finish(sweep, {(v.name, s): (60.0 + s, 70.0, 80.0) for v in sweep.variants for s in (0, 1)})
    findings = score_sweep(sweep)
    shown = {grid: grid_table(sweep, findings, grid) for grid in sweep.grids}
    assert {row[0] for row in shown["same"].rows} == {"individual", "ensemble"}
    assert [row[:2] for row in shown["pair"].rows if row[0].startswith("net")] == [
        ["net 0", "a"],
        ["net 0", "b"],
        ["net 1", "a"],
        ["net 1", "b"],
    ]
    assert shown["pair"].headings == [
        *("score", "m", "seeds", "top-1", "vs a", "95 % interval", "p")
    ]


def knn_rows(directory: RunDirectory, *steps: int, networks: int) -> None:
    facts = {"data_root": None, "images": 1437, "seed": 0, "lr": 0.1, "processes": 1}
    write_env(directory.env, "pretrain", TrainingFacts(dataset="digits", **facts))
    for step in steps:
        row: dict = {"step": step, "epoch": 1.0, "ensemble/knn_top1": 90.0 + step}
        row |= {f"net/{m}/knn_top1": 80.0 + m + step for m in range(networks)}
        row |= {"net/key-0/knn_top1": 1.0, "pixels/knn_top1": 2.0, "knn/k": 5}
        row |= {"knn/temperature": 0.1, "knn/train_images": 1437, "knn/test_images": 360}
        directory.append_metrics(row)


def test_without_classification_the_last_knn_counts(tmp_path: Path) -> None:
    sweep = make(tmp_path, grids={"g": {"cohort.networks": [1, 2]}}, seeds=[0])
    for run in sweep.runs:
        knn_rows(begin(run), 0, 6, LAST_STEP, networks=run.variant.config.cohort.networks)
    findings = score_sweep(sweep)
    assert findings.problems == []
    found = {(s.cell.labels[0], s.network): s.mean for s in findings.scores}
    assert found == {
        ("1", "individual"): 92.0,
        ("1", "0"): 92.0,
        ("2", "individual"): 92.5,
        ("2", "ensemble"): 102.0,
        ("2", "0"): 92.0,
        ("2", "1"): 93.0,
    }
    assert findings.scores[0].measured == (
        "kNN top-1 on digits (k 5, temperature 0.1, 1,437 neighbours, n 360)"
    )


def test_runs_without_a_usable_score_say_why(tmp_path: Path) -> None:
    sizes = list(range(1, 10))
    sweep = make(tmp_path, seeds=[0], grids={"g": {"cohort.embedding_dim": sizes}})
    runs = dict(zip(sizes, sweep.runs, strict=True))
    two = {"0": 50.0, "1": 60.0}
    for size, run in runs.items():
        begin(run, done=size not in (2, 3))
    classified(runs[1], two)
    RunDirectory(runs[2].folder).mark_failed("no space")
    classified(runs[3], two)
    classified(runs[4], two)
    damaged = next((runs[4].folder / "results").glob("*-0-*.json"))
    damaged.write_text(damaged.read_text()[:50])
    classified(runs[5], two, step=LAST_STEP - 1)
    classified(runs[6], {"1": 50.0})
    classified(runs[7], two)
    classified(runs[7], {"1": 61.0}, export_hash="another")
    knn_rows(RunDirectory(runs[8].folder), 6, networks=2)
    classified(runs[9], two, metrics={"top1": 50.0, "top5": None, "n": 359})
    findings = score_sweep(sweep)
    found = {problem.run.split("-")[1]: problem.why for problem in findings.problems}
    assert found.keys() == {str(size) for size in sizes} - {"1", "9"}
    for size, why in {
        "2": "no space",
        "3": "it has begun and is not done",
        "4": f"results/{damaged.name} is damaged",
        "5": f"of step {LAST_STEP - 1}, but it ended at step {LAST_STEP}",
        "6": f"its network 0 has no top1 at step {LAST_STEP}",
        "7": "network 1 has several results of step",
        "8": "nor kNN in metrics.jsonl",
    }.items():
        assert why in found[size], found[size]
    assert find(findings.scores, "g", "1").mean == 55.0
    # Measured on other images: not compared.
    other = find(findings.scores, "g", "9")
    assert (other.mean, other.difference) == (50.0, None)
    assert "only what was measured alike" in grid_table(sweep, findings, "g").caption


def test_an_axis_of_numbers_is_a_line_and_doubling_ones_are_evenly_spaced() -> None:
    assert axis_numbers(["64", "8", "0.5"]) == {"0.5": 0.5, "8": 8.0, "64": 64.0}
    assert list(axis_numbers(["64", "8", "0.5"])) == ["0.5", "8", "64"]
    assert axis_numbers(["8", "all"]) == axis_numbers(["8"]) == axis_numbers(["1", "nan"]) == {}
    assert doubles([16, 32, 64, 126])
    assert doubles([0.25, 0.5, 1.0])
    assert not doubles([0, 0.1, 0.2])
    assert not doubles([0.1, 0.2, 0.3])
    assert not doubles([1, 2])


# What is to be run


def test_commands_of_what_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write_file(tmp_path, seeds=[0])
    sweep = plan_sweep(read_sweep(file))
    done, begun, *missing = sweep.runs
    begin(done)
    begin(begun, done=False)
    assert main(["sweep", str(file), "--commands"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(sweep.root)
    assert printed["commands"] == [
        ["resume", str(begun.folder)],
        *(["pretrain", *run.variant.words, *run.own_words] for run in missing),
    ]
    assert main(["sweep", str(file), "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert f"# peerlearn {shlex.join(printed['commands'][1])}\n" in plan
    assert "# terms: all; size: 16; seed 0: done\n" in plan
    own = "".join(line for line in plan.splitlines(keepends=True) if not line.startswith("#"))
    assert yaml.safe_load(own)["seeds"] == [0]

    home, tasks = plan_tasks(["sweep", str(file)], [])
    assert home == sweep.root / "slurm"
    assert [task.words for task in tasks] == printed["commands"]
    assert [task.run for task in tasks] == [str(run.folder) for run in (begun, *missing)]
    assert all(task.trains for task in tasks)
    config = yaml.safe_load(tasks[1].config_yaml or "")
    assert config["cohort"]["embedding_dim"] == missing[0].variant.config.cohort.embedding_dim
    for run in (begun, *missing):
        begin(run)
    words = ["submit", "--cluster", "local", "--dry_run"]
    assert main([*words, "--", "sweep", str(file)]) == 1
    assert "all its runs are done" in capsys.readouterr().err
    assert main([*words, "--", "sweep", str(file), "--table"]) == 2
    assert "done here and now" in capsys.readouterr().err
    assert main([*words, "--sweep", "seed=1,2", "--", "sweep", str(file)]) == 2
    assert "what varies stands in the file" in capsys.readouterr().err
    assert not (sweep.root / "slurm").exists()


def test_a_failure_stops_no_other_and_a_run_that_stops_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sweep = make(tmp_path, seeds=[0])
    done, *others = sweep.runs
    begin(done)
    codes = dict(zip([run.folder for run in others], [1, 0, 75], strict=True))
    started = []

    def run_it(sweep: Sweep, run: SweptRun, stop: Stop) -> int:
        started.append(run.folder)
        directory = begin(run, done=codes[run.folder] == 0)
        if codes[run.folder] == 1:
            directory.mark_failed("no luck")
        return codes[run.folder]

    monkeypatch.setattr("studies.sweep_run._run", run_it)
    assert not run_missing(sweep, Stop())
    assert started == [run.folder for run in others]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{sweep.root}: 4 runs, 1 of them done"
    assert lines[1].startswith(f"[2/4] {others[0].folder.name}: starts")
    assert lines[2].startswith(f"[2/4] {others[0].folder.name}: failed: no luck (")
    assert lines[4].startswith(f"[3/4] {others[1].folder.name}: done (")
    # Again: what failed and what stopped, and no other; then what is told to stop begins nothing.
    started.clear()
    codes[others[2].folder] = 0
    assert run_missing(sweep, Stop())
    assert started == [others[0].folder, others[2].folder]
    started.clear()
    assert not run_missing(sweep, Stop(requested=True))
    assert started == []


@pytest.mark.slow(20)
def test_a_sweep_told_to_stop_goes_on(tmp_path: Path) -> None:
    """The real command: SIGTERM in its first run, then to its end; the second run cannot start."""
    words = [*SMALL, "--method", "simclr", "--data.limit", "64", "--epochs", "40"]
    words += ["--checkpoint.every_steps", "1000", "--checkpoint.export_every_epochs", "1000"]
    words += ["--monitor.every_epochs", "40", "--monitor.train_limit", "200"]
    labels = {"long": "", "failing": "--device cuda:9"}
    file = write_file(
        tmp_path, pretrain=shlex.join(words), seeds=[0], grids={"g": {"which": labels}}
    )
    long, failing = plan_sweep(read_sweep(file)).runs
    start = command("sweep", str(file))
    process = Process(
        start, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 240
    metrics = RunDirectory(long.folder).metrics
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert "[1/2] base-seed-0: starts" in output
    assert output.endswith(f"saved; `peerlearn sweep {tmp_path / 's'}` goes on\n")
    assert not RunDirectory(long.folder).done
    assert not failing.folder.exists()

    # As the command says: by its folder.
    again = command("sweep", str(tmp_path / "s"))
    found = run_process(again, env=environment(), capture_output=True, text=True, timeout=400)
    assert found.returncode == 1, found.stdout + found.stderr
    first, second = events(long.folder, "started")
    assert first["step"] == 0 < second["step"] < events(long.folder, "done")[0]["step"]
    assert "[1/2] base-seed-0: goes on" in found.stdout
    assert RunDirectory(long.folder).done
    content = json.loads((tmp_path / "s" / "sweep.json").read_text())
    (problem,) = content["problems"]
    assert problem["run"] == failing.folder.name
    assert "device 'cuda:9' is not available" in problem["why"]
    assert f"{failing.folder.name}: failed: {problem['why']}" in found.stdout
    scored = {(score["labels"][0], score["network"]) for score in content["scores"]}
    assert {("long", "individual"), ("long", "ensemble")} <= scored
    assert read_sweep(tmp_path / "s" / "sweep.yaml") == read_sweep(file)


def test_a_part_of_a_sweep_leaves_its_files_and_a_moved_folder_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds add up in sweep.yaml; --only and fewer seeds print, and overwrite nothing."""
    words = shlex.join([*SMALL, "--method", "supervised"])
    file = write_file(
        tmp_path, pretrain=words, seeds=[0, 1], grids={"size": SIZES, "t": {"x": TERMS}}
    )
    sweep = plan_sweep(read_sweep(file))
    values = {(v.name, seed): (70.0 + seed, 72.0, 75.0) for v in sweep.variants for seed in (0, 1)}
    finish(sweep, values)
    assert main(["sweep", str(file), "--seeds", "1", "--table"]) == 0
    assert main(["sweep", str(file), "--table"]) == 0
    root = tmp_path / "s"
    assert read_sweep(root / "sweep.yaml").seeds == [0, 1]
    before = {path.name: path.read_bytes() for path in root.glob("sweep.*")}
    assert set(before) == {"sweep.yaml", "sweep.csv", "sweep.json", "sweep.md", "sweep.png"}
    for part in (["--only", "size"], ["--seeds", "0"]):
        capsys.readouterr()
        assert main(["sweep", str(file), "--table", *part]) == 0
        assert f"a part of {root}: its sweep.csv" in capsys.readouterr().out
        assert {path.name: path.read_bytes() for path in root.glob("sweep.*")} == before

    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    root.rename(moved)
    monkeypatch.chdir(moved.parent)
    capsys.readouterr()
    assert main(["sweep", "moved", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("seed 0: done") == printed.count("seed 1: done") == len(sweep.variants)
    assert main(["sweep", "moved", "--table"]) == 0
    assert json.loads((moved / "sweep.json").read_text())["problems"] == []


def test_a_supervised_run_without_its_results_is_not_done(tmp_path: Path) -> None:
    sweep = make(tmp_path, pretrain=shlex.join([*SMALL, "--method", "supervised"]))
    run = sweep.runs[0]
    begin(run)
    assert run.state == "begun"
    classified(run, {"0": 50.0})
    assert run.state == "done"


def test_what_another_process_has_done_meanwhile_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sweep = make(tmp_path, grids={"g": {"x": {"a": "", "b": "--base_lr 0.2"}}}, seeds=[0])
    write_sweep(sweep)
    first, second = sweep.runs
    started = []

    def run(_sweep: Sweep, run: SweptRun, _stop: Stop) -> int:
        started.append(run.folder.name)
        begin(second)
        return 0

    monkeypatch.setattr("studies.sweep_run._run", run)
    assert run_missing(sweep, Stop())
    assert started == [first.folder.name]
    assert "another process has done it meanwhile" in capsys.readouterr().out


# What ships


def test_configs_lists_sweeps_and_prints_one(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "# source: mine\n# expected metric: unmeasured\nfolder: a\n"
    (tmp_path / "figure.yaml").write_text(text)
    monkeypatch.setitem(VERBS, "sweep", VERBS["sweep"]._replace(configs=str(tmp_path)))
    assert main(["configs"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "figure" in line]
    assert line.split() == ["figure", "the", "run's", "images", "unmeasured"]
    assert main(["configs", "figure"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cohort.backbones nonsense", "no network is called 'nonsense'"),
        ("--data.root /nowhere", "data.root /nowhere is not a folder"),
        ("--batch_size 4096", "fewer than one batch"),
    ],
)
def test_networks_images_and_sizes_are_checked_before_anything_runs(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write_file(tmp_path, seeds=[0], grids={"g": {"a": {"good": "", "bad": words}}})
    local = ["submit", "--cluster", "local"]
    for start in (["sweep"], ["sweep", "--dry_run"], [*local, "--", "sweep"]):
        assert main([*start, str(file)]) == 1, start
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


def test_the_listing_of_commands_is_json_alone(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    words = "mcl_fashion_mnist_demo --data.name digits --epochs 1 --epochs 2"
    grids = {"g": {"alpha": [0.5, 0.25]}}
    file.write_text(
        yaml.safe_dump(
            {"folder": str(tmp_path / "r"), "pretrain": words, "seeds": [0], "grids": grids}
        )
    )
    assert main(["sweep", str(file), "--commands"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert len(listing["commands"]) == 2
