"""What `peerlearn detect` cannot do ends in one line that names it and the fix, and leaves nothing half-written."""

import json
import re
import shutil
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.runs.directory import RunDirectory
from tests.e2e.detectors import (
    CLASSES,
    flip_a_weight,
    scores,
    training_of,
    words,
    write_export,
)
from tests.e2e.runs import ends, events, launch

pytestmark = pytest.mark.slow(2)
SHORT = ("--iterations", "2", "--milestones", "[1]", "--precise_bn_iterations", "0")


@pytest.fixture(scope="session")
def exports(once) -> Path:
    def make(folder: Path) -> None:
        for name in ("vit_tiny_patch16_224", "mixer_s16_224", "regnetx_002", "resnet32", "conv4"):
            write_export(folder / name, name)

    return once("detect-exports", make)


@pytest.fixture(scope="session")
def trained(once, place) -> Path:
    def train(results: Path) -> None:
        assert main(words(place, results, *SHORT)) == 0

    return once("detect-short", train)


@pytest.fixture
def own(place, tmp_path) -> Path:
    """A copy of the devkit, to be spoilt."""
    shutil.copytree(place / "VOCdevkit", tmp_path / "own/VOCdevkit")
    return tmp_path / "own/VOCdevkit/VOC2007"


def refused(capsys, given: list[str], code: int = 1) -> str:
    """The line that refuses the words."""
    capsys.readouterr()
    assert main(given) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("#")]
    assert len(lines) == 1, error
    assert not re.search(r"[a-z]Error\b", lines[0]), error
    return lines[0]


NETWORKS = [
    (
        "vit_tiny_patch16_224",
        (),
        "no detector can stand on network vit_tiny_patch16_224: its stages do not halve",
    ),
    (
        "mixer_s16_224",
        (),
        "no detector can stand on network mixer_s16_224: its stages do not halve",
    ),
    (
        "regnetx_002",
        ("--model.detector", "d2_c4"),
        "regnetx_002 is no ResNet of timm, which model.detector d2_c4 needs",
    ),
    (
        "regnetx_002",
        (),
        "BatchNormAct2d, which cannot be split or synchronised: set model.norm batch",
    ),
    (
        "regnetx_002",
        ("--model.norm", "frozen", "--base_lr", "0.001"),
        "cannot be fixed: set model.norm batch",
    ),
    ("regnetx_002", ("--model.trainable_stages", "3"), "model.trainable_stages 3 needs a ResNet"),
    (
        "resnet32",
        (),
        "model.anchor_sizes has 5 sizes, and the pyramid on network resnet32_cifar has 4 maps, of strides 1, 2, 4, 8",
    ),
]


@pytest.mark.parametrize(("name", "more", "message"), NETWORKS)
def test_a_network_that_no_detector_can_stand_on(
    name, more, message, exports, place, tmp_path, capsys
):
    results = tmp_path / "results"
    given = [*words(place, results, *more), "--checkpoint", str(exports / name)]
    assert message in refused(capsys, given)
    assert not results.exists()


@pytest.mark.parametrize("more", [(), ("--model.detector", "torchvision_fpn")])
def test_anchors_that_do_not_fit_the_pyramid(more, place, tmp_path, capsys):
    results = tmp_path / "results"
    given = words(place, results, *more, "--model.anchor_sizes", "[8,16]")
    line = refused(capsys, given)
    assert "model.anchor_sizes has 2 sizes, and the pyramid on network resnet18 has 5 maps" in line
    assert "of strides 4, 8, 16, 32, 64: give one size for each" in line
    assert not results.exists()


