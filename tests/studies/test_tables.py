"""The tables of a study in every format: what stands in them, and how wide they are."""

import csv
import io
import json
import math
import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from peerlearn.errors import UserError
from studies.evaluations import Problem
from studies.formats import as_csv, as_json, as_latex, as_markdown, latex
from studies.picture import axis_numbers, draw_panel, is_geometric, plot_tables
from studies.report import report
from studies.scores import score_study
from studies.study import Study
from studies.table import Row, Table, tables
from tests.drawn import check_texts, figure_of
from tests.study_folders import METHODS, begin, evaluate, finish, make_study, write_scores

# The labels of Table 1 of the paper.
NETWORKS = {"ResNet-32": "", "ResNet-110": "--base_lr 0.2"}
TEACHING = {
    "vanilla": "--alpha 0 --beta 0 --supervised.teaching none",
    "DML": "--alpha 0 --beta 0 --supervised.teaching dml",
    "DML + MCL (x2)": "--supervised.teaching dml",
    "EnsTeach + MCL (x2)": "",
}
TABLE_1 = {"table 1": {"network": NETWORKS, "method": TEACHING}}
PUBLISHED = [
    {
        "grid": "table 1",
        "score": "classification/top1",
        "network": network,
        "rows": {"ResNet-32": figures, "ResNet-110": [75.29, None, 77.81, 77.92]},
    }
    for network, figures in (
        ("individual", [70.91, 72.25, 73.46, 74.56]),
        ("ensemble", [73.49, 72.59, 73.63, 76.14]),
    )
]


def measured_table_1(home: Path, seeds: int = 3, **keys: Any) -> Study:
    """All runs of Table 1, each cell better than the one before."""
    study = make_study(home, grids=TABLE_1, published=PUBLISHED, seeds=list(range(seeds)), **keys)
    for place, cell in enumerate(study.cells):
        for seed in study.config.seeds:
            run = study.run_of(cell.variant, seed)
            begin(run)
            own = 70.0 + place + math.sin(place * seed)
            write_scores(run, {"0": own, "1": own + 1, "ensemble": own + 4 - 0.5 * seed})
    return study


def only(study: Study) -> Table:
    (table,) = tables(study, score_study(study)[0])
    return table


def row_of(table: Table, group: str, label: str, network: str = "individual") -> Row:
    (row,) = [r for r in table.rows if (r.group, r.label, r.network) == (group, label, network)]
    return row


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def printed(study: Study, capsys: pytest.CaptureFixture[str], *problems: Problem) -> str:
    capsys.readouterr()
    report(study, problems, write=False)
    return capsys.readouterr().out


# What stands in a table


def test_nothing_run_leaves_the_published_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    study = make_study(tmp_path, grids=TABLE_1, published=PUBLISHED)
    table = only(study)
    assert {row.network for row in table.rows} == {"individual", "ensemble"}
    row = row_of(table, "ResNet-32", "EnsTeach + MCL (x2)", "ensemble")
    assert (row.score, row.published, row.gain) == (None, 76.14, pytest.approx(2.65))
    assert row_of(table, "ResNet-32", "vanilla").gain is None
    assert row_of(table, "ResNet-110", "DML").published is None
    text = printed(study, capsys)
    assert ["method", "top1", "(%)", "published", "gain"] in words(text)
    assert ["EnsTeach", "+", "MCL", "(x2)", "unmeasured", "74.56", "+3.65"] in words(text)
    assert ["DML", "unmeasured"] in words(text)
    assert "seeds" not in text.split("Nothing is measured")[0]
    assert not (tmp_path / "s").exists()


