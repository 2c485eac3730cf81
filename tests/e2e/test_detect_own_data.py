"""`peerlearn detect own_data`: one's own images in COCO's format, with and without pretraining, by shares of them."""

import json
import shutil
import statistics
from pathlib import Path

import pytest

from peerlearn.cli import main
from tests.detection_trees import write_jpeg

# The whole recipe, in small.
SMALL = [
    *("--iterations", "1", "--milestones", "1", "--warmup_iterations", "0", "--trials", "2"),
    *("--batch_size", "4", "--base_batch_size", "4", "--precise_bn_iterations", "1"),
    *("--model.short_sides", "32", "--model.longest_side", "48", "--model.fpn_channels", "8"),
    *("--model.head_features", "8", "--model.regions_per_image", "8", "--device", "cpu"),
    *("--model.rpn_candidates_train", "20", "--model.rpn_candidates_test", "20"),
    *("--model.rpn_proposals_train", "10", "--model.rpn_proposals_test", "10"),
    *("--data.workers", "0"),
]
TRAIN_IMAGES, TEST_IMAGES = 20, 4


def write_own_data(folder: Path) -> None:
    """photos/, train.json and test.json, whose first image is a copy of a training image."""
    for split, number, seed in (("train", TRAIN_IMAGES, 0), ("test", TEST_IMAGES, 100)):
        names = [f"{split}-{each}.jpg" for each in range(number)]
        for each, name in enumerate(names, seed):
            write_jpeg(folder / "photos" / name, each)
        content = {
            "images": [
                {"id": each, "file_name": name, "width": 60, "height": 40}
                for each, name in enumerate(names)
            ],
            "categories": [{"id": 1, "name": "screw"}, {"id": 2, "name": "nut"}],
            "annotations": [
                {"id": each, "image_id": each, "category_id": 1 + each % 2, "bbox": [9, 9, 30, 20]}
                for each in range(number)
            ],
        }
        (folder / f"{split}.json").write_text(json.dumps(content))
    shutil.copy(folder / "photos/train-7.jpg", folder / "photos/test-0.jpg")


@pytest.mark.slow(60)
def test_one_command_tells_whether_pretraining_helps(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    write_own_data(tmp_path)
    words = ["detect", "own_data", "--checkpoint", str(runs[0]), "--network", "0"]
    words += ["--data.root", "photos", "--data.train", "train.json", "--data.test", "test.json"]
    assert main([*words, *SMALL, "--results", "found"]) == 0
    leak = "1 of 4 test images are copies of training images, which makes the score too good (1 of the same bytes, "
    leak += "0 that look alike): photos/test-0.jpg (photos/train-7.jpg): remove them from one of the splits"
    assert [message for message in caplog.messages if "copies" in message] == [leak]

    results = [json.loads(file.read_text()) for file in Path("found").glob("detect-*.json")]
    protocols = {result["variant"]: result["protocol"] for result in results}
    shares = {
        variant: (each["backbone_weights"], each["data.train_percent"], each["train_images"])
        for variant, each in protocols.items()
    }
    # Of 20 images 1 % are as many as both classes need.
    assert shares == {
        f"{'random weights, ' if weights == 'random' else ''}{percent} % of the images": (
            *(weights, percent, images),
        )
        for weights in ("export", "random")
        for percent, images in ((1, 2), (10, 2), (100, 20))
    }
    assert all(
        each["leakage"] == {"same": 1, "near": 0, "undecodable": 0} for each in protocols.values()
    )
    assert {(each["steps"], each["trials"]) for each in protocols.values()} == {(1, 2)}
    # A training each, which has left its detector.
    assert len(list(Path("found").glob("*/detector/model.safetensors"))) == 12

    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "detection, average precision (%), rule coco" in printed
    for result in results:
        metrics = result["metrics"]
        cells = []
        for name in ("ap", "ap50", "ap75"):
            values = metrics[f"{name}_trials"]
            assert len(values) == 2
            assert metrics[name] == pytest.approx(statistics.fmean(values))
            assert metrics[f"{name}_std"] == pytest.approx(statistics.stdev(values))
            cells.append(f"{metrics[name]:.2f} +- {metrics[f'{name}_std']:.2f}")
        assert f"0, {result['variant']} {' '.join(cells)}" in printed
        assert metrics["per_class_objects"] == {"screw": 2, "nut": 2}
    # Where there are several rows, none has the table of its classes.
    assert "AP50 (%) by class" not in printed


@pytest.mark.slow(10)
def test_a_single_score_has_a_table_of_its_classes(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_own_data(tmp_path)
    words = ["detect", "own_data", *SMALL, "--checkpoint", str(runs[0]), "--network", "0"]
    words += ["--data.train_percent", "100", "--backbone_weights", "export", "--trials", "1"]
    words += ["--data.root", str(tmp_path / "photos"), "--results", str(tmp_path / "found")]
    for split in ("train", "test"):
        words += [f"--data.{split}", str(tmp_path / f"{split}.json")]
    test = json.loads((tmp_path / "test.json").read_text())
    test["annotations"][0]["iscrowd"] = 1
    (tmp_path / "test.json").write_text(json.dumps(test))
    assert main(words) == 0
    (file,) = (tmp_path / "found").glob("detect-*.json")
    ap50 = json.loads(file.read_text())["metrics"]["per_class_ap50"]
    shown = capsys.readouterr().out
    assert "AP50 (%) by class, rule coco" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    # The crowd does not count.
    assert [row for row in rows if row[:1] in (["screw"], ["nut"])] == [
        ["screw", "1", f"{ap50['screw']:.2f}"],
        ["nut", "2", f"{ap50['nut']:.2f}"],
    ]


@pytest.mark.parametrize("annotations", ["none", "crowds"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_images_without_an_object_that_counts_are_refused_before_the_training(
    annotations: str,
    split: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path)
    content = json.loads(Path("test.json").read_text())
    for each in content["annotations"]:
        each["iscrowd"] = 1
    kept = content["annotations"] if annotations == "crowds" else []
    Path("empty.json").write_text(json.dumps({**content, "annotations": kept}))
    words = ["detect", "own_data", *SMALL, "--checkpoint", str(runs[0]), "--results", "found"]
    words += ["--data.root", "photos", "--data.train", "train.json", "--data.test", "test.json"]
    assert main([*words, f"--data.{split}", "empty.json"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("peerlearn: empty empty: none of its 4 images has an object that count")
    assert not Path("found").exists()
