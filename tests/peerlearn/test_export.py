"""Exports: the same bits through peerlearn and through timm, the same bytes every time."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.data
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms.functional import to_pil_image

import peerlearn.runs.files
from peerlearn.backbones import create_backbone
from peerlearn.data.augment import evaluation_view, is_seen_whole, normalise
from peerlearn.errors import UserError
from peerlearn.export import _timm_view, export_hash, load_export, save_export
from peerlearn.networks.shared_stages import share_low_stages

# Name, in_chans, small_images, image_size.
NETWORKS = [
    ("resnet32", 1, False, 28),
    ("resnet32", 3, True, 32),
    ("densenet_bc_40_12", 3, False, 32),
    ("wrn_16_2", 4, False, 32),
    ("conv4", 1, False, 28),
    ("conv4", 3, False, 84),
    ("conv4_wide", 1, False, 28),
    ("resnet18", 1, True, 28),
    ("resnet18", 3, True, 32),
    ("resnet18", 4, True, 32),
    ("resnet10t", 4, False, 64),
    ("resnet50", 1, False, 64),
    ("mobilenetv3_small_050", 3, False, 64),
    ("mobilenetv3_small_050", 4, False, 64),
    ("vit_tiny_patch16_224", 1, False, 48),
    ("convnext_atto", 1, False, 32),
    ("resnet50_gn", 3, False, 32),
    ("nf_regnet_b0", 1, False, 64),
    ("mixer_s16_224", 3, False, 32),
    ("swin_tiny_patch4_window7_224", 1, False, 32),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def trained(name: str, in_chans: int, small_images: bool, image_size: int) -> nn.Module:
    """A network none of whose parameters and buffers is what a new one starts with."""
    backbone = create_backbone(
        name, in_chans=in_chans, small_images=small_images, image_size=image_size
    )
    generator = torch.Generator().manual_seed(1)
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(torch.rand(tensor.shape, generator=generator) + 0.5).add_(0.01)
        else:
            tensor.fill_(17)
    return backbone.eval()


def save(
    backbone: nn.Module, folder: Path, network: tuple[str, int, bool, int], **changes: Any
) -> str:
    name, in_chans, small_images, image_size = network
    arguments: dict[str, Any] = {
        "architecture": name,
        "in_chans": in_chans,
        "small_images": small_images,
        "image_size": image_size,
        "mean": (0.4,) * in_chans,
        "std": (0.3,) * in_chans,
        "provenance": {"method": "moco", "step": 1000},
    }
    return save_export(backbone, folder, **{**arguments, **changes})


def images(in_chans: int, size: int) -> torch.Tensor:
    return torch.randn(2, in_chans, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small_export(tmp_path: Path) -> Path:
    network = ("resnet32", 1, False, 28)
    save(trained(*network), tmp_path / "net-0", network)
    return tmp_path / "net-0"


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_peerlearn_and_timm_load_the_same_bits(
    network: tuple[str, int, bool, int], tmp_path: Path
) -> None:
    backbone = trained(*network)
    save(backbone, tmp_path / "net-0", network)
    by_peerlearn = load_export(tmp_path / "net-0")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'net-0'}", pretrained=True).eval()
    assert not by_peerlearn.training
    assert by_peerlearn.num_features == backbone.num_features

    x = images(network[1], network[3])
    expected = backbone.state_dict()
    with torch.no_grad():
        for loaded in (by_peerlearn, by_timm):
            state = loaded.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
            assert torch.equal(loaded(x), backbone(x))
    assert by_timm(x).shape == (2, backbone.num_features)

    agreed = by_timm.pretrained_cfg.keys() & by_peerlearn.pretrained_cfg.keys()
    assert {"architecture", "input_size", "mean", "std", "num_classes"} <= agreed
    own, timms = (
        json.loads(json.dumps({key: loaded.pretrained_cfg[key] for key in agreed}))
        for loaded in (by_peerlearn, by_timm)
    )
    assert own == timms


@pytest.mark.parametrize(
    ("network", "architecture", "model_args"),
    [
        (("resnet18", 4, True, 32), "resnet18_small", {"in_chans": 4}),
        (("conv4", 1, False, 28), "conv4_cifar", {"in_chans": 1, "image_size": 28}),
        (("conv4_wide", 3, False, 32), "conv4_wide_cifar", {"in_chans": 3, "image_size": 32}),
        (("vit_tiny_patch16_224", 3, False, 48), "vit_tiny_patch16_224", {"img_size": 48}),
    ],
    ids=str,
)
def test_config_tells_timm_how_to_build_and_to_leave_the_weights_alone(
    network: tuple[str, int, bool, int],
    architecture: str,
    model_args: dict[str, int],
    tmp_path: Path,
) -> None:
    """timm 1.0.20 takes any first_conv that it is told of for an RGB one, and adapts it."""
    backbone = trained(*network)
    save(backbone, tmp_path / "net-0", network)
    config = json.loads((tmp_path / "net-0" / "config.json").read_text())
    assert config["architecture"] == architecture
    assert config["model_args"] == {"in_chans": network[1], **model_args}
    assert (config["num_classes"], config["num_features"]) == (0, backbone.num_features)
    pretrained_cfg = config["pretrained_cfg"]
    assert pretrained_cfg["input_size"] == [network[1], network[3], network[3]]
    assert pretrained_cfg["first_conv"] is None
    assert not pretrained_cfg.keys() & {"url", "file", "hf_hub_id", "source", "tag"}


def test_timm_prepares_images_as_for_training(small_export: Path) -> None:
    for loaded in (
        load_export(small_export),
        timm.create_model(f"local-dir:{small_export}", pretrained=True),
    ):
        config = timm.data.resolve_model_data_config(loaded)
        assert tuple(config["input_size"]) == (1, 28, 28)
        assert (tuple(config["mean"]), tuple(config["std"])) == ((0.4,), (0.3,))
        assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 1.0)


@pytest.mark.parametrize(
    ("height", "width", "size", "crop_pct", "crop_mode"),
    [
        (28, 28, 64, 1.0, "squash"),
        (32, 32, 32, 1.0, "squash"),
        (63, 40, 32, 1.0, "squash"),
        (64, 64, 64, 1.0, "squash"),
        (96, 96, 96, 1.0, "squash"),
        (96, 96, 32, 32 / 37, "center"),
        (96, 96, 64, 64 / 73, "center"),
        (96, 70, 48, 48 / 55, "center"),
        (300, 401, 224, 0.875, "center"),
        (231, 120, 224, 0.875, "center"),
    ],
)
def test_timms_own_transform_gives_the_view_of_the_evaluators(
    height: int, width: int, size: int, crop_pct: float, crop_mode: str, tmp_path: Path
) -> None:
    network = ("resnet32", 3, False, size)
    whole = is_seen_whole(height, width, size=size)
    save(create_backbone("resnet32"), tmp_path / "net-0", network, seen_whole=whole)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'net-0'}", pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    assert config["crop_pct"] == pytest.approx(crop_pct, abs=1e-9)
    assert (config["crop_mode"], config["interpolation"]) == (crop_mode, "bilinear")

    noise = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise[None], (height, width), mode="bicubic").clamp(0, 1)
    image = (255 * smooth[0]).to(torch.uint8)
    theirs = timm.data.create_transform(**config)(to_pil_image(image))
    ours = normalise(evaluation_view(image[None], size=size), (0.4,) * 3, (0.3,) * 3)[0]
    # Pillow rounds to 8 bits after each direction.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1.5 / 255 / 0.3)
    card = (tmp_path / "net-0" / "README.md").read_text()
    expected = (
        f"resized whole to {size} x {size} pixels"
        if whole
        else f"resized until the shorter side has {round(size / crop_pct)} pixels, and the centre of {size} x {size}"
    )
    assert expected in card


def test_timm_resizes_to_the_side_that_we_do() -> None:
    for size in range(8, 700):
        view = _timm_view(size, seen_whole=False)
        assert math.floor(size / view["crop_pct"]) == round(size * 256 / 224)


@pytest.mark.parametrize(
    "network",
    [("resnet10t", 1, True, 28), ("conv4", 1, False, 28), ("mobilenetv3_small_050", 4, False, 64)],
    ids=str,
)
def test_timm_adds_a_classifier_and_keeps_the_rest(
    network: tuple[str, int, bool, int], tmp_path: Path
) -> None:
    backbone = trained(*network)
    save(backbone, tmp_path / "net-0", network)
    tuned = timm.create_model(f"local-dir:{tmp_path / 'net-0'}", pretrained=True, num_classes=7)
    state = tuned.state_dict()
    assert all(torch.equal(state[key], t) for key, t in backbone.state_dict().items())
    assert tuned.eval()(images(network[1], network[3])).shape == (2, 7)


@pytest.mark.slow
def test_plain_networks_load_through_timm_alone(tmp_path: Path) -> None:
    """Neither peerlearn nor the network: a fresh process, sockets refused."""
    x = images(1, 64)
    expected = {}
    for name in ("resnet18", "mobilenetv3_small_050"):
        backbone = trained(name, 1, False, 64)
        save(backbone, tmp_path / name, (name, 1, False, 64))
        with torch.no_grad():
            expected[name] = backbone(x)
    safetensors.torch.save_file({"x": x, **expected}, tmp_path / "expected.safetensors")
    code = """