def test_scores_stand_beside_the_published_figures_and_their_gains(tmp_path: Path) -> None:
    table = only(measured_table_1(tmp_path))
    row = row_of(table, "ResNet-110", "EnsTeach + MCL (x2)")
    assert row.score is not None
    assert row.score.mean == pytest.approx(77.5 + sum(math.sin(7 * s) for s in range(3)) / 3)
    assert (row.published, row.gain) == (77.92, pytest.approx(77.92 - 75.29))
    # Compared with vanilla of the same row, and not with the first row's.
    first = row_of(table, "ResNet-110", "vanilla")
    assert first.score is not None
    assert row.score.difference is not None
    assert row.score.difference.mean == pytest.approx(row.score.mean - first.score.mean)
    assert len(table.rows) == 2 * len(NETWORKS) * len(TEACHING)


def test_p_is_corrected_for_all_comparisons_of_its_table_and_no_other(tmp_path: Path) -> None:
    study = measured_table_1(tmp_path, evaluate=["knn --k 20"])
    for cell in study.cells[:2]:
        for seed in study.config.seeds:
            # Two comparisons in this table: of individuals, and of ensembles.
            scores = {"0": 50.0 + seed * len(cell.labels[1]), "1": 50.0, "ensemble": 60.0 + seed**2}
            evaluate(study.run_of(cell.variant, seed), "knn --k 20", scores)
    scores, _ = score_study(study)
    own, knn = tables(study, scores)
    assert (own.key.task, knn.key.task) == ("classification", "knn")
    p_values = {}
    for row in own.rows:
        if row.label != "vanilla":
            base = row_of(own, row.group, "vanilla", row.network).score
            assert row.score is not None
            assert base is not None
            seeds = list(study.config.seeds)
            p = stats.ttest_rel(*([s.values[n] for n in seeds] for s in (row.score, base))).pvalue
            p_values[row.network, row.group, row.label] = p
            assert row.score.difference is not None
            assert row.score.difference.p == pytest.approx(p)
    assert len(p_values) == 12
    largest = 0.0
    for done, (place, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1, (12 - done) * p))
        score = row_of(own, place[1], place[2], place[0]).score
        assert score is not None
        assert score.difference is not None
        assert score.difference.p_holm == pytest.approx(largest), place
    assert "corrected for all comparisons of this table (12)" in own.caption
    # The ensembles' differences have no spread, and so no p.
    difference = row_of(knn, "ResNet-32", "DML").score.difference  # type: ignore[union-attr]
    assert difference is not None
    assert difference.p_holm == difference.p
    assert "comparisons of this table (1)" in knn.caption
    # What is in no table is not corrected.
    assert all(s.difference.p_holm is None for s in scores if s.difference)


def test_the_config_says_which_scores_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["classification/top5", "linear/top1"]
    study = measured_table_1(tmp_path, evaluate=["linear"], compare={"score": asked})
    table = only(study)
    assert table.metric == "top5"
    assert row_of(table, "ResNet-32", "vanilla").published is None
    assert "missing: " not in printed(study, capsys)
    # A score that is not measured yet may still come; these cannot.
    for name in ("classification/top3", "knn/top1"):
        wrong = replace(study.config, compare=replace(study.config.compare, score=[name]))
        text = printed(replace(study, config=wrong), capsys)
        assert text.splitlines()[-2:] == [
            "table 1: nothing is measured yet",
            f"missing: study.yaml: compare: score: no result has {name}: there are "
            "classification/top1, classification/top5",
        ]


def test_published_figures_do_not_stand_beside_scores_on_validation_images(tmp_path: Path) -> None:
    lines = ["linear --data.validation_images 9", "linear"]
    figures = [{"grid": "g", "score": "linear/top1", "rows": {"": [1, 2]}}]
    study = make_study(tmp_path, seeds=[0], evaluate=lines, published=figures)
    run = study.runs[0]
    begin(run)
    for line, dataset in zip(lines, ("a, validation images", "a"), strict=True):
        evaluate(run, line, {"0": 60.0, "1": 61.0}, dataset=dataset)
    found = {table.key.dataset: table for table in tables(study, score_study(study)[0])}
    shown = {name: [row.published for row in table.rows][:2] for name, table in found.items()}
    assert shown == {"a, validation images": [None, None], "a": [1, 2]}


