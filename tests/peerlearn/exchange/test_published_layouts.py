"""Files laid out as published programs write them, tensor by tensor: read, or refused with what to do.

Each test names the source of its layout. A ResNet-18 stands in for larger ones: names do not depend on the depth.
"""

import argparse
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from peerlearn.export import load_export
from tests.peerlearn.exchange.foreign_networks import (
    CifarResNet,
    WideResNet,
    assert_same_features,
    exports,
    images,
    prefixed,
    published,
    resnet,
    trained,
)

Import = Callable[..., tuple[int, str, str]]
STAGES = ("layer1", "layer2", "layer3", "layer4")


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers without bias, each but the last with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*(layers[:-1] if last_norm else layers[:-2]))


def backbone(seed: int = 1) -> Any:
    """Without a classifier, as after ``fc = nn.Identity()``."""
    network = resnet(seed=seed, head=nn.Identity())
    assert not [name for name in network.state_dict() if name.startswith("fc")]
    return network


def small(seed: int = 1, *, padding: int = 1, pooled: bool = False) -> Any:
    """A ResNet-18 with a 3x3 stem, for CIFAR."""
    network: Any = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    if not pooled:
        network.maxpool = nn.Identity()
    return trained(network, seed)


def line(out: str, start: str) -> str:
    """The rest of the line of the report that starts so."""
    (found,) = re.findall(rf"^{re.escape(start)}(.*)$", out, flags=re.MULTILINE)
    return str(found)


def test_swav_and_deepcluster(import_file: Import, tmp_path: Path) -> None:
    """facebookresearch/swav main_swav.py saves the state of DDP; src/resnet50.py names projection_head and prototypes.

    Its padding layer and its stem's padding of 2 together are torchvision's 3.
    """
    network = backbone()
    state = {
        **prefixed("module.", network),
        **prefixed("module.projection_head.", mlp(512, 2048, 128)),
        "module.prototypes.weight": torch.randn(30, 128),
    }
    for content in (state, {"epoch": 800, "state_dict": state, "optimizer": {}, "amp": {}}):
        code, out, _ = import_file(content, "--output", str(tmp_path / str(len(content))))
        assert code == 0
        assert line(out, "layout: ") == "SwAV or DeepCluster v2"
        assert line(out, "left out, in tensors: ") == "projection_head 7, prototypes 1"
        assert line(out, "stripped from the names: ") == "module."
        assert_same_features(tmp_path / str(len(content)) / "net-0", network, images())


def test_simsiam(import_file: Import, tmp_path: Path) -> None:
    """facebookresearch/simsiam simsiam/builder.py: encoder with a projector as its fc, predictor; main_simsiam.py saves
    epoch, arch, state_dict, optimizer."""
    network = resnet(seed=1, head=mlp(512, 512, 512, 256, last_norm=True))
    state = {
        **prefixed("module.encoder.", network),
        **prefixed("module.predictor.", mlp(256, 64, 256)),
    }
    code, out, _ = import_file(published(state, resnet()))
    assert code == 0
    assert line(out, "layout: ") == "SimSiam"
    assert "encoder is resnet18, matched 120 of 120 tensors" in out
    assert line(out, "left out, in tensors: ") == "heads 18, predictor 7"
    assert line(out, "stripped from the names: ") == "module.encoder."
    assert "taken as in resnet18, which the file says it is" in out
    assert_same_features(tmp_path / "out/net-0", network, images())


def test_barlow_twins(import_file: Import, tmp_path: Path) -> None:
    """facebookresearch/barlowtwins main.py: epoch, model (of DDP), optimizer; and resnet50.pth, the backbone alone."""
    network = backbone()
    state = {
        **prefixed("module.backbone.", network),
        **prefixed("module.projector.", mlp(512, 64, 64, 64)),
        **prefixed("module.bn.", nn.BatchNorm1d(64, affine=False)),
    }
    optimizer = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.2, "params": [0]}]}
    code, out, _ = import_file({"epoch": 1000, "model": state, "optimizer": optimizer})
    assert code == 0
    assert line(out, "layout: ") == "Barlow Twins or VICReg"
    assert line(out, "left out, in tensors: ") == "bn 3, projector 13"
    assert line(out, "not read, beside the state dict: ") == "epoch, optimizer"
    assert line(out, "stripped from the names: ") == "module.backbone."
    assert_same_features(tmp_path / "out/net-0", network, images())
    code, out, _ = import_file(network.state_dict(), "--output", str(tmp_path / "alone"))
    assert (code, line(out, "left out, in tensors: ")) == (0, "nothing")
    assert_same_features(tmp_path / "alone/net-0", network, images())


