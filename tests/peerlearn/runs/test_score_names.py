"""Names of scores: written, parsed back, and told from the other fields of a row."""

import pytest

from peerlearn.runs.score_names import (
    ENSEMBLE,
    KNN_TOP1,
    PIXELS,
    WEIGHTED_ENSEMBLE,
    ScoreName,
    measured_part,
    parse_score_name,
    score_name,
)


@pytest.mark.parametrize(
    ("network", "part"),
    [
        ("0", "net/0"),
        ("12", "net/12"),
        ("key-3", "net/key-3"),
        (ENSEMBLE, "ensemble"),
        (WEIGHTED_ENSEMBLE, "weighted_ensemble"),
        (PIXELS, "pixels"),
    ],
)
def test_a_name_tells_network_and_figure(network: str, part: str):
    assert measured_part(network) == part
    for figure in (KNN_TOP1, "validation_top5", "rankme"):
        assert score_name(network, figure) == f"{part}/{figure}"
        assert parse_score_name(f"{part}/{figure}") == ScoreName(network, figure)


def test_a_number_stands_for_its_network():
    assert score_name(3, "scl_hard") == score_name("3", "scl_hard") == "net/3/scl_hard"


@pytest.mark.parametrize(
    "name", ["loss", "step", "images_per_second", "knn/k", "cohort/agreement", "test/images", ""]
)
def test_other_fields_of_a_row_are_no_scores(name: str):
    assert parse_score_name(name) is None
