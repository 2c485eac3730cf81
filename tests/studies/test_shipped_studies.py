"""Shipped studies: headers, cells, recipes, and the published figures against the paper's own tables."""

import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.commands.configs_command import HEADER_FIELDS, _recipe, read_header
from peerlearn.config import flat_config, load_config
from pretrain.command import SHIPPED
from pretrain.config import PretrainConfig
from pretrain.preview import preview
from studies.config import Published
from studies.study import Study, plan_study
from studies.study_file import read_study

STUDIES = sorted((Path(__file__).parents[2] / "studies" / "configs").glob("*.yaml"))
PAGE = Path(__file__).with_name("published_tables.md")
# Columns of the page that are no scores.
FACTS = {"#params", "Computation", "Memory"}
MCL = {"alpha", "beta"}
TEACHING = {f"supervised.{name}" for name in ("teaching", "teaching_temperature", "detach_teacher")}
# By axis, the keys that its labels may set.
NAMED = {
    "network": {"cohort.backbones"},
    "networks": {"cohort.backbones"},
    "method": MCL | TEACHING | {"cohort.networks", "cohort.share_stages", "terms", "temperature"},
    "terms": MCL | {"terms"},
    "cohort.embedding_dim": {"cohort.embedding_dim"},
    "supervised.num_negatives": {"supervised.num_negatives"},
    **{
        key: {key}
        for key in (
            *("alpha", "beta", "base_lr", "soft_temperature", "same_sample_positive", "queue.size"),
            *("queue.momentum", "mutual_warmup_epochs", "symmetric"),
        )
    },
}
# Rivals of other cost and kind are methods of the self-supervised studies.
NAMED_BY_RIVALS = {
    *("method", "soft_temperature", "same_sample_positive", "cohort.backbones", "base_lr"),
    *("epochs", "checkpoint.export_every_epochs"),
}
# (table, row, column) of the page -> figure.
Figures = dict[tuple[int, str, str], float]

# By study: grids, cells, runs.
SIZES = {
    "figure_3_cifar100": (5, 27, 72),
    "table_1_cifar100": (1, 6 * 4, 72),
    "table_1_imagenet": (1, 2 * 4, 24),
    "table_2_cifar100": (1, 6 * 4, 72),
    "table_3_imagenet": (1, 2 * 3, 18),
    "table_4_cifar100": (1, 6 * 2, 36),
    "table_4_imagenet": (1, 1 * 2, 6),
    "table_5_cifar100": (1, 5 * 7, 105),
    "table_5_imagenet": (1, 1 * 7, 21),
    "table_6_cifar100": (1, 6 * 2, 36),
    "table_7_miniimagenet": (2, 2 * 2, 12),
    "table_8_cifar100": (1, 3 * 2, 18),
    "table_8_imagenet": (1, 1 * 2, 6),
    # Small ones. Cells of a figure may share their config.
    "fashion_mnist": (1, 2, 6),
    "fashion_mnist_few_labels": (2, 4 + 3, 35),
    "ssl_best": (3, 5 + 2 + 2, 45),
    "ssl_characters": (5, 5 + 2 + 3 + 2 + 2, 55),
    "ssl_fashion_mnist": (5, 5 + 2 + 7 + 2 + 2, 75),
    "ssl_learning_rates": (3, 6 * 4 + 6 * 4 + 6 * 5, 78),
    "ssl_settings": (9, 5 + 3 * 2 + 5 * 3, 90),
    "figure_3_digits": (5, 8 + 2 + 3 + 3 + 2, 42),
    "table_1_digits": (1, 2 * 4, 24),
    "table_2_digits": (1, 1 * 4, 12),
    "table_3_fashion_mnist": (1, 1 * 3, 9),
    "table_3_mini_voc": (1, 1, 3),
    "table_4_digits": (1, 1 * 2, 6),
    "table_5_digits": (1, 1 * 6, 18),
    "table_6_digits": (1, 1 * 2, 6),
    "table_7_characters": (4, 3 + 2 + 2 + 1, 40),
    "table_7_fashion_mnist": (4, 3 + 2 + 2 + 1, 40),
    "table_8_digits": (1, 1 * 2, 6),
    "where_mcl_helps": (6, 6 * 2, 60),
}
# Our labels of methods, and the page's.
METHODS = {
    "vanilla": "Vanilla",
    "DML": "DML",
    "DML + MCL": "DML+MCL",
    "DML + MCL (x2)": "DML+MCL(x2)",
    "EnsTeach + MCL (x2)": "EnsTeach+MCL(x2)",
    "EnsTeach + MCL (x4)": "EnsTeach+MCL(x4)",
    "CL-ILR": "CL-ILR",
    "ONE": "ONE",
    "OKDDip": "OKDDip",
    "SCL (hard)": "+SCL(hard)",
    "MCL (x2)": "MCL(x2)",
    "MCL (x4)": "MCL(x4)",
    "MoCo": "MoCo",
    "MoCo + MCL (x2)": "MoCo+MCL(x2)",
    "prototypical network": "Prototypical network",
    "prototypical network + MCL (x2)": "Prototypical network+MCL(x2)",
}


