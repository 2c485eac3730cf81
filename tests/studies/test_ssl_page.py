"""The page of the self-supervised study: the figures of a study's tables, and what is unmeasured."""

import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from benchmarks import same_sample, ssl_scores, ssl_study
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from studies.report import report
from studies.study import Study, plan_study
from studies.study_command import SHIPPED
from studies.study_file import read_study
from tests.study_folders import begin, evaluate

GRID = "SimCLR, with and without peers"
# knn/top1 of the networks by label and seed.
VALUES = {
    "SimCLR": {0: (80.0,), 1: (81.0,), 2: (83.0,)},
    "SimCLR + MCL (x2)": {0: (82.0, 84.0), 1: (83.0, 83.0), 2: (86.0, 87.0)},
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A part of ssl_characters that is done: one grid, kNN alone, three of five seeds."""
    config = read_study(SHIPPED / "ssl_characters.yaml", folder=str(tmp_path / "ssl_characters"))
    found = plan_study(config, [GRID])
    line = config.evaluate[0]
    for cell in found.cells:
        for seed, values in VALUES[found.compared_label(cell)].items():
            run = found.run_of(cell.variant, seed)
            directory = begin(run)
            row: dict[str, Any] = {"step": 12, "attempt": 1, "cpu_seconds": 60.0 * len(values)}
            directory.metrics.write_text(json.dumps(row | {"peak_memory_mb": 700.0 + seed}) + "\n")
            scores = {str(m): value for m, value in enumerate(values)}
            if len(values) > 1:
                scores["ensemble"] = 90.0
            evaluate(run, line, scores, dataset="60")
    return found


@pytest.fixture
def kept(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    report(study, [], write=True)
    folder = tmp_path / "results"
    folder.mkdir()
    assert ssl_scores.keep(study.root, folder) == folder / "ssl_characters.json"
    return folder


def test_the_figures_of_the_prose_stand_in_the_tables() -> None:
    """Also those of the README, which are of this page wherever it names it."""
    lines = ssl_study.page().splitlines()
    tables = _figures(line for line in lines if line[:1] == "|")
    readme = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    rows = [line for line in readme if "(docs/study.md)" in line and line[:1] == "|"]
    assert len(rows) > 4
    prose = [line for line in lines if not line.startswith(("|", "`", "Shown at p"))]
    figures = _figures(prose + rows)
    assert {"84.64", "65.88", "0.50", "1.97"} <= figures
    assert sorted(figure for figure in figures if figure not in tables) == []


def _figures(lines: Iterable[str]) -> set[str]:
    """The numbers with two decimals, without their signs."""
    return set(re.findall(r"(?<![\d.])\d+\.\d\d(?![\d.])", "\n".join(lines)))


def test_the_figures_of_the_page_are_those_of_the_runs(kept: Path) -> None:
    section = ssl_study.page(kept).split("## ssl_characters")[1].split(f"### {GRID}")[1]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    # Of two comparisons, Holm's method doubles the smaller p, that of the ensembles.
    told = []
    for differences, comparisons in (([3.0, 2.0, 3.5], 1), ([10.0, 9.0, 7.0], 2)):
        t = stats.ttest_1samp(differences, 0.0)
        low, high = t.confidence_interval(0.95)
        mean, p = sum(differences) / 3, comparisons * t.pvalue
        told.append(f"**{mean:+.2f} ({low:.2f} .. {high:.2f}), p {p:.3f}**")
    assert [line[:4] for line in lines[2:]] == [
        ["mean of the networks", "SimCLR", "81.33 ± 1.53 (3)", ""],
        ["mean of the networks", "SimCLR + MCL (x2)", "84.17 ± 2.02 (3)", told[0]],
        ["ensemble", "SimCLR", "81.33 ± 1.53 (3)", ""],
        ["ensemble", "SimCLR + MCL (x2)", "90.00 ± 0.00 (3)", told[1]],
    ]
    # The networks of a run have trained together, and cost what the run did.
    costs = [["1.0", "701"], ["2.0", "701"]]
    assert [line[-2:] for line in lines[2:]] == costs * 2
    assert "Shown at p (Holm) < 0.05, in bold: 2 of 2 comparisons." in section


def _add(folder: Path, **changed: Any) -> None:
    """To the kept file, the scores of its first cell once more, as of the cell or machine that ``changed`` names."""
    file = folder / "ssl_characters.json"
    content = json.loads(file.read_text())
    first = content["scores"][0]
    same = [s for s in content["scores"] if s["labels"] == first["labels"]]
    content["scores"] += [each | changed for each in same]
    content["machines"] = ["another"]
    file.write_text(json.dumps(content))


def test_grids_of_several_machines_stand_side_by_side(study: Study, kept: Path) -> None:
    file = kept / "ssl_characters.json"
    alone = json.loads(file.read_text())
    elsewhere = {"grid": "MoCo, with and without peers", "labels": ["MoCo"]}
    _add(kept, **elsewhere)
    # What was measured again and what the study has no more give way.
    _add(kept, mean=1.0)
    _add(kept, labels=["a rival of old"])
    ssl_scores.keep(study.root, kept)
    content = json.loads(file.read_text())
    assert content["machines"] == ["another", *alone["machines"]]
    stayed = [score for score in content["scores"] if score["grid"] != GRID]
    assert {(each["grid"], *each["labels"]) for each in stayed} == {
        ("MoCo, with and without peers", "MoCo")
    }
    # SimCLR's scores, of its network and of it as an ensemble, under the other name.
    assert [each["mean"] for each in stayed] == pytest.approx([244 / 3] * 2)
    assert [score for score in content["scores"] if score["grid"] == GRID] == alone["scores"]


def test_a_tested_grid_is_of_one_measurement(study: Study, kept: Path) -> None:
    file = kept / "ssl_characters.json"
    part = study.root / "table.json"
    content = json.loads(part.read_text())
    content["scores"] = [s for s in content["scores"] if s["labels"] != ["SimCLR"]]
    part.write_text(json.dumps(content))
    before = file.read_text()
    told = f"has a part of the grid '{GRID}' alone"
    with pytest.raises(UserError, match=re.escape(told)):
        ssl_scores.keep(study.root, kept)
    assert file.read_text() == before


def test_a_tested_grid_stays_until_it_can_be_tested_again(study: Study, kept: Path) -> None:
    table = study.root / "table.json"
    content = json.loads(table.read_text())
    content["scores"] = [s | {"mean": 1.0} for s in content["scores"] if s["labels"] == ["SimCLR"]]
    table.write_text(json.dumps(content))
    before = json.loads((kept / "ssl_characters.json").read_text())
    ssl_scores.keep(study.root, kept)
    assert json.loads((kept / "ssl_characters.json").read_text()) == before


def test_a_difference_that_is_not_shown_is_not_bold(kept: Path) -> None:
    file = kept / "ssl_characters.json"
    content = json.loads(file.read_text())
    for score in content["scores"]:
        if score["network"] == "individual" and score["difference_p_holm"] is not None:
            score["difference_p_holm"] = 0.05
    file.write_text(json.dumps(content))
    section = ssl_study.page(kept).split("## ssl_characters")[1].split(f"### {GRID}")[1]
    assert "| +2.83 (" in section
    assert "| **+8.67 (" in section
    assert "in bold: 1 of 2 comparisons." in section


def test_learning_rates_are_a_row_for_each_rival(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ssl_learning_rates"
    config = read_study(SHIPPED / "ssl_learning_rates.yaml", folder=str(folder))
    study = plan_study(config, ["Fashion-MNIST"])
    scored = {("MoCo", "0.004"): 80.0, ("MoCo", "0.03"): 81.0, ("MCL (x2)", "0.015"): 79.0}
    cpu_seconds = {80.0: 60.0, 81.0: 120.0, 79.0: 210.0}
    for cell in study.cells:
        if cell.labels in scored:
            run = study.run_of(cell.variant, config.seeds[0])
            top1 = scored[cell.labels]
            row = {"step": 12, "attempt": 1, "cpu_seconds": cpu_seconds[top1]}
            begin(run).metrics.write_text(json.dumps(row) + "\n")
            networks = map(str, range(cell.variant.config.cohort.networks))
            evaluate(run, config.evaluate[0], dict.fromkeys(networks, top1))
    report(study, [], write=True)
    page = ssl_study.page(ssl_scores.keep(folder, tmp_path).parent)
    section = page.split("### Fashion-MNIST\n")[1].split("###")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    empty = "unmeasured"
    assert lines[0] == [
        *("method", "base_lr 0.004", "base_lr 0.0075", "base_lr 0.015", "base_lr 0.03"),
        "core-min",
    ]
    assert lines[2:5] == [
        ["MoCo", "80.00 (1)", empty, empty, "**81.00 (1)**", "1.5"],
        ["MCL (x2)", empty, empty, "**79.00 (1)**", empty, "3.5"],
        ["MCL (x2), weights of the authors' code", *[empty] * 4],
    ]
    assert "Nothing is tested" not in section

    fashion_mnist, *others = ssl_scores.learning_rates(tmp_path)
    assert not others
    drawn = {
        (row.group, row.label, row.network): row.score.mean
        for row in fashion_mnist.rows
        if row.score
    }
    assert drawn == {(*labels, "individual"): top1 for labels, top1 in scored.items()}


def test_the_answers_stand_first(kept: Path) -> None:
    section = ssl_study.page(kept).split("## In short")[1].split("##")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    of_characters = [line for line in lines if line[0] == "[ssl_characters](#ssl_characters)"]
    none = ["unmeasured"] * 3
    network = "mean of the networks"
    assert of_characters[0] == [of_characters[0][0], "MCL (x2)", "unmeasured", network, *none]
    _, *simclr = of_characters[1]
    assert simclr[:3] == ["SimCLR + MCL (x2)", "SimCLR", network]
    assert simclr[3].startswith("**+2.83 (")
    assert simclr[4:] == none[1:]
    assert of_characters[2][1] == "same_sample_positive false"


def test_what_was_not_run_is_unmeasured(kept: Path) -> None:
    page = ssl_study.page(kept)
    other = page.split("## ssl_characters")[1].split("### MoCo, with and without peers")[1]
    assert other.split("###")[0].strip().startswith("Unmeasured: method (MoCo; MCL (x2); ")
    assert page.split("## ssl_fashion_mnist")[1].startswith(
        "\n\n`peerlearn study ssl_fashion_mnist` (unmeasured). Does MCL help"
    )


def test_a_baseline_alone_measures_nothing(kept: Path) -> None:
    _add(kept, grid="MoCo, with and without peers", labels=["MoCo"], baseline="MoCo")
    page = ssl_study.page(kept)
    other = page.split("## ssl_characters")[1].split("### MoCo, with and without peers")[1]
    assert other.split("###")[0].strip().startswith("Unmeasured: method (MoCo; MCL (x2); ")


def test_validation_images_rank_the_settings_and_stand_in_no_other_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_study(SHIPPED / "ssl_settings.yaml", folder=str(tmp_path / "ssl_settings"))
    grids = ["size of the queue", "momentum of the key networks"]
    study = plan_study(config, grids)
    on_test, on_validation = config.evaluate[:2]
    assert "--data.validation_images" in on_validation
    # The shipped setting is in both grids, and is one run.
    scored = {"2048": (80.0, 82.0), "512": (81.0, 81.0), "0.9": (79.0, 83.0)}
    for cell in study.cells:
        label = study.compared_label(cell)
        if label in scored:
            run = study.run_of(cell.variant, 0)
            begin(run)
            test, validation = scored[label]
            of_test, of_validation = {"0": test, "1": test}, {"0": validation, "1": validation}
            evaluate(run, on_test, of_test, dataset="fashion_mnist")
            titled = "fashion_mnist, validation images"
            evaluate(run, on_validation, of_validation, dataset=titled)
    report(study, [], write=True)
    kept = ssl_scores.keep(study.root, tmp_path).parent

    page = ssl_study.page(kept).split("## ssl_settings")[1]
    of_grids, ranking = page.split("### Settings, by validation images")
    assert "validation images, n" not in of_grids
    lines = [line.strip("| ").split(" | ") for line in ranking.splitlines() if line[:1] == "|"]
    assert lines[0][2] == "knn top1 on fashion_mnist, validation images, n 360"
    assert lines[2:] == [
        ["momentum of the key networks", "0.9", "83.00 (1)"],
        ["size of the queue", "2048", "82.00 (1)"],
        ["size of the queue", "512", "81.00 (1)"],
    ]


def test_machines_and_versions_stand_beside_the_figures(study: Study, kept: Path) -> None:
    result = next(RunDirectory(study.runs[0].folder).results.glob("*.json"))
    found = json.loads(result.read_text())
    told = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {found['versions']['torch']})"
    assert told in ssl_study.page(kept)


def test_what_the_peers_query_does_stands_on_the_page(tmp_path: Path) -> None:
    keys = ("queries_same", "queries_other", "keys_same", "keys_other", "loss_lowest", "loss_last")
    values = {key: [number, number + 0.5] for number, key in enumerate(keys)}
    about = {"machine": "m", "python": "3.11", "torch": "2.14"}
    found = about | {"measured": {"MCL (x2)": values}}
    (tmp_path / "same_sample.json").write_text(json.dumps(found))
    section = ssl_study.page(tmp_path).split("## With MoCo, the peer's query betrays itself")[1]
    told = [f"{number}.25 ± 0.35 (2)" for number in range(6)]
    assert " | ".join(["| MCL (x2)", *told]) + " |" in section


def test_losses_of_an_epoch_are_for_one_peer(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for epoch, loss in ((0.5, 9.0), (1.0, 12.0), (1.5, 6.0), (2.0, 3.0)):
        run.append_metrics(
            {"step": 1, "epoch": epoch, "net/0/icl_hard": loss, "net/0/scl_hard": 1.0}
        )
    assert same_sample.hard_loss_by_epoch(run, peers=3) == [3.5, 1.5]
    assert same_sample.hard_loss_by_epoch(run, peers=0) == [1.0, 1.0]


def test_cosines_are_those_of_the_same_image_and_of_others() -> None:
    anchors = torch.eye(3)
    candidates = torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = same_sample.cosines("keys", anchors, candidates)
    assert found == pytest.approx({"keys_same": 2.8 / 3, "keys_other": 0.1})


def test_a_folder_without_tables_is_told_in_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "ssl_settings"
    with pytest.raises(SystemExit) as stop:
        ssl_study.main(["--keep", str(gone)])
    assert stop.value.code == f"{gone}/table.json is not there: `peerlearn table {gone}` writes it"


def test_a_study_that_the_page_does_not_show_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        ssl_study.main(["--keep", str(tmp_path / "demo")])
    told = f"{tmp_path}/demo is none of the studies that the page shows: ssl_learning_rates, "
    assert str(stop.value.code).startswith(told)
