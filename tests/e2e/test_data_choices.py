"""Runs on data that is missing, unlabelled or of odd shape, and kNN of exports that stand alone."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peerlearn.cli import main
from peerlearn.knn import knn_scores, knn_top1
from peerlearn.runs.directory import RunDirectory

TINY = [
    *("--batch_size", "16", "--epochs", "1", "--cohort.backbones", "conv4"),
    *("--cohort.embedding_dim", "8", "--queue.size", "32", "--monitor.k", "3", "--device", "cpu"),
    *("--data.image_size", "16", "--data.augmentation", "moco_v2"),
]


def rows(run: Path) -> list[dict]:
    return list(RunDirectory(run).metric_rows())


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        # Sizes differ, as those of photographs do.
        pixels = generator.integers(0, 256, (20 + i % 5, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def test_a_dataset_that_cannot_be_had_falls_back_where_the_config_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    more = ["--data.name", "imagenet", "--data.fallback", "digits", "--data.limit", "48"]
    assert main(["pretrain", *TINY, *more, "--run", str(run)]) == 0
    assert "training on digits instead" in capsys.readouterr().out
    assert json.loads((run / "env.json").read_text())["training"]["dataset"] == "digits"
    assert rows(run)[-1]["knn/test_images"] == 360
    # The evaluator asks for what the run was trained on, not for what its config wanted.
    assert main(["knn", "--checkpoint", str(run), "--device", "cpu", "--network", "0"]) == 0
    assert list((run / "results").glob("knn-digits-*-0-*.json"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--data.name", "folder", "--data.root", "/nowhere"],
            "data.root /nowhere is not a folder",
        ),
        (["--data.root", "/nowhere"], "data.root /nowhere is not a folder"),
        (["--data.name", "imagenet"], "imagenet needs data.root"),
        (["--data.root", "/nowhere", "--data.fallback", "digits"], "data.root /nowhere is not"),
    ],
)
def test_a_name_or_a_root_that_is_given_voids_the_configs_fallback(more, message, tmp_path, capsys):
    for last in ([], ["--dry_run"]):
        words = ["mcl_fashion_mnist_demo", *more, "--run", str(tmp_path / "run"), *last]
        assert main(["pretrain", *words]) == 1
        printed, error = capsys.readouterr()
        assert message in error
        assert error.count("\n") == 1
        assert "instead" not in printed
        assert not (tmp_path / "run").exists()


def test_a_root_voids_a_fallback_that_stands_in_the_same_file(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("data:\n  name: folder\n  root: /nowhere\n  fallback: digits\n")
    assert main(["pretrain", str(file), *TINY, "--run", str(tmp_path / "run")]) == 1
    assert "data.root /nowhere is not a folder" in capsys.readouterr().err


def test_an_unlabelled_folder_trains_without_knn_and_says_so(tmp_path, capsys):
    write_images(tmp_path / "images", 40)
    run = tmp_path / "run"
    more = ["--data.name", "folder", "--data.root", str(tmp_path / "images")]
    more += ["--data.workers", "0", "--monitor.linear", "true"]
    assert main(["pretrain", *TINY, *more, "--run", str(run)]) == 0
    out, err = capsys.readouterr()
    assert f"kNN is off: {tmp_path / 'images'} holds no test split" in err
    assert "the linear probe is off: images train has not a label for every image" in err
    last = rows(run)[-1]
    assert not [key for key in last if "knn" in key]
    assert last["net/0/rankme"] >= 1
    assert (run / "DONE").exists()
    # Of images alone: the line of an epoch, and the table at the end.
    figures = "  ".join(
        f"{figure}: " + "  ".join(f"net/{m} {last[f'net/{m}/{figure}']:.2f}" for m in (0, 1))
        for figure in ("rankme", "alignment", "uniformity", "lidar")
    )
    agreement = f"agreement %: {last['cohort/neighbour_agreement']:.1f}"
    assert f"\nepoch 1  {figures}  {agreement}  " in out
    assert "features on images, without labels" in out
    assert any("steps 0 to 2" in line for line in out.splitlines())
    assert "moco, 2 x conv4 on 40 images of images" in out


def test_a_labelled_folder_is_scored_on_its_own_test_split(tmp_path, capsys):
    for split, count in (("train", 20), ("test", 6)):
        for seed, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "images" / split / name, count, seed)
    run = tmp_path / "run"
    more = ["--data.name", "folder", "--data.root", str(tmp_path / "images")]
    more += ["--data.workers", "0"]
    assert main(["pretrain", *TINY, *more, "--run", str(run)]) == 0
    assert rows(run)[-1]["knn/test_images"] == 12
    assert "kNN top-1 (%) on images" in capsys.readouterr().out
    # The evaluator takes the run's folder, and calls it by its name.
    assert main(["knn", "--checkpoint", str(run), "--device", "cpu", "--network", "0"]) == 0
    (file,) = (run / "results").glob("knn-images-*-0-*.json")
    assert json.loads(file.read_text())["dataset"] == "images"
    assert "| dataset | images |" in (run / "export/step-00000002/net-0/README.md").read_text()


def test_images_of_several_sizes_name_the_backend_that_takes_them(tmp_path, capsys):
    write_images(tmp_path / "images", 20)
    more = ["--data.name", "folder", "--data.root", str(tmp_path / "images"), "--data.workers", "0"]
    more += ["--data.backend", "memory"]
    assert main(["pretrain", *TINY, *more, "--run", str(tmp_path / "run")]) == 1
    assert "data.backend folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "digits"
    more = ["--data.name", "digits", "--data.limit", "48", "--monitor.every_epochs", "0"]
    assert main(["pretrain", *TINY, *more, "--run", str(run)]) == 0
    return run


def test_the_dry_run_of_an_evaluator_tells_networks_and_images_and_refuses_what_is_not_there(
    digits_run, tmp_path, capsys
):
    words = ["knn", "--checkpoint", str(digits_run), "--dry_run"]
    assert main(words) == 0
    *_, networks, images = capsys.readouterr().out.splitlines()
    # The weights of conv4 and the buffers of its batch norms.
    assert re.fullmatch(
        r"# networks of .*/export/step-00000003: 0 of [\d,]+, 1 of [\d,]+ parameters and their ensemble",
        networks,
    )
    assert images == "# images of digits: 1,437 to learn from and 360 to score on"
    for more, code, message in (
        (["--data.name", "digtis"], 2, "data.name: expected one of digits, fashion_mnist"),
        (["--data.root", "/nowhere"], 1, "data.root /nowhere is not a folder"),
        (["--network", "7"], 2, "choose from 0, 1, all, ensemble"),
        (["--data.shots", "100000"], 1, "data.shots"),
    ):
        for start in ([], ["submit", "--cluster", "local", "--"]):
            assert main([*start, *words, *more]) == code
            assert message in capsys.readouterr().err


def test_the_config_of_a_saved_run_passes_the_same_check(digits_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    text = (run / "config.yaml").read_text()
    last = len(text.splitlines()) + 1
    for more, message in (
        ("seed: 1\n", f"config.yaml: seed stands twice (lines 2 and {last})"),
        ("lr: 1\n", f"config.yaml, line {last}: unknown key 'lr'; here it is called 'base_lr'"),
    ):
        (run / "config.yaml").write_text(text + more)
        assert main(["resume", str(run)]) == 2
        assert message in capsys.readouterr().err
    (run / "config.yaml").write_text(text.replace("method: moco\n", "method:\n"))
    assert main(["resume", str(run), "--epochs", "2"]) == 2
    assert (
        "method: expected one of moco, simclr, supervised, prototypical, got null"
        in capsys.readouterr().err
    )


def test_a_checkpoint_that_a_job_will_make_is_not_asked_for_and_the_rest_is(tmp_path, capsys):
    submit = ["submit", "--cluster", "slurm", "--dependency", "afterok:1", "--dry_run", "--"]
    knn = ["knn", "--checkpoint", str(tmp_path / "to_come")]
    assert main([*submit, *knn]) == 0
    assert "checkpoint: " in capsys.readouterr().out
    more = ["--data.name", "folder", "--data.root", "/nowhere"]
    assert main([*submit, *knn, *more]) == 1
    assert "data.root /nowhere is not a folder" in capsys.readouterr().err
    assert main(["submit", "--cluster", "slurm", "--dry_run", "--", *knn]) == 1
    assert "is not there (with --dependency it need not be yet)" in capsys.readouterr().err


def test_without_monitoring_there_are_losses_alone(digits_run):
    assert [row["step"] for row in rows(digits_run)] == [3]
    assert "net/0/scl_hard" in rows(digits_run)[0]
    assert not [key for key in rows(digits_run)[0] if "knn" in key or "rankme" in key]


def test_an_export_alone_needs_a_dataset_and_scores_like_the_features_it_holds(
    digits_run, tmp_path, monkeypatch, capsys
):
    import torch

    from peerlearn.data.datasets import load_dataset
    from peerlearn.evaluation.features import extract_features
    from peerlearn.export import load_export

    monkeypatch.chdir(tmp_path)
    export = tmp_path / "net-1"
    shutil.copytree(digits_run / "export/step-00000003/net-1", export)
    words = ["knn", "--checkpoint", str(export), "--device", "cpu", "--k", "7"]
    assert main(words) == 1
    assert "give one by --data.name" in capsys.readouterr().err
    assert main([*words, "--data.name", "digits"]) == 0
    (path,) = (tmp_path / "results").glob("knn-digits-*.json")
    result = json.loads(path.read_text())
    splits = [load_dataset("digits", split) for split in ("train", "test")]
    features = [
        extract_features(
            [load_export(export)],
            split,
            image_size=16,
            batch_size=64,
            device=torch.device("cpu"),
            workers=0,
        )[0]
        for split in splits
    ]
    scores = knn_scores(
        features[0], splits[0].labels, features[1], k=7, temperature=0.1, num_classes=10
    )
    assert result["metrics"]["top1"] == pytest.approx(knn_top1(scores, splits[1].labels))
    share = result["metrics"]["top1"] / 100
    error = 100 * (share * (1 - share) / 360) ** 0.5
    assert result["metrics"]["top1_standard_error"] == pytest.approx(error)
    for field in ("schema", "task", "dataset", "network", "export_hash", "seed", "versions"):
        assert field in result


def test_a_dataset_of_other_channels_is_refused(digits_run, tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write_images(tmp_path / "images" / split / name, 3)
    words = ["knn", "--checkpoint", str(digits_run), "--device", "cpu"]
    words += ["--data.name", "folder", "--data.root", str(tmp_path / "images")]
    assert main(words) == 1
    assert "takes 1 channels, folder has 3" in capsys.readouterr().err
