"""The config of a study: which runs a file makes, what is compared, and what is refused."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from peerlearn.cli import main
from peerlearn.config import config_to_yaml
from peerlearn.runs.directory import RunDirectory
from slurm.config import SubmitConfig
from studies.runner import place_of
from studies.study import Study, StudyRun, check_folder, plan_study, write_study
from studies.study_file import read_study
from tests.e2e.runs import SMALL, environment

LAST_STEP = 12
TERMS = {"all": "", "without scl_hard": "--terms scl_soft icl_hard icl_soft"}
SIZES = {"cohort.embedding_dim": [8, 16, 32]}


def write_file(home: Path, **keys: object) -> Path:
    """FILE.yaml of a small study in ``home``/s."""
    content = {
        "folder": str(home / "s"),
        "pretrain": shlex.join([*SMALL, "--method", "simclr"]),
        "seeds": [0, 1],
        "grids": {"terms": {"loss terms": TERMS}, "size": SIZES},
        **keys,
    }
    file = home / "file.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def make(home: Path, **keys: object) -> Study:
    return plan_study(read_study(write_file(home, **keys)))


def names(study: Study) -> dict[tuple[str, ...], str]:
    return {(cell.grid, *cell.labels): cell.variant.name for cell in study.cells}


def begin(run: StudyRun, *, done: bool = True) -> RunDirectory:
    """A run directory as training leaves it, without training."""
    directory = RunDirectory(run.folder)
    directory.create_folder()
    config = replace(run.variant.config, seed=run.seed, run=str(run.folder))
    directory.write_config(config_to_yaml(config))
    if done:
        directory.event("done", attempt=1, step=LAST_STEP)
        directory.mark_done()
    return directory


# Which runs


def test_a_grid_is_the_product_of_its_axes_and_equal_configs_are_one_run(tmp_path: Path) -> None:
    study = make(
        tmp_path,
        grids={
            "terms": {"loss terms": TERMS},
            "size": SIZES,
            "both": {
                "networks": {"one": "--cohort.networks 1", "two": ""},
                "alpha": {"low": "--alpha 0.25", "as it is": "--alpha 0.5"},
            },
        },
    )
    base, low = "base", "alpha-0.25"
    assert names(study) == {
        ("terms", "all"): base,
        ("terms", "without scl_hard"): "terms-scl_soft+icl_hard+icl_soft",
        ("size", "8"): "cohort.embedding_dim-8",
        ("size", "16"): base,
        ("size", "32"): "cohort.embedding_dim-32",
        ("both", "one", "low"): "alpha-0.25_cohort.networks-1",
        ("both", "one", "as it is"): "cohort.networks-1",
        ("both", "two", "low"): low,
        ("both", "two", "as it is"): base,
    }
    assert [(run.seed, run.folder.name) for run in study.runs[:2]] == [
        (0, "base-seed-0"),
        (0, "terms-scl_soft+icl_hard+icl_soft-seed-0"),
    ]
    assert len(study.runs) == len({run.folder for run in study.runs}) == 7 * 2
    by_name = {variant.name: variant.config for variant in study.variants}
    assert (by_name[low].alpha, by_name[low].cohort.networks) == (0.25, 2)
    one = by_name["cohort.networks-1"]
    assert (one.alpha, one.cohort.networks) == (0.5, 1)
    assert study.config.compare.baseline == {"terms": "all", "size": "8", "both": "low"}
    assert (study.row_of(study.cells[-1]), study.compared_label(study.cells[-1])) == (
        "two",
        "as it is",
    )


def test_a_new_grid_renames_no_run(tmp_path: Path) -> None:
    before = names(make(tmp_path))
    grids = {"first": {"beta": [0.1, 0.2]}, "terms": {"loss terms": TERMS}, "size": SIZES}
    after = names(make(tmp_path, grids=grids))
    assert {key: after[key] for key in before} == before
    assert after["first", "0.2"] == "beta-0.2"


def test_names_of_odd_and_long_values_are_short_and_differ(tmp_path: Path) -> None:
    names_of_run = ["a b", "a/b", "c" * 100, "c" * 99 + "d"]
    study = make(tmp_path, grids={"g": {"data.root": names_of_run}})
    found = [variant.name for variant in study.variants]
    assert len(set(found)) == 4
    assert all(len(name) <= 80 and "/" not in name and " " not in name for name in found)


def test_labels_are_as_written_and_values_as_on_the_command_line(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    text = file.read_text()
    text = text[: text.index("grids:")] + (
        "grids:\n"
        "  g:\n"
        "    a: &axis {no: '', 1e-3: --base_lr 1e-3, '2': }\n"
        "    symmetric: [false]\n"
        "    cohort.share_stages: [null, 1]\n"
        "    cohort.backbones: [conv4, [conv4, resnet32]]\n"
        "  h:\n"
        "    a: *axis\n"
    )
    file.write_text(text)
    config = read_study(file)
    study = plan_study(config)
    assert list(config.grids["g"]["a"]) == list(config.grids["h"]["a"]) == ["no", "1e-3", "2"]
    assert list(config.grids["g"]["cohort.backbones"]) == ["conv4", "conv4, resnet32"]
    cells = {cell.labels: cell.variant.config for cell in study.cells}
    last = cells["1e-3", "false", "1", "conv4, resnet32"]
    assert (last.base_lr, last.symmetric, last.cohort.share_stages) == (1e-3, False, 1)
    assert last.cohort.backbones == ["conv4", "resnet32"]
    assert cells["2", "false", "null", "conv4"].cohort.share_stages is None
    again = tmp_path / "again.yaml"
    again.write_text(config_to_yaml(config))
    assert read_study(again) == config


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    config = read_study(file, folder="f", seeds=[7], pretrain="--epochs 3")
    assert (config.folder, config.seeds) == ("f", [7])
    study = plan_study(config, only=["size"])
    assert study.grids == ["size"]
    assert {variant.config.epochs for variant in study.variants} == {3}


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("without scl_hard", {"terms": "without scl_hard", "size": "8"}),
        ({"size": 16}, {"terms": "all", "size": "16"}),
        (32, {"terms": "all", "size": "32"}),
    ],
)
def test_the_baseline_is_a_label_of_the_compared_axis(
    tmp_path: Path, baseline: object, expected: dict
) -> None:
    assert (
        read_study(write_file(tmp_path, compare={"baseline": baseline})).compare.baseline
        == expected
    )


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sedes": [0]}, "unknown key 'sedes'; did you mean 'seeds'?"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": None}, "line 6: seeds: expected a list of whole numbers, got null"),
        ({"seeds": 3}, "seeds: expected a list of whole numbers, got 3: write [3]"),
        ({"seeds": [0, True]}, "seeds: expected a list of whole numbers, got true in it"),
        ({"seeds": [1, 1]}, "seeds holds one twice"),
        ({"folder": ""}, "line 1: folder: expected text, got ''"),
        ({"folder": [3]}, "folder: expected text, got a list"),
        ({"grids": {}}, "grids must hold at least one"),
        ({"grids": [1]}, "grids must map names to axes"),
        ({"grids": {"g": {}}}, "grids: g: it has no axis"),
        ({"grids": {"g": "--alpha 1"}}, "grids: g: it must map axes"),
        ({"grids": {"g": {"a": {}}}}, "grids: g: a: it has no label"),
        ({"grids": {"g": {"a": "--alpha 1"}}}, "grids: g: a: an axis maps labels to words"),
        ({"grids": {"g": {"a": {"x": 3}}}}, "grids: g: a: x: words must be a line of text, got 3"),
        ({"grids": {"g": {"alfa": [1, 2]}}}, "this is none; did you mean 'alpha'?"),
        ({"grids": {"g": {"cohort": [1, 2]}}}, "and this is none"),
        ({"grids": {"g": {"alpha": [1, "1"]}}}, "grids: g: alpha: '1' stands twice"),
        ({"grids": {"g": {"a": {"x": "--alpha '1"}}}}, 'g: a: x: "--alpha \'1" cannot be split'),
        ({"grids": {"g": {"a": {"x": "--seed 1"}}}}, "g: a: x: --seed has no place here"),
        ({"pretrain": "--run=a"}, "pretrain: --run has no place here"),
        ({"compare": {"baseline": "vanila"}}, "compare: baseline: no grid has a label 'vanila'"),
        (
            {"compare": {"baseline": {"sise": 8}}},
            "baseline: unknown grid 'sise'; did you mean 'size'?",
        ),
        ({"compare": {"baseline": {"size": 9}}}, "its axis cohort.embedding_dim has no label '9'"),
        ({"compare": {"axis": "siz"}}, "compare: axis: no grid has an axis 'siz'"),
        ({"compare": {"score": "top1"}}, "expected TASK/METRIC, linear/top1 say, got 'top1'"),
        (
            {
                "grids": {
                    "g": {"a": {"x / y": "", "x": ""}, "b": {"z": "", "y / z": ""}, "c": {"l": ""}}
                }
            },
            "grids: g: two of its rows are called 'x / y / z'",
        ),
        ({"evaluate": "knn"}, "evaluate: expected a list of text, got 'knn': write [knn]"),
        ({"evaluate": ["knn", "knn"]}, "evaluate holds one twice"),
        ({"evaluate": ["knn --checkpoint a"]}, "--checkpoint has no place here"),
        ({"evaluate": ["doctor"]}, "evaluate: 'doctor': doctor is no evaluation of a checkpoint"),
        ({"evaluate": ["linear nonsense"]}, "'nonsense' is neither a file nor a shipped config"),
        ({"exports": 0}, "exports: expected a number of epochs of at least 1, got 0"),
        ({"keep": "some"}, "keep: expected one of all, last, results, got 'some'"),
        ({"throttle": 0}, "throttle must be at least 1"),
        ({"published": [{"grid": "terms", "score": "knn/top1"}]}, "published: rows is missing"),
        ({"exports": True}, "exports: expected one of last, all or a whole number"),
        (
            {"evaluation_cluster": 5},
            "evaluation_cluster: '5' is neither a file nor a shipped config",
        ),
        ({"cluster": None}, "cluster: expected text, got null"),
        ({"compare": {"score": None}}, "compare: score: expected text or a list of text, got null"),
        (
            {"compare": {"score": 5}},
            "compare: score: expected TASK/METRIC, linear/top1 say, got '5'",
        ),
        ({"compare": {"score": ["knn/top1"] * 2}}, "compare: score holds one twice"),
        ({"compare": {"baseline": None}}, "compare: baseline: expected a value, got null"),
        ({"published": [{"grid": None}]}, "published: grid: expected text, got null"),
        ({"published": [{"score": None}]}, "published: score: expected text, got null"),
        (
            {"published": [{"grid": "terms", "score": "knn/top1", "rows": {"": [1, 2, 3]}}]},
            "published: terms: row '': 3 figures for 2 labels",
        ),
        (
            {"published": [{"grid": "trems", "score": "knn/top1", "rows": {"": [1, 2]}}]},
            "published: unknown grid 'trems'; did you mean 'terms'?",
        ),
        ({"grids": {"g": {"a": {"ok": "", "x": "--alfa 1"}}}}, "grids: g: a x: unknown key --alfa"),
        ({"grids": {"g": {"a": {"x": "--alpha -1"}}}}, "grids: g: a x: alpha must be at least 0"),
        ({"grids": {"g": {"alpha": [0, "x"]}}}, "grids: g: alpha x: "),
        (
            {"pretrain": "no_such_config"},
            "grids: terms: loss terms all: 'no_such_config' is neither",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, keys: dict, message: str
) -> None:
    assert main(["study", str(write_file(tmp_path, **keys))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "folder: f\nseeds: [0]\ngrids: {g: {a: {x: '',\n x: 1}}}\n",
            "grids.g.a.x stands twice (lines 3 and 4)",
        ),
        (
            "folder: f\nseeds: [0]\ngrids: {g: {alpha: [1]},\n g: {beta: [1]}}\n",
            "grids.g stands twice (lines 3 and 4)",
        ),
        ("folder: f\nseeds: [0]\ngrids: {g: {[a, b]: [1]}}\n", "a key must be a word"),
        ("folder: [\n", "file.yaml, line 2: not a readable YAML file"),
        ("folder\n", "a config file holds `key: value` lines"),
        ("", "holds no keys"),
    ],
)
def test_files_that_are_no_studys(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert main(["study", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--only", "sise"], 2, "--only: no grid is named 'sise'; did you mean 'size'?"),
        (["--seeds"], 2, "--seeds"),
        (["--sedes", "1"], 2, "--sedes"),
        (["--keep", "some"], 2, "--keep"),
        (
            ["--exports", "some"],
            2,
            "--exports: expected one of last, all or a whole number, got 'some'",
        ),
        (["--throttle", "0"], 2, "throttle must be at least 1"),
        (["--grid", "beta=1,2"], 2, "--grid stands for a file"),
        (["--evaluate", "knm"], 2, "evaluate: 'knm': unknown verb 'knm'; did you mean 'knn'?"),
        (["--evaluate", "knn --kk 5"], 2, "evaluate: 'knn --kk 5': unknown key --kk"),
        (["--cluster", "slrum"], 2, "cluster: 'slrum' is neither a file nor a shipped config"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], code: int, message: str
) -> None:
    assert main(["study", str(write_file(tmp_path)), *words]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_study(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["study", str(tmp_path)]) == 2
    assert "it has no study.yaml" in capsys.readouterr().err
    assert main(["study", "figure_33"]) == 2
    assert "neither a file nor a shipped config" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    file = write_file(tmp_path, folder=str(tmp_path / "taken" / "s"))
    assert main(["study", str(file)]) == 1
    assert "cannot be written (Not a directory): choose another --folder" in capsys.readouterr().err


def test_a_folder_with_runs_of_other_configs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = make(tmp_path)
    begin(study.runs[0], done=False)
    check_folder(study)
    elsewhere = shlex.join([*SMALL, "--method", "simclr", "--data.root", "there"])
    check_folder(make(tmp_path, pretrain=elsewhere))
    longer = write_file(
        tmp_path, pretrain=shlex.join([*SMALL, "--method", "simclr", "--epochs", "9"])
    )
    assert main(["study", str(longer)]) == 1
    error = capsys.readouterr().err
    assert "base-seed-0 is a run of another config: epochs is 2 there and 9 in the study" in error
    assert not (tmp_path / "s" / "study.yaml").exists()
    study.runs[1].folder.mkdir()
    (study.runs[1].folder / "notes.txt").write_text("mine")
    assert main(["study", str(write_file(tmp_path))]) == 1
    assert f"{study.runs[1].folder} is there and no run" in capsys.readouterr().err


def test_published_figures_and_compared_axis(tmp_path: Path) -> None:
    """Rows are the other axes' labels, wherever the compared axis stands."""
    grids = {
        "g": {
            "a": {"x": "", "y": "--alpha 0.25"},
            "m": {"one": "--cohort.networks 1", "two": ""},
            "b": {"low": "--beta 0.1", "high": "--beta 0.2"},
        }
    }
    rows = {"x / low": [1, None], "x / high": [2, 3], "y / low": [4, 5.5], "y / high": [6, 7]}
    published = [{"grid": "g", "score": "knn/top1", "network": 1, "rows": rows}]
    study = make(tmp_path, grids=grids, compare={"axis": "m"}, published=published)
    assert study.config.compare.baseline == {"g": "one"}
    assert study.config.row_labels("g") == list(rows)
    assert [(study.row_of(c), study.compared_label(c)) for c in study.cells][:3] == [
        ("x / low", "one"),
        ("x / high", "one"),
        ("x / low", "two"),
    ]
    assert study.config.published[0].network == "1"
    again = tmp_path / "again.yaml"
    again.write_text(config_to_yaml(study.config))
    assert read_study(again) == study.config


