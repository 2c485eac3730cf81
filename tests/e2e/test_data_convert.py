"""`peerlearn data convert`: pickles of few-shot data sets become the folders that are read, and nothing is run."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peerlearn.cli import main
from peerlearn.commands.data_command import folder_names
from peerlearn.data.class_splits import check_disjoint
from peerlearn.data.datasets import CLASS_SPLITS, load_dataset
from tests.peerlearn.data.test_cifar_pickles import MALICE, WRITERS, python2

SPLITS = ("train", "val", "test")
# By split: the class of each image.
CLASSES = {
    "train": ["n01", "n02", "n01", "n03"],
    "val": ["n05", "n04", "n04"],
    "test": ["n07", "n06", "n07"],
}
Writer = Callable[[object], bytes]


def pixels(split: str) -> np.ndarray:
    noise = np.random.default_rng(SPLITS.index(split))
    return noise.integers(0, 256, (len(CLASSES[split]), 12, 12, 3), dtype=np.uint8)


def numbers(split: str) -> tuple[list[int], list[str]]:
    """The class of each image by its place among the names, and the names."""
    names = sorted(set(CLASSES[split]))
    return [names.index(name) for name in CLASSES[split]], names


def cache(folder: Path, write: Writer) -> None:
    for split, classes in CLASSES.items():
        members = {
            name: [i for i, other in enumerate(classes) if other == name] for name in set(classes)
        }
        content = {"image_data": pixels(split), "class_dict": members}
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(write(content))


def labelled(folder: Path, write: Writer, files: dict[str, str]) -> None:
    first = 0
    for split, file in files.items():
        labels, names = numbers(split)
        content = {
            "data": pixels(split),
            "labels": [first + label for label in labels],
            "catname2label": {name: first + label for label, name in enumerate(names)},
        }
        first += len(names)
        (folder / file).write_bytes(write(content))


def metaoptnet(folder: Path, write: Writer) -> None:
    phases = {"train": "train_phase_train", "val": "val", "test": "test"}
    files = {split: f"miniImageNet_category_split_{part}.pickle" for split, part in phases.items()}
    labelled(folder, write, files)
    # Further images of the training classes, which are left alone.
    (folder / "miniImageNet_category_split_train_phase_val.pickle").write_bytes(b"")


def cifar_fs(folder: Path, write: Writer) -> None:
    labelled(folder, write, {split: f"CIFAR_FS_{split}.pickle" for split in SPLITS})


def tiered_labels(folder: Path, write: Writer) -> None:
    for split in SPLITS:
        labels, names = numbers(split)
        content = {"label_specific": np.array(labels), "label_specific_str": names}
        (folder / f"{split}_labels.pkl").write_bytes(write(content))


def tiered_npz(folder: Path, write: Writer) -> None:
    tiered_labels(folder, write)
    for split in SPLITS:
        np.savez(folder / f"{split}_images.npz", images=pixels(split))


def tiered_png(folder: Path, write: Writer) -> None:
    tiered_labels(folder, write)
    for split in SPLITS:
        # As OpenCV gives them: columns of bytes.
        files = [np.frombuffer(png(image), np.uint8)[:, None] for image in pixels(split)]
        (folder / f"{split}_images_png.pkl").write_bytes(write(files))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


LAYOUTS = {
    cache: "miniimagenet",
    metaoptnet: "miniimagenet",
    cifar_fs: "cifar_fs",
    tiered_npz: "tieredimagenet",
    tiered_png: "tieredimagenet",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return source


def convert(source: Path) -> int:
    return main(["data", "convert", str(source), "--output", str(source.parent / "out/converted")])


def refusal(source: Path, capsys: pytest.CaptureFixture) -> str:
    """One line, and nothing written."""
    capsys.readouterr()
    assert convert(source) == 1
    said = capsys.readouterr().err
    assert said.startswith("peerlearn: ")
    assert not list((source.parent / "out").glob("*"))
    return " ".join(said.split())


@pytest.mark.parametrize(
    "write", [*WRITERS, pickle.dumps, lambda content: pickle.dumps(content, 5)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_comes_with_its_class(
    layout: Callable, write: Writer, source: Path, capsys: pytest.CaptureFixture
):
    layout(source, write)
    assert convert(source) == 0
    output = source.parent / "out/converted"
    assert list(output.parent.iterdir()) == [output]
    printed = " ".join(capsys.readouterr().out.split())
    assert "train: 4 images of 3 classes val: 3 images of 2 classes" in printed
    assert f"use it: --data.name {LAYOUTS[layout]} --data.root {output}" in printed
    splits = [load_dataset(LAYOUTS[layout], split, root=str(output)) for split in CLASS_SPLITS]
    for split, name in zip(splits, SPLITS, strict=True):
        assert split.class_names == tuple(sorted(set(CLASSES[name])))
        for index, (image, of_class) in enumerate(zip(pixels(name), CLASSES[name], strict=True)):
            place = split.images.index(output / name / of_class / f"{index:08d}.png")
            assert np.array_equal(split.read(place).permute(1, 2, 0).numpy(), image)
            assert split.class_names[split.labels[place]] == of_class
        assert len(split) == len(CLASSES[name])
    check_disjoint(splits)


def test_without_names_classes_are_numbered_by_split(source: Path):
    for split in SPLITS:
        content = {"data": pixels(split), "labels": numbers(split)[0]}
        (source / f"CIFAR_FS_{split}.pickle").write_bytes(python2(content))
    assert convert(source) == 0
    folders = sorted((source.parent / "out/converted").glob("*/*"))
    assert [folder.name for folder in folders] == [
        *("test-000", "test-001", "train-000", "train-001", "train-002", "val-000", "val-001")
    ]


def test_names_become_folders_of_their_split_and_no_others():
    assert folder_names({0: "../../etc", 1: "a/b", 2: ".hidden", 3: "..", 4: "lost+found"}) == {
        0: "etc",
        1: "a_b",
        2: "hidden",
        3: "class",
        4: "lost_found",
    }
    assert folder_names({3: "a/b", 4: "a b", 5: "c"}) == {3: "a_b-003", 4: "a_b-004", 5: "c-005"}


def test_a_class_that_would_lead_out_of_the_folder_is_renamed_and_told(source: Path, capsys):
    cache(source, pickle.dumps)
    content = {"image_data": pixels("val"), "class_dict": {"../../up": [0, 1], "/tmp/x": [2]}}
    (source / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(content))
    assert convert(source) == 0
    output = source.parent / "out/converted"
    assert sorted(path.name for path in (output / "val").iterdir()) == ["tmp_x", "up"]
    assert "classes renamed: '../../up' to up, '/tmp/x' to tmp_x" in capsys.readouterr().out
    assert sorted(path.name for path in source.parent.iterdir()) == ["out", "source"]


# Malice


@pytest.mark.parametrize("layout", [cache, metaoptnet, cifar_fs, tiered_png])
@pytest.mark.parametrize("name", MALICE)
def test_a_planted_call_is_not_run(name: str, layout: Callable, source: Path, capsys):
    canary = source.parent / "canary"
    call = MALICE[name](canary)
    layout(source, pickle.dumps)
    for path in source.glob("*.p*"):
        intact = path.read_bytes()
        if not intact:
            continue
        path.write_bytes(pickle.dumps([call, pickle.loads(intact)]))
        said = refusal(source, capsys)
        assert f"cannot read {path} (it asks for" in said
        assert "which was not run" in said
        path.write_bytes(intact)
    assert not canary.exists()
    assert convert(source) == 0


def test_an_archive_of_numpy_is_not_unpickled(source: Path, capsys):
    tiered_npz(source, pickle.dumps)
    canary = source.parent / "canary"
    objects = np.array([MALICE["posix.mkdir"](canary)], dtype=object)
    np.savez(source / "val_images.npz", images=objects)
    assert "holds no pictures" in refusal(source, capsys)
    assert not canary.exists()


# Damage


CACHE = {"image_data": pixels("val"), "class_dict": {"n04": [1, 2], "n05": [0]}}
DAMAGED = {
    "holds no dictionary": [1],
    "holds no pictures (images, height, width, 3) of bytes as image_data": {"class_dict": {}},
    "of bytes as image_data": {**CACHE, "image_data": pixels("val").astype(np.float32)},
    "3) of bytes as image_data": {**CACHE, "image_data": pixels("val")[..., 0]},
    "holds no dictionary of classes as class_dict": {**CACHE, "class_dict": ["n04"]},
    "no whole numbers as class_dict 'n05'": {**CACHE, "class_dict": {"n04": [0, 1], "n05": []}},
    "image 3 of class 'n04' is not there": {**CACHE, "class_dict": {"n04": [0, 1, 2, 3]}},
    "image 1 of class 'n05' is in two": {**CACHE, "class_dict": {"n04": [0, 1, 2], "n05": [1]}},
    "image 2 is in no class": {**CACHE, "class_dict": {"n04": [0, 1]}},
    "a class whose name is no word": {**CACHE, "class_dict": {(1, 2): [0, 1, 2]}},
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_damaged_files_are_named(reason: str, source: Path, capsys):
    cache(source, pickle.dumps)
    path = source / "mini-imagenet-cache-val.pkl"
    path.write_bytes(pickle.dumps(DAMAGED[reason]))
    said = refusal(source, capsys)
    assert str(path) in said
    assert reason in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"data": pixels("val"), "labels": [1, 2]}, "holds 2 labels for 3 images"),
        ({"data": pixels("val"), "labels": [0.5, 1, 2]}, "no whole numbers as labels"),
        ({"data": pixels("val")}, "no whole numbers as labels"),
        ({"labels": [1, 2, 3]}, "holds no pictures"),
        ({"data": pixels("val"), "labels": [1, 1, 2], "catname2label": {"a": "b"}}, "no whole"),
    ],
)
def test_damaged_labels_are_named(content: object, reason: str, source: Path, capsys):
    cifar_fs(source, pickle.dumps)
    (source / "CIFAR_FS_val.pickle").write_bytes(pickle.dumps(content))
    assert reason in refusal(source, capsys)


def test_damaged_pictures_of_tieredimagenet(source: Path, capsys):
    tiered_png(source, pickle.dumps)
    path = source / "val_images_png.pkl"
    whole = [np.frombuffer(png(image), np.uint8) for image in pixels("val")]
    for files, reason in (
        ([], "holds no list of images"),
        (whole[:2], "holds 3 labels for 2 images"),
        ([*whole[:2], np.zeros(9, dtype=np.uint8)], "image 2 is no PNG file"),
        ([*whole[:2], np.array([whole], dtype=object)], "image 2 is no PNG file"),
        ([*whole[:2], 3], "image 2 is no PNG file"),
        ([*whole[:2], whole[2][:60]], "image 2 cannot be decoded ("),
    ):
        path.write_bytes(pickle.dumps(files))
        assert reason in refusal(source, capsys)


def test_damaged_archives_of_tieredimagenet(source: Path, capsys):
    tiered_npz(source, pickle.dumps)
    path = source / "val_images.npz"
    intact = path.read_bytes()
    path.write_bytes(intact[:200])
    assert f"cannot read {path} (" in refusal(source, capsys)
    np.savez_compressed(path, images=pixels("val"))
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 255
    path.write_bytes(packed)
    assert f"cannot read {path} (" in refusal(source, capsys)
    np.savez(path, other=pixels("val"))
    assert f"cannot read {path} (" in refusal(source, capsys)
    np.savez(path, images=pixels("val")[0])
    assert "holds no pictures" in refusal(source, capsys)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", npy(pixels("val"))[:-1])
    assert f"{path} ends within image 2" in refusal(source, capsys)
    np.savez(path, images=np.asfortranarray(pixels("val")))
    assert "holds no pictures" in refusal(source, capsys)
    (source / "test_labels.pkl").unlink()
    path.write_bytes(intact)
    assert f"cannot read {source}/test_labels.pkl (" in refusal(source, capsys)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_compressed_archive_is_read_too(source: Path):
    tiered_npz(source, pickle.dumps)
    np.savez_compressed(source / "val_images.npz", images=pixels("val"))
    assert convert(source) == 0


def test_the_same_classes_in_two_splits_are_refused(source: Path, capsys):
    """As in MetaOptNet's own train_phase_val, which is of the training classes."""
    phases = {split: f"miniImageNet_category_split_train_phase_{split}.pickle" for split in SPLITS}
    labelled(source, pickle.dumps, phases)
    intact = (source / phases["train"]).read_bytes()
    (source / phases["val"]).write_bytes(intact)
    assert "holds the class 'n01', which is in the train split too" in refusal(source, capsys)
    for names in ({}, {"catname2label": {}}):
        for split in SPLITS:
            content = {"data": pixels(split), "labels": numbers(split)[0], **names}
            (source / phases[split]).write_bytes(pickle.dumps(content))
        assert "holds the class '000', which is in the train split too" in refusal(source, capsys)
    labelled(source, pickle.dumps, phases)
    assert convert(source) == 0


