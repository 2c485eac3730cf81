"""Other programs' checkpoints, written here as those programs write them, are read."""

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from peerlearn.cli import main
from peerlearn.exchange.export_formats import RESNETS
from peerlearn.exchange.foreign_checkpoints import _identify
from peerlearn.export import load_export
from tests.peerlearn.exchange.foreign_networks import (
    CifarResNet,
    State,
    WideResNet,
    assert_same_features,
    exports,
    images,
    prefixed,
    published,
    resnet,
    small_moco,
    trained,
)


def test_moco_v1(import_file: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    content, query, key = small_moco()
    code, out, _ = import_file(content)
    assert code == 0
    assert exports(tmp_path) == {"net-0", "net-0-key"}
    assert_same_features(tmp_path / "out/net-0", query, images())
    assert_same_features(tmp_path / "out/net-0-key", key, images())
    file = tmp_path / "moco.pth.tar"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    lines = out.splitlines()
    assert lines[0] == f"{file}: {file.stat().st_size:,} bytes, SHA-256 {sha256}"
    assert lines[1] == "layout: MoCo v1"
    assert "net-0: encoder_q is resnet18, matched 120 of 120 tensors" in lines[2]
    assert "net-0-key: encoder_k is resnet18, matched 120 of 120 tensors" in lines[3]
    assert lines[4] == "left out, in tensors: heads 4, queue 1, queue_ptr 1"
    assert lines[5] == "not read, beside the state dict: arch, epoch, optimizer"

    card = (tmp_path / "out/net-0-key/README.md").read_text()
    assert "# resnet18, imported from moco.pth.tar" in card
    for row in (
        "layout | MoCo v1",
        f"SHA-256 of the file | {sha256}",
        "network in the file | encoder_k",
    ):
        assert f"| {row} |" in card
    assert str(tmp_path) not in card
    config = json.loads((tmp_path / "out/net-0/config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [3, 224, 224]
    assert (config["mean"], config["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_moco_v2_of_a_resnet50(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    head = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 16))
    query = resnet("resnet50", 1, head)
    # The published files hold the query network alone.
    code, out, _ = import_file({"epoch": 800, "state_dict": prefixed("module.encoder_q.", query)})
    assert code == 0
    assert "layout: MoCo v2\n" in out
    assert "encoder_q is resnet50, matched 318 of 318 tensors" in out
    assert "left out, in tensors: heads 4\n" in out
    assert exports(tmp_path) == {"net-0"}
    assert_same_features(tmp_path / "out/net-0", query, images())


def test_moco_v3_of_a_resnet50(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    def mlp(inputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(inputs, 32, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(inplace=True),
            nn.Linear(32, 16, bias=False),
            nn.BatchNorm1d(16, affine=False),
        )

    base = resnet("resnet50", 1, mlp(2048))
    momentum = resnet("resnet50", 2, mlp(2048))
    state = {
        **prefixed("module.base_encoder.", base),
        **prefixed("module.momentum_encoder.", momentum),
        **prefixed("module.predictor.", mlp(16)),
    }
    # LARS keeps mu; torch.cuda.amp's scaler is saved too.
    optimizer = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.3, "params": [0]}]}
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 7}
    content = {"epoch": 1000, "arch": "resnet50", "state_dict": state}
    code, out, _ = import_file({**content, "optimizer": optimizer, "scaler": scaler})
    assert code == 0
    assert "layout: MoCo v3\n" in out
    assert "left out, in tensors: heads 20, predictor 10\n" in out
    assert "not read, beside the state dict: arch, epoch, optimizer, scaler\n" in out
    assert_same_features(tmp_path / "out/net-0", base, images())
    assert_same_features(tmp_path / "out/net-0-key", momentum, images())


def test_moco_of_the_mcl_authors(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    networks = {
        f"encoder_{role}_{number}": resnet(seed=10 * number + (role == "k"))
        for number in (0, 1)
        for role in "qk"
    }
    state: State = {}
    for name, network in reversed(networks.items()):
        state |= prefixed(f"module.{name}.", network)
    # --mlp registers the last network's head once more, under a name with a dot.
    state |= prefixed(
        "module.encoder_q_1.fc.", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    )
    state |= {"module.queue": torch.randn(2, 16, 32), "module.queue_ptr": torch.zeros(2).long()}
    code, out, _ = import_file(published(state, resnet()))
    assert code == 0
    assert "layout: MoCo of the MCL authors\n" in out
    assert re.findall(r"/out/(\S+): ", out) == ["net-0", "net-1", "net-0-key", "net-1-key"]
    assert "left out, in tensors: heads 12, queue 1, queue_ptr 1\n" in out
    assert exports(tmp_path) == {f"net-{n}{suffix}" for n in (0, 1) for suffix in ("", "-key")}
    for number in (0, 1):
        assert_same_features(
            tmp_path / f"out/net-{number}", networks[f"encoder_q_{number}"], images()
        )
        assert_same_features(
            tmp_path / f"out/net-{number}-key", networks[f"encoder_k_{number}"], images()
        )


def test_supervised_imagenet_networks_of_the_mcl_authors(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    networks = [resnet("resnet34", seed) for seed in (1, 2)]
    state: State = {}
    for number, network in enumerate(networks):
        state |= prefixed(f"module_list.{number}.", network)
    code, out, _ = import_file({"net": state, "acc": 0.7412, "epoch": 89, "optimizer": {}})
    assert code == 0
    assert "layout: supervised networks of the MCL authors\n" in out
    assert "left out, in tensors: heads 4\n" in out
    for number, network in enumerate(networks):
        assert_same_features(tmp_path / f"out/net-{number}", network, images())


@pytest.mark.parametrize(
    ("architecture", "build"),
    [
        ("resnet32", lambda: CifarResNet(BasicBlock, 5)),
        ("resnet56", lambda: CifarResNet(BasicBlock, 9)),
        ("resnet110_bottleneck", lambda: CifarResNet(Bottleneck, 12)),
        ("wrn_16_2", lambda: WideResNet(2, 2)),
        ("wrn_28_4", lambda: WideResNet(4, 4)),
    ],
)
def test_supervised_cifar_networks_of_the_mcl_authors(
    architecture: str,
    build: Callable[[], nn.Module],
    import_file: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    networks = [trained(build(), seed) for seed in (1, 2)]
    state: State = {}
    for number, network in enumerate(networks):
        state |= prefixed(f"module_list.{number}.", network)
    code, out, _ = import_file({"net": state, "acc": 0.7412, "epoch": 299, "optimizer": {}})
    assert code == 0
    assert f"module_list.1 is {architecture}, matched" in out
    for number, network in enumerate(networks):
        assert_same_features(tmp_path / f"out/net-{number}", network, images(size=32))
    config = json.loads((tmp_path / "out/net-0/config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [3, 32, 32]
    assert config["mean"] == [0.5071, 0.4867, 0.4408]
    card = (tmp_path / "out/net-0/README.md").read_text()
    assert "| mean and standard deviation | CIFAR-100's, assumed of a 3x3 stem |" in card


def shared(networks: list[nn.Module], branch_names: dict[str, str]) -> State:
    """The state of one network with shared low stages: network 0's, and of all of them what `branch_names` renames."""
    state: State = {}
    for number, network in enumerate(networks):
        for name, tensor in network.state_dict().items():
            module, _, rest = name.partition(".")
            if module in branch_names:
                state[f"{branch_names[module]}_{number}.{rest}"] = tensor
            else:
                state[name] = networks[0].state_dict()[name]
    return state


def share(networks: list[nn.Module], branch_names: dict[str, str]) -> None:
    for network in networks[1:]:
        for name, module in networks[0].named_children():
            if name not in branch_names:
                setattr(network, name, module)


@pytest.mark.parametrize(
    ("architecture", "build", "branch_names"),
    [
        (
            "resnet32",
            lambda seed: trained(CifarResNet(BasicBlock, 5), seed),
            {"layer2": "layer2", "layer3": "layer3", "classifier": "classifier"},
        ),
        (
            "wrn_16_2",
            lambda seed: trained(WideResNet(2, 2), seed),
            {"block2": "block2", "block3": "block3", "bn1": "bn", "fc": "classifier"},
        ),
        (
            "resnet18",
            lambda seed: resnet(seed=seed),
            {"layer3": "layer3", "layer4": "layer4", "fc": "classifier"},
        ),
    ],
)
def test_each_branch_on_shared_stages_is_a_whole_network(
    architecture: str,
    build: Callable[[int], nn.Module],
    branch_names: dict[str, str],
    import_file: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    networks = [build(seed) for seed in (1, 2, 3, 4)]
    state = shared(networks, branch_names)
    share(networks, branch_names)
    code, out, _ = import_file({"net": state, "acc": 0.7, "epoch": 1})
    assert code == 0
    assert "layout: supervised networks of the MCL authors that share low stages\n" in out
    assert "left out, in tensors: heads 8\n" in out
    assert f"branch 3 is {architecture}, matched" in out
    assert len(exports(tmp_path)) == 4
    for number, network in enumerate(networks):
        assert_same_features(tmp_path / f"out/net-{number}", network, images(size=64))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
def test_a_plain_state_dict(
    prefix: str, wrapper: str, import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    network = resnet(seed=1)
    state = prefixed(prefix, network)
    code, out, _ = import_file(
        {wrapper: state, "best_acc1": torch.tensor(67.5)} if wrapper else state
    )
    assert code == 0
    assert "layout: plain state dict\n" in out
    assert "the network is resnet18, matched 120 of 120 tensors; 3 x 224 x 224 pixels" in out
    assert "left out, in tensors: heads 2\n" in out
    assert ("not read, beside the state dict: best_acc1\n" in out) == bool(wrapper)
    assert_same_features(tmp_path / "out/net-0", network, images())


def test_a_safetensors_file(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    network = resnet(seed=1)
    content = safetensors.torch.save(network.state_dict())
    assert import_file(content, name="timm.safetensors")[0] == 0
    assert_same_features(tmp_path / "out/net-0", network, images())


def test_the_second_format_and_half_precision(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    network = resnet(seed=1).half()
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer, _use_new_zipfile_serialization=False)
    assert import_file(buffer.getvalue())[0] == 0
    assert_same_features(tmp_path / "out/net-0", network.float(), images())


def test_files_from_before_batch_norm_counted_batches(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """As torchvision's own of 2017."""
    network = resnet(seed=1)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    code, out, _ = import_file(state)
    assert code == 0
    assert "matched 100 of 100 tensors, batch counters are not in the file: set to 0" in out
    assert (
        "| batch counters | not in the file, set to 0 |"
        in (tmp_path / "out/net-0/README.md").read_text()
    )
    assert_same_features(tmp_path / "out/net-0", network, images())
    assert load_export(tmp_path / "out/net-0").state_dict()["bn1.num_batches_tracked"] == 0


def test_a_small_stem_of_other_channels_needs_its_normalisation(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    network: Any = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    trained(network, 1)
    code, _, err = import_file(network.state_dict())
    assert (code, err.count("\n")) == (2, 1)
    assert "the network takes 1 channels: give as many numbers by --mean and --std" in err
    assert not (tmp_path / "out").exists()
    words = ["--mean", "0.286", "--std", "0.353", "--image_size", "28"]
    code, out, _ = import_file(network.state_dict(), *words)
    assert code == 0
    assert "with a 3x3 stem; 1 x 28 x 28 pixels" in out
    assert_same_features(tmp_path / "out/net-0", network, images(1, 28))
    config = json.loads((tmp_path / "out/net-0/config.json").read_text())
    assert config["architecture"] == "resnet18_small"
    assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == ([0.286], [0.353])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mean", "0.5"], "--mean and --std belong together"),
        (["--mean", "0.5", "--std", "0.5"], "takes 3 channels: give as many numbers"),
        (["--mean", "0", "0", "0", "--std", "1", "0", "1"], "--std must be positive"),
        (["--mean", "0", "0", "0", "--std", "1", "nan", "1"], "--std must be positive and finite"),
        (["--mean", "0", "nan", "0", "--std", "1", "1", "1"], "--mean must be finite"),
        (["--image_size", "999999999"], "--image_size must be within"),
        (["--image_size", "0"], "--image_size must be within 1..8192"),
    ],
)
def test_numbers_that_cannot_be_meant_are_usage_errors(
    words: list[str],
    message: str,
    import_file: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    code, _, err = import_file(resnet().state_dict(), *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RESNETS)
def test_the_tensors_tell_the_architecture(name: str) -> None:
    with torch.device("meta"):
        network = getattr(torchvision.models, name)()
        small = getattr(torchvision.models, name)()
        small.conv1 = nn.Conv2d(2, 64, 3, bias=False)
    plan = _identify("here", network.state_dict())
    assert (plan.architecture, plan.in_chans, plan.small_images) == (name, 3, False)
    plan = _identify("here", small.state_dict())
    assert (plan.architecture, plan.in_chans, plan.small_images) == (name, 2, True)


def test_the_default_folder_is_named_after_the_file_and_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet(seed=1).state_dict(), "r18-v1.5.pth.tar")
    assert main(["import", "r18-v1.5.pth.tar"]) == 0
    assert "peerlearn knn --checkpoint imported/r18-v1.5 " in capsys.readouterr().out
    export = Path("imported/r18-v1.5/net-0")
    before = [(file.name, file.read_bytes()) for file in sorted(export.iterdir())]
    assert main(["import", "r18-v1.5.pth.tar"]) == 1
    assert capsys.readouterr().err == (
        "peerlearn: imported/r18-v1.5 is there already: choose another folder by --output\n"
    )
    # The same file gives the same bytes.
    assert main(["import", "r18-v1.5.pth.tar", "--output", "again"]) == 0
    again = [(file.name, file.read_bytes()) for file in sorted(Path("again/net-0").iterdir())]
    assert again == before
