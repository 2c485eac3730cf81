"""Backbones: exact sizes, what the layers compute, timm's registry, shared stages."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock as TimmBasicBlock
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import downsample_conv
from torch import nn
from torchvision.models import densenet as torchvision_densenet

import peerlearn
from peerlearn.backbones import create_backbone
from peerlearn.errors import UserError
from peerlearn.networks.cifar import BasicBlock, BottleneckBlock, DenseLayer, PreActivationBlock
from peerlearn.networks.shared_stages import (
    default_share_stages,
    forward_shared,
    share_low_stages,
    stage_names,
)

# Features only, with a 100-class classifier, with a linear projection to 128.
PARAMETERS = {
    "resnet32": (466_256, 472_756, 474_576),
    "resnet56": (855_120, 861_620, 863_440),
    "resnet110": (1_730_064, 1_736_564, 1_738_384),
    "resnet110_bottleneck": (1_145_168, 1_170_868, 1_178_064),
    "wrn_16_2": (690_384, 703_284, 706_896),
    "wrn_40_2": (2_242_256, 2_255_156, 2_258_768),
    "wrn_28_4": (5_846_480, 5_872_180, 5_879_376),
    "densenet_bc_40_12": (174_792, 188_092, 191_816),
    "resnet50": (23_508_032, 23_712_932, 23_770_304),
}
# Name, small_images, and the children that networks sharing some low stages have in common.
STAGED = [
    ("resnet32", False, ["stem", "layer1", "layer2"]),
    ("wrn_16_2", False, ["stem", "layer1"]),
    ("densenet_bc_40_12", False, ["stem", "layer1", "layer2"]),
    ("conv4", False, ["stem", "layer1", "layer2", "layer3"]),
    ("conv4_wide", False, ["stem", "layer1", "layer2", "layer3"]),
    ("resnet18", True, ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2"]),
    ("resnet10t", False, ["conv1", "bn1", "act1", "maxpool", "layer1"]),
]


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Normalisation weights and statistics as after training, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for tensor in (layer.weight, layer.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (layer.bias, layer.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return module


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    features_only, with_classifier, with_projection = PARAMETERS[name]
    backbone = create_backbone(name)
    assert parameter_count(backbone) == features_only
    assert features_only + 128 * (backbone.num_features + 1) == with_projection
    timm_name = name if name == "resnet50" else f"{name}_cifar"
    assert parameter_count(timm.create_model(timm_name, num_classes=100)) == with_classifier


@pytest.mark.parametrize(("image_size", "features"), [(84, 1600), (28, 64), (47, 256), (16, 64)])
def test_conv4_flattens_what_four_halvings_leave(image_size: int, features: int) -> None:
    backbone = create_backbone("conv4", image_size=image_size)
    assert parameter_count(backbone) == 113_088
    assert backbone.num_features == features
    assert backbone(images(2, 3, image_size, image_size)).shape == (2, features)


@pytest.mark.parametrize(("name", "features"), [("conv4", 1600), ("conv4_wide", 3200)])
def test_conv4_is_for_84_pixels_unless_told_otherwise(name: str, features: int) -> None:
    backbone = create_backbone(name)
    assert backbone.num_features == features
    assert backbone.pretrained_cfg["input_size"] == (3, 84, 84)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("image_size", [84, 28, 47, 16])
def test_conv4_wide_is_conv4_with_twice_the_channels(image_size: int, in_chans: int) -> None:
    wide, narrow = (
        create_backbone(name, in_chans=in_chans, image_size=image_size)
        for name in ("conv4_wide", "conv4")
    )
    # Kernels, biases, and weight and bias of batch norm: a first layer and three more.
    assert parameter_count(wide) == 128 * (9 * in_chans + 3) + 3 * 128 * (9 * 128 + 3)
    assert wide.num_features == 2 * narrow.num_features == 128 * (image_size // 16) ** 2
    x = images(2, in_chans, image_size, image_size)
    assert wide(x).shape == (2, 2 * narrow(x).shape[1])
    widths = {key: tensor.shape for key, tensor in narrow.state_dict().items()}
    assert wide.state_dict().keys() == widths.keys()
    for key, tensor in wide.state_dict().items():
        # Twice the outputs and, but for the image's channels, twice the inputs.
        doubled = [2 * side if side == 64 else side for side in widths[key]]
        assert list(tensor.shape) == doubled, key


@pytest.mark.parametrize(
    "name", ["resnet32", "resnet110_bottleneck", "wrn_16_2", "densenet_bc_40_12"]
)
@pytest.mark.parametrize("size", [32, 28])
def test_cifar_networks_halve_the_image_twice_and_average(name: str, size: int) -> None:
    backbone = create_backbone(name, in_chans=1).eval()
    x = images(2, 1, size, size)
    maps = backbone.forward_features(x)
    assert maps.shape == (2, backbone.num_features, size // 4, size // 4)
    torch.testing.assert_close(backbone(x), maps.mean(dim=(2, 3)))


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (32, 2)])
def test_basic_block_is_timms(channels: int, stride: int) -> None:
    block = randomise(BasicBlock(16, channels, stride), seed=1).eval()
    projection = downsample_conv(16, channels, kernel_size=1, stride=stride) if stride > 1 else None
    oracle = TimmBasicBlock(16, channels, stride, projection).eval()
    own = [t for name, t in block.state_dict().items()]
    oracle.load_state_dict(dict(zip(oracle.state_dict(), own, strict=True)))
    x = images(2, 16, 9, 9)
    torch.testing.assert_close(block(x), oracle(x))


@pytest.mark.parametrize(("in_channels", "stride"), [(64, 1), (16, 1), (64, 2)])
def test_bottleneck_block_is_timms(in_channels: int, stride: int) -> None:
    block = randomise(BottleneckBlock(in_channels, 64, stride), seed=1).eval()
    projects = stride > 1 or in_channels != 64
    projection = downsample_conv(in_channels, 64, kernel_size=1, stride=stride)
    oracle = TimmBottleneck(in_channels, 16, stride, projection if projects else None).eval()
    own = block.state_dict().values()
    oracle.load_state_dict(dict(zip(oracle.state_dict(), own, strict=True)))
    x = images(2, in_channels, 9, 9)
    torch.testing.assert_close(block(x), oracle(x))


def test_dense_layer_is_torchvisions() -> None:
    layer = randomise(DenseLayer(24, 12), seed=2).eval()
    oracle = torchvision_densenet._DenseBlock(1, 24, 4, 12, 0.0).eval()
    own = layer.state_dict().values()
    oracle.load_state_dict(dict(zip(oracle.state_dict(), own, strict=True)))
    x = images(2, 24, 7, 7)
    torch.testing.assert_close(layer(x), oracle(x))


def test_dense_transition_is_torchvisions() -> None:
    backbone = randomise(create_backbone("densenet_bc_40_12"), seed=3).eval()
    transition = backbone.layer2[:4]
    oracle = torchvision_densenet._Transition(96, 48).eval()
    own = transition.state_dict().values()
    oracle.load_state_dict(dict(zip(oracle.state_dict(), own, strict=True)))
    x = images(2, 96, 8, 8)
    torch.testing.assert_close(transition(x), oracle(x))


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (32, 2)])
def test_wide_block_is_the_papers(channels: int, stride: int) -> None:
    """Zagoruyko & Komodakis: y = conv2(relu(bn2(conv1(a)))) + shortcut, with a = relu(bn1(x)).

    The shortcut is x itself, or a projection of a where the shape changes.
    """
    block = randomise(PreActivationBlock(16, channels, stride), seed=4).eval()
    x = images(2, 16, 9, 9)

    def normalised(values: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
        mean, var, weight, bias = (
            t[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return (values - mean) / (var + bn.eps).sqrt() * weight + bias

    activated = normalised(x, block.bn1).clamp(min=0)
    hidden = F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)
    residual = F.conv2d(normalised(hidden, block.bn2).clamp(min=0), block.conv2.weight, padding=1)
    shortcut = x if stride == 1 else F.conv2d(activated, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), residual + shortcut)


def test_convolutions_start_as_he_wrote() -> None:
    torch.manual_seed(0)
    for name in ("wrn_16_2", "conv4"):
        for layer in create_backbone(name).modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 9000:
                expected = math.sqrt(2 / (layer.out_channels * math.prod(layer.kernel_size)))
                assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)
                assert layer.bias is None or not layer.bias.any()


def test_networks_differ_unless_the_seed_is_the_same() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(create_backbone("resnet18", small_images=True).conv1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "image_size", "num_features"),
    [
        ("mobilenetv3_small_050", None, 1024),
        ("vit_tiny_patch16_224", 48, 192),
        ("resnet18", 40, 512),
    ],
)
def test_num_features_is_what_comes_out(
    name: str, image_size: int | None, num_features: int
) -> None:
    """MobileNetV3 has layers behind the pooling, which timm's own num_features ignores."""
    backbone = create_backbone(name, in_chans=1, image_size=image_size).eval()
    size = image_size or 64
    assert backbone.num_features == num_features
    assert backbone(images(2, 1, size, size)).shape == (2, num_features)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet10t", "resnet50d", "resnetrs50", "resnetblur18", "seresnext26t_32x4d"],
)
def test_small_stem_keeps_the_resolution_and_the_names(name: str) -> None:
    small = create_backbone(name, in_chans=1, small_images=True).eval()
    large = create_backbone(name, in_chans=1)
    shapes = {key: t.shape for key, t in large.state_dict().items() if "maxpool" not in key}
    if isinstance(small.conv1, nn.Conv2d):
        shapes["conv1.weight"] = (64, 1, 3, 3)
    assert {key: t.shape for key, t in small.state_dict().items()} == shapes
    assert small.forward_features(images(1, 1, 32, 32)).shape[2:] == (4, 4)
    assert small.num_features == large.num_features