def test_dino_of_a_resnet(import_file: Import, tmp_path: Path) -> None:
    """facebookresearch/dino main_dino.py: student and (with batch norm) teacher of DDP, optimizer, epoch, args,
    dino_loss; utils.py's MultiCropWrapper names backbone and head. hubconf.py's
    dino_resnet50_pretrain.pth is the backbone alone."""
    student, teacher = backbone(1), backbone(2)
    head = nn.Sequential(nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 32))
    content = {
        "student": {
            **prefixed("module.backbone.", student),
            **prefixed("module.head.mlp.", head),
            "module.head.last_layer.weight_g": torch.ones(10, 1),
            "module.head.last_layer.weight_v": torch.randn(10, 32),
        },
        "teacher": {
            **prefixed("module.backbone.", teacher),
            **prefixed("module.head.mlp.", head),
        },
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
        "epoch": 300,
        "args": argparse.Namespace(arch="resnet18", patch_size=16, out_dim=65536),
        "dino_loss": {"center": torch.zeros(1, 10)},
    }
    code, out, _ = import_file(content)
    assert code == 0
    assert line(out, "layout: ") == "DINO"
    assert line(out, "left out, in tensors: ") == "head 10"
    assert line(out, "not read, beside the state dict: ") == "args, dino_loss, epoch, optimizer"
    assert "taken as in resnet18, which the file says it is" in out
    assert exports(tmp_path) == {"net-0", "net-0-key"}
    assert_same_features(tmp_path / "out/net-0", student, images())
    assert_same_features(tmp_path / "out/net-0-key", teacher, images())


def test_vissl(import_file: Import, tmp_path: Path) -> None:
    """facebookresearch/vissl: classy_state_dict of ClassyVision, base_model.model.trunk of base_ssl_model.py, whose
    ResNet (models/trunks/resnext.py) keeps its layers in _feature_blocks."""
    network = backbone()
    trunk = prefixed("_feature_blocks.", network)
    heads = prefixed("0.clf.", nn.Sequential(nn.Linear(512, 128)))
    classy = {
        "base_model": {"model": {"trunk": trunk, "heads": heads}},
        "optimizer": {"optim": {"state": {0: {"momentum_buffer": torch.zeros(2)}}}},
        "loss": {"queue": torch.zeros(3, 4)},
        "phase_idx": 99,
    }
    code, out, _ = import_file({"phase_idx": 99, "iteration": 7, "classy_state_dict": classy})
    assert code == 0
    assert line(out, "layout: ") == "VISSL"
    assert line(out, "left out, in tensors: ") == "heads 2, loss 1"
    assert line(out, "stripped from the names: ") == "_feature_blocks."
    assert_same_features(tmp_path / "out/net-0", network, images())


@pytest.mark.parametrize("name", ["backbone", "encoder"])
def test_solo_learn(name: str, import_file: Import, tmp_path: Path) -> None:
    """vturrisi/solo-learn solo/methods/base.py: backbone (encoder before 1.0.3) and momentum_backbone, classifier,
    momentum_classifier; methods/mocov2plus.py: projector, momentum_projector, queue, queue_ptr. Saved by Lightning."""
    query, key = backbone(1), backbone(2)
    projector = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 32))
    state = {
        **prefixed(f"{name}.", query),
        **prefixed("classifier.", nn.Linear(512, 100)),
        **prefixed(f"momentum_{name}.", key),
        **prefixed("momentum_classifier.", nn.Linear(512, 100)),
        **prefixed("projector.", projector),
        **prefixed("momentum_projector.", projector),
        "queue": torch.randn(2, 32, 64),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    content = {
        "epoch": 1000,
        "global_step": 195000,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(2)}}}],
        "lr_schedulers": [],
        "hyper_parameters": {name: {"name": "resnet18"}, "lr": 0.3},
    }
    code, out, _ = import_file(content, name="solo.ckpt")
    assert code == 0
    assert line(out, "layout: ") == "a checkpoint of Lightning, as solo-learn and lightly save it"
    assert line(out, "left out, in tensors: ") == (
        "classifier 2, momentum_classifier 2, momentum_projector 4, projector 4, queue 1, queue_ptr 1"
    )
    assert "taken as in resnet18, which the file says it is" in out
    assert_same_features(tmp_path / "out/net-0", query, images())
    assert_same_features(tmp_path / "out/net-0-key", key, images())


