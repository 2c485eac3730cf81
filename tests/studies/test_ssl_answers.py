"""The comparisons that the page of the self-supervised study answers with, and their picture."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from benchmarks import ssl_answers, ssl_scores, ssl_study
from peerlearn.evaluation.plots import COLORS
from studies.study_command import SHIPPED
from studies.study_file import read_study
from tests.drawn import check_texts, figure_of

SETTING = ("ssl_settings", "weight of the interactive terms", "1.0", "individual")


def _score(task: str, mean: float, **more: Any) -> dict[str, Any]:
    _, grid, label, network = SETTING
    compared = {"difference_mean": mean, "difference_ci95": 0.5, "difference_p_holm": 0.01}
    cell = {"grid": grid, "labels": [label], "network": network, "baseline": "0.1"}
    return {"task": task, "dataset": "fashion_mnist"} | cell | compared | more


@pytest.fixture
def answers(tmp_path: Path) -> list[ssl_answers.Answer]:
    """Of one comparison: two kNN scores, of which one is shown; and linear, which is not."""
    on_validation = _score("knn", 9.0, dataset="fashion_mnist, validation images")
    linear = _score("linear", -2.0, difference_p_holm=0.05)
    kept = {"machines": [], "scores": [_score("knn", 3.0), on_validation, linear]}
    (tmp_path / "ssl_settings.json").write_text(json.dumps(kept))
    return list(ssl_answers.answers(ssl_scores.read_kept(tmp_path)))


def test_they_name_cells_that_there_are() -> None:
    for study, grid, label, network in ssl_answers.ANSWERS:
        ((axis, labels),) = read_study(SHIPPED / f"{study}.yaml").grids[grid].items()
        assert label in labels, (study, grid, axis)
        assert network in ssl_scores.NETWORKS


def test_validation_images_answer_nothing(answers: list[ssl_answers.Answer]) -> None:
    found = dict(zip(ssl_answers.ANSWERS, answers, strict=True))
    answer = found.pop(SETTING)
    assert (answer.this, answer.against) == ("beta 1.0", "beta 0.1")
    assert {task: score["difference_mean"] for task, score in answer.scores.items()} == {
        "knn": 3.0,
        "linear": -2.0,
    }
    assert {each.against for each in found.values()} == {"unmeasured"}
    assert not any(each.scores for each in found.values())


def test_the_picture_has_each_difference_with_its_interval(
    answers: list[ssl_answers.Answer], tmp_path: Path
) -> None:
    figure = figure_of(lambda file: ssl_answers.plot_answers(answers, file), tmp_path / "a.svg")
    check_texts(figure)
    row = ssl_answers.ANSWERS.index(SETTING)
    knn, linear, few_shot = figure.axes
    assert [axes.get_title() for axes in figure.axes] == [
        *("kNN", "linear", "few-shot, characters")
    ]
    names = [label.get_text() for label in knn.get_yticklabels()]
    assert names[row] == "beta 1.0\nagainst beta 0.1, Fashion-MNIST"
    assert names[1].endswith(", characters")
    for axes, mean, color in ((knn, 3.0, COLORS[0]), (linear, -2.0, None)):
        ((marker, _, (bar,)),) = axes.containers
        np.testing.assert_allclose(marker.get_xydata(), [[mean, row]])
        np.testing.assert_allclose(bar.get_segments(), [[[mean - 0.5, row], [mean + 0.5, row]]])
        # What is not shown is hollow.
        assert to_hex(marker.get_markerfacecolor()).upper() == (color or "#FFFFFF")
    assert not few_shot.containers
    low, high = knn.get_ylim()
    assert (low, high) == (len(answers) - 0.5, -0.5)


def test_the_pictures_of_the_page_are_those_of_the_kept_scores(tmp_path: Path) -> None:
    """Red? Run `python -m benchmarks.ssl_study --pictures`."""
    for drawn in ssl_study.draw_pictures(docs=tmp_path):
        shipped = Path(__file__).parents[2] / "docs" / drawn.name
        assert f"]({drawn.name})" in ssl_study.page()
        texts, numbers = _drawn(drawn)
        shipped_texts, shipped_numbers = _drawn(shipped)
        assert texts == shipped_texts, drawn.name
        np.testing.assert_allclose(numbers, shipped_numbers, atol=0.1)


def _drawn(file: Path) -> tuple[list[str], list[float]]:
    """The texts and colours of an SVG, and its coordinates in points, which processors round otherwise."""
    content = file.read_text()
    exact = re.findall(r"<text [^>]*>([^<]*)<|(#[0-9a-f]{6})\b", content)
    places = re.findall(r'\b(?:d|x|y|transform)="([^"]*)"', content)
    return [text or color for text, color in exact], [
        float(number) for place in places for number in re.findall(r"-?\d+(?:\.\d+)?", place)
    ]