def test_other_scores_leave_the_compared_axis_and_the_baselines(tmp_path: Path) -> None:
    axes = {"a": {"x": "", "y": "--alpha 0.25"}, "b": {"low": "--beta 0.1", "high": ""}}
    compare = {"score": "knn/top1", "axis": "a", "baseline": "y"}
    file = write_file(tmp_path, grids={"g": axes}, compare=compare)
    found = read_study(file, score=["linear/top1", "linear/top5"]).compare
    assert (found.score, found.axis) == (["linear/top1", "linear/top5"], "a")
    assert found.baseline == {"g": "y"}


def test_without_a_file_the_command_line_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["study", "--pretrain", shlex.join([*SMALL, "--method", "simclr"]), "--folder"]
    words += [str(tmp_path / "lr"), "--grid", "base_lr=0.03,0.06", "alpha=0.1,1"]
    words += ["--seeds", "0", "1", "--evaluate", "knn --k 20", "linear logistic_regression"]
    assert main([*words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "grid: grid: base_lr (2) x alpha (2) = 4, compared along alpha with 0.1" in printed
    assert "runs: 8, of 4 configs x 2 seeds (8 to start)" in printed
    # 2 epochs of 6 steps of 32 images, 8 times.
    assert f"images to process: {8 * 2 * 6 * 32:,} " in printed
    assert printed.count("\n") < 24
    assert not (tmp_path / "lr").exists()
    assert main([*words, "--dry_run", "--verbose"]) == 0
    assert capsys.readouterr().out.count("peerlearn pretrain ") == 8
    for key in ("--pretrain", "--folder"):
        at = words.index(key)
        assert main([*words[:at], *words[at + 2 :]]) == 2
        assert f"or give {key} " in capsys.readouterr().err
    assert main(["study", "--grid", "base_lr"]) == 2


def test_a_study_belongs_to_the_account_that_made_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = make(tmp_path)
    write_study(study, [])
    os.chown(study.root / "study.yaml", 65534, -1)
    for words in (
        ["study", str(study.root)],
        ["resume", str(study.root)],
        ["watch", str(study.root)],
        ["cancel", str(study.root)],
    ):
        assert main(words) == 1, words
        assert "belongs to the account nobody, which alone can go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sweep.yaml", ["study"]),
        ("pipeline.yaml", ["study"]),
        ("pipeline.yaml", ["table"]),
        ("sweep.yaml", ["resume"]),
        ("pipeline.yaml", ["resume"]),
    ],
)
def test_folders_of_earlier_versions_are_told_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, words: list[str]
) -> None:
    (tmp_path / name).write_text("folder: x\n")
    assert main([*words, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"holds the {name[:-5]} of an earlier version: write its grids" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("verb", ["sweep", "pipeline", "summary"])
def test_verbs_of_earlier_versions_are_told_what_to_write(
    capsys: pytest.CaptureFixture, verb: str
) -> None:
    assert main([verb, "x"]) == 2
    error = capsys.readouterr().err
    assert f"unknown verb '{verb}'; write `peerlearn " in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"baseline": "all"}, "baseline: write it under compare: compare: {baseline: ...}"),
        ({"pretrain": ["a = x"]}, "pretrain: a pipeline's variants are labels of a grid"),
        ({"every_epochs": 2}, "every_epochs: write exports: N"),
    ],
)
def test_files_of_earlier_versions_are_told_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: dict, message: str
) -> None:
    assert main(["study", str(write_file(tmp_path, **content))]) == 2
    assert message in capsys.readouterr().err


def test_planning_is_light() -> None:
    """A table of published figures waits for no torch."""
    code = (
        "import sys; from studies.study import plan_study; from studies.study_file import read_study;"
        "import studies.watch_command; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_a_study_names_and_orders_its_jobs_itself(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("partition: gpu\nname: mine\ndependency: afterok:1\nwait: true\n")
    assert place_of(str(profile)) == SubmitConfig(partition="gpu")
    assert place_of("here").executor == "debug"
