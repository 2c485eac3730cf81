"""`peerlearn data show`: a sheet of the views that a run would see."""

from pathlib import Path

import matplotlib.image
import pytest
import torch

from peerlearn.cli import main
from peerlearn.compute.dist import Ranks
from peerlearn.config import parse_config
from peerlearn.runs.directory import RunDirectory
from pretrain.config import PretrainConfig
from pretrain.data_show import _sheet
from pretrain.state import build

SMALL = [
    *("--data.name", "digits", "--data.limit", "100", "--data.image_size", "16"),
    *("--batch_size", "32", "--cohort.backbones", "conv4", "--device", "cpu", "--seed", "5"),
]


def parsed(*words: str) -> PretrainConfig:
    given = [*SMALL, *words]
    return parse_config(PretrainConfig, given, verb="pretrain", description="", example="")[0]


@pytest.mark.parametrize("words", [["--data.augmentation", "byol"], ["--method", "supervised"]])
def test_the_sheet_has_the_views_of_the_run_s_first_batch(words, tmp_path):
    config = parsed(*words)
    sheet = _sheet(config, 7)
    training = build(config, RunDirectory(tmp_path / "run"), Ranks(torch.device("cpu")))
    dataset = training.data.train
    batch = next(training.loader.epoch(0))
    assert len(sheet.rows) == 7
    assert sheet.titles[:2] == ["image", "epoch 0, view 1"]
    assert len(sheet.titles) == 7
    for number, row in enumerate(sheet.rows):
        index = int(batch.index[number])
        assert row.name == f"{index}\n{dataset.class_names[int(dataset.labels[index])]}"
        assert torch.equal(row.panels[0], dataset.read(index))
        for view, seen in enumerate(batch.views):
            pixels = seen[number] * dataset.std[0] + dataset.mean[0]
            torch.testing.assert_close(row.panels[1 + view], pixels, atol=2e-6, rtol=0)


def test_the_picture_is_written_with_its_recipe(tmp_path, capsys):
    file = tmp_path / "deep" / "views.png"
    words = ["mcl_fashion_mnist_demo", *SMALL, "--images", "3", "-o", str(file)]
    assert main(["data", "show", *words, "--data.views.second.solarize_probability", "1"]) == 0
    out = capsys.readouterr().out
    assert "digits train, recipe moco_cifar, views of 16 pixels, seed 5" in out
    assert "view 2: crop_scale 0.6 1, " in out
    assert "solarize_probability 1, solarize_threshold 0.5" in out
    assert f"wrote {file}" in out
    picture = matplotlib.image.imread(file)
    assert picture.shape[1] > picture.shape[0] > 300
    # White paper, and images from black on.
    assert picture[..., :3].min() < 0.05
    assert len([*file.parent.iterdir()]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "views.jpg"], "--output views.jpg must end in .png, .svg or .pdf"),
        (["--images", "0"], "--images must be within 1..32, got 0"),
        (["--images", "x"], "--images: expected a whole number, got 'x'"),
        (["--data.views.jitter", "1"], "data.views.jitter: expected a list of numbers"),
        (["no_such_config"], "'no_such_config' is neither a file nor a shipped config"),
    ],
)
def test_wrong_words_are_told_in_a_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_picture_s_place_is_told(tmp_path, capsys):
    folder = Path(tmp_path / "a.png")
    folder.mkdir()
    assert main(["data", "show", *SMALL, "-o", str(folder)]) == 2
    assert f"--output {folder} is a folder: name a file" in capsys.readouterr().err


def test_data_help_lists_it(capsys):
    assert main(["data", "--help"]) == 0
    assert "draw the random views of a run as a picture" in capsys.readouterr().out