def test_published_figures_find_their_data_set_and_variant(tmp_path: Path) -> None:
    facts = {"grid": "g", "score": "linear/top1"}
    study = make_study(
        tmp_path,
        seeds=[0],
        evaluate=["linear --data.name a", "linear --data.name b", "fewshot"],
        published=[
            {**facts, "dataset": "a", "rows": {"": [1, 2]}},
            {**facts, "dataset": "c", "rows": {"": [3, 4]}},
            {**facts, "rows": {"": [5, 6]}, "network": "ensemble"},
            {"grid": "g", "score": "fewshot/accuracy", "variant": "5-way", "rows": {"": [7, 9.5]}},
        ],
    )
    run = study.runs[0]
    begin(run)
    write_scores(run, {"0": 50.0, "1": 50.0})
    for name in ("a", "b"):
        line = f"linear --data.name {name}"
        evaluate(run, line, {"0": 60.0, "1": 61.0, "ensemble": 70.0}, dataset=name)
    found = {
        (table.key.task, table.key.dataset, table.key.variant): table
        for table in tables(study, score_study(study)[0])
    }
    assert list(found) == [
        ("classification", "digits", ""),
        ("linear", "a", ""),
        ("linear", "b", ""),
        ("linear", "c", ""),
        ("fewshot", "", "5-way"),
    ]
    figures = {key: [row.published for row in table.rows] for key, table in found.items()}
    assert figures["classification", "digits", ""] == [None, None]
    assert figures["linear", "a", ""] == [1, 2, 5, 6]
    assert figures["linear", "b", ""] == [None, None, 5, 6]
    assert figures["linear", "c", ""] == [3, 4, 5, 6]
    few = found["fewshot", "", "5-way"]
    assert [row.gain for row in few.rows] == [None, 2.5]
    assert few.key.line == "fewshot"


def test_rows_of_another_data_set_stand_in_its_table_alone(tmp_path: Path) -> None:
    """As Table 8 has it: the data set is an axis."""
    facts = {"grid": "g", "score": "linear/top1"}
    axes = {"data": {"a": "", "b": "--base_lr 0.2"}, "method": METHODS}
    study = make_study(
        tmp_path,
        grids={"g": axes},
        evaluate=["linear"],
        published=[
            {**facts, "dataset": "a", "rows": {"a": [1, 2]}},
            {**facts, "dataset": "b", "rows": {"b": [3, 4]}},
        ],
    )
    methods = list(METHODS)
    expected = {"a": [("a", each) for each in methods], "b": [("b", each) for each in methods]}
    assert {t.key.dataset: [(r.group, r.label) for r in t.rows] for t in tables(study, [])} == (
        expected
    )
    for cell in study.cells[:3]:
        run = study.run_of(cell.variant, 0)
        begin(run, done=False)
        evaluate(run, "linear", {"0": 50.0, "1": 51.0}, dataset=cell.labels[0])
    found = tables(study, score_study(study)[0])
    assert {t.key.dataset: [(r.group, r.label) for r in t.rows] for t in found} == expected
    assert [row.score is None for table in found for row in table.rows] == [False] * 3 + [True]


def test_published_figures_of_no_network_there_is_make_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"grid": "g", "score": "knn/top1", "network": "7"}
    study = make_study(tmp_path, published=[{**facts, "rows": {"": [None, None]}}])
    assert tables(study, []) == []
    assert printed(study, capsys) == "g: nothing is measured yet\n"