@cache
def plan(name: str) -> Study:
    return plan_study(read_study(next(path for path in STUDIES if path.stem == name)))


# The page


def page_tables() -> dict[int, list[dict[str, str]]]:
    """The rows of each table, by column."""
    tables: dict[int, list[dict[str, str]]] = {}
    for number, lines in re.findall(r"^## Table (\d)\n\n((?:.+\n)+)", PAGE.read_text(), re.M):
        head, *rows = [line.split("\t") for line in lines.splitlines()]
        tables[int(number)] = [dict(zip(head, row, strict=True)) for row in rows]
    return tables


def figure(cell: str) -> float | None:
    """The figure of a cell of the page, without its gain and its interval."""
    found = re.match(r"(\d\d\.\d\d)(?: \([+-]\d\.\d\d\)| \+- \d\.\d\d)?$", cell)
    return float(found[1]) if found else None


def on_the_page() -> Figures:
    found: Figures = {}
    for number, rows in page_tables().items():
        for row in rows:
            cells = {name: cell for name, cell in row.items() if name not in FACTS}
            title = ", ".join(cell for cell in cells.values() if figure(cell) is None)
            for column, cell in cells.items():
                value = figure(cell)
                if value is not None:
                    found[number, title, column] = value
    return found


def in_the_studies() -> Figures:
    found: Figures = {}
    for path in STUDIES:
        config = read_study(path)
        for published in config.published:
            labels = config.grids[published.grid][config.compared_axis(published.grid)]
            for row, figures in published.rows.items():
                for label, value in zip(labels, figures, strict=True):
                    if value is not None:
                        place = page_place(path.stem, published, row, label)
                        assert place not in found, (path.stem, place)
                        found[place] = value
    return found


def page_place(name: str, published: Published, row: str, label: str) -> tuple[int, str, str]:
    """Where the page prints what a study calls so."""
    number, method = int(name.split("_")[1]), METHODS[label]
    network = published.network
    others = {6: "linear/top1", 7: "fewshot/accuracy", 8: "linear/top1"}
    assert number == 3 or published.score == others.get(number, "classification/top1")
    match number:
        case 1 | 5:
            return number, row, f"{method} {({'individual': 'Ind', 'ensemble': 'Ens'})[network]}"
        case 2:
            return number, row, f"+{method}" if method.startswith("MCL") else method
        case 3:
            columns = {
                ("classification/top1", "individual"): "ImageNet Cls Top-1",
                ("classification/top5", "individual"): "ImageNet Cls Top-5",
                ("detect/ap50", "0"): "Pascal VOC Det mAP",
            }
            return number, f"{row}+{method}", columns[published.score, network]
        case 4:
            return number, row, f"{method} Net{int(network) + 1}"
        case 6:
            dataset = {"stl10": "STL-10", "tinyimagenet": "TinyImageNet"}[published.dataset or ""]
            return number, row, f"{dataset} {method}"
        case 7:
            assert published.variant == published.grid
            return number, method, published.grid.title()
        case _:
            dataset = {"cifar100": "CIFAR-100", "imagenet": "ImageNet"}[name.split("_")[2]]
            return number, f"{dataset}, {row}", method


