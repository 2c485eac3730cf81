"""Folders of images as people have them: what is read, what is skipped and said, and why a split has no labels."""

import os
from pathlib import Path

import pytest

from peerlearn.data.datasets import ImageDataset, load_dataset
from peerlearn.data.titles import dataset_title
from peerlearn.errors import UserError
from tests.e2e.runs import write_noise


def load(root: Path, split: str = "train", **more: bool) -> ImageDataset:
    return load_dataset("folder", split, root=str(root), **more)


def test_a_stray_image_is_named_with_what_it_is_in_the_way_of(tmp_path):
    write_noise(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    stray = tmp_path / "train" / "stray.png"
    (tmp_path / "train/a/000.png").rename(stray)
    train = load(tmp_path)
    assert (train.labels, len(train)) == (None, 4)
    assert (
        train.why_unlabelled == f"{stray} lies beside the class folders a, b, and in none of them"
    )
    # The test split has its labels all the same.
    assert load(tmp_path, "test").labels.tolist() == [0, 1]


def test_a_test_folder_without_classes_is_passed_over_for_one_that_has_them(tmp_path):
    """As those of Kaggle, whose test labels are not public."""
    write_noise(tmp_path, {"train/a": 2, "train/b": 2, "test": 3, "val/a": 1, "val/b": 1})
    test = load(tmp_path, "test")
    assert [path.parent for path in test.images] == [tmp_path / "val/a", tmp_path / "val/b"]
    (remark,) = test.remarks
    assert remark == (
        f"{tmp_path / 'test'} has no labels ({tmp_path / 'test/000.png'} and the others lie in no class folders): "
        f"{tmp_path / 'val'} is the test split instead"
    )
    assert load(tmp_path).remarks == ()


def test_without_another_the_test_split_has_no_labels_and_says_why(tmp_path):
    write_noise(tmp_path, {"train/a": 2, "train/b": 2, "test": 3})
    test = load(tmp_path, "test")
    assert (len(test), test.labels) == (3, None)
    assert test.why_unlabelled.startswith(f"{tmp_path / 'test/000.png'} and the others lie in no")


def test_an_empty_test_folder_is_passed_over_too(tmp_path):
    write_noise(tmp_path, {"train/a": 1, "train/b": 1, "val/b": 2})
    (tmp_path / "test").mkdir()
    assert load(tmp_path, "test").labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *[("train", name) for name in ("test", "testing", "val", "valid", "validation")],
        *[("Training", "Testing"), ("TRAIN", "Valid")],
    ],
)
def test_the_folders_of_splits_have_several_names(train: str, test: str, tmp_path):
    write_noise(tmp_path, {f"{train}/a": 1, f"{train}/b": 2, f"{test}/a": 1, f"{test}/b": 1})
    assert load(tmp_path).labels.tolist() == [0, 1, 1]
    assert load(tmp_path, "test").labels.tolist() == [0, 1]


def test_of_two_names_the_one_in_small_letters_counts(tmp_path):
    write_noise(tmp_path, {"Train/a": 1, "train/a": 1, "train/b": 1})
    assert len(load(tmp_path)) == 2


def test_a_test_split_lacks_classes_and_even_all_but_one(tmp_path):
    write_noise(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 1, "test/b": 2})
    test = load(tmp_path, "test")
    assert test.class_names == ("a", "b", "c")
    assert test.labels.tolist() == [1, 1]


