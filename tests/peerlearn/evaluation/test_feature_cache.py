"""Kept features: what invalidates them, what damage does, and two processes that want the same."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from peerlearn.backbones import create_backbone
from peerlearn.compute.dist import Ranks
from peerlearn.data.augment import EVALUATION_VIEW
from peerlearn.data.datasets import first_images, load_dataset
from peerlearn.errors import UserError
from peerlearn.evaluation import feature_cache
from peerlearn.evaluation.feature_cache import Extraction, cache_key, load_features
from peerlearn.evaluation.networks import frozen
from peerlearn.export import save_export
from tests.e2e.runs import write_noise

HOW = Extraction(ranks=Ranks(torch.device("cpu")), batch_size=16, workers=0, cached=True)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "peerlearn" / "features"


def export(folder: Path, *, seed: int = 0, channels: int = 1, poison: bool = False) -> Path:
    torch.manual_seed(seed)
    backbone = create_backbone("conv4", in_chans=channels, image_size=16)
    if poison:
        with torch.no_grad():
            next(backbone.parameters()).fill_(float("inf"))
    save_export(
        backbone,
        folder,
        architecture="conv4",
        in_chans=channels,
        small_images=False,
        image_size=16,
        mean=[0.5] * channels,
        std=[0.25] * channels,
        provenance={},
    )
    return folder


@pytest.fixture
def network(tmp_path) -> Path:
    return export(tmp_path / "net-0")


@pytest.fixture
def extractions(monkeypatch) -> list[str]:
    """The names of networks whose features were computed and not read."""
    names: list[str] = []
    plain = feature_cache._extract

    def extract(folders, dataset, how):
        names.extend(folders)
        return plain(folders, dataset, how)

    monkeypatch.setattr(feature_cache, "_extract", extract)
    return names


def digits(n: int = 40):
    return first_images(load_dataset("digits", "train"), n)


def test_the_second_time_features_are_read_and_the_same(cache, network, extractions):
    first = load_features({"0": network}, digits(), HOW)
    second = load_features({"0": network}, digits(), HOW)
    assert extractions == ["0"]
    assert first["0"].shape == (40, 64)
    assert torch.equal(first["0"], second["0"])
    uncached = load_features({"0": network}, digits(), dataclasses.replace(HOW, cached=False))
    assert torch.equal(first["0"], uncached["0"])
    assert extractions == ["0", "0"]
    assert {path.suffix for path in cache.iterdir()} == {".safetensors", ".json", ".lock"}


def test_only_what_is_missing_is_computed(cache, network, tmp_path, extractions):
    load_features({"0": network}, digits(), HOW)
    other = export(tmp_path / "net-1", seed=1)
    both = load_features({"0": network, "1": other}, digits(), HOW)
    assert extractions == ["0", "1"]
    assert not torch.equal(both["0"], both["1"])


def test_weights_images_labels_size_and_view_each_invalidate(cache, network, tmp_path, monkeypatch):
    def key(folder=network, dataset=None, device="cpu"):
        return cache_key(folder, dataset or digits(), device)

    other_pixel = digits()
    other_pixel.images[0, 0, 3, 3] += 1
    keys = [key(), key(dataset=digits(39)), key(dataset=other_pixel), key(device="cuda")]
    keys.append(key(folder=export(tmp_path / "net-9", seed=9)))
    monkeypatch.setattr(feature_cache, "EVALUATION_VIEW", EVALUATION_VIEW + " anew")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_an_image_file_that_changes_invalidates(cache, network, tmp_path):
    for i in range(3):
        (tmp_path / "images" / "train" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(
            tmp_path / "images" / "train" / str(i % 2) / f"{i}.png"
        )
    images = load_dataset("folder", "train", root=str(tmp_path / "images"))
    before = cache_key(network, images, "cpu")
    assert cache_key(network, images, "cpu") == before
    os.utime(images.images[0], ns=(1, 1))
    assert cache_key(network, images, "cpu") != before


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no facts", "spoilt facts"])
def test_damaged_features_are_computed_again(cache, network, extractions, damage, caplog):
    whole = load_features({"0": network}, digits(), HOW)["0"]
    (file,) = cache.glob("*.safetensors")
    facts = file.with_suffix(".json")
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "delete":
        file.unlink()
    elif damage == "no facts":
        facts.unlink()
    else:
        facts.write_text("{")
    found = load_features({"0": network}, digits(), HOW)["0"]
    assert torch.equal(found, whole)
    assert extractions == ["0", "0"]
    told = damage in ("flip", "truncate", "spoilt facts")
    assert ("damaged: its features are computed again" in caplog.text) == told
    assert torch.equal(load_features({"0": network}, digits(), HOW)["0"], whole)
    assert extractions == ["0", "0"]


SLOW = """
import json, sys, time
from pathlib import Path
import torch
from peerlearn.evaluation import feature_cache
from peerlearn.data.datasets import first_images, load_dataset
from peerlearn.compute.dist import Ranks
plain = feature_cache._extract
def extract(*arguments):
    print("computes", flush=True)
    time.sleep(1)
    return plain(*arguments)
