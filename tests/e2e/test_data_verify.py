"""`peerlearn data verify`: every fault of detection data by its line, leaks between splits, and the summary."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from peerlearn.cli import main
from tests.detection_trees import (
    VocObject,
    coco_content,
    voc_xml,
    write_coco,
    write_devkit,
    write_jpeg,
)


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return write_devkit(tmp_path)


def verify(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, list[str]]:
    """The exit code and the lines."""
    code = main(["data", "verify", *map(str, words)])
    printed = capsys.readouterr()
    assert not printed.err
    return code, printed.out.splitlines()


def verified(capsys: pytest.CaptureFixture, *words: object) -> dict:
    """The JSON object, whose verdict is the exit code's."""
    code = main(["data", "verify", *map(str, words), "--json"])
    printed = capsys.readouterr()
    assert not printed.err
    content = json.loads(printed.out)
    assert content["clean"] == (code == 0) == (not content["faults"])
    return content


def lines_of(content: dict) -> dict[str, list[str]]:
    return {
        kind: [fault["line"] for fault in of_kind] for kind, of_kind in content["faults"].items()
    }


def test_a_clean_devkit_is_summed_up(devkit: Path, capsys):
    code, lines = verify(capsys, devkit)
    assert code == 0
    table = {words[0]: words[1:] for line in lines if (words := line.split())}
    assert table["trainval2007"] == ["2", "3", "1", "1", "0"]
    assert table["test2007"] == ["2", "1", "0", "0", "1"]
    assert table["trainval2012"] == ["2", "2", "1", "1", "1"]
    assert table["objects"] == [
        *("trainval2007", "train2007", "val2007", "test2007"),
        *("trainval2012", "train2012", "val2012"),
    ]
    assert table["dog"] == ["1", "1", "0", "0", "1", "1", "0"]
    assert table["sofa"] == ["0"] * 7
    assert lines[-1] == "nothing wrong was found"
    content = verified(capsys, devkit / "VOC2007")
    assert list(content["splits"]) == ["trainval2007", "train2007", "val2007", "test2007"]
    found = content["splits"]["trainval2007"]
    assert {name: count for name, count in found.pop("classes").items() if count} == {
        "aeroplane": 1,
        "dog": 1,
        "person": 1,
    }
    assert found == {
        "images": 2,
        "objects": 3,
        "difficult": 1,
        "truncated": 1,
        "without objects": 0,
    }


def boxed(*corners: float, name: str = "dog") -> list[VocObject]:
    return [(name, *corners, 0, 0)]  # type: ignore[list-item]


def annotated(objects: list[VocObject], size: tuple[int, int] = (60, 40)) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "Annotations/000001.xml").write_text(voc_xml(objects, size)) and None
    )


def image(folder: Path, name: str = "000001") -> Path:
    return folder / f"JPEGImages/{name}.jpg"


def main_list(folder: Path, split: str) -> Path:
    return folder / f"ImageSets/Main/{split}.txt"


def copied(folder: Path, name: str) -> None:
    shutil.copy(image(folder), image(folder, name))


def compressed(folder: Path, name: str) -> None:
    with Image.open(image(folder)) as picture:
        picture.resize((120, 80)).save(image(folder, name), quality=70)
    xml = folder / f"Annotations/{name}.xml"
    xml.write_text(
        xml.read_text().replace("<width>60", "<width>120").replace("<height>40", "<height>80")
    )