def test_missing_files_are_named(source: Path, capsys):
    assert "holds none of the pickles that are known: mini-imagenet-cache-train.pkl" in (
        refusal(source, capsys)
    )
    cache(source, pickle.dumps)
    (source / "mini-imagenet-cache-val.pkl").unlink()
    assert "cache-train.pkl and no mini-imagenet-cache-val.pkl" in refusal(source, capsys)
    for path in (source / "mini-imagenet-cache-test.pkl", source / "none"):
        assert convert(path) == 1
        assert "is not a folder: give the one" in " ".join(capsys.readouterr().err.split())


def test_an_output_that_is_there_is_left_as_it_is(source: Path, capsys):
    cache(source, pickle.dumps)
    output = source.parent / "out/converted"
    output.mkdir(parents=True)
    (output / "mine").write_text("")
    assert convert(source) == 1
    assert "is there already: choose another folder by --output" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["mine"]
    (output / "mine").unlink()
    assert convert(source) == 0


def test_an_interrupted_conversion_leaves_nothing(source: Path, monkeypatch, capsys):
    cache(source, pickle.dumps)
    saved = Image.Image.save
    written: list[Path] = []

    def save(image: Image.Image, path: Path, **options: int) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        saved(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    assert "interrupted" in refusal(source, capsys)
    assert len(written) == 5


def test_a_place_that_takes_no_files_is_named(source: Path, capsys):
    cache(source, pickle.dumps)
    (source.parent / "file").write_text("")
    output = source.parent / "file/converted"
    assert main(["data", "convert", str(source), "--output", str(output)]) == 1
    assert "cannot be written (" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "the following arguments are required: ACTION"),
        (["konvert"], "invalid choice: 'konvert'"),
        (["convert", "x"], "the following arguments are required: --output"),
    ],
)
def test_wrong_words_are_usage(words: list[str], reason: str, capsys):
    assert main(["data", *words]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_help_has_an_example(capsys):
    assert main(["data", "convert", "--help"]) == 0
    assert "peerlearn data convert downloads/mini-imagenet --output" in (
        " ".join(capsys.readouterr().out.split())
    )