def test_small_resnet18_is_mocos_cifar_resnet18() -> None:
    """ResNet-18's 11,176,512 without the 7x7 stem's 9,408 and with 1,728 for 3x3."""
    assert parameter_count(create_backbone("resnet18", small_images=True)) == 11_168_832


def test_every_network_of_the_resnet_family_has_a_small_stem() -> None:
    family = timm.list_models(module="resnet")
    assert {"resnet18", "resnext50_32x4d", "wide_resnet50_2", "senet154"} <= set(family)
    assert all(timm.is_model(f"{name}_small") for name in family)


def test_small_images_changes_nothing_for_networks_made_for_them() -> None:
    for name in ("resnet32", "conv4", "resnet32_cifar", "resnet18_small"):
        flagged = create_backbone(name, small_images=True).pretrained_cfg["architecture"]
        assert flagged == create_backbone(name).pretrained_cfg["architecture"]


def test_timm_changes_the_head_as_it_does_for_its_own() -> None:
    network = timm.create_model("wrn_16_2_cifar", num_classes=100, drop_rate=0.5).eval()
    assert network.get_classifier(name_only=True) == "fc"
    assert network.get_classifier() is network.fc
    x = images(2, 3, 32, 32)
    pooled = network.forward_head(network.forward_features(x), pre_logits=True)
    torch.testing.assert_close(network(x), pooled @ network.fc.weight.T + network.fc.bias)
    network.reset_classifier(7, "catavgmax")
    assert network(x).shape == (2, 7)
    network.reset_classifier(0, "")
    assert network(x).shape == (2, 128, 8, 8)
    network.reset_classifier(0, "avg")
    assert torch.equal(network(x), pooled)
    trained = timm.create_model("resnet32_cifar", num_classes=0, drop_rate=0.9).train()
    assert (trained(x) == 0).float().mean() > 0.5