import socket, sys
socket.socket.connect = socket.getaddrinfo = None
import safetensors.torch, timm, torch
torch.set_num_threads(int(sys.argv[2]))
expected = safetensors.torch.load_file(sys.argv[1] + "/expected.safetensors")
for name in ("resnet18", "mobilenetv3_small_050"):
    backbone = timm.create_model(f"local-dir:{sys.argv[1]}/{name}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(backbone(expected["x"]), expected[name]), name
assert "peerlearn" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["resnet32", "resnet10t"])
def test_the_card_s_code_runs(name: str, tmp_path: Path) -> None:
    backbone = trained(name, 1, False, 32)
    save(backbone, tmp_path / "net-0", (name, 1, False, 32))
    card = (tmp_path / "net-0" / "README.md").read_text()
    assert ("import peerlearn  #" in card) == (name == "resnet32")
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    x = images(1, 32)
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block.replace("FOLDER", str(tmp_path / "net-0")), scope)
        assert torch.equal(scope["backbone"](x), backbone(x))
    (call,) = re.findall(r"create_backbone\(.*\)", card)
    assert eval(call).state_dict().keys() == backbone.state_dict().keys()
    assert "| method | moco |\n| step | 1000 |" in card


def test_shared_stages_are_stored_in_full(tmp_path: Path) -> None:
    network = ("resnet32", 3, False, 32)
    backbones = [trained(*network) for _ in range(3)]
    share_low_stages(backbones, 2)
    save(backbones[2], tmp_path / "net-2", network)
    x = images(3, 32)
    with torch.no_grad():
        assert torch.equal(load_export(tmp_path / "net-2")(x), backbones[2](x))