def test_every_figure_of_the_page_is_in_a_study_and_none_but_these():
    page, ours = on_the_page(), in_the_studies()
    assert len(page) == 64 + 24 + 18 + 28 + 72 + 24 + 4 + 8
    assert ours == page


def test_gains_on_the_page_are_differences_of_its_figures():
    """A slip in copying a figure would show as a wrong gain. What the page itself has wrong is listed."""
    wrong = {}
    count = 0
    for number, rows in page_tables().items():
        for row in rows:
            title = next(iter(row.values()))
            for column, cell in row.items():
                if found := re.search(r"\(([+-]\d\.\d\d)\)", cell):
                    gain = (figure(cell) or 0) - base_of(number, row, column)
                    count += 1
                    if round(gain, 2) != float(found[1]):
                        wrong[number, title, column] = (float(found[1]), round(gain, 2))
    assert count == 48 + 18 + 12 + 14 + 12 + 12 + 4
    ours = "EnsTeach+MCL(x4)"
    assert wrong == {
        # The page takes another method than DML for the second best.
        (5, "DenseNet-40-12", f"{ours} Ind"): (2.19, 2.12),
        (5, "ResNet-32", f"{ours} Ind"): (1.64, 1.22),
        (5, "WRN-16-2", f"{ours} Ind"): (2.07, 1.42),
        # Slips of the page.
        (1, "ResNet-56", "DML Ens"): (-0.03, 0.03),
        (4, "WRN-40-2", "DML+MCL Net2"): (1.11, 1.09),
        (5, "ResNet-110", f"{ours} Ens"): (1.10, 1.50),
    }


def base_of(number: int, row: dict[str, str], column: str) -> float:
    """The figure that a gain of the page is upon: a baseline's, or in Table 5 the second best."""
    kind = column.split()[-1]
    if number == 5:
        same = (row[name] for name in row if name.endswith(kind) and name != column)
        return max(value for cell in same if (value := figure(cell)) is not None)
    if number == 3:
        network = row["Method"].split("+")[0]
        (row,) = (each for each in page_tables()[3] if each["Method"] == f"{network}+Vanilla")
    names = {
        1: f"Vanilla {kind}",
        2: "Vanilla",
        3: column,
        4: f"DML {kind}",
        6: f"{column.split()[0]} Vanilla",
        8: "MoCo",
    }
    return figure(row[names[number]]) or 0


def test_figures_in_headers_are_published_ones():
    for path in STUDIES:
        metric = read_header(path)["expected metric"]
        if "(published" in metric:
            rows = [row for each in read_study(path).published for row in each.rows.values()]
            known = {f"{value:.2f}" for row in rows for value in row if value is not None}
            told = set(re.findall(r"\b\d\d\.\d\d\b", metric.split("(published")[0]))
            assert told, path.stem
            assert told <= known, path.stem


# Headers and cells


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_opens_with_its_facts_and_a_command_that_names_it(path):
    header = read_header(path)
    assert set(header) == set(HEADER_FIELDS)
    assert all(header.values())
    assert re.match(rf"peerlearn study {path.stem}(?!\w)", header["command"])
    assert read_study(path).folder == f"runs/{path.stem}"


def test_every_study_has_as_many_cells_and_runs_as_its_table():
    found = {}
    for path in STUDIES:
        study = plan(path.stem)
        found[path.stem] = (len(study.grids), len(study.cells), len(study.runs))
    assert found == SIZES


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_cells_differ_by_what_their_axes_name(path):
    config = read_study(path)
    cells = plan(path.stem).cells
    by_place = {(cell.grid, cell.labels): flat_config(cell.variant.config) for cell in cells}
    compared = 0
    for (grid, labels), ours in by_place.items():
        for number, (axis, names) in enumerate(config.grids[grid].items()):
            for other in names:
                neighbour = (*labels[:number], other, *labels[number + 1 :])
                theirs = by_place[grid, neighbour]
                differing = {key for key, value in ours.items() if value != theirs[key]}
                rivals = NAMED_BY_RIVALS if path.stem.startswith("ssl_") else set()
                allowed = NAMED[axis] | (rivals if axis == "method" else set())
                assert differing <= allowed, (grid, labels, other)
                assert bool(differing) == (other != labels[number]), (grid, labels, other)
                compared += 1
    assert compared >= len(cells)


