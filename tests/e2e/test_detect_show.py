"""`peerlearn detect show`: what a saved detector finds in one's own images."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest
import torch
from PIL import Image

from detection.backbone import new_body
from detection.config import ModelConfig
from detection.model import build_detector
from detection.norms import prepare_norms
from detection.saved import describe, save_detector
from peerlearn.cli import main
from tests.detection_trees import write_jpeg

MODEL = ModelConfig(
    norm="frozen",
    short_sides=[32],
    longest_side=64,
    anchor_sizes=[8, 16, 24, 32, 48],
    fpn_channels=8,
    head_features=8,
    rpn_proposals_test=1,
)
CLASSES = ("screw", "nut")


@pytest.fixture(scope="module")
def detector(once: Callable[..., Path]) -> Path:
    """A training's folder with a detector that finds one nut of score 0.90 in every image."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        body = new_body("resnet18", channels=1, image_size=32, mean=(0.5,), std=(0.25,), c4=False)
        made = build_detector(MODEL, body, len(CLASSES))
        prepare_norms(MODEL, made)
        with torch.no_grad():
            for parameter in made.roi_heads.box_predictor.parameters():
                parameter.zero_()
            # Background, screw, nut: 1, 1 and 18 parts of 20.
            made.roi_heads.box_predictor.cls_score.bias[2] = math.log(18)
        about = describe(
            body, MODEL, CLASSES, network="0", weights="export", dataset="screws", step=9
        )
        save_detector(folder / "detector", made, about)

    return once("nut-detector", make)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images, of which the second is the first at half the size, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    write_jpeg(folder / "a.jpg", 0, (120, 80))
    (folder / "deep").mkdir()
    Image.open(folder / "a.jpg").resize((60, 40)).save(folder / "deep/b.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def one_line(capsys: pytest.CaptureFixture) -> str:
    (line,) = " ".join(capsys.readouterr().err.split()).split("peerlearn: ")[1:]
    return line


def show(*words: object) -> int:
    return main(["detect", "show", *map(str, words), "--device", "cpu"])


def test_each_image_has_a_line_and_a_place_on_the_sheet(
    detector: Path, photos: Path, capsys: pytest.CaptureFixture
):
    words = [photos, "--checkpoint", detector / "detector", "--json", "deep/found.json"]
    assert show(*words) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{photos}/a.jpg: 1 detection: nut 0.90",
        f"{photos}/deep/b.png: 1 detection: nut 0.90",
        "drawn: detections.png",
    ]
    found = json.loads(Path("deep/found.json").read_text())
    assert list(found) == [f"{photos}/a.jpg", f"{photos}/deep/b.png"]
    (large,), (small,) = found.values()
    assert large["class"] == small["class"] == "nut"
    assert large["score"] == pytest.approx(0.9, abs=1e-6)
    # The same object in the pixels of each file.
    left, top, right, bottom = large["box"]
    assert 0 <= left < right <= 120
    assert 0 <= top < bottom <= 80
    assert large["box"] == pytest.approx([2 * side for side in small["box"]], abs=2)
    assert Image.open("detections.png").format == "PNG"
    assert sorted(path.name for path in Path().iterdir()) == ["deep", "detections.png", "photos"]


def test_a_score_hides_what_is_below_it(
    detector: Path, photos: Path, capsys: pytest.CaptureFixture
):
    words = [photos / "a.jpg", "--checkpoint", detector, "--json", "found.json"]
    pictures = []
    for score, told in (("0.91", "no detections"), ("0.89", "1 detection: nut 0.90")):
        assert show(*words, "--score", score) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"{photos}/a.jpg: {told}"
        pictures.append(matplotlib.image.imread("detections.png"))
        assert len(json.loads(Path("found.json").read_text())[f"{photos}/a.jpg"]) == (
            score == "0.89"
        )
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.slow(15)
def test_more_than_sixteen_images_take_several_sheets(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for number in range(17):
        write_jpeg(tmp_path / f"many/{number:02d}.jpg", number)
    sheets = tmp_path / "new/out.png"
    # An image that is named twice is shown once.
    words = [tmp_path / "many", tmp_path / "many/03.jpg", "--checkpoint", detector]
    assert show(*words, "--output", sheets) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"drawn: {sheets}", f"drawn: {sheets.with_name('out-2.png')}"]
    assert len(lines) == 17 + 2
    # Four rows of four images over a page, and one image in a column of text, at 200 dpi.
    (wide, high), (alone, alone_high) = [
        Image.open(each).size for each in sorted(sheets.parent.iterdir(), reverse=True)
    ]
    assert (wide, alone) == (1360, 660)
    assert high / 4 < wide / 4 < alone_high


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["gone.jpg"], 1, "gone.jpg is not there: give image files, or folders of them"),
        (["empty"], 1, "empty holds no images"),
        (["photos/notes.txt"], 1, "cannot decode photos/notes.txt (no image in any known format)"),
        (["cut.jpg"], 1, "cut.jpg"),
        (["photos", "--output", "out.gif"], 2, "--output out.gif must end in .png, .svg or .pdf"),
        (["photos", "--score", "1.5"], 2, "--score must be within 0..1, got 1.5"),
        (["photos", "--device", "gpu"], 2, "--device must be auto, cpu, mps, cuda"),
        (["photos", "--sore", "0.5"], 2, "--sore 0.5; did you mean 'score'?"),
        (["photos", "--dry_run"], 2, "detect show is done here and now: leave out --dry_run"),
        (["photos", "--weights", "x"], 2, "here it is called 'checkpoint'"),
        (["photos/deep/b.png", "--output", "photos/deep/b.png"], 1, "is one of the images"),
        (["photos", "--json", "photos"], 1, "photos is a folder"),
        (["photos", "--output", "photos/notes.txt/x.png"], 1, "cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_told_in_one_line(
    words: list[str],
    code: int,
    message: str,
    detector: Path,
    photos: Path,
    capsys: pytest.CaptureFixture,
):
    Path("empty").mkdir()
    Path("cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    given = [] if "--device" in words else ["--device", "cpu"]
    assert main(["detect", "show", *words, "--checkpoint", str(detector), *given]) == code
    assert message in one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_a_checkpoint_that_is_no_detector_is_told(
    detector: Path, photos: Path, capsys: pytest.CaptureFixture
):
    assert show(photos, "--checkpoint", photos) == 1
    assert "photos holds no detector: give the folder detector that" in one_line(capsys)
    cut = Path(shutil.copytree(detector, "cut"))
    weights = cut / "detector/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert show(photos, "--checkpoint", cut) == 1
    assert "model.safetensors cannot be read" in one_line(capsys)
    assert show(photos) == 2
    assert "required: --checkpoint" in one_line(capsys)
    assert not Path("detections.png").exists()


def test_help_has_an_example(capsys: pytest.CaptureFixture):
    assert show("--help") == 0
    assert "peerlearn detect show photos --checkpoint runs/a/results/" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["detect", "--help"]) == 0
    assert "peerlearn detect show IMAGES" in " ".join(capsys.readouterr().out.split())
