"""The data that a detection config names."""

from detection.config import DetectDataConfig
from detection.data import from_anywhere


def test_a_training_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_voc = from_anywhere(DetectDataConfig(root="VOCdevkit", train="train2007"))
    assert (of_voc.root, of_voc.train) == (str(tmp_path / "VOCdevkit"), "train2007")
    of_coco = from_anywhere(
        DetectDataConfig(name="coco", root="photos", train="a/train.json", test="b.json")
    )
    assert of_coco.root == str(tmp_path / "photos")
    assert (of_coco.train, of_coco.test) == (
        str(tmp_path / "a/train.json"),
        str(tmp_path / "b.json"),
    )
    assert (of_coco.validation, from_anywhere(DetectDataConfig(name="mini_voc")).root) == (
        None,
        None,
    )