# Grids of the self-supervised studies whose question is whether peers help.
WITHOUT_PEERS = (
    "MoCo, with and without peers",
    "SimCLR, with and without peers",
    "at the same cost",
    "unlike networks",
    "with fresh seeds",
    "four networks with common low stages",
    "SimCLR with fresh seeds",
    "MoCo at the same cost",
    "SimCLR at the same cost",
)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_compares_methods_with_one_without_peers(path):
    study = plan(path.stem)
    compare = study.config.compare
    assert compare.score
    if path.stem.startswith("figure_3"):
        assert list(compare.baseline.values())[1:] == FIGURE_3[path.stem]
        assert compare.baseline["loss terms"] == "all"
        return
    for grid, axes in study.config.grids.items():
        if path.stem.startswith("ssl_") and grid not in WITHOUT_PEERS:
            continue
        assert study.config.compared_axis(grid) == "method"
        if len(axes["method"]) == 1:
            continue
        assert compare.baseline[grid] == next(iter(axes["method"]))
        baseline = [
            cell.variant.config
            for cell in study.cells
            if cell.grid == grid and study.compared_label(cell) == compare.baseline[grid]
        ]
        assert baseline
        assert all(config.beta == 0 or config.cohort.networks == 1 for config in baseline)


# The setting of the rest of the figure: embedding size, negatives, alpha, beta.
FIGURE_3 = {
    "figure_3_cifar100": ["128", "126", "0.5", "0.1"],
    "figure_3_digits": ["128", "null", "0.5", "0.1"],
}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_evaluation_is_a_command_line_that_its_verb_takes(path, capsys):
    for line in read_study(path).evaluate:
        main([*shlex.split(line), "--checkpoint", "nowhere", "--dry_run"])
        # All words were read, and only the checkpoint is missing.
        said = capsys.readouterr()
        assert said.err == "peerlearn: --checkpoint nowhere is not there\n"


@pytest.mark.parametrize(
    ("name", "data", "images"),
    [
        ("table_1_cifar100", "cifar100", 50_000),
        ("table_1_imagenet", "imagenet", 1_281_167),
        ("table_2_digits", "digits", 200),
        ("table_8_digits", "digits", 1_437),
        ("table_7_characters", "characters", 39_699),
        ("fashion_mnist", "fashion_mnist", 10_000),
        ("fashion_mnist_few_labels", "fashion_mnist", 1_000),
    ],
)
def test_the_list_of_configs_tells_the_images_of_a_study(name, data, images):
    """Those of its first run, by the words that it gives beside its recipe."""
    (path,) = (path for path in STUDIES if path.stem == name)
    recipe = _recipe("study", path)
    assert (recipe.task, recipe.data, recipe.images) == ("study", data, images)


# Table by table