@pytest.mark.parametrize(
    ("padding", "pooled", "architecture"),
    [
        (1, False, None),
        (2, False, "resnet18_small_padding2"),
        (1, True, "resnet18_small_pooled"),
    ],
)
def test_the_3x3_stem_of_cifar_networks_is_settled_by_architecture(
    padding: int, pooled: bool, architecture: str | None, import_file: Import, tmp_path: Path
) -> None:
    """vturrisi/solo-learn solo/methods/base.py pads its CIFAR stem by 2; others leave the max-pool where it was."""
    network = small(padding=padding, pooled=pooled)
    state = prefixed("backbone.", network)
    words = ["--architecture", architecture] if architecture else []
    code, out, _ = import_file(state, *words)
    assert code == 0
    if architecture is None:
        untold = line(out, "not told by the tensors: ")
        assert "solo-learn pads by 2: --architecture resnet18_small_padding2" in untold
        assert "where a max-pool was left: resnet18_small_pooled" in untold
    assert_same_features(tmp_path / "out/net-0", network, images(size=32))
    pretrained_cfg = load_export(tmp_path / "out/net-0").pretrained_cfg
    assert pretrained_cfg["input_size"] == [3, 32, 32]  # type: ignore[index]
    export = tmp_path / "out/net-0"
    theirs = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(images(size=32)), load_export(export)(images(size=32)))


def numbered(network: nn.Module, *, without: tuple[str, ...] = ()) -> nn.Sequential:
    """The children by number, without the classifier."""
    children = [child for name, child in network.named_children() if name not in ("fc", *without)]
    return nn.Sequential(*children)


def test_lightlys_examples_number_the_layers(import_file: Import, tmp_path: Path) -> None:
    """lightly-ai/lightly examples/pytorch_lightning/moco.py: nn.Sequential(*list(resnet.children())[:-1]) as backbone
    and backbone_momentum, with projection_head and projection_head_momentum."""
    query, key = resnet(seed=1), resnet(seed=2)
    state = {
        **prefixed("backbone.", numbered(query)),
        **prefixed("projection_head.layers.", mlp(512, 64, 32)),
        **prefixed("backbone_momentum.", numbered(key)),
        **prefixed("projection_head_momentum.layers.", mlp(512, 64, 32)),
        "criterion.memory_bank.bank": torch.randn(4, 8),
    }
    code, out, _ = import_file(
        {"state_dict": state, "pytorch-lightning_version": "2.5.0", "epoch": 9}, name="lightly.ckpt"
    )
    assert code == 0
    assert line(out, "left out, in tensors: ") == (
        "criterion 1, projection_head 7, projection_head_momentum 7"
    )
    assert line(out, "stripped from the names: ") == "backbone., backbone_momentum."
    assert_same_features(tmp_path / "out/net-0", query, images())
    assert_same_features(tmp_path / "out/net-0-key", key, images())


@pytest.mark.parametrize("by_number", [False, True])
def test_lightlys_own_resnet(by_number: bool, import_file: Import, tmp_path: Path) -> None:
    """lightly-ai/lightly lightly/models/resnet.py: a 3x3 stem, no ReLU or max-pool among its children, `shortcut`,
    `linear`. Its examples number the children but the last, and so lose the ReLU that its forward has."""
    network = small(1)
    if by_number:
        network.relu = nn.Identity()
    state = {}
    for name, tensor in network.state_dict().items():
        child, _, rest = name.replace(".downsample.", ".shortcut.").partition(".")
        number = ["conv1", "bn1", *STAGES, "fc"].index(child)
        if by_number and child != "fc":
            state[f"backbone.{number}.{rest}"] = tensor
        elif not by_number:
            state[f"module.{child.replace('fc', 'linear')}.{rest}"] = tensor
    assert ("backbone.2.0.conv1.weight" in state) == by_number
    code, out, _ = import_file({"state_dict": state})
    assert code == 0
    assert f"is resnet18{'_small_no_relu' if by_number else ''}, matched 120 of 120 tensors" in out
    assert_same_features(tmp_path / "out/net-0", network, images(size=32))


