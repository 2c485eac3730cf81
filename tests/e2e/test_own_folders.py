"""Folders and names as people have them, through the whole command: trained, resumed, exported, scored; or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.runs.directory import RunDirectory
from tests.e2e.runs import environment, write_noise

TINY = [
    *("--batch_size", "8", "--epochs", "1", "--cohort.backbones", "conv4", "--queue.size", "16"),
    *("--cohort.embedding_dim", "8", "--monitor.k", "3", "--device", "cpu", "--data.workers", "0"),
]
FOLDER = ["--data.name", "folder", "--data.root"]
CLASSES = ["$x^^$", "[red]", "-lead", "a\nb", "grün 😀", "%s {y}", "gr\udcfcn", "x" * 200]
RUN = "run [red] {x} %d 'q'"
ROOT = "my [bold] photos $x^^$ 😀"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A run on classes, in a folder and in a run directory with names of all kinds."""
    folder = tmp_path_factory.mktemp("odd")
    counts = {"train": 3, "validation": 2}
    write_noise(folder / ROOT, {f"{s}/{name}": n for s, n in counts.items() for name in CLASSES})
    words = [*TINY, *FOLDER, str(folder / ROOT), "--run", str(folder / RUN)]
    assert main(["pretrain", *words]) == 0
    return folder / RUN


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_noise(folder / "plain", {"a": 8, "b": 8})
    words = [*TINY, *FOLDER, str(folder / "plain"), "--run", str(folder / "run")]
    assert main(["pretrain", *words, "--monitor.every_epochs", "0"]) == 0
    return folder / "run" / "export/step-00000002/net-0"


@pytest.mark.slow
def test_names_of_all_kinds_go_through_training_and_resumption(odd, capsys):
    assert main(["resume", str(odd), "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert f"run directory: {odd}" in out
    assert "kNN top-1 (%) on my [bold]" in out
    last = list(RunDirectory(odd).metric_rows())[-1]
    assert (last["step"], last["knn/test_images"]) == (6, 2 * len(CLASSES))
    assert main(["export", str(odd), "--format", "timm", "--output", str(odd / "-x")]) == 0


@pytest.mark.slow
def test_names_of_all_kinds_are_scored_and_drawn(odd, tmp_path, capsys, caplog):
    words = ["--checkpoint", str(odd), "--network", "0", "--device", "cpu"]
    words += ["--data.workers", "0", "--results", str(tmp_path / "results")]
    for evaluator in (["knn", "--k", "3"], ["linear", "logistic_regression"]):
        assert main([*evaluator, *words]) == 0
        assert "my [bold] photos" in capsys.readouterr().out
    assert not caplog.records
    (file,) = (tmp_path / "results").glob("linear-my__bold__photos__x___*.json")
    result = json.loads(file.read_text())
    assert result["dataset"] == ROOT
    assert set(result["metrics"]["per_class_top1"]) == set(CLASSES)
    assert file.with_suffix(".png").stat().st_size > 5000


@pytest.mark.slow
def test_an_environment_of_ascii_and_no_home_costs_one_warning(export, tmp_path):
    """In a process of its own, whose locale and home are read when it starts."""
    counts = {"train": 3, "val": 2}
    write_noise(tmp_path, {f"{s}/{name}": n for s, n in counts.items() for name in CLASSES})
    words = ["linear", "logistic_regression", "--checkpoint", str(export), *FOLDER, str(tmp_path)]
    words += ["--device", "cpu", "--data.workers", "0", "--results", str(tmp_path / "results")]
    more = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "1"}
    more |= {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "MPLBACKEND": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-m", "peerlearn", *words],
        env=environment(**more),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"\n") == 1
    assert b"features are not kept" in done.stderr
    assert done.stdout.isascii()
    assert list((tmp_path / "results").glob("*.png"))


def test_a_root_that_no_config_can_hold_is_refused_before_anything_is_done(tmp_path, capsys):
    root = os.fsencode(tmp_path) + b"/gr\xfcn"
    write_noise(Path(os.fsdecode(root)), {"train/a": 8, "train/b": 8})
    words = [*TINY, *FOLDER, os.fsdecode(root), "--run", str(tmp_path / "run")]
    assert main(["pretrain", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("peerlearn: data.root: ")
    assert said.endswith(
        " has bytes that are no UTF-8 text: rename it, or give a link to it (ln -s)\n"
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "green").symlink_to(os.fsdecode(root))
    words = [*TINY, *FOLDER, str(tmp_path / "green"), "--run", str(tmp_path / "run")]
    assert main(["pretrain", *words]) == 0
    assert main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 0


def knn(export: Path, root: Path) -> int:
    words = ["knn", "--checkpoint", str(export), "--results", str(root / "results"), "--k", "3"]
    return main([*words, "--data.workers", "0", "--device", "cpu", *FOLDER, str(root)])


def test_a_stray_image_is_named_by_who_needs_labels(export, tmp_path, capsys):
    write_noise(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    (tmp_path / "train/a/000.png").rename(tmp_path / "train/stray.png")
    assert knn(export, tmp_path) == 1
    assert capsys.readouterr().err == (
        "peerlearn: folder has no labels: evaluation needs them, and in its train split "
        f"{tmp_path / 'train/stray.png'} lies beside the class folders a, b, and in none of them: mend that; or "
        "choose another by --data.name\n"
    )


def test_the_test_images_of_kaggle_are_passed_over(export, tmp_path, capsys, caplog):
    write_noise(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2, "test": 3})
    assert knn(export, tmp_path) == 0
    (record,) = caplog.records
    assert f"{tmp_path / 'test/000.png'} and the others lie in no class" in record.getMessage()
    assert record.getMessage().endswith(f"{tmp_path / 'val'} is the test split instead")


def test_what_is_skipped_and_what_is_missing_is_told_and_the_rest_scored(export, tmp_path, caplog):
    write_noise(tmp_path, {"train/a": 3, "train/b": 3, "train/c": 3, "val/b": 2})
    for name in ("train/a/1.heic", "train/b/2.HEIC", "val/b/Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    assert knn(export, tmp_path) == 0
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path / 'train'}: skipped 2 .heic (a format that is not read: convert them to JPEG or PNG)",
        f"{tmp_path / 'val'}: skipped 1 .db (no images)",
        f"{tmp_path.name}: the test split has images of only 1 of its 3 classes: accuracy is that of these; it "
        "lacks a, c",
    ]
    (file,) = (tmp_path / "results").glob("knn-*-0-*.json")
    assert json.loads(file.read_text())["metrics"]["n"] == 2


@pytest.mark.slow
def test_relative_names_do_in_a_folder_whose_own_name_is_no_text(tmp_path, monkeypatch, capsys):
    here = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn"))
    write_noise(here, {f"photos/{part}": 8 for part in ("train/a", "train/b", "test/a", "test/b")})
    monkeypatch.chdir(here)
    assert main(["pretrain", *TINY, *FOLDER, "photos", "--run", "run"]) == 0
    assert main(["resume", "run", "--epochs", "2"]) == 0
    words = ["--checkpoint", "run", "--network", "0", "--device", "cpu", "--data.workers", "0"]
    assert main(["knn", *words, "--k", "3"]) == 0
    assert main(["linear", "finetune", *words, "--epochs", "1", "--batch_size", "8"]) == 0
    assert main(["export", "run", "--format", "timm", "--output", "out"]) == 0
    assert main(["knn", "--checkpoint", "out/net-0", *words[2:], *FOLDER, "photos"]) == 0
    assert len(list((here / "run/results").glob("*-photos-*.json"))) == 2
    capsys.readouterr()
