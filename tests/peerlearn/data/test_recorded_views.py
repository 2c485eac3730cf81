"""Every recipe draws and cuts the views that it always did: an old run that is resumed sees what it would have seen."""

import json

import pytest
import torch

from peerlearn.data.recipes import AUGMENTATIONS
from tests.peerlearn.data.recorded_views import FILE, SOURCES, arithmetic, measured

RECORDED = json.loads(FILE.read_text())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_recipe_is_recorded():
    assert set(RECORDED["recipes"]) == set(AUGMENTATIONS)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_are_those_of_earlier_versions(name, tmp_path):
    recorded, now = RECORDED["recipes"][name], measured(name, tmp_path)
    assert now["parameters"] == recorded["parameters"]
    rounds_alike = arithmetic() == RECORDED["arithmetic"]
    for source in SOURCES:
        if rounds_alike:
            assert set(now[source]["pixels"]) <= set(recorded[source]["pixels"])
        for figure in ("means", "squares"):
            assert now[source][figure] == pytest.approx(recorded[source][figure], abs=1e-5)
