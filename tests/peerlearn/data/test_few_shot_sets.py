"""Few-shot data sets, each from a small tree in every layout that it is published in."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from peerlearn.data.class_splits import check_disjoint
from peerlearn.data.datasets import CLASS_SPLITS, ImageDataset, load_dataset
from peerlearn.data.published import is_split_by_class
from peerlearn.errors import UserError
from tests.e2e.runs import write_noise

# By split: its classes, and so many images of each.
CLASSES = {
    "train": {"n01532829": 3, "n01558993": 2},
    "validation": {"n02138441": 2, "n02981792": 2},
    "test": {"n01930112": 1, "n01981276": 4, "n02099601": 2},
}
FILES = {"train": "train", "validation": "val", "test": "test"}
LABELS = {"train": [0, 0, 0, 1, 1], "validation": [0, 0, 1, 1], "test": [0, 1, 1, 1, 1, 2, 2]}
IMAGE_SETS = ("miniimagenet", "tieredimagenet", "cifar_fs")


def class_folders(root: Path, top: str = "{split}/{name}") -> dict[str, list[Path]]:
    """Files by class, in the order of their names."""
    folders = {
        name: (top.format(split=FILES[split], name=name), count)
        for split, classes in CLASSES.items()
        for name, count in classes.items()
    }
    write_noise(root, dict(folders.values()))
    return {name: sorted((root / folder).iterdir()) for name, (folder, _) in folders.items()}


def ravi(root: Path) -> dict[str, list[Path]]:
    """images/ of all classes together, and lists that name files."""
    files = class_folders(root, "away/{name}")
    (root / "images").mkdir()
    for name, paths in files.items():
        files[name] = [root / "images" / f"{name}{i:08d}.jpg" for i in range(1, len(paths) + 1)]
        for old, new in zip(paths, files[name], strict=True):
            old.rename(new)
    write_lists(root, files, "filename,label", lambda path, name: f"{path.name},{name}")
    return files


def mmfewshot(root: Path) -> dict[str, list[Path]]:
    """Ravi's lists beside ILSVRC's own files, in folders of classes: by their number among those of the class."""
    files = class_folders(root, "images/{name}")
    for name, paths in files.items():
        # As text, 1004 comes before 93.
        files[name] = [
            path.rename(path.with_name(f"{name}_{number}.JPEG"))
            for path, number in zip(paths, (8, 93, 1004, 20000), strict=False)
        ]
    lines = {path: i for paths in files.values() for i, path in enumerate(paths, 1)}
    write_lists(
        root, files, "filename,label", lambda path, name: f"{name}{lines[path]:08d}.jpg,{name}"
    )
    return files


def easyfsl_csv(root: Path) -> dict[str, list[Path]]:
    files = class_folders(root, "{name}")
    write_lists(root, files, "class_name,image_name", lambda path, name: f"{name},{path.name}")
    return files


def lists_in_a_folder_of_their_own(root: Path) -> dict[str, list[Path]]:
    files = class_folders(root, "images/{name}")
    (root / "split").mkdir()
    write_lists(root / "split", files, "filename,label", lambda path, name: f"{path.name},{name}")
    return files


def write_lists(folder: Path, files: dict, header: str, line: Callable[[Path, str], str]) -> None:
    for split, classes in CLASSES.items():
        rows = [line(path, name) for name in classes for path in files[name]]
        (folder / f"{FILES[split]}.csv").write_text("\n".join([header, *rows]) + "\n")


def easyfsl_json(root: Path, place: str = "images/{name}") -> dict[str, list[Path]]:
    files = class_folders(root, place)
    for split, classes in CLASSES.items():
        roots = [f"./data/tiered_imagenet/images/{name}" for name in classes]
        content = {"class_names": list(classes), "class_roots": roots}
        (root / f"{FILES[split]}.json").write_text(json.dumps(content))
    return files


def json_of_an_imagenet_tree(root: Path) -> dict[str, list[Path]]:
    return easyfsl_json(root, "train/{name}")


LAYOUTS = [
    *(class_folders, ravi, mmfewshot, easyfsl_csv, easyfsl_json, json_of_an_imagenet_tree),
    lists_in_a_folder_of_their_own,
]


def load(name: str, root: Path, split: str = "train") -> ImageDataset:
    return load_dataset(name, split, root=str(root))


def refusal(name: str, root: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load(name, root, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_all(name: str, root: Path, files: dict[str, list[Path]]) -> None:
    splits = [load(name, root, split) for split in CLASS_SPLITS]
    for split in splits:
        names = tuple(CLASSES[split.split])
        assert split.class_names == names
        assert split.images == tuple(path for each in names for path in files[each])
        assert split.labels.tolist() == LABELS[split.split]
        assert split.labels.dtype == torch.int64
        assert split.read(0).shape == (3, 16, 16)
    check_disjoint(splits)


@pytest.mark.parametrize("name", IMAGE_SETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_splits(layout: Callable, name: str, tmp_path: Path):
    assert is_split_by_class(name)
    check_all(name, tmp_path, layout(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder"),
    [("miniimagenet", "mini-imagenet"), ("tieredimagenet", "tiered_imagenet"), ("cifar_fs", "CIFAR-FS")],
)  # fmt: skip
def test_a_folder_of_its_own_in_the_root_or_in_the_cache(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = class_folders(tmp_path / "peerlearn" / folder)
    check_all(name, tmp_path / "peerlearn", files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_dataset(name).class_names == tuple(CLASSES["train"])


@pytest.mark.parametrize("top", ["", "cifar100"])
def test_cifar_fs_of_its_publisher(top: str, tmp_path: Path):
    files = class_folders(tmp_path / top, "data/{name}")
    lists = tmp_path / top / "splits/bertinetto"
    lists.mkdir(parents=True)
    for split, classes in CLASSES.items():
        (lists / f"{FILES[split]}.txt").write_text("\n".join(classes) + "\n")
    check_all("cifar_fs", tmp_path, files)
    (lists / "val.txt").unlink()
    assert f"{lists} holds no val.txt" in refusal("cifar_fs", tmp_path, "validation")
    (lists / "test.txt").write_text("apple\n")
    assert refusal("cifar_fs", tmp_path, "test") == (
        f"{lists} lists the class 'apple', whose folder {tmp_path / top}/data/apple is missing: add it"
    )


# Damage


@pytest.mark.parametrize("name", [*IMAGE_SETS, "omniglot"])
def test_an_empty_root_is_told_what_must_lie_there(name: str, tmp_path: Path, monkeypatch):
    said = refusal(name, tmp_path)
    assert said.startswith(f"{tmp_path} holds no ")
    assert "images_evaluation/" in said or "train/, val/ and test/" in said
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    with pytest.raises(UserError, match=f"^{tmp_path}/none/peerlearn holds no "):
        load_dataset(name)


def test_a_missing_list_is_named(tmp_path: Path):
    ravi(tmp_path)
    (tmp_path / "val.csv").unlink()
    message = refusal("miniimagenet", tmp_path, "validation")
    assert message == f"{tmp_path} holds no val.csv, the list of the validation split: add it"


def test_a_missing_split_folder_is_named(tmp_path: Path):
    write_noise(tmp_path, {"train/a": 1, "train/b": 1, "test/c": 1})
    assert f"{tmp_path} has a folder for the train split and none for the validation split" in (
        refusal("miniimagenet", tmp_path)
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "begins with 'nothing': a list of images begins with filename,label or class_name,"),
        ("name,class\na,b\n", "begins with 'name,class': a list of images begins with"),
        ("filename,label\n", "lists no images"),
        ("filename,label\na.png,n01532829,3\n", "line 2 has 3 columns, and its header 2"),
        ("filename,label\n,n01532829\n", "line 2 names no image"),
        ("filename,label\n\n\n,n01532829\n", "line 4 names no image"),
        ("filename,label\na.png,\n", "line 2 names no class"),
        ("filename,label\nn0153282900000001.jpg,n01532829\nnone.jpg,a\n", "line 3 names none.jpg, which is neither"),
        ("filename,label\nn0153282900000004.jpg,n01532829\n", "line 2 names n0153282900000004.jpg, which is"),
        ("filename,label\nn0153282900000001.jpg,a\nn0153282900000001.jpg,b\n", "a second time: remove the line"),
        ('filename,label\n"a', "is no list of images ("),
        ("filename,label\na\0b,c\0d\n", "line 2 names a\0b, which is neither"),
    ],
)  # fmt: skip
def test_damaged_lists_are_named_by_their_line(text: str, reason: str, tmp_path: Path):
    ravi(tmp_path)
    (tmp_path / "train.csv").write_text(text)
    message = refusal("miniimagenet", tmp_path)
    assert message.startswith(str(tmp_path / "train.csv"))
    assert reason in message


def test_a_list_that_is_no_text(tmp_path: Path):
    ravi(tmp_path)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path}/train.csv is no list of images (" in refusal("miniimagenet", tmp_path)


def test_more_images_than_the_class_folder_has(tmp_path: Path):
    mmfewshot(tmp_path)
    with (tmp_path / "train.csv").open("a") as file:
        file.write("n0153282900000004.jpg,n01532829\n")
    assert "train.csv line 7 names n0153282900000004.jpg, which is" in (
        refusal("miniimagenet", tmp_path)
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"class_names": ["a"]}',
        '{"class_names": ["a"], "class_roots": []}',
        '{"class_names": [1], "class_roots": ["a"]}',
        '{"class_names": ["a"], "class_roots": [" "]}',
        "[" * 100_000,
    ],
)
def test_damaged_lists_of_classes(content: str, tmp_path: Path):
    (tmp_path / "train.json").write_text(content)
    assert f"{tmp_path}/train.json is no list of classes: it needs" in (
        refusal("tieredimagenet", tmp_path)
    )


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "lists no classes"),
        (["n01532829", "n01532829"], "lists the class 'n01532829' twice"),
        (["n01532829", "none"], "lists the class 'none', whose folder"),
        (["n01532829", "empty"], "images/empty holds no images"),
    ],
)
def test_classes_of_a_list_are_there_once_and_hold_images(
    names: list[str], reason: str, tmp_path: Path
):
    easyfsl_json(tmp_path)
    (tmp_path / "images/empty").mkdir()
    content = {"class_names": names, "class_roots": names}
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert reason in refusal("tieredimagenet", tmp_path)


def test_class_folders_hold_images_and_nothing_lies_beside_them(tmp_path: Path):
    files = class_folders(tmp_path)
    (tmp_path / "val/empty").mkdir()
    assert f"the class 'empty', whose folder {tmp_path}/val/empty holds no images" in (
        refusal("miniimagenet", tmp_path, "validation")
    )
    stray = files["n01532829"][0].rename(tmp_path / "train/stray.png")
    assert refusal("miniimagenet", tmp_path) == (
        f"{stray} lies beside the class folders of {tmp_path}/train: move or remove it"
    )
    for path in (tmp_path / "test").rglob("*.png"):
        path.unlink()
    for path in (tmp_path / "test").iterdir():
        path.rmdir()
    assert f"{tmp_path}/test (test split) holds no class folders" in (
        refusal("miniimagenet", tmp_path, "test")
    )


# Omniglot


ALPHABETS = {
    "images_background": {"Arcadian": 1, "Greek": 2, "Korean": 1},
    "images_evaluation": {"Gurmukhi": 1, "Tibetan": 2},
}


def write_omniglot(base: Path) -> dict[str, list[Image.Image]]:
    """Two black and white drawings of each character, 105 x 105, as published; by the character's name."""
    noise = np.random.default_rng(0)
    written: dict[str, list[Image.Image]] = {}
    for top, alphabets in ALPHABETS.items():
        for alphabet, count in alphabets.items():
            for c in range(1, count + 1):
                name = f"{alphabet}/character{c:02d}"
                (base / top / name).mkdir(parents=True)
                written[name] = []
                for drawing in range(2):
                    # Large squares: strokes are wider than a pixel.
                    cells = noise.integers(0, 2, (15, 15), dtype=np.uint8).repeat(7, 0).repeat(7, 1)
                    image = Image.fromarray(cells * 255).convert("1")
                    image.save(base / top / name / f"{c:04d}_{drawing:02d}.png")
                    written[name].append(image)
    return written


