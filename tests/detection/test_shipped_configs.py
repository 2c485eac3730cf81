"""The shipped recipes of `detect`: each is valid, and says where it comes from and how it is started."""

import shlex
from pathlib import Path

import pytest

from detection.command import SHIPPED
from detection.config import DetectConfig
from peerlearn.commands.configs_command import HEADER_FIELDS, read_header
from peerlearn.config import parse_config


def recipe(*words: str) -> DetectConfig:
    config, _ = parse_config(
        DetectConfig, words, verb="detect", description="", example="", shipped=SHIPPED
    )
    return config


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_says_where_it_comes_from_and_its_command_is_valid(path: Path):
    header = read_header(path)
    assert set(header) == set(HEADER_FIELDS)
    assert all(header.values())
    command = shlex.split(header["command"])
    assert command[:3] == ["peerlearn", "detect", path.stem]
    assert recipe(*command[2:]).checkpoints()


def test_own_data_compares_weights_and_shares_by_one_budget():
    config = recipe("own_data", "--checkpoint", "x")
    assert config.weights == ["export", "random"]
    assert (config.data.percents, config.trials, config.data.leakage) == ([1, 10, 100], 3, "warn")
    # As many images a step as in the published recipes take twice the rate.
    published = recipe("d2_fpn", "--checkpoint", "x")
    assert config.lr / config.batch_size == published.lr / published.batch_size
    assert config.chosen_rule == "coco"
