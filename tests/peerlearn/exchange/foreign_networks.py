"""Networks and checkpoints as other programs build and save them."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from peerlearn.export import load_export

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


def published(
    state_dict: State, network: nn.Module, arch: str = "resnet18", **more: object
) -> dict[str, Any]:
    """epoch, arch, state_dict and optimizer, as MoCo's scripts and their descendants save them."""
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    network.train()
    F.cross_entropy(network(images(size=32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    network.eval()
    return {
        "epoch": 200,
        "arch": arch,
        "state_dict": OrderedDict(state_dict),
        "optimizer": optimizer.state_dict(),
        **more,
    }


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