def test_networks_of_different_kinds_and_published_ones_stand_apart(tmp_path: Path) -> None:
    pair = "--cohort.backbones conv4 resnet32"
    study = make_study(
        tmp_path,
        seeds=[0],
        grids={
            "same": {"alpha": [0.5, 0.7]},
            "pair": {"m": {"a": pair, "b": pair + " --alpha 1"}},
            "alone": {"m": {"one": "--cohort.networks 1", "two": ""}},
            "named": {"beta": [0.1, 0.3]},
        },
        published=[
            {"grid": "named", "score": "classification/top1", "network": "1", "rows": {"": [1, 2]}}
        ],
    )
    for run in study.runs:
        begin(run)
        names = ["0"] if run.variant.config.cohort.networks == 1 else ["0", "1", "ensemble"]
        write_scores(run, dict.fromkeys(names, 50.0))
    found = {table.grid: table for table in tables(study, score_study(study)[0])}
    shown = {
        grid: list(dict.fromkeys(row.network for row in table.rows))
        for grid, table in found.items()
    }
    assert shown == {
        "same": ["individual", "ensemble"],
        "pair": ["individual", "ensemble", "0", "1"],
        "alone": ["individual", "ensemble"],
        "named": ["individual", "ensemble", "1"],
    }
    # A network alone stands beside the ensembles too.
    assert [(r.label, r.network) for r in found["alone"].rows] == [
        ("one", "individual"),
        ("two", "individual"),
        ("one", "ensemble"),
        ("two", "ensemble"),
    ]


def test_where_one_network_alone_was_asked_for_it_is_shown(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=[0], evaluate=["detect --network 0"])
    metrics = {"ap": 40.0, "ap50": 70.0, "n": 100}
    for run in study.runs:
        begin(run)
        evaluate(run, "detect --network 0", {"0": 0.0}, metrics=metrics)
    (table,) = tables(study, score_study(study)[0])
    assert (table.metric, table.metric_text) == ("ap", "ap (%)")
    assert [row.network for row in table.rows] == ["0", "0"]


