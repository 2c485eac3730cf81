"""Readers of detection data: Pascal VOC devkits and COCO-format JSON."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.datasets import VOCDetection

from peerlearn.data.coco import coco
from peerlearn.data.detection_sets import Fault, Kind
from peerlearn.data.voc import VOC_CLASSES, voc
from peerlearn.errors import UserError
from tests.detection_trees import (
    LISTS_2007,
    coco_content,
    voc_xml,
    write_coco,
    write_devkit,
    write_jpeg,
)


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return write_devkit(tmp_path)


def test_the_classes_stand_in_the_published_order():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert VOC_CLASSES[14] == "person"


def test_boxes_are_read_as_detectron2_reads_them(devkit: Path):
    data = voc("trainval2007", devkit)
    assert [path.name for path in data.images] == ["000001.jpg", "000002.jpg"]
    assert data.boxes[0].tolist() == [[0, 0, 60, 40], [9, 4, 30, 35]]
    assert data.boxes[0].dtype == torch.float32
    # One pixel, whose corners are equal in the file.
    assert data.boxes[1].tolist() == [[2, 3, 3, 4]]
    assert data.labels[0].tolist() == [11, 14]
    assert data.difficult[0].tolist() == [False, True]
    assert data.truncated[0].tolist() == [True, False]
    assert data.sizes.tolist() == [[60, 40], [60, 40]]
    assert data.read(0).shape == (3, 40, 60)


def test_images_without_objects_are_kept(devkit: Path):
    data = voc("test2007", devkit)
    assert len(data) == 2
    assert data.boxes[0].shape == (0, 4)
    assert data.labels[0].dtype == torch.int64
    assert data.difficult[0].dtype == data.truncated[0].dtype == torch.bool
    assert data.boxes[1].tolist() == [[44.5, 0, 59, 12.25]]


def test_years_are_joined(devkit: Path):
    data = voc("trainval07+12", devkit)
    assert [path.name for path in data.images] == [
        *("000001.jpg", "000002.jpg", "2008_000001.jpg", "2008_000002.jpg")
    ]
    assert [len(labels) for labels in data.labels] == [2, 1, 2, 0]
    assert len(voc("train07+12", devkit)) == 2


@pytest.mark.parametrize("split", [*LISTS_2007])
def test_names_and_boxes_are_those_of_torchvision(split: str, devkit: Path):
    theirs = VOCDetection(str(devkit.parent), "2007", split)
    ours = voc(f"{split}2007", devkit)
    assert len(theirs) == len(ours)
    for index, (_, annotation) in enumerate(theirs):
        objects = annotation["annotation"]["object"] if len(ours.labels[index]) else []
        corners = [
            [float(o["bndbox"][c]) for c in ("xmin", "ymin", "xmax", "ymax")] for o in objects
        ]
        found = ours.boxes[index] + torch.tensor([1, 1, 0, 0])
        assert found.tolist() == corners
        assert [VOC_CLASSES[label] for label in ours.labels[index]] == [o["name"] for o in objects]
        assert [str(int(flag)) for flag in ours.difficult[index]] == [
            o["difficult"] for o in objects
        ]
        assert theirs.images[index] == str(ours.images[index])


def test_the_devkit_is_found_from_above_and_by_its_year(devkit: Path, monkeypatch):
    first = voc("test2007", devkit).fingerprint()
    assert voc("test2007", devkit.parent).fingerprint() == first
    assert voc("test2007", devkit / "VOC2007").fingerprint() == first
    monkeypatch.chdir(devkit / "VOC2007")
    assert voc("test2007", Path(".")).fingerprint() == first
    moved = devkit.rename(devkit.parent / "elsewhere") / "VOC2007"
    assert voc("test2007", moved.rename(moved.parent / "mine")).fingerprint() == first
    with pytest.raises(
        UserError, match=r"elsewhere holds no VOC2007, only VOC2012: give VOCdevkit"
    ):
        voc("test2007", devkit.parent / "elsewhere")
    with pytest.raises(UserError, match="VOC2012 holds no VOC2007, only VOC2012"):
        voc("trainval07+12", devkit.parent / "elsewhere/VOC2012")


@pytest.mark.parametrize(
    "change",
    [
        ("<difficult>0", "<difficult>1"),
        ("<truncated>1", "<truncated>0"),
        ("dog", "cat"),
        ("<xmin>1<", "<xmin>2<"),
        ("<width>60", "<width>61"),
    ],
)
def test_the_fingerprint_sees_every_change(change: tuple[str, str], devkit: Path):
    before = voc("train2007", devkit).fingerprint()
    assert before == voc("train2007", devkit).fingerprint()
    path = devkit / "VOC2007/Annotations/000001.xml"
    path.write_text(path.read_text().replace(*change, 1))
    assert voc("train2007", devkit).fingerprint() != before


def test_the_fingerprint_sees_the_pixels(devkit: Path):
    before = voc("train2007", devkit).fingerprint()
    write_jpeg(devkit / "VOC2007/JPEGImages/000001.jpg", 99)
    assert voc("train2007", devkit).fingerprint() != before


def test_other_classes_and_png_files(devkit: Path):
    folder = devkit / "VOC2007"
    (folder / "Annotations/000001.xml").write_text(voc_xml([("Screw", 1, 1, 9, 9, 0, 0)]))
    jpeg = folder / "JPEGImages/000001.jpg"
    jpeg.rename(jpeg.with_suffix(".png"))
    data = voc("train2007", devkit, class_names=("Nut", "Screw"))
    assert data.class_names == ("Nut", "Screw")
    assert data.labels[0].tolist() == [1]
    assert data.images[0].name == "000001.png"


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_size_that_is_not_written_is_that_of_the_file(size: str, devkit: Path):
    path = devkit / "VOC2007/Annotations/000001.xml"
    path.write_text(re.sub("<size>.*</size>", size, path.read_text()))
    assert voc("train2007", devkit).sizes.tolist() == [[60, 40]]


def test_flags_that_are_not_written_are_0(devkit: Path):
    path = devkit / "VOC2007/Annotations/000001.xml"
    path.write_text(re.sub("<(difficult|truncated)>.</.*?>", "", path.read_text()))
    data = voc("train2007", devkit)
    assert data.difficult[0].tolist() == data.truncated[0].tolist() == [False, False]


def doctype(path: Path) -> None:
    entities = '<!DOCTYPE annotation [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    path.write_text(entities + path.read_text().replace("dog", "&b;"))


def utf16_doctype(path: Path) -> None:
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE annotation [<!ENTITY a "dog">]>'
    path.write_bytes((text + path.read_text().replace("dog", "&a;")).encode("utf-16"))


def swap(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


# By what is said of the annotation of image 000001.
VOC_FAULTS = {
    "000001.xml is missing: restore it, or remove 000001 from the lists": Path.unlink,
    "000001.xml cannot be read (it has a DOCTYPE, which is not read)": doctype,
    "001.xml cannot be read (it has a DOCTYPE, which is not read)": utf16_doctype,
    "000001.xml cannot be read (mismatched tag: line 1": swap("</name>", ""),
    "000001.xml cannot be read (no element found": lambda path: path.write_bytes(b""),
    "000001.xml cannot be read (not well-formed": lambda path: path.write_bytes(b"\xff\xd8\xff"),
    "001.xml cannot be read (unknown encoding": lambda path: path.write_bytes(
        b'<?xml version="1.0" encoding="nothing"?><annotation/>'
    ),
    "it begins with <labels>, not <annotation>": lambda path: path.write_text("<labels/>"),
    "000001.xml: object 2: 'Person' is none of the 20 classes; did you mean 'person'?": swap(
        "person", "Person"
    ),
    "(object 1: <object> has no <name>)": swap("<name>dog</name>", ""),
    "(object 1: <object> has no <bndbox><xmin>)": swap("<xmin>1</xmin>", ""),
    "(object 1: 'one' in <bndbox><xmin> is no number of pixels)": swap("<xmin>1<", "<xmin>one<"),
    "(object 1: 'nan' in <bndbox><xmin> is no number of pixels)": swap("<xmin>1<", "<xmin>nan<"),
    "(object 1: '1e99' in <bndbox><xmax> is no number": swap("<xmax>60<", "<xmax>1e99<"),
    "('inf' in <size><width> is no number of pixels)": swap("<width>60", "<width>inf"),
    "(object 1: 'Unspecified' in <truncated> is neither 0 nor 1)": swap(
        "<truncated>1", "<truncated>Unspecified"
    ),
    "object 2, 'person', xmin 10 ymin 5 xmax 9 ymax 35, is empty": swap("<xmax>30<", "<xmax>9<"),
    "'dog', xmin 1 ymin 1 xmax 62 ymax 40, lies outside the image, which is 60x40": swap(
        "<xmax>60<", "<xmax>62<"
    ),
    "'dog', xmin -1 ymin 1 xmax 60 ymax 40, lies outside the image": swap("<xmin>1<", "<xmin>-1<"),
}


@pytest.mark.parametrize("said", VOC_FAULTS)
def test_a_fault_of_an_annotation_is_one_line(said: str, devkit: Path):
    path = devkit / "VOC2007/Annotations/000001.xml"
    VOC_FAULTS[said](path)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        voc("trainval2007", devkit)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_faults_of_lists_and_images_are_one_line(devkit: Path):
    lists, images = devkit / "VOC2007/ImageSets/Main", devkit / "VOC2007/JPEGImages"
    (images / "000001.jpg").unlink()
    with pytest.raises(
        UserError, match=r"000001.jpg is missing: restore it, or remove 000001 from the lists"
    ):
        voc("train2007", devkit)
    (lists / "val.txt").write_text("000002\n000002\n")
    with pytest.raises(UserError, match=r"val.txt lists 000002 twice: remove one of the lines"):
        voc("val2007", devkit)
    (lists / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val.txt lists no images"):
        voc("val2007", devkit)
    (lists / "test.txt").unlink()
    with pytest.raises(UserError, match=r"test.txt is missing: unpack the devkit again"):
        voc("test2007", devkit)
    with pytest.raises(
        UserError, match=r"unknown split 'trainval' of Pascal VOC: choose one of trainval07"
    ):
        voc("trainval", devkit)
    shutil.rmtree(devkit / "VOC2007")
    with pytest.raises(UserError, match=r"VOCdevkit holds no VOC2007, only VOC2012"):
        voc("test2007", devkit)


def test_corners_counted_from_0_can_be_used_and_are_reported(devkit: Path):
    swap("<xmin>1<", "<xmin>0<")(devkit / "VOC2007/Annotations/000001.xml")
    assert voc("train2007", devkit).boxes[0][0].tolist() == [-1, 0, 60, 40]
    faults: list[Fault] = []
    voc("train2007", devkit, report=faults.append)
    assert [fault.kind for fault in faults] == [Kind.OUTSIDE]


def test_a_reader_that_may_go_on_reports_all_faults(devkit: Path):
    folder = devkit / "VOC2007/Annotations"
    swap("dog", "dgo")(folder / "000001.xml")
    swap("<xmin>10<", "<xmin>ten<")(folder / "000001.xml")
    (folder / "000002.xml").write_text("")
    faults: list[Fault] = []
    data = voc("trainval2007", devkit, report=faults.append)
    assert [fault.kind for fault in faults] == [Kind.UNKNOWN_CLASS, *[Kind.MALFORMED] * 2]
    assert [len(labels) for labels in data.labels] == [0, 0]


# COCO


def test_coco_boxes_labels_and_crowds(tmp_path: Path):
    path = write_coco(tmp_path)
    data = coco(tmp_path / "images", path)
    assert data.class_names == ("screw", "nut")
    assert [image.relative_to(tmp_path).as_posix() for image in data.images] == [
        *("images/a/one.jpg", "images/b/two.jpg", "images/three.jpg")
    ]
    assert [boxes.tolist() for boxes in data.boxes] == [
        [[1.5, 2, 11.5, 22.25]],
        [[0, 0, 60, 40], [5, 6, 12, 14]],
        [],
    ]
    assert data.boxes[2].shape == (0, 4)
    assert [labels.tolist() for labels in data.labels] == [[0], [1, 0], []]
    assert data.difficult[1].tolist() == [True, False]
    assert not data.truncated[1].any()
    assert data.split == "annotations"
    assert data.read(1).shape == (3, 40, 60)


def test_coco_sizes_may_be_missing(tmp_path: Path):
    path = write_coco(tmp_path)
    content = coco_content()
    del content["images"][0]["width"]
    content["images"][1]["height"] = 0
    path.write_text(json.dumps(content))
    assert coco(tmp_path / "images", path).sizes.tolist() == [[60, 40]] * 3


def entry(part: str, place: int, **values: object) -> Callable[[dict], object]:
    return lambda content: content[part][place].update(values)


NEEDS = "needs 'image_id', 'category_id', 'bbox' [x, y, width, height] and 'iscrowd' 0 or 1"
COCO_FAULTS: dict[str, Callable[[dict], object]] = {
    "has no list 'images'": lambda content: content.pop("images"),
    "has no list 'categories'; did you mean 'categorys'?": lambda content: content.update(
        categorys=content.pop("categories")
    ),
    "has no list 'annotations': it needs images, annotations, categories": lambda content: (
        content.update(annotations={})
    ),
    "lists no images": lambda content: content.update(images=[], annotations=[]),
    "two images have the id 7": entry("images", 1, id=7),
    "two images have the file a/one.jpg": entry("images", 1, file_name="a/one.jpg"),
    "two categories have the id 90": entry("categories", 1, id=90),
    "two categories have the name 'screw'": entry("categories", 1, name="screw"),
    "two annotations have the id 1": entry("annotations", 1, id=1),
    "the image at place 1 has no 'id' or no 'file_name'": entry("images", 1, id=[1]),
    "the image at place 2 has no 'id' or no 'file_name'": entry("images", 2, file_name=None),
    "the category at place 0 has no 'id' or no 'name'": entry("categories", 0, name=""),
    "annotation 2 has category 91, none of 90, 2": entry("annotations", 1, category_id=91),
    "annotation 2 is of image 8, which is not listed": entry("annotations", 1, image_id=8),
    f"annotation 1 {NEEDS}": entry("annotations", 0, bbox=[1, 2, 3]),
    f"annotation 2 {NEEDS}": entry("annotations", 1, bbox=[1, 2, 3, float("nan")]),
    f"annotation 3 {NEEDS}": entry("annotations", 2, bbox="1 2 3 4"),
    f"annotation 1 {NEEDS}: mend": entry("annotations", 0, iscrowd=2),
    f"annotation 2 {NEEDS}: mend": entry("annotations", 1, category_id={}),
    "annotation 3, bbox [5, 6, 0, 8], is empty": entry("annotations", 2, bbox=[5, 6, 0, 8]),
    "annotation 3, bbox [5, 6, 7, -8], is empty": entry("annotations", 2, bbox=[5, 6, 7, -8]),
    "annotation 1, bbox [0, 0, 61.5, 40], lies outside the image, which is 60x40": entry(
        "annotations", 0, bbox=[0, 0, 61.5, 40]
    ),
    "annotation 1, bbox [-2, 0, 6, 4], lies outside the image": entry(
        "annotations", 0, bbox=[-2, 0, 6, 4]
    ),
}


@pytest.mark.parametrize("said", COCO_FAULTS)
def test_a_fault_of_coco_data_is_one_line(said: str, tmp_path: Path):
    path = write_coco(tmp_path)
    content = coco_content()
    COCO_FAULTS[said](content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        coco(tmp_path / "images", path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no JSON (Expecting value"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is no object with images, annotations, categories"),
    ],
)
def test_what_is_no_coco_file_is_one_line(content: bytes, said: str, tmp_path: Path):
    path = tmp_path / "annotations.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} {said}")):
        coco(tmp_path, path)


def test_a_missing_image_of_coco_data_is_one_line(tmp_path: Path):
    path = write_coco(tmp_path)
    with pytest.raises(UserError, match=r"one.jpg is missing, and .*annotations.json lists it"):
        coco(tmp_path, path)
    with pytest.raises(UserError, match=r"cannot read .*nothing.json \(No such file"):
        coco(tmp_path, tmp_path / "nothing.json")
