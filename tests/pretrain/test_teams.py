"""Which processes train which networks, and what is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlearn.errors import UserError
from pretrain.cohort_config import CohortConfig
from pretrain.config import DataConfig, PretrainConfig
from pretrain.method_config import SupervisedConfig
from pretrain.parallel_config import ParallelConfig, Team
from pretrain.preview import preview
from pretrain.teams import check_share, placement, teams_of


def teams(cohort: int | list[str], networks: int, processes: int) -> list[Team]:
    return ParallelConfig(cohort=cohort).teams(networks, processes)


@given(count=st.integers(1, 6), networks=st.integers(1, 4), processes=st.integers(1, 4))
def test_every_network_and_every_process_is_in_one_of_equal_teams(count, networks, processes):
    found = teams(count, count * networks, count * processes)
    assert [n for team in found for n in team.networks] == list(range(count * networks))
    assert [r for team in found for r in team.ranks] == list(range(count * processes))
    assert {(len(team.networks), len(team.ranks)) for team in found} == {(networks, processes)}


def test_teams_are_as_they_are_named():
    assert teams(["0:0-2", "1:3"], 2, 4) == [Team((0,), (0, 1, 2)), Team((1,), (3,))]
    assert teams(["2:0", "0-1:1"], 3, 2) == [Team((2,), (0,)), Team((0, 1), (1,))]
    assert teams(1, 3, 5) == [Team((0, 1, 2), (0, 1, 2, 3, 4))]


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        (3, "parallel.cohort 3 must divide cohort.networks, 2"),
        (["0:0-2", "1:2-3"], "must name each process once: it names process 2 2 times"),
        (["0:0-1", "1:2"], "must name each process once: it names process 3 0 times"),
        (["0:0-3", "0:0"], "must name each network once: it names network 0 2 times"),
        (
            ["0-9999999999:0"],
            "must name each network once: it names network 2 1 times, and the last",
        ),
        (["0-1:0-1", "2:2-3"], "it names network 2 1 times, and the last is 1"),
        (["0:0-1", "1:2-4"], "it names process 4 1 times, and the last is 3"),
    ],
)
def test_teams_that_do_not_fit_two_networks_and_four_processes_are_refused(cohort, message):
    config = PretrainConfig(parallel=ParallelConfig(cohort=cohort))
    with pytest.raises(UserError, match=message):
        teams_of(config, 4)


def test_teams_that_do_not_divide_the_processes_are_refused():
    config = PretrainConfig(parallel=ParallelConfig(cohort=2))
    with pytest.raises(UserError, match="must divide the number of processes, 3"):
        check_share(config, 3)


@pytest.mark.parametrize("text", ["0", "0:", "1-0:2", "a:b", "0:0-2 1:3", "-1:0"])
def test_what_is_no_team_is_refused(text):
    with pytest.raises(ValueError, match="must be a number or teams such as 0:0-2 1:3"):
        ParallelConfig(cohort=[text, "1:3"])


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "message"),
    [
        (24, 1, None),
        (32, 1, "batch_size 32 must divide into 3 processes of a team x accumulation_steps 1"),
        (30, 1, "batch_size 30 must divide into 4 processes x accumulation_steps 1: each computes"),
        (24, 2, "accumulation_steps must be 1, got 2, where parallel.cohort gives networks unlike"),
        (4, 1, "batch_size 4 must divide into 3 processes of a team"),
    ],
)
def test_batches_that_unequal_teams_cannot_share(batch_size, accumulation, message):
    config = PretrainConfig(
        parallel=ParallelConfig(cohort=["0:0-2", "1:3"]),
        batch_size=batch_size,
        accumulation_steps=accumulation,
    )
    if message is None:
        check_share(config, 4)
        return
    with pytest.raises(UserError, match=message):
        check_share(config, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cohort": CohortConfig(networks=1), "terms": ["scl_hard"]}, "nothing to share out"),
        ({"method": "prototypical"}, "method prototypical"),
        ({"precision": "fp16"}, "take bf16"),
        ({"cohort": CohortConfig(share_stages=1)}, "set cohort.share_stages to 0"),
        *(
            (
                {
                    "method": "supervised",
                    "supervised": SupervisedConfig(teaching=each),
                    "cohort": CohortConfig(networks=3),
                },
                each,
            )
            for each in ("cl_ilr", "one", "okddip")
        ),
    ],
)
def test_what_cannot_be_parted_is_refused(changes, reason):
    config = replace(PretrainConfig(), **changes)
    with pytest.raises(ValueError, match=f"parallel.cohort must be 1, got 2: .*{reason}"):
        replace(config, parallel=ParallelConfig(cohort=2))


def test_a_team_over_two_machines_is_told_where_one_would_do():
    found = teams(["0:0", "1:1-2", "2:3"], 3, 4)
    assert list(placement(found, ["a", "a", "b", "b"])) == [
        "network 0: process 0 on a",
        "network 1: processes 1 to 2 on a, b, though one machine runs 2 processes: gradients cross the network",
        "network 2: process 3 on b",
    ]
    wide = teams(2, 4, 8)
    assert list(placement(wide, [*"aabbccdd"])) == [
        "networks 0 to 1: processes 0 to 3 on a, b",
        "networks 2 to 3: processes 4 to 7 on c, d",
    ]


def test_parts_of_batch_norm_that_a_team_cannot_share_are_refused():
    """On every process alike: one team alone would stop, and leave the others waiting."""
    config = PretrainConfig(
        parallel=ParallelConfig(cohort=["0:0", "1:1-2"]),
        batch_size=36,
        cohort=CohortConfig(batch_norm_splits=3),
    )
    with pytest.raises(UserError, match="batch_norm_splits 3 cannot be shared by 2 processes"):
        check_share(config, 3)


def test_no_team_is_refused():
    with pytest.raises(ValueError, match="must name at least one team"):
        ParallelConfig(cohort=[])


def test_stages_shared_by_the_papers_rule_are_refused_before_the_start(monkeypatch):
    config = PretrainConfig(
        parallel=ParallelConfig(cohort=2),
        batch_size=32,
        cohort=CohortConfig(networks=4, backbones="resnet32"),
        data=DataConfig(name="digits", image_size=16),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"cohort\.share_stages must be 0 with parallel\.cohort"):
        preview(config)