@pytest.mark.parametrize(
    ("name", "reductions"),
    [
        ("resnet32_cifar", [1, 2, 4]),
        ("conv4_cifar", [2, 4, 8, 16]),
        ("conv4_wide_cifar", [2, 4, 8, 16]),
        ("resnet18_small", [1, 1, 2, 4, 8]),
    ],
)
def test_timm_extracts_a_feature_map_per_stage(name: str, reductions: list[int]) -> None:
    network = timm.create_model(name, features_only=True)
    maps = network(images(1, 3, 32, 32))
    assert [32 // m.shape[2] for m in maps] == network.feature_info.reduction() == reductions
    assert [m.shape[1] for m in maps] == network.feature_info.channels()


def test_timm_builds_conv4_for_an_image_size() -> None:
    assert timm.create_model("conv4_cifar", image_size=28, num_classes=0).num_features == 64
    assert timm.create_model("conv4_cifar", num_classes=5).fc.weight.shape == (5, 1600)
    wide = timm.create_model("conv4_wide_cifar", image_size=28, num_classes=5)
    assert wide.fc.weight.shape == (5, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet33"}, r"'resnet33'; did you mean .*resnet32"),
        ({"name": "wrn_16_3"}, r"'wrn_16_3'; did you mean wrn_16_2"),
        ({"name": "qqqqqq"}, r"'qqqqqq'; see timm.list_models"),
        ({"name": "ResNet50"}, r"'ResNet50'; did you mean resnet50 or"),
        ({"name": "transformer"}, r"'transformer'; see timm.list_models"),
        ({"name": "lenet"}, r"'lenet'; see timm.list_models"),
        ({"name": "hf-hub:timm/resnet18"}, "no network is called"),
        ({"name": "local-dir:/tmp"}, "no network is called"),
        ({"name": "resnet18.a1_in1k"}, "write 'resnet18'"),
        ({"name": "mobilenetv3_small_050", "small_images": True}, "resnet32, .*resnet18, resnet50"),
        ({"name": "conv4", "image_size": 15}, "image_size 15 is below 16"),
        ({"name": "conv4_wide", "image_size": 15}, "image_size 15 is below 16"),
        ({"name": "beit_base_patch16_224", "image_size": -3}, "3 channels and -3 pixels"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        create_backbone(**arguments)
    assert "\n" not in str(error.value)


def shared_cohort(name: str, small_images: bool, stages: int) -> nn.ModuleList:
    torch.manual_seed(0)
    backbones = [
        randomise(create_backbone(name, small_images=small_images, image_size=32), seed)
        for seed in range(3)
    ]
    share_low_stages(backbones, stages)
    return nn.ModuleList(backbones)


@pytest.mark.parametrize(("name", "small_images", "trunk"), STAGED)
def test_shared_modules_are_the_same_and_the_others_are_not(
    name: str, small_images: bool, trunk: list[str]
) -> None:
    plain = create_backbone(name, small_images=small_images, image_size=32)
    stages = sum(child.startswith("layer") for child in trunk)
    cohort = shared_cohort(name, small_images, stages)
    first, *others = cohort
    for other in others:
        assert list(other.state_dict()) == list(plain.state_dict())
        assert all(getattr(other, child) is getattr(first, child) for child in trunk)
        for key, tensor in other.state_dict(keep_vars=True).items():
            assert (tensor is first.state_dict(keep_vars=True)[key]) == (key.split(".")[0] in trunk)
    of_trunk = sum(parameter_count(getattr(plain, child)) for child in trunk)
    assert parameter_count(cohort) == 3 * parameter_count(plain) - 2 * of_trunk
    assert parameter_count(copy.deepcopy(cohort)) == parameter_count(cohort)


@pytest.mark.parametrize(("name", "small_images", "trunk"), STAGED)
def test_sharing_changes_no_bit_of_the_features(
    name: str, small_images: bool, trunk: list[str]
) -> None:
    stages = sum(child.startswith("layer") for child in trunk)
    cohort = shared_cohort(name, small_images, stages)
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        in_training = [copy.deepcopy(backbone).train()(x) for backbone in cohort]
        features = forward_shared(list(cohort.train()), x, stages)
        assert all(torch.equal(a, b) for a, b in zip(features, in_training, strict=True))
        counts = {
            key: int(count)
            for key, count in cohort.state_dict().items()
            if key.endswith("num_batches_tracked")
        }
        assert set(counts.values()) == {1}
        cohort.eval()
        features = forward_shared(list(cohort), x, stages)
        assert all(torch.equal(f, b(x)) for f, b in zip(features, cohort, strict=True))
    assert not torch.equal(features[0], features[1])
    assert not torch.equal(features[1], features[2])


def test_gradients_of_shared_stages_are_summed() -> None:
    cohort = shared_cohort("resnet32", False, 2).double().eval()
    x = images(2, 3, 32, 32).double()
    per_network = []
    for backbone in cohort:
        (gradient,) = torch.autograd.grad(backbone(x).square().sum(), backbone.stem[0].weight)
        per_network.append(gradient)
    torch.stack(forward_shared(list(cohort), x, 2)).square().sum().backward()
    torch.testing.assert_close(cohort[0].stem[0].weight.grad, sum(per_network))


def test_unshared_networks_run_on_their_own() -> None:
    backbones = [create_backbone("mobilenetv3_small_050").eval() for _ in range(2)]
    share_low_stages(backbones, 0)
    x = images(2, 3, 32, 32)
    features = forward_shared(backbones, x, 0)
    assert all(torch.equal(f, b(x)) for f, b in zip(features, backbones, strict=True))


def test_a_trunk_that_is_not_shared_is_not_run_for_all() -> None:
    backbones = [create_backbone("resnet32") for _ in range(3)]
    share_low_stages(backbones[:2], 2)
    with pytest.raises(ValueError, match="do not share"):
        forward_shared(backbones, images(2, 3, 32, 32), 2)


@pytest.mark.parametrize(
    ("names", "stages", "message"),
    [
        (["resnet32", "resnet56"], 1, "resnet32_cifar, resnet56_cifar.* cohort.backbones"),
        (["mobilenetv3_small_050"] * 2, 1, "mobilenetv3_small_050 has no named stages"),
        (["resnet32"] * 2, 3, "resnet32_cifar can share 0 to 2 of its 3 stages"),
        (["resnet32"] * 2, -1, "can share 0 to 2"),
        (["resnet10t"] * 2, 4, "can share 0 to 3 of its 4 stages"),
    ],
)
def test_what_cannot_be_shared_names_the_key(names: list[str], stages: int, message: str) -> None:
    with pytest.raises(UserError, match=f"cohort.share_stages={stages}: .*{message}"):
        share_low_stages([create_backbone(name) for name in names], stages)


def test_networks_of_unlike_input_share_nothing() -> None:
    with pytest.raises(UserError, match="unlike architecture"):
        share_low_stages([create_backbone("resnet32", in_chans=c) for c in (1, 3)], 1)
    with pytest.raises(UserError, match="unlike architecture"):
        share_low_stages([create_backbone("resnet10t", small_images=s) for s in (True, False)], 1)


def test_stage_names() -> None:
    three = ("layer1", "layer2", "layer3")
    assert stage_names(create_backbone("densenet_bc_40_12")) == three
    assert stage_names(create_backbone("conv4")) == (*three, "layer4")
    assert stage_names(create_backbone("resnet10t", small_images=True)) == (*three, "layer4")
    assert stage_names(create_backbone("mobilenetv3_small_050")) is None
    assert stage_names(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (["resnet32"], 0),
        (["resnet32"] * 2, 0),
        (["resnet32"] * 3, 2),
        (["resnet10t"] * 2, 0),
        (["resnet10t"] * 4, 2),
        (["mobilenetv3_small_050"] * 3, 0),
        (["resnet32", "resnet32", "resnet56"], 0),
    ],
)
def test_default_sharing_is_the_papers(names: list[str], stages: int) -> None:
    assert default_share_stages([create_backbone(name) for name in names]) == stages


def run_python(code: str) -> str:
    root = str(Path(peerlearn.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_peerlearn_loads_neither_torch_nor_timm() -> None:
    code = "import peerlearn, sys; print(*sorted({'torch', 'timm'} & set(sys.modules)))"
    assert run_python(code).strip() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import peerlearn; from timm.models.resnet import ResNet; import timm",
        "import timm; import peerlearn",
        "import peerlearn.backbones; import timm",
    ],
)
def test_timm_knows_the_networks_in_either_import_order(imports: str) -> None:
    code = f"{imports}; print(timm.create_model('resnet32_cifar').num_classes, end=' ');"
    code += "print(timm.is_model('resnet18_small'), timm.is_model('conv4_cifar'))"
    assert run_python(code).split() == ["100", "True", "True"]


@pytest.mark.parametrize(
    ("kind", "size", "reduction"),
    [("small", 4, 8), ("small_padding2", 5, 8), ("small_pooled", 2, 16), ("small_no_relu", 4, 8)],
)
def test_small_stems_of_other_programs(kind: str, size: int, reduction: int) -> None:
    """Of 32 pixels, a stem with padding 2 makes 34, and three halvings of them leave 5."""
    backbone = randomise(create_backbone(f"resnet18_{kind}", in_chans=1), seed=1).eval()
    x = images(2, 1, 32, 32)
    assert backbone.forward_features(x).shape == (2, 512, size, size)
    assert backbone.feature_info[-1]["reduction"] == reduction
    plain = create_backbone("resnet18", in_chans=1, small_images=True).eval()
    plain.load_state_dict(backbone.state_dict())
    assert torch.equal(plain(x), backbone(x)) == (kind == "small")