# By kind and line: what makes the fault in the folder VOC2007.
FAULTS: dict[tuple[str, str], Callable[[Path], object]] = {
    ("missing images", "000001.jpg is missing: restore it, or remove 000001 from the lists"): (
        lambda folder: image(folder).unlink()
    ),
    (
        "images that cannot be decoded",
        "cannot decode {}/JPEGImages/000001.jpg (image file is trun",
    ): (lambda folder: image(folder).write_bytes(image(folder).read_bytes()[:1200])),
    ("images that cannot be decoded", "000001.jpg (no image in any known format): replace or"): (
        lambda folder: image(folder).write_bytes(b"<html>")
    ),
    (
        "missing annotations",
        "Annotations/000001.xml is missing: restore it, or remove 000001 from",
    ): (lambda folder: (folder / "Annotations/000001.xml").unlink()),
    (
        "malformed annotations",
        "000001.xml cannot be read (no element found: line 1, column 0): mend",
    ): (lambda folder: (folder / "Annotations/000001.xml").write_text("")),
    ("malformed annotations", "000001.xml cannot be read (it has a DOCTYPE, which is not read)"): (
        lambda folder: (folder / "Annotations/000001.xml").write_text(
            f"<!DOCTYPE annotation>{voc_xml([])}"
        )
    ),
    (
        "sizes unlike the file's",
        "000001.jpg is 60x40 pixels, and its annotation says 70x40: mend",
    ): (annotated([], (70, 40))),
    ("sizes unlike the file's", "annotation says 40x60 (turned by its EXIF orientation?): mend"): (
        annotated([], (40, 60))
    ),
    (
        "unknown classes",
        "object 1: 'hors' is none of the 20 classes; did you mean 'horse'?: rename",
    ): (annotated(boxed(1, 1, 9, 9, name="hors"))),
    ("empty boxes", "object 1, 'dog', xmin 9 ymin 1 xmax 8 ymax 9, is empty: mend its corners"): (
        annotated(boxed(9, 1, 8, 9))
    ),
    (
        "boxes outside the image",
        "xmin 1 ymin 1 xmax 61 ymax 9, lies outside the image, which is 60x40",
    ): (annotated(boxed(1, 1, 61, 9))),
    (
        "boxes outside the image",
        "xmin 0 ymin 1 xmax 60 ymax 9, lies outside the image, which is 60x40",
    ): (annotated(boxed(0, 1, 60, 9))),
    (
        "boxes outside the image",
        "xmin 1 ymin 1 xmax 6 ymax 900, lies outside the image, which is",
    ): (annotated(boxed(1, 1, 6, 900))),
    (
        "lists without images",
        "ImageSets/Main/test.txt lists no images: add their names to the list",
    ): (lambda folder: main_list(folder, "test").write_text("")),
    (
        "lists without images",
        "Main/trainval.txt is missing: unpack the devkit again or write the list",
    ): (lambda folder: shutil.rmtree(folder / "ImageSets")),
    ("listed twice", "ImageSets/Main/test.txt lists 000004 twice: remove one of the lines"): (
        lambda folder: main_list(folder, "test").write_text("000003\n000004\n000004\n")
    ),
    (
        "images in two splits",
        "000001 is in {}/ImageSets/Main/train.txt and in {}/ImageSets/Main/val.txt",
    ): (lambda folder: main_list(folder, "val").write_text("000001\n000002\n")),
    (
        "same image twice in a split",
        "000004.jpg has the same bytes as {}/JPEGImages/000003.jpg: remove",
    ): (lambda folder: shutil.copy(image(folder, "000003"), image(folder, "000004"))),
    (
        "same image in two splits",
        "000003.jpg (test2007) has the same bytes as {}/JPEGImages/000001.jpg",
    ): (lambda folder: copied(folder, "000003")),
    (
        "near duplicates in two splits",
        "000004.jpg (test2007) looks like {}/JPEGImages/000001.jpg (train2",
    ): (lambda folder: compressed(folder, "000004")),
}


@pytest.mark.parametrize(("kind", "line"), FAULTS)
def test_a_fault_is_reported_by_its_kind_and_line(kind: str, line: str, devkit: Path, capsys):
    folder = devkit / "VOC2007"
    FAULTS[kind, line](folder)
    found = verified(capsys, devkit)
    assert list(found["faults"]) == [kind]
    (fault,) = found["faults"][kind]
    assert line.format(folder, folder) in fault["line"]
    assert all(str(folder) in file for file in fault["files"])
    code, lines = verify(capsys, devkit)
    assert code == 1
    assert lines[0] == f"{kind}: 1"
    assert lines[1] == f"  {fault['line']}"
    assert lines[-1] == "1 fault"


def test_all_faults_are_reported_at_once(devkit: Path, capsys):
    """The first does not hide the others, in one file neither."""
    folder = devkit / "VOC2007"
    objects = [
        *boxed(1, 1, 9, 9, name="hors"),
        *boxed(9, 1, 8, 9),
        *boxed(1, 1, 99, 9),
        *boxed(1, 1, 9, 9),
    ]
    annotated(objects)(folder)
    text = (
        (folder / "Annotations/000001.xml")
        .read_text()
        .replace("<object>", "<object><x/></object><object>", 1)
    )
    (folder / "Annotations/000001.xml").write_text(text)
    image(folder, "000002").unlink()
    image(folder, "000003").write_bytes(b"")
    (folder / "Annotations/000004.xml").write_text("<")
    found = verified(capsys, devkit)
    assert {kind: len(lines) for kind, lines in lines_of(found).items()} == {
        "missing images": 1,
        "images that cannot be decoded": 1,
        "malformed annotations": 2,
        "unknown classes": 1,
        "empty boxes": 1,
        "boxes outside the image": 1,
    }
    assert found["splits"]["train2007"]["objects"] == 1