feature_cache._extract = extract
how = feature_cache.Extraction(ranks=Ranks(torch.device("cpu")), batch_size=16, workers=0, cached=True)
images = first_images(load_dataset("digits", "train"), 40)
found = feature_cache.load_features({"0": Path(sys.argv[1])}, images, how)["0"]
print(json.dumps(float(found.double().sum())))
"""


@pytest.mark.slow
def test_of_two_processes_one_computes_and_both_get_the_features(cache, network):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, str(network)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0].split("\n") for process in processes]
    assert sorted(len(lines) for lines in outputs) == [2, 3]
    assert outputs[0][-2] == outputs[1][-2]


def test_a_process_that_computes_for_too_long_is_not_waited_for(
    cache, network, extractions, monkeypatch, caplog
):
    monkeypatch.setattr(feature_cache, "_LOCK_SECONDS", 0.2)
    cache.mkdir(parents=True)
    key = cache_key(network, digits(), "cpu")
    with FileLock(cache / f"{key}.lock"):
        found = load_features({"0": network}, digits(), HOW)
    assert extractions == ["0"]
    assert found["0"].shape[0] == 40
    assert "another process computes these features: waiting for it" in caplog.text
    assert "it has not done so in 0 s: computing them here too" in caplog.text


def test_a_process_killed_while_it_writes_leaves_nothing_that_counts(cache, network, extractions):
    """Its temporary file, and a lock that nobody holds."""
    cache.mkdir(parents=True)
    key = cache_key(network, digits(), "cpu")
    (cache / f".{key}.1234.tmp").write_bytes(b"half")
    (cache / f"{key}.lock").touch()
    start = time.monotonic()
    load_features({"0": network}, digits(), HOW)
    assert time.monotonic() - start < 120
    assert extractions == ["0"]


def test_a_planted_link_leads_no_features_elsewhere(cache, network, tmp_path):
    cache.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    key = cache_key(network, digits(), "cpu")
    guessed = cache / f".{key}.{os.getpid()}.tmp"
    for link in (guessed, cache / f"{key}.safetensors", cache / f"{key}.json"):
        link.symlink_to(precious)
    load_features({"0": network}, digits(), HOW)
    assert precious.read_text() == "precious"
    assert guessed.is_symlink()
    assert not (cache / f"{key}.safetensors").is_symlink()


def test_features_that_are_not_finite_are_one_line_and_not_kept(cache, tmp_path):
    bad = export(tmp_path / "net-0", poison=True)
    with pytest.raises(UserError, match=rf"{bad} gives NaN or Inf features for 40 of 40 images of"):
        load_features({"0": bad}, digits(), HOW)
    assert not list(cache.glob("*.json"))


def test_other_channels_are_one_line(cache, tmp_path):
    with pytest.raises(UserError, match=r"takes 3 channels, digits has 1"):
        load_features({"0": export(tmp_path / "net-0", channels=3)}, digits(), HOW)


def test_a_full_disk_costs_the_kept_copy_only(cache, network, files_up_to, caplog):
    cache.mkdir(parents=True)
    with files_up_to(100):
        found = load_features({"0": network}, digits(), HOW)
    assert found["0"].shape == (40, 64)
    assert "features are not kept" in caplog.text
    assert not list(cache.glob(".*.tmp"))
    assert not list(cache.glob("*.safetensors"))


def _not_locked(*_: object, **options: object) -> FileLock:
    raise NotImplementedError("FileSystem does not appear to support flock")


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("case", ["a file", "read-only", "no locks", "no home"])
def test_a_cache_that_cannot_be_used_is_one_warning(case, network, tmp_path, monkeypatch, caplog):
    """However many splits and networks there are; the features are those of any other day."""
    (tmp_path / "file").write_text("")
    networks = {"0": network, "1": export(tmp_path / "net-1", seed=1)}
    splits = [digits(n) for n in (40, 30)]
    root = {"a file": tmp_path / "file", "read-only": Path("/proc"), "no locks": tmp_path}.get(case)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root or ""))
    if case == "no locks":
        monkeypatch.setattr(feature_cache, "FileLock", _not_locked)
    elif case == "no home":
        monkeypatch.setattr(Path, "home", _no_home)
    found = [load_features(networks, split, HOW) for split in splits]
    alone = load_features(networks, splits[0], dataclasses.replace(HOW, cached=False))
    assert torch.equal(found[0]["1"], alone["1"])
    assert found[1]["0"].shape == (30, 64)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("this user has no home" if case == "no home" else f"{root}/peerlearn/f")
    assert "features are not kept, and are computed anew each time; XDG_CACHE_HOME names" in text


def test_an_image_that_is_gone_is_told_when_it_is_decoded(cache, tmp_path):
    write_noise(tmp_path / "images", {"a": 2, "b": 2})
    images = load_dataset("folder", "train", root=str(tmp_path / "images"))
    images.images[1].unlink()
    colour = export(tmp_path / "net-0", channels=3)
    with pytest.raises(UserError, match=r"cannot decode .*a/001.png \(No such file or directory\)"):
        load_features({"0": colour}, images, HOW)


def move_statistics(backbone: torch.nn.Module) -> None:
    backbone.train()
    backbone(torch.rand(2, 1, 16, 16))


@torch.no_grad()
def move_weight(backbone: torch.nn.Module) -> None:
    next(backbone.parameters()).view(-1)[0] += 1e-6


@pytest.mark.parametrize("move", [move_statistics, move_weight])
def test_a_network_that_changes_while_it_is_frozen_is_found_out(move):
    backbone = create_backbone("conv4", in_chans=1, image_size=16)

    def run(work) -> None:
        with frozen([backbone]):
            work(backbone)

    run(lambda network: network(torch.rand(2, 1, 16, 16)))
    with pytest.raises(RuntimeError, match="weights of a frozen network have changed"):
        run(move)


def test_the_facts_tell_a_person_what_the_features_are(cache, network):
    load_features({"0": network}, digits(), HOW)
    (file,) = cache.glob("*.json")
    facts = json.loads(file.read_text())
    assert facts["dataset"] == "digits train"
    assert facts["images"] == 40