def test_the_columns_of_table_5():
    study = plan("table_5_cifar100")
    column = {
        study.compared_label(cell): cell.variant.config
        for cell in study.cells
        if study.row_of(cell) == "ResNet-32"
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


@pytest.mark.parametrize("table", [1, 2, 4, 5, 6])
def test_the_resnet_110_of_the_supervised_tables_is_that_of_the_authors_code(table):
    """Bottlenecks, of 1.17M parameters; Table 8's 1.74M is the basic one."""
    name = f"table_{table}_cifar100"
    (path,) = (path for path in STUDIES if path.stem == name)
    assert (
        "ResNet-110 is the one of the authors' code, with bottlenecks"
        in read_header(path)["source"]
    )
    meant = set()
    for cell in plan(name).cells:
        architectures = cell.variant.config.cohort.architectures()
        for label, architecture in zip(cell.labels[0].split(", "), architectures, strict=False):
            if label == "ResNet-110":
                meant.add(architecture)
    assert meant == {"resnet110_bottleneck"}


def test_table_6_probes_networks_that_table_2_trains():
    """So one folder can hold both: its runs have the names and the configs of Table 2's."""
    trained = {variant.name: variant.config for variant in plan("table_2_cifar100").variants}
    probed = {variant.name: variant.config for variant in plan("table_6_cifar100").variants}
    assert probed.items() < trained.items()


RECIPES = {
    "table_8_cifar100": {
        ("DenseNet", "MoCo"): "moco_cifar100_densenet_bc_40_12",
        ("DenseNet", "MoCo + MCL (x2)"): "mcl_x2_cifar100_densenet_bc_40_12",
        ("ResNet-110", "MoCo"): "moco_cifar100_resnet110",
        ("ResNet-110", "MoCo + MCL (x2)"): "mcl_x2_cifar100_resnet110",
        ("WRN-28-4", "MoCo"): "moco_cifar100_wrn_28_4",
        ("WRN-28-4", "MoCo + MCL (x2)"): "mcl_x2_cifar100_wrn_28_4",
    },
    "table_8_imagenet": {
        ("ResNet-50", "MoCo"): "moco_v1_imagenet_resnet50",
        ("ResNet-50", "MoCo + MCL (x2)"): "mcl_x2_imagenet_resnet50",
    },
    "table_7_miniimagenet": {
        ("", "prototypical network"): "prototypical_miniimagenet",
        ("", "prototypical network + MCL (x2)"): "mcl_x2_prototypical_miniimagenet",
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_cells_are_the_shipped_recipes(name):
    """But for the folder of the images, which the study names."""
    study = plan(name)
    (grid, *_) = study.grids
    found = {
        (study.row_of(cell), study.compared_label(cell)): cell.variant.config
        for cell in study.cells
        if cell.grid == grid
    }
    recipes = {
        place: load_config(PretrainConfig, SHIPPED / f"{recipe}.yaml")
        for place, recipe in RECIPES[name].items()
    }
    assert found.keys() == recipes.keys()
    for place, recipe in recipes.items():
        root = found[place].data.root
        assert found[place] == replace(recipe, data=replace(recipe.data, root=root)), place


def test_table_7_trains_for_five_shots_as_published():
    """Protocols of the baseline: 30 ways for 1 shot, 20 for 5, and as many shots as the test has."""
    study = plan("table_7_miniimagenet")
    trained = {
        cell.grid: (episode.ways, episode.shots)
        for cell in study.cells
        if (episode := cell.variant.config.prototypical)
    }
    assert trained == {"5-way 1-shot": (30, 1), "5-way 5-shot": (20, 5)}
    assert study.config.evaluate == ["fewshot --ways 5 --shots 1 5 --queries 15 --episodes 600"]


# Small ones


@pytest.mark.parametrize(
    ("small_name", "whole_name"),
    [
        *((f"table_{number}_digits", f"table_{number}_cifar100") for number in (1, 2, 4, 5, 6)),
        ("table_3_fashion_mnist", "table_3_imagenet"),
    ],
)
def test_a_small_table_has_the_methods_of_the_papers(small_name, whole_name):
    """The very words, over another recipe; the live DML of Table 5, which the paper does not print, is left out."""
    small, whole = plan(small_name), plan(whole_name)
    (grid,) = whole.grids
    ours, theirs = (study.config.grids[grid]["method"] for study in (small, whole))
    assert ours == {
        label: words for label, words in theirs.items() if label != "DML (T 3, live teachers)"
    }
    assert small.config.compare == whole.config.compare


def test_the_small_table_8_and_figure_3_are_alike_the_papers():
    small, whole = plan("table_8_digits"), plan("table_8_cifar100")
    told = [
        [(c.alpha, c.beta, c.cohort.networks) for c in (cell.variant.config for cell in cells)]
        for cells in (small.cells, whole.cells[:2])
    ]
    assert told == [[(1.0, 0.0, 1), (0.5, 0.1, 2)]] * 2
    small, whole = plan("figure_3_digits"), plan("figure_3_cifar100")
    assert small.grids == whole.grids
    assert small.config.grids["loss terms"] == whole.config.grids["loss terms"]


def test_a_small_table_6_probes_networks_that_the_small_table_2_trains():
    trained = {variant.name: variant.config for variant in plan("table_2_digits").variants}
    probed = {variant.name: variant.config for variant in plan("table_6_digits").variants}
    assert probed.items() < trained.items()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_runs_of_small_studies_see_few_images(path):
    """On data that are always there: scikit-learn's digits, Fashion-MNIST of Debian, and fonts of Debian."""
    study = plan(path.stem)
    if read_header(path)["hardware"] != "2 CPU cores":
        assert not path.stem.endswith("digits")
        return
    assert not study.config.published
    for variant in study.variants:
        data = variant.config.data
        assert data.name in (
            "digits",
            "fashion_mnist",
            "fashion_mnist_classes",
            "characters",
            "folder",
        )
        if data.name == "digits":
            images = 11 * 128 * 20 if path.stem == "table_8_digits" else 3 * 64 * 40
            assert preview(variant.config).images == images


# Names of run directories: results of an older version stay readable.
NAMES = {
    "fashion_mnist_few_labels": [
        "alpha-0.0_beta-0.0_supervised.teaching-none",
        "alpha-0.0_beta-0.0_supervised.teaching-dml",
        "supervised.teaching-none",
        "base",
        "epochs-300_alpha-0.0_beta-0.0_supervised.teaching-none_data.shots-20_mo-b2d0cf28",
        "epochs-300_supervised.teaching-none_data.shots-20_monitor.every_epochs-100",
        "epochs-300_data.shots-20_monitor.every_epochs-100",
    ],
    "where_mcl_helps": [
        "alpha-0.0_beta-0.0_supervised.teaching-none",
        "supervised.teaching-none",
        "batch_size-20_alpha-0.0_beta-0.0_supervised.teaching-none",
        "batch_size-20_supervised.teaching-none",
        "alpha-0.0_beta-0.0_supervised.teaching-none_data.name-folder_data.root--80120aae",
        "supervised.teaching-none_data.name-folder_data.root-runs-characters-60_-4b0f2af4",
        "alpha-0.0_beta-0.0_supervised.teaching-none_data.name-folder_data.root--121c6cac",
        "supervised.teaching-none_data.name-folder_data.root-runs-characters-10_-b2af381f",
        "epochs-200_alpha-0.0_beta-0.0_supervised.teaching-none_data.name-folder-29cbd819",
        "epochs-200_supervised.teaching-none_data.name-folder_data.root-runs-fas-009d625f",
        "epochs-200_alpha-0.0_beta-0.0_supervised.teaching-none_data.name-folder-e1aeba86",
        "epochs-200_supervised.teaching-none_data.name-folder_data.root-runs-fas-53a95b98",
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_run_directories_keep_their_names(name):
    study = plan(name)
    assert [cell.variant.name for cell in study.cells] == NAMES[name]
    assert study.runs[0].folder == Path(f"runs/{name}/{NAMES[name][0]}-seed-0")


def test_small_few_shot_studies_train_eight_ways():
    """Prototypical networks by 1 and 5 shots, plain batches, and MoCo without labels; each by its recipe's words."""
    for name, ways in (("table_7_characters", 10), ("table_7_fashion_mnist", 4)):
        configs = [variant.config for variant in plan(name).variants]
        episodes = [config.prototypical for config in configs]
        assert [config.method for config in configs] == ["prototypical"] * 7 + ["moco"]
        assert [each.batches for each in episodes[:7]] == ["episodes"] * 5 + [
            "images_per_class"
        ] * 2
        assert [each.shots for each in episodes[:5]] == [1, 1, 1, 5, 5]
        assert [each.ways for each in episodes[:3]] == [ways] * 3
        assert [config.cohort.networks for config in configs] == [2, 2, 2, 2, 2, 1, 2, 2]
        assert {config.cohort.backbones for config in configs} == {"conv4"}
        assert {config.data.name for config in configs} == {
            {"table_7_characters": "characters"}.get(name, "fashion_mnist_classes")
        }