def test_mocos_cifar_notebook(import_file: Import, tmp_path: Path) -> None:
    """facebookresearch/moco colab/moco_cifar10_demo.ipynb: ModelBase.net numbers the layers, without the max-pool and
    with nn.Flatten before the classifier."""

    def net(network: Any) -> nn.Sequential:
        children = list(numbered(network, without=("maxpool",)))
        return nn.Sequential(*children, nn.Flatten(1), nn.Linear(512, 128))

    query, key = small(1), small(2)
    state = {
        **prefixed("encoder_q.net.", net(query)),
        **prefixed("encoder_k.net.", net(key)),
        "queue": torch.randn(128, 64),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    assert "encoder_q.net.3.0.conv1.weight" in state
    assert "encoder_q.net.9.weight" in state
    code, out, _ = import_file({"epoch": 200, "state_dict": state, "optimizer": {}})
    assert code == 0
    assert line(out, "layout: ") == "MoCo's CIFAR notebook"
    assert line(out, "left out, in tensors: ") == "heads 4, queue 1, queue_ptr 1"
    assert_same_features(tmp_path / "out/net-0", query, images(size=32))
    assert_same_features(tmp_path / "out/net-0-key", key, images(size=32))


def test_a_7x7_stem_without_room_for_a_max_pool_is_refused(import_file: Import) -> None:
    network = resnet(seed=1)
    code, _, err = import_file(prefixed("net.", numbered(network, without=("maxpool",))))
    assert (code, err.count("\n")) == (1, 1)
    assert "resnet18 without max-pool between its stem and its first stage" in err


def test_timms_training_script(import_file: Import, tmp_path: Path) -> None:
    """huggingface/pytorch-image-models timm/utils/checkpoint_saver.py: epoch, arch, state_dict, optimizer, version,
    args, amp_scaler, state_dict_ema, metric."""
    network, average = resnet(seed=1), resnet(seed=2)
    content = {
        "epoch": 90,
        "arch": "resnet18",
        "state_dict": network.state_dict(),
        "optimizer": {},
        "version": 2,
        "args": argparse.Namespace(model="resnet18"),
        "state_dict_ema": average.state_dict(),
        "metric": 70.1,
    }
    code, out, _ = import_file(content)
    assert code == 0
    assert line(out, "left out, in tensors: ") == "heads 4"
    assert_same_features(tmp_path / "out/net-0", network, images())
    assert_same_features(tmp_path / "out/net-0-key", average, images())


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.backbone.",
        "net.module.encoder._orig_mod.",
        "a_name_of_ones_own.",
    ],
)
@pytest.mark.parametrize("holders", [(), ("state_dict",), ("ckpt", "model")])
def test_prefixes_are_stripped_and_named_in_any_nesting(
    prefix: str, holders: tuple[str, ...], import_file: Import, tmp_path: Path
) -> None:
    network = resnet(seed=1)
    content: Any = {
        **prefixed(prefix, network),
        f"{prefix}neck.0.weight": torch.zeros(3),
        "logit_scale": torch.zeros(()),
    }
    for holder in reversed(holders):
        content = {holder: content, "step": 3}
    code, out, _ = import_file(content)
    assert code == 0
    assert line(out, "stripped from the names: ") == prefix
    assert line(out, "left out, in tensors: ") == "heads 2, logit_scale 1, neck 1"
    assert_same_features(tmp_path / "out/net-0", network, images())
    card = (tmp_path / "out/net-0/README.md").read_text()
    # An underscore at the edge of a word would begin an emphasis.
    escaped = prefix.replace("_orig", r"\_orig")
    assert f"| prefix of its names in the file | {escaped} |" in card