def test_identical_weights_give_identical_bytes(tmp_path: Path) -> None:
    network = ("resnet32", 3, False, 32)
    backbone = trained(*network)
    hashes = [save(backbone, tmp_path / "a" / "net-0", network)]
    backbone.to(memory_format=torch.channels_last).requires_grad_(False)
    hashes.append(save(backbone, tmp_path / "b" / "net-9", network))
    hashes.append(save(backbone.double(), tmp_path / "b" / "net-9", network))
    assert len(set(hashes)) == 1
    for name in ("model.safetensors", "config.json", "README.md"):
        content = (tmp_path / "a" / "net-0" / name).read_bytes()
        assert content == (tmp_path / "b" / "net-9" / name).read_bytes()
        assert str(tmp_path).encode() not in content


def test_safetensors_hold_float32_and_the_counter(small_export: Path) -> None:
    tensors = safetensors.torch.load_file(small_export / "model.safetensors")
    dtypes = {key.split(".")[-1]: tensor.dtype for key, tensor in tensors.items()}
    assert dtypes.pop("num_batches_tracked") == torch.int64
    assert set(dtypes.values()) == {torch.float32}


def test_the_hash_covers_weights_and_config_but_not_the_card(tmp_path: Path) -> None:
    network = ("resnet32", 1, False, 28)
    backbone = trained(*network)
    folder = tmp_path / "net-0"
    first = save(backbone, folder, network)
    parts = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "config.json")
    ]
    assert first == export_hash(folder) == hashlib.sha256("".join(parts).encode()).hexdigest()
    assert save(backbone, folder, network, provenance={"step": 2000}) == first
    assert "2000" in (folder / "README.md").read_text()
    assert save(backbone, folder, network, mean=(0.41,)) != first
    backbone.stem[0].weight.data[3, 0, 1, 1] += 1e-6
    assert save(backbone, folder, network) != first


