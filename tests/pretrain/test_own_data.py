"""`peerlearn pretrain --data.name folder` without a config: what is found, what is chosen, and what stays as it is."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from peerlearn import HOME
from peerlearn.cli import main
from peerlearn.config import flat_config, load_config
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from pretrain.cohort_config import CohortConfig
from pretrain.config import PretrainConfig
from pretrain.own_data import Found, choose, look

# All that a run of seconds needs of the keys that would be chosen; the others are chosen.
QUICK = [
    *("--cohort.backbones", "conv4", "--data.image_size", "16", "--cohort.embedding_dim", "8"),
    *("--epochs", "1", "--data.workers", "0", "--device", "cpu"),
]


def write_images(root: Path, counts: dict[str, int], *, side: int = 20, grey: bool = False) -> Path:
    pixels = np.random.default_rng(0)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (side, side + number % 2 * 7) if grey else (side, side + number % 2 * 7, 3)
            picture = Image.fromarray(pixels.integers(0, 256, shape, dtype=np.uint8))
            picture.save(root / folder / f"{number:03d}.{'png' if grey else 'jpg'}")
    return root


def folder_words(root: Path, *more: str) -> list[str]:
    return ["pretrain", "--data.name", "folder", "--data.root", str(root), *more]


def found_in(root: Path, **more: object) -> Found:
    from pretrain.config import DataConfig

    return look(
        PretrainConfig(device="cpu", data=DataConfig(name="folder", root=str(root), **more))
    )


def chosen(found: Found, config: PretrainConfig | None = None, *given: str) -> dict[str, str]:
    choices = choose(found, config or PretrainConfig(), given)
    return {each.key: " ".join(each.words) for each in choices}


def test_a_folder_of_photographs_without_a_gpu():
    """3,000 photographs of 500 pixels on a laptop."""
    found = Found(name="photos", images=3000, side=224, cores=8)
    assert chosen(found) == {
        "data.image_size": "96",
        "cohort.backbones": "resnet18",
        "cohort.small_images": "false",
        "data.augmentation": "moco_v2",
        "batch_size": "64",
        "base_lr": "0.12",
        "epochs": "20",
        "queue.size": "1024",
        "queue.momentum": "0.99",
        "cohort.batch_norm_splits": "8",
        "monitor.every_epochs": "1",
        "data.workers": "2",
    }


def test_a_folder_of_photographs_with_a_gpu():
    found = Found(name="photos", images=3000, side=224, has_gpu=True, cores=16)
    assert chosen(found) == {
        "data.image_size": "224",
        "cohort.backbones": "resnet18",
        "cohort.small_images": "false",
        "data.augmentation": "moco_v2",
        "batch_size": "256",
        "base_lr": "0.12",
        "epochs": "200",
        "queue.size": "1024",
        "queue.momentum": "0.99",
        "cohort.batch_norm_splits": "8",
        "monitor.every_epochs": "10",
        "data.workers": "8",
    }


def test_small_grey_images_with_labels():
    found = Found(name="x", images=60_000, side=28, is_grey=True, has_labels=True, has_test=True)
    assert chosen(found) == {
        "data.image_size": "28",
        "cohort.backbones": "resnet18",
        "cohort.small_images": "true",
        "data.augmentation": "moco_cifar",
        "data.views.jitter": "0.4 0.4 0 0",
        "data.views.grayscale_probability": "0",
        "batch_size": "64",
        "base_lr": "0.12",
        "epochs": "5",
        "queue.size": "16384",
        "queue.momentum": "0.99",
        "cohort.batch_norm_splits": "8",
        "monitor.every_epochs": "1",
        "monitor.k": "200",
        "monitor.train_limit": "10000",
        "monitor.test_limit": "5000",
        "data.workers": "2",
    }


@pytest.mark.parametrize(
    ("images", "batch", "queue", "splits"),
    [
        (16, "8", "8", None),
        (70, "8", "32", None),
        (128, "16", "64", "2"),
        (10**6, "64", "65536", "8"),
    ],
)
def test_batches_and_queues_fit_the_number_of_images(images, batch, queue, splits):
    found = chosen(Found(name="x", images=images, side=64))
    assert (found["batch_size"], found["queue.size"]) == (batch, queue)
    assert found.get("cohort.batch_norm_splits") == splits


def test_long_runs_have_slow_momentum_networks():
    found = chosen(Found(name="x", images=200_000, side=224, has_gpu=True))
    assert (found["epochs"], found["queue.momentum"]) == ("55", "0.999")


def test_given_keys_are_not_chosen_and_the_others_fit_them():
    found = Found(name="x", images=100, side=20, is_grey=True)
    config = PretrainConfig(batch_size=50, epochs=3000)
    assert chosen(found, config, "batch_size", "epochs", "data.augmentation") == {
        "data.image_size": "20",
        "cohort.backbones": "resnet18",
        "cohort.small_images": "true",
        "base_lr": "0.12",
        "queue.size": "32",
        "queue.momentum": "0.99",
        "cohort.batch_norm_splits": "2",
        "monitor.every_epochs": "150",
        "data.workers": "2",
    }
    assert "queue.size" not in chosen(found, PretrainConfig(method="simclr"), "method")
    for processes, splits in ((2, "8"), (3, None)):
        several = chosen(Found(name="x", images=999, side=9, processes=processes))
        assert several.get("cohort.batch_norm_splits") == splits


@pytest.mark.parametrize(("parts", "batch"), [(4, 8), (5, 10), (16, 32)])
def test_a_batch_divides_into_the_parts_that_are_asked_for(parts, batch):
    found = Found(name="x", images=100, side=64)
    settings = chosen(found, PretrainConfig(accumulation_steps=parts, batch_size=32 * parts))
    assert int(settings["batch_size"]) == batch


def test_a_stem_that_is_given_decides_how_long_a_run_takes():
    found = Found(name="x", images=3_000, side=64)
    config = PretrainConfig(cohort=CohortConfig(small_images=False))
    own = int(chosen(found)["epochs"])
    assert int(chosen(found, config, "cohort.small_images")["epochs"]) > own


def test_neighbours_and_limits_fit_a_few_labelled_images():
    few = chosen(Found(name="x", images=17, side=64, has_labels=True, has_test=True))
    assert few["monitor.k"] == "8"
    assert "monitor.train_limit" not in few


def test_too_few_images_are_refused_unless_the_batch_is_given():
    found = Found(name="x", images=5, side=20)
    with pytest.raises(
        UserError, match=r"^x has 5 images, too few .* give at least 16, or choose --batch_size"
    ):
        chosen(found)
    assert chosen(found, PretrainConfig(batch_size=4), "batch_size")["queue.size"] == "2"


def test_what_is_found_in_folders(tmp_path):
    flat = write_images(tmp_path / "flat", {".": 3, "2024/05": 4}, side=40)
    classes = write_images(tmp_path / "classes", {"a": 3, "b": 2}, grey=True)
    splits = write_images(tmp_path / "splits", {"train/a": 3, "train/b": 2, "val/a": 1})
    open_test = write_images(tmp_path / "open", {"train/a": 3, "train/b": 2, "test": 1}, side=300)
    (flat / "000.jpg").write_text("no image")
    here = found_in(flat)
    facts = {"cores": here.cores}
    assert here == Found(name="flat", images=7, side=40, **facts)
    assert found_in(flat, limit=2) == Found(name="flat", images=2, side=40, **facts)
    assert found_in(classes) == Found(
        name="classes", images=5, side=20, is_grey=True, has_labels=True, **facts
    )
    assert found_in(splits) == Found(
        name="splits", images=5, side=20, has_labels=True, has_test=True, **facts
    )
    assert found_in(open_test) == Found(name="open", images=5, side=224, has_labels=True, **facts)


def test_the_choices_are_told_and_written_once(tmp_path, monkeypatch, capsys):
    """A run, its resumption after images have come, and --auto_resume: config.yaml alone counts."""
    monkeypatch.chdir(tmp_path)
    counts = {"train/a": 10, "train/b": 10, "val/a": 4, "val/b": 4}
    root = write_images(tmp_path / "my photos", counts, grey=True)
    words = folder_words(root, *QUICK)
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0]
        == "my photos: 20 images in class folders, grey; for what you do not give is chosen:"
    )
    assert "  --batch_size 8: 2 steps in each epoch of 20 images, without a GPU" in said
    run = RunDirectory(Path("runs/my_photos"))
    before = run.config.read_text()
    config = flat_config(load_config(PretrainConfig, run.config))
    expected = {"batch_size": 8, "queue.size": 8, "data.views.jitter": [0.4, 0.4, 0.0, 0.0]}
    expected |= {"monitor.k": 10, "epochs": 1, "data.image_size": 16, "cohort.backbones": "conv4"}
    assert {key: config[key] for key in expected} == expected
    assert any("ensemble/knn_top1" in row for row in run.metric_rows())
    write_images(root, {"train/a": 100}, grey=True)
    # It is over, and of the images that there were.
    assert main([*words, "--auto_resume"]) == 0
    assert main(["resume", str(run.root)]) == 0
    out = capsys.readouterr().out
    assert out.count("is done already") == 2
    assert "is chosen" not in out
    assert main(["resume", str(run.root), "--epochs", "2"]) == 1
    for number in range(10, 100):
        (root / f"train/a/{number:03d}.png").unlink()
    assert main(["resume", str(run.root), "--epochs", "2"]) == 0
    assert run.config.read_text() == before.replace("epochs: 1\n", "epochs: 2\n", 1)
    assert main(words) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_a_dry_run_prints_the_choices_as_comments(tmp_path, capsys):
    root = write_images(tmp_path / "flat", {".": 20}, side=30)
    assert main([*folder_words(root, *QUICK, "--seed=3"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# flat: 20 images without labels, in colour; for what you do not give")
    assert "#   no kNN: it needs class folders" in out
    config = yaml.safe_load(out)
    assert (config["seed"], config["batch_size"], config["run"]) == (3, 8, "runs/flat")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({".": 5}, "images has 5 images, too few to tell one from others: give at least 16"),
        ({"train": 0}, "no images ("),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(tmp_path, capsys, counts, said):
    root = write_images(tmp_path / "images", counts)
    (root / "notes.txt").write_text("no image")
    assert main(folder_words(root, "--run", str(tmp_path / "run"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"peerlearn: {said}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "mcl_fashion_mnist_demo"],
        ["pretrain", "--method", "supervised"],
        ["pretrain", "--help"],
    ],
)
def test_nothing_is_chosen_where_a_config_or_labels_settle_it(tmp_path, capsys, words):
    root = write_images(tmp_path / "x", {"train/a": 160, "train/b": 160, "val/a": 1, "val/b": 1})
    more = ["--data.name", "folder", "--data.root", str(root), "--dry_run"]
    if "mcl_fashion_mnist_demo" not in words:
        more += ["--cohort.networks", "1", "--alpha", "0", "--beta", "0"]
    assert main([*words, *more]) == 0
    assert "is chosen" not in capsys.readouterr().out


def test_the_commands_of_the_page_run_one_after_another(tmp_path, monkeypatch, capsys):
    """Those of docs/your_images.md, with smaller networks and images."""
    page = (HOME / "docs/your_images.md").read_text()
    commands = re.findall(r"^\$ peerlearn (.+)$", page, re.MULTILINE)
    assert [words.split()[0] for words in commands] == [
        *("pretrain", "knn", "pretrain", "linear", "export"),
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "photos", {".": 20})
    counts = {"train/a": 10, "train/b": 10, "val/a": 4, "val/b": 4}
    write_images(tmp_path / "labelled", counts)
    for command in commands:
        words = command.split()
        more = QUICK if words[0] == "pretrain" else ["--device", "cpu", "--data.workers", "0"]
        assert main([*words, *(more if words[0] != "export" else [])]) == 0, command
    assert (tmp_path / "clothes/net-1/model.safetensors").is_file()