@pytest.mark.parametrize(
    "extra",
    [
        "layer1.0.se.weight",
        "layer2.0.downsample.2.weight",
        "conv2.weight",
        "bn2.weight",
        "attnpool.c_proj.weight",
    ],
)
def test_what_would_change_the_network_is_never_left_out(extra: str, import_file: Import) -> None:
    state = prefixed("encoder.", resnet(seed=1)) | {f"encoder.{extra}": torch.zeros(3)}
    code, _, err = import_file(state)
    assert (code, err.count("\n")) == (1, 1)
    assert f"encoder does not fit resnet18: '{extra}' is not part of it" in err
    assert "120 of 120 tensors match; --architecture NAME reads any network of timm" in err


@pytest.mark.parametrize("how", ["arch", "args", "--architecture"])
def test_a_network_of_the_same_tensors_is_known_by_its_name(
    how: str, import_file: Import, tmp_path: Path
) -> None:
    """resnetblur18 blurs before it strides, and has the tensors of resnet18."""
    network = trained(timm.create_model("resnetblur18"), 1)
    plain = trained(timm.create_model("resnet18"), 1)
    x = images()
    content: dict[str, Any] = {"state_dict": network.state_dict()}
    words = []
    if how == "arch":
        content["arch"] = "resnetblur18"
    elif how == "args":
        content["args"] = argparse.Namespace(model="other", arch="resnetblur18")
    else:
        words = ["--architecture", "resnetblur18"]
    code, out, _ = import_file(content, *words)
    assert code == 0
    assert "the network is resnetblur18, matched 120 of 120 tensors" in out
    assert_same_features(tmp_path / "out/net-0", network, x)
    with torch.no_grad():
        assert not torch.allclose(load_export(tmp_path / "out/net-0")(x), plain(x)[:, :512])


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("a.pth", ", for example resnetblur18"),
        ("resnet18.pth", ", for example resnetblur18"),
        ("resnetblur18.pth", ": the file is called resnetblur18"),
    ],
)
def test_what_tensors_do_not_tell_is_said(
    file: str, hint: str, import_file: Import, tmp_path: Path
) -> None:
    network = timm.create_model("resnetblur18")
    code, out, _ = import_file(network.state_dict(), name=file)
    assert code == 0
    expected = (
        "blur (anti-aliasing), padding, strides, activation and batch norm's epsilon, taken as in torchvision's "
        f"resnet18; another network of the same tensors is to be named by --architecture{hint}"
    )
    assert line(out, "not told by the tensors: ") == expected
    assert (
        f"| not told by the tensors | {expected} |"
        in (tmp_path / "out/net-0/README.md").read_text()
    )


def test_a_name_beside_the_weights_that_does_not_fit_them_is_refused(import_file: Import) -> None:
    state = {"arch": "resnet34", "state_dict": resnet(seed=1).state_dict()}
    code, _, err = import_file(state)
    assert (code, err.count("\n")) == (1, 1)
    assert "is resnet18 by its tensors, but the file calls it resnet34" in err
    assert "--architecture resnet18 imports it all the same" in err
    assert import_file(state, "--architecture", "resnet18")[0] == 0


def test_a_name_of_no_known_network_is_not_compared(import_file: Import) -> None:
    content = {"arch": "my_resnet", "state_dict": resnet(seed=1).state_dict()}
    code, out, _ = import_file(content)
    assert code == 0
    assert "taken as in torchvision's resnet18" in out


def test_an_architecture_that_does_not_fit_or_exist_is_refused(import_file: Import) -> None:
    state = resnet(seed=1).state_dict()
    code, _, err = import_file(state, "--architecture", "resnet34")
    assert (code, err.count("\n")) == (1, 1)
    assert "does not fit resnet34: 'layer1.2.conv1.weight' is missing" in err
    code, _, err = import_file(state, "--architecture", "resnet19")
    assert (code, err.count("\n")) == (1, 1)
    assert "no network is called 'resnet19'; did you mean" in err


