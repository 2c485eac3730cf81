"""Other programs' checkpoints, written here as those programs write them, and files that are none or mean harm."""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from peerlearn.cli import main
from peerlearn.export import load_export
from peerlearn.export_formats import RESNETS
from peerlearn.foreign_checkpoints import _identify

State = dict[str, Tensor]


def trained(network: nn.Module, seed: int) -> nn.Module:
    """None of its parameters and statistics is what a new network starts with."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(torch.rand(tensor.shape, generator=generator) + 0.5).add_(0.01)
        else:
            tensor.fill_(17)
    return network.eval()


def resnet(name: str = "resnet18", seed: int = 0, head: nn.Module | None = None) -> nn.Module:
    network = getattr(torchvision.models, name)(num_classes=16)
    if head is not None:
        network.fc = head
    return trained(network, seed)


def prefixed(prefix: str, network: nn.Module) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}


def images(in_chans: int = 3, size: int = 64) -> Tensor:
    return torch.randn(2, in_chans, size, size, generator=torch.Generator().manual_seed(0))


def features_of(network: Any, x: Tensor) -> Tensor:
    """What the network's own classifier would get."""
    found: list[Tensor] = []
    handle = network.fc.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        network(x)
    handle.remove()
    return found[0]


def assert_same_features(export: Path, network: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        ours, theirs = load_export(export)(x), features_of(network, x)
    assert theirs.isfinite().all()
    assert torch.equal(ours, theirs)


def published(state_dict: State, network: nn.Module, **more: object) -> dict[str, Any]:
    """epoch, arch, state_dict and optimizer, as MoCo's scripts and their descendants save them."""
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    network.train()
    F.cross_entropy(network(images(size=32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    network.eval()
    return {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": OrderedDict(state_dict),
        "optimizer": optimizer.state_dict(),
        **more,
    }


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def import_file(
        content: object, *words: str, name: str = "moco.pth.tar"
    ) -> tuple[int, str, str]:
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        code = main(["import", str(file), "--output", str(tmp_path / "out"), *words])
        found = capsys.readouterr()
        return code, found.out, found.err

    return import_file


def exports(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out").iterdir()}


def small_moco() -> tuple[dict[str, Any], nn.Module, nn.Module]:
    query, key = resnet(seed=1), resnet(seed=2)
    state = {
        **prefixed("module.encoder_q.", query),
        **prefixed("module.encoder_k.", key),
        "module.queue": torch.randn(16, 32),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    return published(state, resnet()), query, key


def test_moco_v1(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    content, query, key = small_moco()
    code, out, _ = run(content)
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


def test_moco_v2_of_a_resnet50(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    head = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 16))
    query = resnet("resnet50", 1, head)
    # The published files hold the query network alone.
    code, out, _ = run({"epoch": 800, "state_dict": prefixed("module.encoder_q.", query)})
    assert code == 0
    assert "layout: MoCo v2\n" in out
    assert "encoder_q is resnet50, matched 318 of 318 tensors" in out
    assert "left out, in tensors: heads 4\n" in out
    assert exports(tmp_path) == {"net-0"}
    assert_same_features(tmp_path / "out/net-0", query, images())


def test_moco_v3_of_a_resnet50(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
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
    code, out, _ = run({**content, "optimizer": optimizer, "scaler": scaler})
    assert code == 0
    assert "layout: MoCo v3\n" in out
    assert "left out, in tensors: heads 20, predictor 10\n" in out
    assert "not read, beside the state dict: arch, epoch, optimizer, scaler\n" in out
    assert_same_features(tmp_path / "out/net-0", base, images())
    assert_same_features(tmp_path / "out/net-0-key", momentum, images())


def test_moco_of_the_mcl_authors(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
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
    code, out, _ = run(published(state, resnet()))
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
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    networks = [resnet("resnet34", seed) for seed in (1, 2)]
    state: State = {}
    for number, network in enumerate(networks):
        state |= prefixed(f"module_list.{number}.", network)
    code, out, _ = run({"net": state, "acc": 0.7412, "epoch": 89, "optimizer": {}})
    assert code == 0
    assert "layout: supervised networks of the MCL authors\n" in out
    assert "left out, in tensors: heads 4\n" in out
    for number, network in enumerate(networks):
        assert_same_features(tmp_path / f"out/net-{number}", network, images())


class CifarResNet(nn.Module):
    """The ResNet of the CIFAR experiments, of torchvision's blocks; its classifier is called `classifier`."""

    def __init__(self, block: type[BasicBlock | Bottleneck], blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            layers = []
            for number in range(blocks):
                stride = 2 if stage > 1 and number == 0 else 1
                outputs = width * block.expansion
                downsample = None
                if stride > 1 or channels != outputs:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, outputs, 1, stride, bias=False),
                        nn.BatchNorm2d(outputs),
                    )
                layers.append(block(channels, width, stride, downsample))
                channels = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, 100)

    @property
    def fc(self) -> nn.Module:
        return self.classifier

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class WideBlock(nn.Module):
    """The block of a wide ResNet whose shape changes in its first block, where alone there is a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "convShortcut"):
            x = F.relu(self.bn1(x))
            out = self.conv2(F.relu(self.bn2(self.conv1(x))))
            return torch.add(self.convShortcut(x), out)
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.add(x, out)


class WideResNet(nn.Module):
    def __init__(self, blocks: int, widening: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        channels = 16
        for stage, width in enumerate((16 * widening, 32 * widening, 64 * widening), start=1):
            layers = [WideBlock(channels, width, 1 if stage == 1 else 2)]
            layers += [WideBlock(width, width, 1) for _ in range(blocks - 1)]
            block = nn.Module()
            block.layer = nn.Sequential(*layers)
            self.add_module(f"block{stage}", block)
            channels = width
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in (1, 2, 3):
            x = self.get_submodule(f"block{stage}.layer")(x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("architecture", "build"),
    [
        ("resnet32", lambda: CifarResNet(BasicBlock, 5)),
        ("resnet56", lambda: CifarResNet(BasicBlock, 9)),
        ("wrn_16_2", lambda: WideResNet(2, 2)),
        ("wrn_28_4", lambda: WideResNet(4, 4)),
    ],
)
def test_supervised_cifar_networks_of_the_mcl_authors(
    architecture: str,
    build: Callable[[], nn.Module],
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    networks = [trained(build(), seed) for seed in (1, 2)]
    state: State = {}
    for number, network in enumerate(networks):
        state |= prefixed(f"module_list.{number}.", network)
    code, out, _ = run({"net": state, "acc": 0.7412, "epoch": 299, "optimizer": {}})
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
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    networks = [build(seed) for seed in (1, 2, 3, 4)]
    state = shared(networks, branch_names)
    share(networks, branch_names)
    code, out, _ = run({"net": state, "acc": 0.7, "epoch": 1})
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
    prefix: str, wrapper: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    network = resnet(seed=1)
    state = prefixed(prefix, network)
    code, out, _ = run({wrapper: state, "best_acc1": torch.tensor(67.5)} if wrapper else state)
    assert code == 0
    assert "layout: plain state dict\n" in out
    assert "the network is resnet18, matched 120 of 120 tensors; 3 x 224 x 224 pixels" in out
    assert "left out, in tensors: heads 2\n" in out
    assert ("not read, beside the state dict: best_acc1\n" in out) == bool(wrapper)
    assert_same_features(tmp_path / "out/net-0", network, images())


def test_a_safetensors_file(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    network = resnet(seed=1)
    content = safetensors.torch.save(network.state_dict())
    assert run(content, name="timm.safetensors")[0] == 0
    assert_same_features(tmp_path / "out/net-0", network, images())


def test_the_second_format_and_half_precision(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    network = resnet(seed=1).half()
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer, _use_new_zipfile_serialization=False)
    assert run(buffer.getvalue())[0] == 0
    assert_same_features(tmp_path / "out/net-0", network.float(), images())


def test_files_from_before_batch_norm_counted_batches(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """As torchvision's own of 2017."""
    network = resnet(seed=1)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    code, out, _ = run(state)
    assert code == 0
    assert "matched 100 of 100 tensors, batch counters are not in the file: set to 0" in out
    assert (
        "| batch counters | not in the file, set to 0 |"
        in (tmp_path / "out/net-0/README.md").read_text()
    )
    assert_same_features(tmp_path / "out/net-0", network, images())
    assert load_export(tmp_path / "out/net-0").state_dict()["bn1.num_batches_tracked"] == 0


def test_a_small_stem_of_other_channels_needs_its_normalisation(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    network: Any = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    trained(network, 1)
    code, _, err = run(network.state_dict())
    assert (code, err.count("\n")) == (2, 1)
    assert "the network takes 1 channels: give as many numbers by --mean and --std" in err
    assert not (tmp_path / "out").exists()
    words = ["--mean", "0.286", "--std", "0.353", "--image_size", "28"]
    code, out, _ = run(network.state_dict(), *words)
    assert code == 0
    assert "stem 3x3, taken to be without stride and max-pool; 1 x 28 x 28 pixels" in out
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
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    code, _, err = run(resnet().state_dict(), *words)
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


class Harm:
    """What an attacker pickles: a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def zip_format(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def second_format(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def first_format(content: object) -> bytes:
    """A tar file, as PyTorch wrote before 0.1.10; no tensors."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        parts = {
            "sys_info": pickle.dumps({"protocol_version": 1000}, protocol=2),
            "storages": pickle.dumps(0, protocol=2) + pickle.dumps([], protocol=2),
            "tensors": pickle.dumps(0, protocol=2),
            "pickle": pickle.dumps(content, protocol=2),
        }
        for name, part in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[object], bytes]] = {
    "zip": zip_format,
    "second": second_format,
    "tar": first_format,
    **{f"pickle-{p}": lambda content, p=p: pickle.dumps(content, p) for p in range(6)},
}


def test_a_user_sees_one_line_of_it(tmp_path: Path) -> None:
    """In a process of its own, where PyTorch's warnings would show."""
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Harm(tmp_path / "it_ran"), 4))
    done = subprocess.run(
        [sys.executable, "-m", "peerlearn", "import", str(tmp_path / "a.pth")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "would run code when loaded (posix.system): refused" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["alone", "beside", "inside", "optimizer"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    container: str, place: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    marker = tmp_path / "it_ran"
    harm = Harm(marker)
    state = {"conv1.weight": 1.0}
    content = {
        "alone": harm,
        "beside": {"state_dict": state, "extra": harm},
        "inside": {"state_dict": {**state, "layer1.0.conv1.weight": harm}},
        "optimizer": {"state_dict": state, "optimizer": {"state": [harm], "param_groups": []}},
    }[place]
    planted = CONTAINERS[container](content)
    code, out, err = run(planted)
    assert not marker.exists()
    assert (code, out, err.count("\n")) == (1, "", 1)
    file = tmp_path / "moco.pth.tar"
    assert err.startswith(f"peerlearn: {file} would run code when loaded (posix.system): refused;")
    assert not (tmp_path / "out").exists()
    # The plant is alive: who trusts it is had.
    if container.startswith("pickle"):
        pickle.loads(planted)
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("container", ["zip", "second", "pickle-4"])
def test_more_than_plain_data_is_refused_by_its_names(
    container: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    for content, names in (
        (
            {"state_dict": {}, "acc": np.float64(0.7)},
            r"numpy\.\w+\.multiarray\.scalar, numpy\.dtype",
        ),
        ({"state_dict": {}, "args": argparse.Namespace(lr=0.1)}, r"argparse\.Namespace"),
    ):
        code, _, err = run(CONTAINERS[container](content))
        assert (code, err.count("\n")) == (1, 1)
        assert re.search(rf"holds more than tensors and plain values \({names}\): refused;", err)


def test_a_whole_pickled_model_is_refused(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run({"model": resnet()})
    assert (code, err.count("\n")) == (1, 1)
    assert re.search(
        r"would run code when loaded \(torch\.nn\.modules\..* and \d+ more\): refused;", err
    )
    assert "torch.save(model.state_dict(), ...)" in err


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused(run: Callable[..., tuple[int, str, str]]) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    code, _, err = run(buffer.getvalue())
    assert (code, err.count("\n")) == (1, 1)
    assert "would run code when loaded (__torch__." in err


def truncated(container: Callable[[object], bytes], keep: float) -> bytes:
    content = container({"state_dict": {"conv1.weight": torch.randn(64, 3, 7, 7)}})
    return content[: int(keep * len(content))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am no checkpoint", "is no checkpoint that can be read safely"),
        (b"\x80", "is no checkpoint that can be read safely"),
        (b"PK\x03\x04 and no zip file", "is no checkpoint that can be read safely"),
        (truncated(zip_format, 0.5), "is no checkpoint that can be read safely"),
        (truncated(zip_format, 0.99), "is no checkpoint that can be read safely"),
        (truncated(second_format, 0.5), "is no checkpoint that can be read safely"),
        (truncated(second_format, 0.99), "is no checkpoint that can be read safely"),
        (first_format({"a": 1}), "is of PyTorch's first format, a tar file"),
        (zip_format([torch.zeros(3)]), "holds no state dict"),
        (zip_format({}), "holds no state dict"),
        (zip_format({"state_dict": {"epoch": 3}}), "holds no state dict"),
        (zip_format(torch.zeros(3)), "holds no state dict"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(
    content: bytes, message: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = run(content)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{tmp_path / 'moco.pth.tar'} {message}" in err
    assert not (tmp_path / "out").exists()


def test_a_broken_safetensors_file_is_one_line(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run(safetensors.torch.save({"a": torch.zeros(3)})[:-1], name="a.safetensors")
    assert (code, err.count("\n")) == (1, 1)
    assert "a.safetensors is no checkpoint that can be read safely" in err


def test_a_folder_and_a_missing_file_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, message in (
        (tmp_path, "is a folder: give the checkpoint file in it"),
        (tmp_path / "none.pth", "cannot be read (No such file or directory)"),
    ):
        assert main(["import", str(file)]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith(f"peerlearn: {file}")
        assert message in err


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: prefixed("module_list.0.", CifarResNet(Bottleneck, 12)),
            r"module_list\.0 is a ResNet of 12, 12, 12 bottleneck blocks on a 3x3 stem of 16 channels, which is none",
        ),
        (
            lambda: prefixed("", CifarResNet(Bottleneck, 5)),
            r"a ResNet of 5, 5, 5 bottleneck blocks on a 3x3 stem of 16 channels, which is none",
        ),
        (
            lambda: prefixed("module_list.0.", WideResNet(1, 1)),
            r"module_list\.0 is a wide ResNet of depth 10 and 16 channels in its first stage, which is none",
        ),
        (
            lambda: prefixed("", CifarResNet(BasicBlock, 2)),
            r"a ResNet of 2, 2, 2 basic blocks on a 3x3 stem of 16 channels, which is none",
        ),
        (
            lambda: {"module.base_encoder.cls_token": torch.zeros(1, 1, 8)},
            r"base_encoder is none of the networks that can be imported.*its first tensor is cls_token",
        ),
        (
            lambda: {"\x1b[2Jfeatures.0.weight": torch.zeros(3)},
            r"its first tensor is '\\x1b\[2Jfeatures",
        ),
        (
            lambda: {**prefixed("", resnet()), "conv1.weight": torch.zeros(64)},
            r"conv1\.weight is \(64,\), not the weights of a convolution",
        ),
    ],
)
def test_other_networks_are_named_not_guessed(
    state: Callable[[], State],
    message: str,
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    code, out, err = run({"state_dict": state()})
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def spoil(state: State) -> Iterator[tuple[State, str]]:
    without = {k: v for k, v in state.items() if not k.startswith("encoder_q.layer3.1.bn")}
    yield (
        without,
        "encoder_q does not fit resnet18: 'layer3.1.bn1.weight' is missing, and 9 more; 110 of 120 tensors match",
    )
    extra = {**state, "encoder_q.layer1.0.se.weight": torch.zeros(3)}
    yield extra, "resnet18: 'layer1.0.se.weight' is not part of it; 120 of 120 tensors match"
    shape = {**state, "encoder_q.bn1.bias": torch.zeros(65)}
    yield shape, "'bn1.bias' is (65,), not (64,); 119 of 120 tensors match"
    counter = {k: v for k, v in state.items() if k != "encoder_q.bn1.num_batches_tracked"}
    yield counter, "'bn1.num_batches_tracked' is missing; 119 of 120 tensors match"
    quantised = {**state, "encoder_q.bn1.bias": torch.zeros(64, dtype=torch.int8)}
    yield quantised, "'bn1.bias' is torch.int8, torch.strided, not numbers of one plain tensor"
    sparse = {**state, "encoder_q.bn1.bias": torch.zeros(64).to_sparse()}
    yield sparse, "'bn1.bias' is torch.float32, torch.sparse_coo, not numbers of one plain tensor"
    for value in (float("nan"), float("inf")):
        poisoned = {k: v.clone() for k, v in state.items()}
        poisoned["encoder_q.layer4.0.bn2.running_var"][3] = value
        yield poisoned, "encoder_q: 'layer4.0.bn2.running_var' holds NaN or Inf: refused"


def test_what_float32_cannot_hold_is_refused(run: Callable[..., tuple[int, str, str]]) -> None:
    state = {name: tensor.double() for name, tensor in resnet().state_dict().items()}
    state["bn1.weight"] *= 1e200
    code, _, err = run(state)
    assert (code, err.count("\n")) == (1, 1)
    assert "'bn1.weight' holds NaN or Inf: refused" in err


def test_a_flipped_byte_in_the_archive_is_found_by_its_checksum(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    torch.save(resnet().state_dict(), tmp_path / "whole.pth")
    content = bytearray((tmp_path / "whole.pth").read_bytes())
    content[len(content) // 2] ^= 0x40
    code, _, err = run(bytes(content))
    assert (code, err.count("\n")) == (1, 1)
    assert re.search(r"is damaged: the checksum of \S+ does not match; get it again", err)


def test_an_archive_that_unpacks_to_far_more_is_refused(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    torch.save({"conv1.weight": torch.zeros(2**22)}, tmp_path / "zeros.pth")
    packed = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(tmp_path / "zeros.pth") as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for record in plain.namelist():
            archive.writestr(record, plain.read(record))
    code, _, err = run(packed.read_bytes())
    assert (code, err.count("\n")) == (1, 1)
    assert "unpack to 16,77" in err


def test_a_stem_of_absurdly_many_channels_builds_no_network(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    state = resnet().state_dict()
    state["conv1.weight"] = torch.zeros(1).expand(64, 100_000, 7, 7)
    code, _, err = run(state)
    assert (code, err.count("\n")) == (1, 1)
    assert "conv1.weight is of 100000 channels, more than 1024" in err


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_float8_is_read_and_nested_tensors_are_refused(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    state = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.is_floating_point() else tensor
        for name, tensor in resnet().state_dict().items()
    }
    code, _, err = run(state)
    assert (code, err) == (0, "")
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    code, _, err = run({**resnet().state_dict(), "conv1.weight": nested}, name="nested.pth")
    assert (code, err.count("\n")) == (1, 1)


def test_an_import_that_fails_midway_leaves_nothing(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peerlearn import import_command

    plain, saved = import_command._save, []

    def save_one(folder: Path, *rest: object) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        plain(folder, *rest)

    monkeypatch.setattr(import_command, "_save", save_one)
    state = {**prefixed("encoder_q.", resnet(seed=1)), **prefixed("encoder_k.", resnet(seed=2))}
    code, _, err = run({"state_dict": state})
    assert (code, len(saved)) == (1, 2)
    assert "No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["moco.pth.tar"]


def test_a_backbone_that_is_not_whole_is_refused(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    state = {**prefixed("encoder_q.", resnet(seed=1)), **prefixed("encoder_k.", resnet(seed=2))}
    for spoilt, message in spoil(state):
        code, out, err = run({"state_dict": spoilt})
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err
        assert not (tmp_path / "out").exists()


def test_a_misfit_in_the_last_network_writes_none(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    content, _, _ = small_moco()
    del content["state_dict"]["module.encoder_k.bn1.weight"]
    code, _, err = run(content)
    assert code == 1
    assert "encoder_k does not fit resnet18: 'bn1.weight' is missing" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("in the way")
    code, _, err = run(resnet().state_dict())
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path / 'out'} is there already: choose another folder by --output" in err


def test_torch_load_is_never_asked_for_more_than_weights(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    real = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert run(resnet().state_dict())[0] == 0
    assert [options["weights_only"] for options in asked] == [True]


def test_the_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--help"]) == 0
    assert "Example: peerlearn import moco_v2.pth.tar" in " ".join(capsys.readouterr().out.split())


def test_zip_members_of_any_name_are_searched(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """torch.save names the folder in the archive after the file; a forger names it as he likes."""
    marker = tmp_path / "it_ran"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Harm(marker), 2))
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    code, _, err = run(buffer.getvalue())
    assert code == 1
    assert "would run code when loaded (posix.system)" in err
    assert not marker.exists()
