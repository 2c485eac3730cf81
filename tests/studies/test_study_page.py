"""The page of a study, from what `peerlearn table` has written."""

import os
import shutil

import pytest

from peerlearn.cli import main
from peerlearn.report.parts import Paragraph, Picture, Table
from peerlearn.report.study_page import MOST_RUNS, study_sections
from studies.report import report
from studies.study import write_study
from tests.study_folders import begin, finish, make_study

PUBLISHED = {
    "grid": "g",
    "score": "classification/top1",
    "network": "ensemble",
    "rows": {"all": [70.0, 75.0]},
}
VALUES = {
    ("vanilla", 0): (60.0, 61.0, 62.0),
    ("vanilla", 1): (61.0, 61.0, 63.0),
    ("MCL (x2)", 0): (65.0, 66.0, 67.0),
    ("MCL (x2)", 1): (66.0, 66.0, 69.0),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of two seeds, with its tables."""
    study = make_study(tmp_path_factory.mktemp("home"), seeds=[0, 1])
    write_study(study, [])
    finish(study, VALUES)
    report(study, [], write=True)
    return study.root


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s")


def study_parts(folder):
    return study_sections(folder)[0].parts


def first_table(folder):
    found = next(part for part in study_parts(folder) if isinstance(part, Table))
    return [dict(zip(found.headings, row, strict=True)) for row in found.rows]


def test_the_tables_of_a_study(folder):
    (own,) = [
        row
        for row in first_table(folder)
        if row["network"] == "ensemble" and row["method"] == "MCL (x2)"
    ]
    # 67 and 69, less 62 and 63.
    assert own["top1 (%): mean"] == 68.0
    assert own["std"] == pytest.approx(2**0.5)
    assert own["vs vanilla"] == 5.5
    assert own["seeds"] == 2
    assert 0 < own["p"] < 0.2
    assert any(isinstance(part, Picture) for part in study_parts(folder))


def test_results_that_are_newer_than_the_tables_are_told_of(folder):
    assert not [part for part in study_parts(folder) if isinstance(part, Paragraph)]
    (result, *_) = sorted(folder.glob("*/results/*.json"))
    newer = (folder / "table.json").stat().st_mtime + 10
    os.utime(result, (newer, newer))
    (told,) = [part.text for part in study_parts(folder) if isinstance(part, Paragraph)]
    assert told.startswith("1 results are newer than table.json")
    assert f"`peerlearn table {folder}`" in told


@pytest.mark.parametrize(("content", "told"), [(None, "has no table yet"), ("{", "is damaged")])
def test_without_tables_the_page_says_how_to_have_them(folder, content, told):
    (folder / "table.json").unlink()
    if content is not None:
        (folder / "table.json").write_text(content)
    (part,) = study_parts(folder)
    assert told in part.text
    assert f"`peerlearn table {folder}`" in part.text


def test_a_large_study_shows_some_runs_and_says_which(tmp_path):
    study = make_study(tmp_path, seeds=list(range(10)))
    write_study(study, [])
    for run in study.runs:
        begin(run)
    sections = {each.anchor: each for each in study_sections(study.root)}
    told, table = sections["study-runs"].parts
    assert len(table.rows) == 20
    assert told.text.startswith("What follows is of 2 of 20 runs: of each config one, up to 8")
    assert len(sections["standing"].parts[0].rows) == 2 <= MOST_RUNS


def test_the_page_of_a_study_lies_in_it(folder, capsys):
    assert main(["report", str(folder), "--no_images"]) == 0
    assert "<title>Study s</title>" in (folder / "report.html").read_text()
