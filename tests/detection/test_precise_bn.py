"""PreciseBN against a derivation by hand: per-batch normalisation below, statistics of all pixels of all batches."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from detection.precise_bn import measure_batch_norm
from peerlearn.compute.dist import Ranks

RANKS = Ranks(torch.device("cpu"))
SIZES = [(2, 5, 7), (3, 4, 4), (1, 9, 6)]


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 1, bias=False),
        nn.BatchNorm2d(4),
    )
    for norm in (layers[1], layers[4]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return layers.train()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(count, 2, height, width, generator=generator) * (place + 1) + place
        for place, (count, height, width) in enumerate(SIZES)
    ]


def pixels(images: torch.Tensor) -> np.ndarray:
    """(B, channels, H, W) -> (channels, B H W), float64."""
    return images.double().permute(1, 0, 2, 3).flatten(1).numpy()


def weight_of(layer: nn.Module) -> np.ndarray:
    return layer.weight.detach().double().numpy()


def test_statistics_are_those_of_all_pixels_with_each_batch_normalised_by_its_own(network):
    measure_batch_norm(network, [partial(network, images) for images in batches()], RANKS)
    first, second = [], []
    for images in batches():
        seen = weight_of(network[0])[:, :, 0, 0] @ pixels(images)
        first.append(seen)
        mean, var = seen.mean(1, keepdims=True), seen.var(1, keepdims=True)
        scale, shift = weight_of(network[1])[:, None], network[1].bias.detach().double().numpy()
        normalised = (seen - mean) / np.sqrt(var + 1e-5) * scale + shift[:, None]
        second.append(weight_of(network[3])[:, :, 0, 0] @ np.maximum(normalised, 0))
    for norm, seen in ((network[1], first), (network[4], second)):
        together = np.concatenate(seen, axis=1)
        np.testing.assert_allclose(
            norm.running_mean.numpy(), together.mean(1), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(norm.running_var.numpy(), together.var(1), rtol=1e-5)
    # Not the mean of the batches' own variances, which leaves out how their means differ.
    own = np.mean([seen.var(1) for seen in first], axis=0)
    assert not np.allclose(network[1].running_var.numpy(), own, rtol=0.05)


def test_nothing_else_changes(network):
    network[1].num_batches_tracked.fill_(7)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measure_batch_norm(network, [partial(network, images) for images in batches()], RANKS)
    for name, tensor in network.state_dict().items():
        same = torch.equal(tensor, before[name])
        assert same == ("running" not in name), name
    assert network.training
    assert not network[1]._forward_pre_hooks
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_pass_that_fails_leaves_no_watcher(network):
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_batch_norm(network, [fail], RANKS)
    assert not network[1]._forward_pre_hooks
    assert int(network[1].num_batches_tracked) == 0


def test_statistics_of_large_means_keep_their_digits():
    norm = nn.BatchNorm2d(1).train()
    images = [torch.full((1, 1, 2, 2), 1000.0), torch.full((1, 1, 2, 2), 1000.25)]
    measure_batch_norm(norm, [partial(norm, each) for each in images], RANKS)
    assert float(norm.running_mean) == 1000.125
    assert float(norm.running_var) == pytest.approx(0.125**2)


def test_without_batch_norm_nothing_is_run():
    def run() -> None:
        raise AssertionError("it was run")

    measure_batch_norm(nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3)), [run], RANKS)