def test_networks_beside_resnets_are_trained(exports, place, tmp_path):
    """They have no file for Detectron2."""
    results = tmp_path / "results"
    checkpoint = ["--checkpoint", str(exports / "conv4")]
    assert main([*words(place, results, *SHORT), *checkpoint]) == 0
    results = tmp_path / "joined"
    more = ("--checkpoint", str(exports / "regnetx_002"), "--model.norm", "batch")
    assert main([*words(place, results, *SHORT), *more]) == 0
    assert {path.name for path in (training_of(results) / "detector").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


WORDS = [
    (("--network", "ensemble"), 2, "networks are scored one by one here"),
    (("--network", "1"), 2, "is network 0 alone; leave it out"),
    (("--data.trian", "train2007"), 2, "unknown key --data.trian; did you mean 'data.train'?"),
    (
        ("--batch_size", "4", "--accumulation_steps", "3"),
        2,
        "must divide into accumulation_steps 3 equal parts",
    ),
    (
        ("--run", "RUN", "--trials", "2"),
        2,
        "--run is the directory of one training, and these are 2",
    ),
    (
        ("--run", "RUN", "--backbone_weights", "[export,random]"),
        2,
        "these are 2: leave it out, or choose one",
    ),
    (("--data.train_percent", "0"), 2, "data.train_percent must be within 0..100"),
    (("--model.detector", "d2_c5"), 2, "model.detector"),
    (("--data.train", "train2009"), 1, "unknown split 'train2009' of Pascal VOC: choose one of"),
    (
        ("--data.train", "trainval2012"),
        1,
        "holds no VOC2012, only VOC2007: give VOCdevkit as data.root",
    ),
    (
        ("--data.test", "trainval2007"),
        1,
        "trainval.txt is missing: unpack the devkit again or write the list",
    ),
    (("--data.root", "/nowhere"), 1, "/nowhere holds no VOC2007: give VOCdevkit as data.root"),
    (("--data.root", "null"), 1, "data.root is missing: give VOCdevkit"),
    (("--data.classes", "null"), 1, "'square' is none of the 20 classes"),
    (("--data.classes", "[disc]"), 1, "'square' is none of the 1 classes"),
    (("--data.limit", "1"), 1, "train2007: none of its 1 images has an object, and images without"),
    (
        ("--data.limit", "1", "--data.train", "test2007", "--data.test", "train2007"),
        1,
        "train2007: none of its 1 images has an object that counts, so there is no average precision",
    ),
    (("--data.limit", "1", "--data.validation", "train2007"), 1, "has an object that counts"),
    (
        ("--data.name", "coco", "--data.classes", "null", "--data.train", "null"),
        1,
        "give the JSON files of data.name coco",
    ),
]


@pytest.mark.parametrize(("more", "code", "message"), WORDS)
def test_words_that_make_no_sense(more, code, message, place, tmp_path, capsys):
    results, run = tmp_path / "results", tmp_path / "run"
    given = words(place, results, *(str(run) if word == "RUN" else word for word in more))
    assert message in refused(capsys, given, code)
    assert not results.exists()
    assert not run.exists()


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


FAULTS = {
    "missing image": (
        lambda d: (d / "JPEGImages/000001.png").unlink(),
        "000001.jpg is missing: restore it",
    ),
    "missing annotation": (
        lambda d: (d / "Annotations/000001.xml").unlink(),
        "000001.xml is missing: restore it",
    ),
    "malformed XML": (
        lambda d: (d / "Annotations/000001.xml").write_text("<annotation><object>"),
        "000001.xml cannot be read (no element found",
    ),
    "box outside": (
        lambda d: edit(d / "Annotations/000001.xml", "<bndbox><xmax>", "<bndbox><xmax>9"),
        "lies outside the image",
    ),
    "unknown class": (
        lambda d: (
            edit(d / "Annotations/000001.xml", "<name>square", "<name>squares")
            if "<name>square<" in (d / "Annotations/000001.xml").read_text()
            else edit(d / "Annotations/000001.xml", "<name>disc", "<name>discs")
        ),
        "is none of the 2 classes; did you mean",
    ),
    "empty split": (
        lambda d: (d / "ImageSets/Main/test.txt").write_text(""),
        "test.txt lists no images",
    ),
    "listed twice": (
        lambda d: (d / "ImageSets/Main/train.txt").write_text("000001\n000001\n"),
        "train.txt lists 000001 twice",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_data(fault, own, place, tmp_path, capsys):
    spoil, message = FAULTS[fault]
    spoil(own)
    results = tmp_path / "results"
    given = words(place, results, "--data.root", str(own.parent))
    assert message in refused(capsys, given)
    assert not results.exists()


def test_classes_of_train_and_test_that_differ(place, tmp_path, capsys):
    results = tmp_path / "results"
    content = json.loads((place / "train.json").read_text())
    content["categories"][0]["name"] = "box"
    (tmp_path / "test.json").write_text(json.dumps(content))
    files = ("--data.train", str(place / "train.json"), "--data.test", str(tmp_path / "test.json"))
    images = str(place / "VOCdevkit/VOC2007/JPEGImages")
    coco = ("--data.name", "coco", "--data.classes", "null", "--data.root", images)
    line = refused(capsys, words(place, results, *coco, *files))
    assert "has other classes than train, or in another order (box, square)" in line
    content["categories"] = {}
    (tmp_path / "test.json").write_text(json.dumps(content))
    line = refused(capsys, words(place, results, *coco, *files))
    assert "test.json has no list 'categories'" in line
    assert not results.exists()


@pytest.mark.ddp
def test_of_several_processes_one_complains(place, exports, trained, tmp_path):
    """Of a batch that they cannot share, of a network, of a damaged detector."""
    results, detector = tmp_path / "results", tmp_path / "detector"
    shutil.copytree(training_of(trained) / "detector", detector)
    flip_a_weight(detector / "model.safetensors")
    refusals = [
        (
            ("--batch_size", "3"),
            "batch_size 3 cannot be shared by 2 processes in accumulation_steps 1 parts: make it a multiple of 2",
        ),
        (
            ("--checkpoint", str(exports / "vit_tiny_patch16_224")),
            "no detector can stand on network",
        ),
        (("--checkpoint", str(detector)), "model.safetensors: damaged"),
        (("--data.limit", "1"), "none of its 1 images has an object"),
    ]
    for more, message in refusals:
        (code, output), other = ends(launch(2, *words(place, results), *more))
        assert (code, other) == (1, (1, "")), message
        assert message in output
        lines = [line for line in output.splitlines() if not line.startswith("#")]
        assert len(lines) == 1
    assert not results.exists()


def test_frozen_norm_at_a_high_rate_is_warned_of(place, tmp_path, capsys, caplog):
    frozen = ("--model.norm", "frozen")
    assert main(words(place, tmp_path / "a", *SHORT, *frozen)) == 0
    printed = " ".join((caplog.text + capsys.readouterr().err).split())
    assert "set model.norm sync, or base_lr below 0.02" in printed
    caplog.clear()
    assert main(words(place, tmp_path / "b", *SHORT, *frozen, "--base_lr", "0.01")) == 0
    assert "model.norm" not in caplog.text + capsys.readouterr().err


def test_milestones_after_the_end_are_warned_of(place, tmp_path, capsys, caplog):
    late = "the learning rate does not fall at milestones 4, 5, as training ends after 2 iterations: set milestones too"
    given = words(place, tmp_path, "--iterations", "2", "--precise_bn_iterations", "0")
    assert main(given) == 0
    assert late in " ".join((caplog.text + capsys.readouterr().err).split())


def test_a_folder_of_another_training_is_refused(place, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(training_of(trained), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    given = words(place, tmp_path / "results", *SHORT, "--run", str(run), "--seed", "3")
    assert "holds another training, which differs in config.seed" in refused(capsys, given)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "results").exists()


def test_a_damaged_detector(place, trained, tmp_path, capsys):
    detector = tmp_path / "detector"
    given = [*words(place, tmp_path / "results"), "--checkpoint", str(detector)]

    def damaged(spoil) -> str:
        shutil.rmtree(detector, ignore_errors=True)
        shutil.copytree(training_of(trained) / "detector", detector)
        spoil()
        return refused(capsys, given)

    weights, config = detector / "model.safetensors", detector / "config.json"
    flipped = damaged(lambda: flip_a_weight(weights))
    assert (
        "model.safetensors: damaged, its SHA-256 is not that of config.json: train the detector again"
        in flipped
    )
    assert "cannot be read" in damaged(lambda: weights.write_bytes(weights.read_bytes()[:-9]))
    fewer = damaged(lambda: edit(config, '"fpn_channels": 16', '"fpn_channels": 8'))
    assert "does not fit the detector of config.json" in fewer
    other = damaged(lambda: edit(config, '"norm": "sync"', '"norm": "batch"'))
    assert (
        "config.json: its SHA-256 is not the one it was written with: train the detector again"
        in other
    )
    nonsense = damaged(lambda: edit(config, '"fpn_channels": 16', '"fpn_channels": "x"'))
    assert "config.json is not the config of a detector" in nonsense
    assert not (tmp_path / "results").exists()


def test_a_detector_is_scored_without_its_training_images(place, trained, tmp_path, capsys):
    detector = training_of(trained) / "detector"
    more = ("--checkpoint", str(detector), "--data.train", "train2012")
    given = words(place, tmp_path / "results", *more)
    assert main([*given, "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith("\n# Pascal VOC: 8 images to score on\n")
    assert main(given) == 0
    (score,) = scores(tmp_path / "results").values()
    (first,) = scores(trained).values()
    assert score["metrics"] == first["metrics"]


def test_a_detector_of_other_classes(place, trained, tmp_path, capsys):
    detector = training_of(trained) / "detector"
    more = ("--checkpoint", str(detector), "--data.classes", f"[{','.join(reversed(CLASSES))}]")
    line = refused(capsys, words(place, tmp_path / "results", *more))
    assert (
        "tells apart 2 classes (square, disc), and Pascal VOC test2007 has 2 classes (disc, square)"
        in line
    )
    assert "choose the data that it was trained on" in line


def test_other_evaluators_refuse_a_detector(trained, capsys):
    detector = str(training_of(trained) / "detector")
    for verb in ("knn", "linear", "fewshot"):
        line = refused(capsys, [verb, "--checkpoint", detector, "--device", "cpu"])
        assert (
            f"{detector} holds a detector, which `peerlearn detect` scores: give a run or an export"
            in line
        )


def spoil(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:200])


def test_an_image_that_cannot_be_decoded_in_training_is_replaced_and_told(
    own, place, tmp_path, capsys, caplog
):
    spoil(own / "JPEGImages/000001.png")
    results = tmp_path / "results"
    given = words(place, results, *SHORT, "--data.root", str(own.parent), "--batch_size", "8")
    assert main([*given, "--data.max_unreadable_percent", "12"]) == 0
    run = training_of(results)
    (event,) = events(run, "image_unreadable")
    assert event["path"] == str(own / "JPEGImages/000001.png")
    printed = " ".join((caplog.text + capsys.readouterr().err).split())
    assert (
        f"some training images cannot be read, and others take their places: {run}/events.jsonl lists them"
        in printed
    )
    capsys.readouterr()
    assert main([*given, "--results", str(tmp_path / "strict")]) == 1
    error = capsys.readouterr().err
    assert "1 of 9 images (11.1 %) cannot be decoded" in error
    assert "or raise data.max_unreadable_percent (1)" in error
    assert "Traceback" not in error
    assert not scores(tmp_path / "strict")


def test_a_test_image_that_cannot_be_decoded_ends_in_one_line_and_the_training_stands(
    own, place, tmp_path, capsys
):
    image = own / "JPEGImages/000021.png"
    whole = image.read_bytes()
    spoil(image)
    results = tmp_path / "results"
    given = words(place, results, *SHORT, "--data.root", str(own.parent))
    assert main(given) == 1
    error = capsys.readouterr().err
    assert "000021.png" in error
    assert "Traceback" not in error
    assert not scores(results)
    assert RunDirectory(training_of(results)).done
    image.write_bytes(whole)
    assert main(given) == 0
    assert len(events(training_of(results), "started")) == 1
    assert len(scores(results)) == 1


def test_less_data_than_a_batch(place, tmp_path):
    """One image with objects in a batch of eight: it is seen eight times."""
    results = tmp_path / "results"
    assert main(words(place, results, *SHORT, "--data.limit", "2", "--batch_size", "8")) == 0
    (score,) = scores(results).values()
    assert (score["metrics"]["n"], score["protocol"]["train_images"]) == (2, 1)
