"""Detectors on disk: scored again to the same figures, read by torchvision's own Faster R-CNN, the best one kept."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detection.measure import measure
from detection.saved import load_detector
from peerlearn.cli import main
from tests.e2e.detectors import CLASSES, scores, training_of, words
from tests.e2e.runs import rows

pytestmark = pytest.mark.slow(8)
# So that detectors of a few steps detect something.
SLOWLY = ("--base_lr", "0.002")
KINDS = {
    "d2_fpn": (),
    "d2_c4": (
        *("--model.detector", "d2_c4", "--model.regions_per_image", "4"),
        *("--model.rpn_proposals_test", "10", "--precise_bn_iterations", "1"),
    ),
    "torchvision_fpn": (
        *("--model.detector", "torchvision_fpn", "--model.fpn_channels", "256"),
        *("--precise_bn_iterations", "0", "--iterations", "3", "--milestones", "[2]"),
    ),
    "frozen": ("--model.norm", "frozen", "--model.trainable_stages", "3"),
}


@contextmanager
def kept_detections(file: Path):
    """Within the block, what a detector finds in the test images is kept in a file."""
    with pytest.MonkeyPatch.context() as patch:

        def measure_and_keep(*arguments, **named):
            measured = measure(*arguments, **named)
            torch.save(measured.detections, file)
            return measured

        patch.setattr("detection.evaluate.measure", measure_and_keep)
        yield


@pytest.fixture(scope="session")
def trained(once, place):
    """``trained(kind)``: the results of a training on a network for colour, and its detections."""

    def make(kind: str) -> Path:
        def train(results: Path) -> None:
            results.mkdir()
            with kept_detections(results / "found.pt"):
                assert main(words(place, results, *SLOWLY, *KINDS[kind], export="colour")) == 0

        return once(f"detect-colour-{kind}", train)

    return make


def scored(place: Path, results: Path, detector: Path, *more: str) -> dict:
    assert main([*words(place, results, *more), "--checkpoint", str(detector)]) == 0
    (score,) = scores(results).values()
    return score


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_detector_is_scored_to_the_very_figures(kind, place, trained, tmp_path):
    (before,) = scores(trained(kind)).values()
    with kept_detections(tmp_path / "found.pt"):
        again = scored(place, tmp_path / "again", training_of(trained(kind)) / "detector")
    expected, found = torch.load(trained(kind) / "found.pt"), torch.load(tmp_path / "found.pt")
    assert sum(len(each["scores"]) for each in expected) > 8
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert again["metrics"] == before["metrics"]
    assert again["variant"] == "detector"
    assert again["protocol"]["detector"]["class_names"] == list(CLASSES)
    assert again["protocol"]["test_fingerprint"] == before["protocol"]["test_fingerprint"]
    # How it is measured is asked for anew.
    coco = scored(
        place, tmp_path / "coco", training_of(trained(kind)) / "detector", "--rule", "coco"
    )
    assert (coco["protocol"]["rule"], before["protocol"]["rule"]) == ("coco", "voc07")


def test_the_folder_of_a_training_stands_for_its_detector(place, trained, tmp_path, capsys):
    training = training_of(trained("d2_fpn"))
    again = scored(place, tmp_path / "again", training)
    assert again["metrics"] == scored(place, tmp_path / "r", training / "detector")["metrics"]
    assert again["variant"] == "detector"
    given = ["--checkpoint", str(training / "detector"), "--run", str(tmp_path / "mine")]
    assert main([*words(place, tmp_path / "r"), *given]) == 2
    assert "which is only scored: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
    assert main(["knn", "--checkpoint", str(training), "--data.name", "digits"]) == 1
    assert "detector holds a detector, which `peerlearn detect` scores" in capsys.readouterr().err


def test_torchvision_reads_its_own_detector(trained):
    folder = training_of(trained("torchvision_fpn")) / "detector"
    about = json.loads((folder / "config.json").read_text())
    theirs = FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d),
        num_classes=len(CLASSES) + 1,
        min_size=64,
        max_size=80,
        image_mean=about["mean"],
        image_std=about["std"],
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in (8, 16, 24, 32, 48)), ((0.5, 1.0, 2.0),) * 5
        ),
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=30,
    )
    theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    ours, _ = load_detector(folder)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.rand(3, height, width, generator=generator) for height, width in [(64, 50), (40, 77)]
    ]
    with torch.inference_mode():
        expected, found = theirs.eval()(images), ours(images)
    assert sum(len(each["scores"]) for each in expected) > 4
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-4)


def test_the_best_of_the_validation_split_is_kept(place, tmp_path, monkeypatch):
    """Which one is best is dealt, whatever these few steps learn: the second of three."""
    dealt, detections, scored_as = iter([1.0, 3.0, 2.0]), [], []

    def measure_as_dealt(*arguments, **named):
        measured = measure(*arguments, **named)
        detections.append(measured.detections)
        scored_as.append(measured.result.ap)
        return measured._replace(result=measured.result._replace(ap=next(dealt)))

    monkeypatch.setattr("detection.train.measure", measure_as_dealt)
    results = tmp_path / "results"
    validated = ("--data.validation", "val2007", "--validate_every", "2")
    assert main(words(place, results, *SLOWLY, *validated)) == 0
    run = training_of(results)
    assert [(row["step"], row["ap"]) for row in rows(run) if "ap" in row] == [
        (2, 1.0),
        (4, 3.0),
        (6, 2.0),
    ]
    steps = {
        name: json.loads((run / name / "config.json").read_text())["step"]
        for name in ("detector", "detector-best")
    }
    assert steps == {"detector": 6, "detector-best": 4}
    assert not torch.equal(detections[1][0]["scores"], detections[2][0]["scores"])
    for name, step in steps.items():
        with kept_detections(tmp_path / "found.pt"):
            again = scored(place, tmp_path / name, run / name, "--data.test", "val2007")
        found, expected = torch.load(tmp_path / "found.pt"), detections[step // 2 - 1]
        assert sum(len(each["scores"]) for each in expected) > 5
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert again["metrics"]["ap"] == scored_as[step // 2 - 1]


def test_without_a_validation_split_there_is_no_best(trained):
    assert not (training_of(trained("frozen")) / "detector-best").exists()


def test_another_rule_and_other_test_images_train_nothing_anew(place, trained, tmp_path, capsys):
    results = Path(shutil.copytree(trained("d2_fpn"), tmp_path / "r"))
    given = words(place, results, *SLOWLY, export="colour")
    steps = len(rows(training_of(results)))
    assert main([*given, "--rule", "coco", "--data.test", "val2007"]) == 0
    assert "is done already: what it has learned is scored" in capsys.readouterr().out
    assert len(rows(training_of(results))) == steps
    protocols = [json.loads(file.read_text())["protocol"] for file in results.glob("detect-*.json")]
    assert sorted((p["rule"], p["test_split"]) for p in protocols) == [
        ("coco", "val2007"),
        ("voc07", "test2007"),
    ]


def test_a_training_whose_detector_was_removed_is_begun_anew(place, trained, tmp_path):
    results = Path(shutil.copytree(trained("d2_fpn"), tmp_path / "r"))
    (before,) = scores(results).values()
    run = training_of(results)
    weights = (run / "detector/model.safetensors").read_bytes()
    shutil.rmtree(run / "detector")
    assert main(words(place, results, *SLOWLY, export="colour")) == 0
    assert (training_of(results) / "detector/model.safetensors").read_bytes() == weights
    (after,) = scores(results).values()
    assert after["metrics"] == before["metrics"]