@pytest.mark.parametrize(
    ("name", "size", "prefix"),
    [
        ("convnext_atto", 64, "module.backbone."),
        ("vit_tiny_patch16_224", 48, ""),
        ("resnet26d", 64, "encoder."),
    ],
)
def test_any_network_of_timms_is_read_by_its_name(
    name: str, size: int, prefix: str, import_file: Import, tmp_path: Path
) -> None:
    arguments = {"img_size": size} if name.startswith("vit") else {}
    network = trained(timm.create_model(name, num_classes=7, **arguments), 1)
    state = prefixed(prefix, network) | {"queue": torch.zeros(3, 4)}
    code, _, err = import_file({"state_dict": state})
    assert (code, err.count("\n")) == (1, 1)
    words = ["--architecture", name, "--image_size", str(size)]
    code, out, err = import_file({"state_dict": state}, *words)
    assert (code, err) == (0, "")
    assert f"3 x {size} x {size} pixels" in out
    assert line(out, "left out, in tensors: ") == "heads 2, queue 1"
    x = images(size=size)
    with torch.no_grad():
        theirs: Tensor = network.forward_head(network.forward_features(x), pre_logits=True)
        assert torch.equal(load_export(tmp_path / "out/net-0")(x), theirs)


def test_the_vits_of_moco_v3_need_their_name(import_file: Import, tmp_path: Path) -> None:
    """facebookresearch/moco-v3 moco/builder.py, _init_encoders_with_vit: timm's names, an MLP as head."""
    base, momentum = (
        trained(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48), seed)
        for seed in (1, 2)
    )
    state = {}
    for name, network in (("base_encoder", base), ("momentum_encoder", momentum)):
        state |= prefixed(f"module.{name}.", network)
        state |= prefixed(f"module.{name}.head.", mlp(192, 64, 64, 32))
    state |= prefixed("module.predictor.", mlp(32, 64, 32))
    content = {"epoch": 300, "arch": "vit_small", "state_dict": state}
    code, _, err = import_file(content)
    assert (code, err.count("\n")) == (1, 1)
    assert "--architecture NAME reads any network of timm by timm's names" in err
    words = ["--architecture", "vit_tiny_patch16_224", "--image_size", "48"]
    code, out, _ = import_file(content, *words)
    assert code == 0
    assert line(out, "layout: ") == "MoCo v3"
    assert line(out, "left out, in tensors: ") == "heads 26, predictor 7"
    for network, folder in ((base, "net-0"), (momentum, "net-0-key")):
        with torch.no_grad():
            x = images(size=48)
            assert torch.equal(load_export(tmp_path / "out" / folder)(x), network(x))


def test_the_wide_resnets_of_swav_are_refused(import_file: Import) -> None:
    """facebookresearch/swav src/resnet50.py, resnet50w2: a stem of 128 channels, which torchvision's do not have."""
    state = {
        "module.conv1.weight": torch.zeros(128, 3, 7, 7),
        "module.layer1.0.conv1.weight": torch.zeros(256, 128, 1, 1),
        "module.layer1.0.conv2.weight": torch.zeros(256, 256, 3, 3),
        "module.layer1.0.conv3.weight": torch.zeros(512, 256, 1, 1),
    }
    code, _, err = import_file({"state_dict": state})
    assert (code, err.count("\n")) == (1, 1)
    assert "is a ResNet of 1 bottleneck blocks on a 7x7 stem of 128 channels, which is none" in err


@pytest.mark.parametrize(
    ("architecture", "build"),
    [("resnet32", lambda: CifarResNet(BasicBlock, 5)), ("wrn_16_2", lambda: WideResNet(2, 2))],
)
def test_a_cifar_network_can_be_named_too(
    architecture: str, build: Callable[[], nn.Module], import_file: Import, tmp_path: Path
) -> None:
    network = trained(build(), 1)
    code, _, _ = import_file(prefixed("module_list.0.", network), "--architecture", architecture)
    assert code == 0
    assert_same_features(tmp_path / "out/net-0", network, images(size=32))


def test_our_own_cifar_resnet_is_read_by_its_own_names(import_file: Import, tmp_path: Path) -> None:
    network = trained(timm.create_model("resnet32_cifar", num_classes=10), 1)
    assert import_file(prefixed("net.", network))[0] == 0
    x = images(size=32)
    with torch.no_grad():
        theirs = network.forward_head(network.forward_features(x), pre_logits=True)
        assert torch.equal(load_export(tmp_path / "out/net-0")(x), theirs)