def test_a_class_that_the_train_split_lacks_is_named_with_its_split(tmp_path):
    write_noise(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/B": 1})
    with pytest.raises(UserError) as error:
        load(tmp_path, "test")
    assert str(error.value) == (
        f"{tmp_path / 'val/B/000.png'} (test split, the class 'B') belongs to none of the 2 classes of the train "
        "split (a, b): move, rename or remove it"
    )


def test_folders_within_a_class_belong_to_it_where_a_folder_is_named_train(tmp_path):
    write_noise(tmp_path, {"train/a/2019": 1, "train/a/2020": 1, "train/b": 1, "test/b/x/y": 1})
    assert load(tmp_path).labels.tolist() == [0, 0, 1]
    assert load(tmp_path, "test").labels.tolist() == [1]


def test_years_and_months_are_no_classes(tmp_path):
    write_noise(tmp_path, {"2019/05": 1, "2020": 1})
    photos = load(tmp_path)
    assert photos.labels is None
    expected = f"{tmp_path / '2019/05/000.png'} lies deeper than in a class folder of {tmp_path}"
    assert photos.why_unlabelled == expected


def test_one_class_alone_is_none(tmp_path):
    write_noise(tmp_path, {"train/a": 2})
    expected = f"all images of {tmp_path / 'train'} lie in one class folder, a"
    assert load(tmp_path).why_unlabelled == expected


def test_a_test_folder_alone_asks_for_one_named_train(tmp_path):
    write_noise(tmp_path, {"photos/a": 1, "val/a": 1})
    with pytest.raises(UserError, match="holds a folder val and none named train"):
        load(tmp_path)


def test_what_is_skipped_is_counted_by_suffix_and_reason(tmp_path):
    write_noise(tmp_path, {"a": 2, "b": 1, "@eaDir/a": 5, "__MACOSX/b": 5})
    for name in (
        "a/1.heic",
        "a/2.HEIC",
        "b/3.heic",
        "b/4.cr2",
        "Thumbs.db",
        "b/Thumbs.db",
        "README",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "b" / "itself.jpg").symlink_to(tmp_path / "b" / "itself.jpg")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    for name in (".DS_Store", "a/._000.png"):
        (tmp_path / name).write_bytes(b"x")
    photos = load(tmp_path)
    assert len(photos) == 3
    (remark,) = photos.remarks
    head, text = remark.split(": skipped ")
    assert head == str(tmp_path)
    assert sorted(text.split("; ")) == [
        "2 .db, 1 without a suffix (no images)",
        "2 .jpg, 1 .png (broken links or no plain files)",
        "3 .heic, 1 .cr2 (a format that is not read: convert them to JPEG or PNG)",
        "4 (hidden)",
    ]


def test_a_folder_of_what_is_not_read_says_what_there_is(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.heic").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert f"below {tmp_path}, only 3 .heic (a format that is not read" in str(error.value)
    assert str(error.value).endswith("mend data.root")


@pytest.mark.parametrize(
    "name", ["a.JPG", "b.Jpeg", "c.PNG", "d.gif", "e.jfif", "f.TIFF", "g.pbm", "-h.png", "[i].png"]
)
def test_suffixes_in_capitals_and_odd_names_are_read(name: str, tmp_path):
    write_noise(tmp_path, {"a": 1})
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / name)
    assert load(tmp_path).read(0).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "root", "title"),
    [
        ("folder", "/data/holiday", "holiday"),
        ("folder", "/data/holiday/", "holiday"),
        ("folder", "/data/holiday/x/..", "holiday"),
        ("folder", "/", "folder"),
        ("folder", None, "folder"),
        ("folder", "/data/a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("folder", "/data/gr\udcfcn", "gr\\xfcn"),
        ("folder", "/data/grün 😀", "grün 😀"),
        ("imagenet", "/data/ilsvrc", "imagenet"),
        ("digits", None, "digits"),
    ],
)
def test_a_folder_is_called_by_its_own_name(name: str, root: str | None, title: str):
    assert dataset_title(name, root) == title


def test_the_title_is_that_of_the_folder_here(tmp_path, monkeypatch):
    write_noise(tmp_path / "here", {"a": 1})
    monkeypatch.chdir(tmp_path / "here")
    assert load(Path(".")).title == "here"


def test_a_folder_that_was_renamed_holds_the_same_images(tmp_path):
    write_noise(tmp_path / "one", {"a": 1, "b": 1})
    before = load(tmp_path / "one")
    fingerprint = before.fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    after = load(tmp_path / "two")
    assert (before.title, after.title) == ("one", "two")
    assert after.fingerprint() == fingerprint


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_with_three_folders_validation_is_val_and_test_is_test(name: str, tmp_path):
    write_noise(tmp_path, {"train/a": 1, "train/b": 1, f"{name}/c": 1, f"{name}/d": 2})
    write_noise(tmp_path, {"test/e": 2, "test/f": 2})
    validation = load(tmp_path, "validation", own_classes=True)
    assert (validation.class_names, validation.labels.tolist()) == (("c", "d"), [0, 1, 1])
    assert load(tmp_path, "test", own_classes=True).class_names == ("e", "f")
    with pytest.raises(UserError, match=r"\(validation split, the class 'c'\) belongs to none of"):
        load(tmp_path, "validation")


def test_a_validation_split_may_have_the_classes_of_train(tmp_path):
    write_noise(tmp_path, {"train/a": 1, "train/b": 1, "val/b": 2, "test/a": 1})
    assert load(tmp_path, "validation").labels.tolist() == [1, 1]


def test_without_a_folder_for_it_the_validation_split_is_missed(tmp_path):
    write_noise(tmp_path, {"train/a": 1, "train/b": 1, "test/a": 2, "test/b": 2})
    with pytest.raises(UserError) as error:
        load(tmp_path, "validation", own_classes=True)
    assert str(error.value) == (
        f"{tmp_path} holds no validation split: it needs a folder named val beside train"
    )