def test_long_lists_are_cut_unless_verbose(devkit: Path, capsys):
    folder = devkit / "VOC2007"
    annotated([box for right in range(61, 86) for box in boxed(1, 1, right, 9)])(folder)
    code, lines = verify(capsys, devkit)
    assert code == 1
    assert lines[0] == "boxes outside the image: 25"
    assert lines[21] == "  and 5 more (--verbose prints them)"
    _, lines = verify(capsys, devkit, "--verbose")
    assert sum("lies outside" in line for line in lines) == 25


def test_other_classes_of_a_devkit(devkit: Path, capsys):
    code, lines = verify(capsys, devkit, "--classes", "dog", "person", "aeroplane")
    assert code == 1
    assert lines[0] == "unknown classes: 1"
    assert "'tvmonitor' is none of the 3 classes" in lines[1]
    names = ["dog", "person", "aeroplane", "tvmonitor"]
    assert verify(capsys, devkit, "--classes", *names)[0] == 0


# COCO


def test_clean_coco_data_is_summed_up_and_its_images_are_found(tmp_path: Path, capsys):
    path = write_coco(tmp_path)
    counts = {
        "images": 3,
        "objects": 3,
        "difficult": 1,
        "truncated": 0,
        "without objects": 1,
        "classes": {"screw": 2, "nut": 1},
    }
    assert verified(capsys, path)["splits"] == {"annotations": counts}
    assert (
        verified(capsys, path, "--images", tmp_path / "images")["splits"]["annotations"] == counts
    )
    # As COCO lies: coco/annotations/instances_val2017.json and coco/val2017.
    published = tmp_path / "coco/annotations/instances_val2017.json"
    published.parent.mkdir(parents=True)
    path.rename(published)
    (tmp_path / "images").rename(tmp_path / "coco/val2017")
    assert verified(capsys, published)["splits"]["instances_val2017"] == counts


def test_faults_of_coco_data_are_reported_at_once(tmp_path: Path, capsys):
    path = write_coco(tmp_path)
    content = coco_content()
    content["images"] += [{"id": 5, "file_name": "x.jpg"}, {"id": 9, "file_name": "gone.jpg"}]
    content["images"][0]["width"] = 61
    content["annotations"] += [
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"id": 5, "image_id": 3, "category_id": 2, "bbox": [1, 1, 0, 2]},
        {"id": 6, "image_id": 3, "category_id": 2, "bbox": [1, 1, 60, 2]},
        {"id": 7, "image_id": 33, "category_id": 2, "bbox": [1, 1, 60, 2]},
        {"id": 8, "image_id": 3, "category_id": 2, "bbox": None},
        "no annotation",
    ]
    path.write_text(json.dumps(content))
    assert {
        kind: [re.sub("^.*?/annotations.json: ", "", line) for line in lines]
        for kind, lines in lines_of(verified(capsys, path)).items()
    } == {
        "listed twice": ["two images have the id 5: remove one"],
        "missing images": [
            f"{tmp_path}/images/gone.jpg is missing, and {path} lists it: restore it or give the folder of the images"
        ],
        "malformed annotations": [
            "annotation 7 is of image 33, which is not listed: remove it",
            *(
                f"{which} needs 'image_id', 'category_id', 'bbox' [x, y, width, height] and 'iscrowd' "
                "0 or 1: mend or remove it"
                for which in ("annotation 8", "the annotation at place 8")
            ),
        ],
        "sizes unlike the file's": [
            f"{tmp_path}/images/a/one.jpg is 60x40 pixels, and its annotation says 61x40: mend the size and check the "
            "boxes"
        ],
        "unknown classes": ["annotation 4 has category 1, none of 90, 2: mend it"],
        "empty boxes": [
            "annotation 5, bbox [1, 1, 0, 2], is empty: mend its corners or remove the object"
        ],
        "boxes outside the image": [
            "annotation 6, bbox [1, 1, 60, 2], lies outside the image, which is 60x40: mend its corners"
        ],
    }


def test_a_file_in_no_format_is_a_fault(tmp_path: Path, capsys):
    path = tmp_path / "train.json"
    path.write_text("{}")
    assert lines_of(verified(capsys, path)) == {
        "malformed annotations": [
            f"{path} has no list 'images': it needs images, annotations, categories"
        ]
    }


# Leaks