# Formats


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_80_columns_are_enough_for_the_longest_labels(
    seeds: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    study = measured_table_1(tmp_path, seeds)
    text = printed(study, capsys)
    assert max(map(len, text.splitlines())) <= 80
    row = row_of(only(study), "ResNet-32", "EnsTeach + MCL (x2)")
    assert row.score is not None
    numbers = f"{seeds} of {seeds} {row.score.mean:.2f}"
    difference = row.score.difference
    assert difference is not None
    if seeds == 1:
        expected = f"{numbers} {difference.mean:+.2f} 74.56 +3.65"
    else:
        mean_and_ci95 = f"{difference.mean:+.2f} +- {difference.ci95:.2f}"
        expected = f"{numbers} +- {row.score.std:.2f} {mean_and_ci95} 74.56 +3.65"
        p_values = f"{difference.p:.3f}, {difference.p_holm:.3f}".replace("0.000", "< 0.001")
        following = words(text)[words(text).index(f"EnsTeach + MCL (x2) {expected}".split()) + 1]
        assert following == p_values.split()
    assert f"EnsTeach + MCL (x2) {expected}".split() in words(text)
    assert "DML + MCL (x2)" in text


def test_80_columns_are_enough_for_costs_beside_published_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are folded; every figure is whole. Memory stands below the processor time."""
    monkeypatch.setenv("COLUMNS", "80")
    study = measured_table_1(tmp_path)
    row = {"step": 1, "attempt": 1, "cpu_seconds": 123_456.0, "peak_memory_mb": 12_345.0}
    for run in study.runs:
        (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    lines = printed(study, capsys).splitlines()
    assert max(map(len, lines)) <= 80
    place = next(n for n, line in enumerate(lines) if line.startswith("DML + MCL"))
    difference = row_of(only(study), "ResNet-32", "DML + MCL (x2)").difference
    assert difference is not None
    told = f"{difference.mean:+.2f} +- {difference.ci95:.2f} 73.46 +2.55 2057.60"
    assert lines[place].split()[-6:] == told.split()
    assert lines[place + 1].split()[-1] == "12345"


def test_odd_labels_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    odd = "a [bold]label[/] of 100% & many_words | \\x"
    labels = {"vanilla": "", odd: "--alpha 1"}
    study = make_study(tmp_path, seeds=[0], grids={"g_1": {"m": labels}})
    finish(study, {("vanilla", 0): (1.0, 2.0), (odd, 0): (3.0, 4.0)})
    shown = tables(study, score_study(study)[0])
    text = printed(study, capsys)
    assert "".join(odd.split()) in "".join(text.split())
    assert r"a \[bold\]label\[/\] of 100% & many\_words \| \\x" in as_markdown(shown, []).replace(
        "many_words", r"many\_words"
    )
    assert r"a [bold]label[/] of 100\% \& many\_words \textbar{} \textbackslash{}x" in as_latex(
        shown
    )


def test_markdown_has_all_columns_and_what_is_missing(tmp_path: Path) -> None:
    problem = Problem(run="r|un", what="knn", why="why")
    text = as_markdown([only(measured_table_1(tmp_path))], [problem])
    lines = text.splitlines()
    assert lines[0] == "## table 1: classification/top1 on digits"
    assert lines[2] == (
        "| score | network | method | seeds | top1 (%) | vs vanilla | 95 % interval | p | p (Holm) "
        "| published | published gain |"
    )
    assert lines[3].count("---") == 3
    assert lines[3].count("--:") == 8
    assert lines[4].startswith("| individual | ResNet-32 | vanilla | 3 of 3 | 70.50 ± 0.00 | base")
    assert {line.count("|") for line in lines[2:20]} == {12}
    assert lines[-2:] == ["Missing:", "", r"- r\|un: knn: why"][1:]


def test_the_files_hold_every_score_and_what_is_unmeasured(tmp_path: Path) -> None:
    study = measured_table_1(tmp_path)
    scores, _ = score_study(study)
    shown = tables(study, scores)
    content = json.loads(as_json(study, shown, scores, [Problem(run="r", what="w", why="y")]))
    assert content["config"]["grids"] == study.config.grids
    assert content["problems"] == [{"run": "r", "what": "w", "why": "y"}]
    # 8 cells x (individual, ensemble, 0, 1) x (top1, top5).
    assert len(content["scores"]) == len(scores) == 8 * 4 * 2
    table_rows = list(csv.DictReader(io.StringIO(as_csv(study, shown, scores))))
    assert len(table_rows) == len(scores)
    for row, plain in zip(table_rows, content["scores"], strict=True):
        assert set(row) == set(plain)
        for name in (
            "mean",
            "std",
            "low",
            "high",
            "difference_mean",
            "difference_p_holm",
            "published",
        ):
            assert row[name] == ("" if plain[name] is None else repr(plain[name]))
        assert json.loads(row["values"]) == plain["values"]
    (own,) = [
        row
        for row in content["scores"]
        if (row["labels"], row["network"], row["metric"])
        == (["ResNet-32", "DML"], "ensemble", "top1")
    ]
    table = row_of(shown[0], "ResNet-32", "DML", "ensemble")
    assert table.score is not None
    assert table.score.difference is not None
    assert own["values"] == {str(seed): value for seed, value in table.score.values.items()}
    assert own["difference_p_holm"] == table.score.difference.p_holm is not None
    assert (own["published"], own["published_gain"]) == (72.59, pytest.approx(-0.9))
    assert (own["task"], own["dataset"], own["line"], own["n"]) == (
        "classification",
        "digits",
        "",
        360,
    )
    # Nothing run: the published figures alone.
    study = make_study(tmp_path / "other", grids=TABLE_1, published=PUBLISHED)
    unmeasured = list(csv.DictReader(io.StringIO(as_csv(study, tables(study, []), []))))
    assert len(unmeasured) == 2 * 8 - 2
    assert [row["published"] for row in unmeasured[:4]] == ["70.91", "72.25", "73.46", "74.56"]
    assert {row["mean"] for row in unmeasured} == {""}
    assert as_csv(study, [], []) == "grid\n"


def test_latex_is_whole(tmp_path: Path) -> None:
    study = measured_table_1(tmp_path, evaluate=["knn --k 20"])
    run = study.runs[0]
    evaluate(run, "knn --k 20", {"0": 50.0, "1": 51.0, "ensemble": 60.0})
    text = as_latex(tables(study, score_study(study)[0]))
    for name in ("table", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 2
    for rule in ("toprule", "bottomrule"):
        assert text.count(f"\\{rule}") == 2
    # A rule after the headings, and one between individuals and ensembles.
    assert text.count("\\midrule") == 4
    for part in text.split("\\begin{tabular}")[1:]:
        columns = re.match(r"\{(l+r+)\}", part)
        assert columns is not None
        rows = [line for line in part.splitlines() if line.endswith(r" \\")]
        assert len(rows) == 1 + 16
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns[1]) - 1
    assert "Evaluation: knn -{}-k 20" in text
    without_escapes = re.sub(r"\\[a-zA-Z]+|\\[&%$#_{}\\]|\$[+\-\\pm]+\$", "", text)
    assert not re.search(r"[$#_^~]", without_escapes)
    assert without_escapes.count("{") == without_escapes.count("}")
    body = "\n".join(text.splitlines()[1:])
    assert re.findall(r"(?<!\\)%", body) == []


def test_every_special_character_of_latex_is_escaped() -> None:
    assert latex("&%$#_{}") == r"\&\%\$\#\_\{\}"
    assert latex("~^\\") == r"\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert latex("p < 0.001 > |") == r"p \textless{} 0.001 \textgreater{} \textbar{}"
    assert latex("74.56 +- 0.30") == r"74.56 $\pm$ 0.30"
    assert latex("-3.65 .. -1.00") == "$-$3.65 .. $-$1.00"
    assert latex("+0.50") == "$+$0.50"
    assert latex("ResNet-32 --alpha 0") == "ResNet-32 -{}-alpha 0"
    assert latex("two\nlines") == r"two\textbackslash{}nlines"


def test_the_interval_of_a_difference_keeps_its_sign_and_is_never_cut(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=[0, 1])
    finish(
        study,
        {
            ("vanilla", 0): (99.0, 99.0),
            ("vanilla", 1): (40.0, 40.0),
            ("MCL (x2)", 0): (10.0, 10.0),
            ("MCL (x2)", 1): (30.0, 30.0),
        },
    )
    text = as_markdown(tables(study, score_study(study)[0]), [])
    # d = -89 and -10: mean -49.5, half width 12.7062 x 79 / 2, t = -99 / 79, p = 1 - 2 atan(99 / 79) / pi.
    assert "| -49.50 | -551.40 .. 452.40 | 0.429 | 0.429 |" in text
    assert "20.00 ± 14.14" in text


# The report


def test_a_report_prints_what_is_missing_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = measured_table_1(tmp_path)
    run = study.runs[3]
    (run.folder / "DONE").unlink()
    damaged = next((study.runs[5].folder / "results").glob("*-1-*.json"))
    damaged.write_text("{}")
    problem = Problem(run=run.folder.name, what="pretraining", why="no space left")
    report(study, [problem, problem], write=True)
    out = capsys.readouterr().out
    missing = [line for line in out.splitlines() if line.startswith("missing: ")]
    assert missing == [
        f"missing: {run.folder.name}: pretraining: no space left",
        f"missing: {study.runs[5].folder.name}: its own accuracy: results/{damaged.name} is damaged: "
        "restore or remove it",
    ]
    assert out.splitlines()[-1] == f"table: {study.root}/table.md, .csv, .json, .tex, .png"
    files = {path.name: path.read_bytes() for path in study.root.glob("table.*")}
    assert set(files) == {f"table.{ending}" for ending in ("csv", "json", "md", "tex", "png")}
    assert files["table.png"].startswith(b"\x89PNG")
    assert [each["why"] for each in json.loads(files["table.json"])["problems"]] == [
        "no space left",
        missing[1].split(": ", 3)[3],
    ]
    assert "2 of 3" in files["table.md"].decode()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    study.root.write_text("a file")
    with pytest.raises(UserError, match=r"/s: cannot be written \(File exists\): choose another"):
        report(study, [], write=True)


# The picture


def names_of_rows(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


@settings(max_examples=1, deadline=None)
@given(
    st.lists(st.text("WMilg _-$%", min_size=1, max_size=60), min_size=2, max_size=9, unique=True)
)
def test_names_of_all_lengths_have_room(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        labels = {name: f"--alpha 0.{number}" for number, name in enumerate(names)}
        by_group = {"kind": {"a": "", "b " * 40: "--beta 0.5"}, "m": labels}
        shown = []
        for name, axes in (("one", {"m": labels}), ("W " * 40, by_group), ("x", {"beta": [1, 2]})):
            root = Path(folder) / str(len(shown))
            root.mkdir()
            study = make_study(root, grids={name: axes}, seeds=[0])
            for run in study.runs:
                begin(run)
                write_scores(run, {"0": 50.0, "1": 52.0, "ensemble": 53.0})
            shown.append(only(study))
        check_texts(figure_of(partial(plot_tables, shown), Path(folder) / "a.svg"))


def test_the_format_of_the_picture_is_the_studys_or_the_one_asked_for(tmp_path: Path) -> None:
    study = make_study(tmp_path, pictures="pdf")
    begin(study.runs[0])
    write_scores(study.runs[0], {"0": 50.0, "1": 52.0})
    report(study, [], write=True)
    report(study, [], write=True, pictures="svg")
    written = {path.suffix: path.read_bytes()[:5] for path in study.root.glob("table.*")}
    assert written[".pdf"] == b"%PDF-"
    assert written[".svg"] == b"<?xml"
    assert ".png" not in written


def drawn(table: Table) -> tuple[Any, list[str]]:
    axes = Figure().add_subplot()
    draw_panel(axes, table)
    return axes, axes.get_legend_handles_labels()[1]


def test_a_picture_tells_networks_apart_and_ends_at_100(tmp_path: Path) -> None:
    published = [{"grid": "g", "score": "classification/top1", "rows": {"": [98.5, 99.5]}}]
    study = make_study(tmp_path, published=published)
    for cell in study.cells:
        for seed in study.config.seeds:
            run = study.run_of(cell.variant, seed)
            begin(run)
            write_scores(run, {"0": 98.0 + seed, "1": 98.0 + seed, "ensemble": 100.0})
    axes, legend = drawn(only(study))
    assert legend == ["individual", "ensemble", "published"]
    vanilla, _, ensemble, _ = axes.containers
    ((low, high),) = [[x for x, _ in bar] for bar in vanilla.lines[2][0].get_segments()]
    assert (low, high) == (pytest.approx(98.0), pytest.approx(100.0))
    # A dot for each name: no line leads from one to the next.
    assert vanilla.lines[0].get_linestyle() == "None"
    assert vanilla.lines[0].get_color() != ensemble.lines[0].get_color()
    assert vanilla.lines[0].get_marker() != ensemble.lines[0].get_marker()
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    shown = [(line.get_marker(), list(line.get_xdata())) for line in hollow]
    assert [each for each in shown if each[1]] == [("o", [98.5]), ("o", [99.5])]
    assert axes.get_xlim()[1] == 100
    assert axes.get_xlabel() == "top1 (%), mean ± std"
    rows = dict(zip(names_of_rows(axes), axes.get_yticks(), strict=True))
    assert rows == {"vanilla (baseline)": 0, "MCL (x2)": 1}
    assert axes.get_title() == "g: classification/top1 on digits\nn = 360, 3 seeds"


def test_networks_of_different_kinds_have_markers_of_their_own(tmp_path: Path) -> None:
    pair = {"a": "--cohort.backbones conv4 resnet32"}
    study = make_study(tmp_path, grids={"g": {"m": pair}}, seeds=[0])
    begin(study.runs[0])
    write_scores(study.runs[0], {"0": 50.0, "1": 52.0, "ensemble": 55.0})
    axes, _ = drawn(only(study))
    markers = [container.lines[0].get_marker() for container in axes.containers]
    assert len(markers) == len(set(markers)) == 4


def test_long_labels_leave_room_for_the_picture_and_none_is_lost(tmp_path: Path) -> None:
    labels = {"long " * 20: "", "_hidden": "--alpha 1"}
    study = make_study(tmp_path, grids={"g": {"m": labels}}, seeds=[0])
    for run in study.runs:
        begin(run)
        write_scores(run, {"0": 50.0, "1": 52.0})
    axes, legend = drawn(only(study))
    assert "individual" in legend
    assert "_hidden" in [name.strip() for name in names_of_rows(axes)]
    check_texts(figure_of(partial(plot_tables, [only(study)]), tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("name", "columns"), [("MoCo", 2), ("two heads on one backbone", 1), ("x" * 60, 1)]
)
def test_a_legend_has_one_column_where_a_name_needs_the_width(
    tmp_path: Path, name: str, columns: int
) -> None:
    kinds = {"short": "", name: "--alpha 1"}
    grids = {"size": {"kind": kinds, "cohort.embedding_dim": [128, 32, 64]}}
    study = make_study(tmp_path, grids=grids, seeds=[0])
    for run in study.runs:
        begin(run)
        write_scores(run, {"0": 50.0, "1": 50.0})
    axes, legend = drawn(only(study))
    assert axes.get_legend()._ncols == columns
    assert (legend[1] == name) is (len(name) < 60)
    check_texts(figure_of(partial(plot_tables, [only(study)]), tmp_path / "a.png"))


def test_an_axis_of_numbers_is_a_line(tmp_path: Path) -> None:
    grids = {"size": {"kind": {"$a": "", "b": "--alpha 1"}, "cohort.embedding_dim": [128, 32, 64]}}
    study = make_study(tmp_path, grids=grids, seeds=[0])
    for place, cell in enumerate(study.cells):
        begin(run := study.run_of(cell.variant, 0))
        write_scores(run, {"0": 50.0 + place, "1": 50.0 + place})
    axes, legend = drawn(only(study))
    assert legend == ["$a", "b", "individual"]
    line = axes.containers[0].lines[0]
    assert line.get_xdata().tolist() == [32, 64, 128]
    assert line.get_ydata().tolist() == [51, 52, 50]
    assert line.get_linestyle() == "-"
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "cohort.embedding_dim (baseline 128)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "64", "128"]


def test_an_axis_of_numbers_is_recognised_and_numbers_that_multiply_are_evenly_spaced() -> None:
    assert axis_numbers(["64", "8", "0.5"]) == {"0.5": 0.5, "8": 8.0, "64": 64.0}
    assert list(axis_numbers(["64", "8", "0.5"])) == ["0.5", "8", "64"]
    assert axis_numbers(["8", "all"]) == axis_numbers(["8"]) == axis_numbers(["1", "nan"]) == {}
    assert is_geometric([16, 32, 64, 126])
    assert is_geometric([0.25, 0.5, 1.0])
    assert is_geometric([1, 10, 20, 200])
    assert is_geometric([0.01, 0.03, 0.1])
    assert not is_geometric([0, 0.1, 0.2])
    assert not is_geometric([0.1, 0.2, 0.3])
    assert not is_geometric([1, 2])