def expected(drawing: Image.Image, turn: int) -> np.ndarray:
    """White on black, turned first and then averaged, by Pillow."""
    grey = ImageOps.invert(drawing.convert("L")).rotate(turn)
    return np.array(grey.resize((28, 28), Image.Resampling.BOX))


def check_omniglot(dataset: ImageDataset, names: list[str], written: dict) -> None:
    assert dataset.class_names == tuple(names)
    assert dataset.images.dtype == torch.uint8
    assert dataset.images.shape == (2 * len(names), 1, 28, 28)
    assert dataset.labels.tolist() == [label for label in range(len(names)) for _ in range(2)]
    for index, image in enumerate(dataset.images[:, 0].numpy()):
        name, _, turn = names[index // 2].rpartition("/rot")
        assert np.array_equal(image, expected(written[name][index % 2], int(turn)))


def turned(*names: str) -> list[str]:
    return [f"{name}/rot{turn:03d}" for name in names for turn in (0, 90, 180, 270)]


@pytest.mark.parametrize("top", ["", "omniglot-py", "omniglot"])
def test_omniglot_has_every_turn_as_a_class(top: str, tmp_path: Path):
    written = write_omniglot(tmp_path / top)
    greek = ["Greek/character01", "Greek/character02"]
    train = turned("Arcadian/character01", *greek)
    check_omniglot(load("omniglot", tmp_path), train, written)
    check_omniglot(load("omniglot", tmp_path, "validation"), turned("Korean/character01"), written)
    test = turned("Gurmukhi/character01", "Tibetan/character01", "Tibetan/character02")
    check_omniglot(load("omniglot", tmp_path, "test"), test, written)
    check_disjoint([load("omniglot", tmp_path, split) for split in CLASS_SPLITS])


def test_omniglot_in_folders_within_folders_of_their_names(tmp_path: Path):
    written = write_omniglot(tmp_path / "once")
    for top in ALPHABETS:
        (tmp_path / top).mkdir()
        (tmp_path / "once" / top).rename(tmp_path / top / top)
    check_omniglot(load("omniglot", tmp_path, "validation"), turned("Korean/character01"), written)


def test_torchvision_reads_the_same_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_omniglot(tmp_path / "omniglot-py")
    # Its MD5s are those of the real archives.
    monkeypatch.setattr("torchvision.datasets.omniglot.check_integrity", lambda *args: True)
    oracle = torchvision.datasets.Omniglot(tmp_path, background=False)
    ours = load("omniglot", tmp_path, "test")
    # It reads in the order of the disk.
    theirs = {
        (f"{oracle._characters[label]}/rot000", expected(drawing, 0).tobytes())
        for drawing, label in oracle
    }
    upright = [i for i, label in enumerate(ours.labels.tolist()) if label % 4 == 0]
    assert len(theirs) == len(upright) == 6
    assert theirs == {
        (ours.class_names[ours.labels[i]], ours.images[i].numpy().tobytes()) for i in upright
    }


def test_of_thirty_alphabets_five_are_the_validation_split(tmp_path: Path):
    for alphabet in range(30):
        path = tmp_path / f"images_background/a{alphabet:02d}/character01/1.png"
        path.parent.mkdir(parents=True)
        Image.new("1", (10, 10), alphabet % 2).save(path)
    validation = load("omniglot", tmp_path, "validation")
    assert validation.class_names[::4] == tuple(f"a{a}/character01/rot000" for a in range(25, 30))
    assert len(load("omniglot", tmp_path)) == 25 * 4


@pytest.mark.parametrize("merged", [False, True])
def test_vinyals_lists_are_the_splits_where_they_are(merged: bool, tmp_path: Path):
    written = write_omniglot(tmp_path)
    if merged:
        (tmp_path / "data").mkdir()
        for top in ALPHABETS:
            for alphabet in (tmp_path / top).iterdir():
                alphabet.rename(tmp_path / "data" / alphabet.name)
            (tmp_path / top).rmdir()
    lists = tmp_path / "splits/vinyals"
    lists.mkdir(parents=True)
    classes = {
        "train": turned("Tibetan/character02", "Arcadian/character01"),
        "val": ["Greek/character01/rot090"],
        "test": ["Korean/character01/rot270", "Gurmukhi/character01/rot000"],
    }
    for name, lines in classes.items():
        (lists / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for split, file in FILES.items():
        check_omniglot(load("omniglot", tmp_path, split), classes[file], written)
    (lists / "test.txt").write_text("Klingon/character01/rot000\n")
    assert "test.txt lists Klingon/character01, which is in no folder of" in (
        refusal("omniglot", tmp_path, "test")
    )
    for line in ("Greek/character01", "Greek/character01/rot045", "../Greek/rot000"):
        (lists / "test.txt").write_text(f"{line}\n")
        assert f"test.txt holds the line {line!r}: its lines are" in (
            refusal("omniglot", tmp_path, "test")
        )
    (lists / "test.txt").unlink()
    assert f"{lists} holds no test.txt" in refusal("omniglot", tmp_path, "test")


def test_an_alphabet_in_train_and_test_is_told(tmp_path: Path):
    """Gurmukhi lies in both folders of some copies."""
    write_omniglot(tmp_path)
    copied = tmp_path / "images_background/Gurmukhi"
    (tmp_path / "images_evaluation/Gurmukhi").rename(copied)
    (tmp_path / "images_evaluation/Gurmukhi").symlink_to(copied)
    with pytest.raises(UserError) as error:
        check_disjoint([load("omniglot", tmp_path, split) for split in CLASS_SPLITS])
    assert str(error.value) == (
        "omniglot: the class 'Gurmukhi/character01/rot000', and 3 more are in the train split and in the test split, "
        "which must be of different classes: leave it in one of them"
    )
    # Under another name, by its drawings.
    (tmp_path / "images_evaluation/Gurmukhi").rename(tmp_path / "images_evaluation/Punjabi")
    with pytest.raises(UserError, match=r"image \d+ of the train split is the same image as image"):
        check_disjoint([load("omniglot", tmp_path, split) for split in CLASS_SPLITS])


def test_an_incomplete_omniglot_is_told_what_is_missing(tmp_path: Path):
    (tmp_path / "images_background/Greek/character01").mkdir(parents=True)
    assert "images_evaluation holds no alphabets: unpack images_evaluation.zip" in (
        refusal("omniglot", tmp_path, "test")
    )
    assert "images_background holds one alphabet, Greek" in refusal("omniglot", tmp_path)
    (tmp_path / "images_background/Latin").mkdir()
    assert "no images (" in refusal("omniglot", tmp_path)
    assert "images_background/Latin holds no folders of characters" in (
        refusal("omniglot", tmp_path, "validation")
    )
    broken = tmp_path / "images_background/Greek/character01/0001_01.png"
    broken.write_bytes(b"\x89PNG")
    assert f"cannot decode {broken} (" in refusal("omniglot", tmp_path)