def test_leaks_are_found_against_other_data(devkit: Path, tmp_path: Path, capsys):
    path = write_coco(tmp_path / "own")
    images = tmp_path / "own/images"
    shutil.copy(image(devkit / "VOC2007"), images / "three.jpg")
    with Image.open(image(devkit / "VOC2007", "000004")) as picture:
        picture.resize((60, 40)).save(images / "b/two.jpg", quality=60)
    assert verified(capsys, path)["clean"]
    found = lines_of(verified(capsys, path, "--against", devkit / "VOC2012", devkit / "VOC2007"))
    jpegs = devkit / "VOC2007/JPEGImages"
    assert found == {
        "same image in two splits": [
            f"{images}/three.jpg (annotations) has the same bytes as {jpegs}/000001.jpg ({devkit}/VOC2007): "
            "remove one of them"
        ],
        "near duplicates in two splits": [
            f"{images}/b/two.jpg (annotations) looks like {jpegs}/000004.jpg ({devkit}/VOC2007): remove one of them"
        ],
    }
    # The other way round, against the images that a JSON file lists.
    content = verified(capsys, devkit / "VOC2007", "--against", path)
    assert [fault["files"] for kind in content["faults"].values() for fault in kind] == [
        [f"{jpegs}/000001.jpg", f"{images}/three.jpg"],
        [f"{jpegs}/000004.jpg", f"{images}/b/two.jpg"],
    ]
    assert list(lines_of(content)) == list(found)


def test_two_files_of_one_folder_must_not_share_images(tmp_path: Path, capsys):
    path = write_coco(tmp_path)
    content = coco_content()
    content["images"], content["annotations"] = content["images"][:1], []
    other = tmp_path / "test.json"
    other.write_text(json.dumps(content))
    (line,) = lines_of(verified(capsys, path, "--against", other))["same image in two splits"]
    file = tmp_path / "images/a/one.jpg"
    assert line.startswith(f"{file} (annotations) has the same bytes as {file} ({other})")


def test_folders_of_photographs(tmp_path: Path, capsys):
    root = tmp_path / "photos"
    for seed, name in enumerate(["train/cat/1", "train/dog/2", "val/cat/3", "val/dog/4"]):
        write_jpeg(root / f"{name}.jpg", seed)
    (root / "notes.txt").write_text("")
    code, lines = verify(capsys, root)
    assert code == 0
    assert [line.split() for line in lines[:3]] == [["images"], ["train", "2"], ["val", "2"]]
    assert lines[3] == f"{root}: skipped 1 .txt (no images)"
    assert lines[4] == f"{root} holds no annotations that are read, only images"
    shutil.copy(root / "train/cat/1.jpg", root / "val/dog/5.jpg")
    (root / "val/dog/6.jpg").write_bytes(b"")
    assert list(verified(capsys, root)["faults"]) == [
        "images that cannot be decoded",
        "same image in two splits",
    ]
    content = verified(capsys, root / "train/cat", "--against", root / "val")
    assert list(content["faults"]) == ["same image in two splits"]
    assert content["remarks"][-1] == f"{root}/val: 1 images cannot be decoded and are not compared"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{}/nothing"], 1, "{}/nothing is not there: give a folder or a JSON file"),
        (
            ["{}/VOCdevkit", "--images", "{}"],
            2,
            "--images belongs to a JSON file, and {}/VOCdevkit is",
        ),
        (
            ["{}/VOCdevkit/VOC2007/JPEGImages", "--classes", "a"],
            2,
            "--classes belongs to a devkit of",
        ),
        (["{}/empty"], 1, "{}/empty holds no images: give a folder of images or a JSON file"),
        (["{}/VOCdevkit", "--against", "{}/no"], 1, "--against {}/no is not there: give a folder"),
        (["{}/VOCdevkit", "--against", "{}/empty"], 1, "--against {}/empty holds no images: give"),
    ],
)
def test_wrong_words_are_one_line(words, code, said, devkit: Path, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["data", "verify", *(word.format(tmp_path) for word in words)]) == code
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("peerlearn: ")
    assert said.format(tmp_path) in printed


def test_help_has_examples(capsys):
    assert main(["data", "verify", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "peerlearn data verify FOLDER|JSON [--images DIR]" in printed
    assert "  peerlearn data verify train.json --images photos --against test.json\n" in printed


def test_nothing_is_changed(devkit: Path, capsys):
    before = {path: path.stat().st_mtime_ns for path in devkit.rglob("*")}
    verify(capsys, devkit)
    assert {path: path.stat().st_mtime_ns for path in devkit.rglob("*")} == before