def test_an_older_export_is_replaced_as_a_whole(small_export: Path) -> None:
    (small_export / "model.pth").write_text("an older layout")
    stale = small_export.with_name(".net-0.tmp")
    stale.mkdir()
    (stale / "model.safetensors").write_text("left by a crash")
    network = ("conv4", 1, False, 28)
    save(trained(*network), small_export, network)
    assert {p.name for p in small_export.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    assert [p.name for p in small_export.parent.iterdir()] == ["net-0"]
    assert load_export(small_export).num_features == 64


def test_a_failed_write_leaves_the_older_export(
    small_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = export_hash(small_export)

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    network = ("conv4", 1, False, 28)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(OSError, match="No space"):
            save(trained(*network), small_export, network)
    assert export_hash(small_export) == before


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "net-0").exists() or synced[-1] == ".net-0.tmp"
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(peerlearn.runs.files.os, "fsync", fsync)
    network = ("conv4", 1, False, 28)
    save(trained(*network), tmp_path / "net-0", network)
    assert {"model.safetensors", "config.json", "README.md", ".net-0.tmp"} <= set(synced)


def test_others_may_read_what_the_umask_lets_them(small_export: Path) -> None:
    plain = small_export.with_name("plain")
    plain.write_text("")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (plain, *small_export.iterdir())}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, small_export: Path) -> None:
    (small_export / name).unlink()
    for function in (load_export, export_hash):
        with pytest.raises(UserError, match=re.escape(f"{small_export / name}: cannot be read")):
            function(small_export)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none" / "config.json"))):
        load_export(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 5, 100, -4, -1])
def test_truncated_weights_are_named(keep: int, small_export: Path) -> None:
    weights = small_export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match=re.escape(f"{weights}: damaged")):
        load_export(small_export)


@given(
    place=st.integers(min_value=0),
    bit=st.integers(0, 7),
    name=st.sampled_from(["model.safetensors", "config.json"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_passes(place: int, bit: int, name: str, small_export: Path) -> None:
    """In config.json, all that JSON reads; but an export of another program has no hashes, so their key can be lost."""
    file = small_export / name
    whole = file.read_bytes()
    spoilt = bytearray(whole)
    place %= len(whole)
    spoilt[place] ^= 1 << bit
    file.write_bytes(spoilt)
    try:
        if name == "config.json" and _reads_alike_or_unsealed(whole, bytes(spoilt)):
            load_export(small_export)
        else:
            with pytest.raises(UserError, match=re.escape(name)):
                load_export(small_export)
    finally:
        file.write_bytes(whole)


def _reads_alike_or_unsealed(one: bytes, other: bytes) -> bool:
    try:
        found = json.loads(other)
    except ValueError:
        return False
    return found == json.loads(one) or "sha256" not in found


def test_a_changed_config_says_what_to_do_if_it_was_meant(small_export: Path) -> None:
    file = small_export / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"]["mean"] = [0.5]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="remove 'sha256' from it if the change is meant"):
        load_export(small_export)
    del config["sha256"]
    file.write_text(json.dumps(config))
    assert load_export(small_export).pretrained_cfg["mean"] == [0.5]


def rewrite(folder: Path, change: str) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["layer1.0.bn1.bias"]
    elif change == "unexpected":
        tensors["fc.weight"] = torch.zeros(2, 64)
    elif change == "shape":
        tensors["stem.0.weight"] = torch.zeros(16, 3, 3, 3)
    else:
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "'layer1.0.bn1.bias' is missing$"),
        ("unexpected", "'fc.weight' is not part of it$"),
        ("shape", r"'stem.0.weight' is \(16, 3, 3, 3\), not \(16, 1, 3, 3\)$"),
        ("prefix", "'stem.0.weight' is missing, and [0-9]+ more$"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    change: str, message: str, small_export: Path
) -> None:
    rewrite(small_export, change)
    file = re.escape(str(small_export / "model.safetensors"))
    with pytest.raises(UserError, match=f"{file}: does not fit resnet32_cifar: {message}"):
        load_export(small_export)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet33_cifar"}, "no network is called 'resnet33_cifar'"),
        ({"architecture": ["resnet32_cifar"]}, "no network is called"),
        ({"architecture": "hf-hub:timm/resnet18"}, "no network is called"),
        ({"pretrained_cfg": None}, "not the config of an export"),
        ({"pretrained_cfg": {}}, "not the config of an export .*input_size"),
        ({"pretrained_cfg": {"input_size": [3, 32]}}, "not the config of an export"),
        ({"pretrained_cfg": {"input_size": ["1", 28, 28]}}, "cannot be built"),
        ({"pretrained_cfg": {"input_size": [1, 28, 28]}}, "its mean is None, not 1 numbers"),
    ],
)
def test_a_spoilt_config_is_named(
    change: dict[str, object], message: str, small_export: Path
) -> None:
    file = small_export / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: .*{message}"):
        load_export(small_export)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_what_is_no_config_is_named(content: bytes, small_export: Path) -> None:
    (small_export / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: not the config of an export"):
        load_export(small_export)


def test_nothing_is_ever_unpickled(small_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    timm.create_model(f"local-dir:{small_export}", pretrained=True)
    shutil.copy(small_export / "model.safetensors", small_export / "pytorch_model.bin")
    load_export(small_export)
