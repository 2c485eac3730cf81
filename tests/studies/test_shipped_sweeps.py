"""Shipped sweeps: each opens with its facts, and its cells differ by what their labels name and nothing else."""

import pytest

from peerlearn.commands.configs_command import HEADER_FIELDS, read_header
from peerlearn.config import flat_config
from studies.sweep import plan_sweep
from studies.sweep_command import SHIPPED_SWEEPS
from studies.sweep_config import read_sweep

SWEEPS = sorted(SHIPPED_SWEEPS.glob("*.yaml"))
MCL = {"alpha", "beta"}
TEACHING = {f"supervised.{name}" for name in ("teaching", "teaching_temperature", "detach_teacher")}
# By axis, the keys that its labels may set.
NAMED = {
    "network": {"cohort.backbones"},
    "networks": {"cohort.backbones"},
    "method": MCL | TEACHING | {"cohort.networks", "cohort.share_stages", "terms"},
    "terms": MCL | {"terms"},
    "cohort.embedding_dim": {"cohort.embedding_dim"},
    "supervised.num_negatives": {"supervised.num_negatives"},
    "alpha": {"alpha"},
    "beta": {"beta"},
}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_cells_differ_by_what_their_axes_name(path):
    config = read_sweep(path)
    cells = plan_sweep(config).cells
    by_place = {(cell.grid, cell.labels): flat_config(cell.variant.config) for cell in cells}
    compared = 0
    for (grid, labels), ours in by_place.items():
        for number, (axis, names) in enumerate(config.grids[grid].items()):
            for other in names:
                neighbour = (*labels[:number], other, *labels[number + 1 :])
                theirs = by_place[grid, neighbour]
                differing = {key for key, value in ours.items() if value != theirs[key]}
                assert differing <= NAMED[axis], (grid, labels, other)
                assert bool(differing) == (other != labels[number]), (grid, labels, other)
                compared += 1
    assert compared > len(cells)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_opens_with_its_facts_and_a_command_that_names_it(path):
    header = read_header(path)
    assert set(header) == set(HEADER_FIELDS)
    assert all(header.values())
    assert header["command"].startswith(f"peerlearn sweep {path.stem}")


def test_the_columns_of_table_5():
    cells = plan_sweep(read_sweep(SHIPPED_SWEEPS / "table_5_cifar100.yaml")).cells
    column = {
        cell.labels[1]: cell.variant.config for cell in cells if cell.labels[0] == "ResNet-32"
    }
    assert [config.supervised.teaching for config in column.values()] == [
        *("none", "dml", "dml", "cl_ilr", "one", "okddip", "ensemble_teaching")
    ]
    assert {config.cohort.networks for config in column.values()} == {4}
    assert column["vanilla"].cohort.share_stages == 0
    ours = column.pop("EnsTeach + MCL (x4)")
    assert (ours.alpha, ours.beta, ours.supervised.weights_per_class) == (0.5, 0.1, True)
    assert all((config.alpha, config.beta) == (0, 0) for config in column.values())
    assert column["DML"].supervised.teaching_temperature is None
    live = column["DML (T 3, live teachers)"].supervised
    assert (live.teaching_temperature, live.detach_teacher) == (3.0, False)


@pytest.mark.parametrize("table", [1, 2, 4, 5])
def test_the_resnet_110_of_the_supervised_tables_is_that_of_the_authors_code(table):
    """Bottlenecks, of 1.17M parameters; Table 8's 1.74M is the basic one."""
    path = SHIPPED_SWEEPS / f"table_{table}_cifar100.yaml"
    assert (
        "ResNet-110 is the one of the authors' code, with bottlenecks"
        in read_header(path)["source"]
    )
    meant = set()
    for cell in plan_sweep(read_sweep(path)).cells:
        names = cell.labels[0].split(", ")
        for name, architecture in zip(
            names, cell.variant.config.cohort.architectures(), strict=False
        ):
            if name == "ResNet-110":
                meant.add(architecture)
    assert meant == {"resnet110_bottleneck"}
