"""Parameter groups and the state that a checkpoint keeps."""

import copy

import pytest
import torch
from torch import nn

from peerlearn.compute.optimizers import (
    OptimizerConfig,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        images = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).pow(2).sum().backward()
        optimizer.step()


def test_sgd_decays_everything_as_moco_does_or_only_weights():
    everything = build_optimizer(network(), OptimizerConfig(weight_decay=0.1), lr=0.5)
    assert [len(group["params"]) for group in everything.param_groups] == [6]
    weights = build_optimizer(
        network(), OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=False), lr=0.5
    )
    decay = {
        p.ndim: group["weight_decay"] for group in weights.param_groups for p in group["params"]
    }
    assert decay == {2: 0.1, 1: 0.0}


def test_one_sgd_step_is_the_textbook_update():
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig(momentum=0.9, weight_decay=0.1), lr=0.5)
    model(torch.tensor([[1.0, 2.0]])).sum().backward()
    optimizer.step()
    expected = before - 0.5 * (torch.tensor([[1.0, 2.0]]) + 0.1 * before)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_one_lars_step_is_the_papers_trust_ratio():
    """You et al. 2017: the step of a layer is scaled by eta |w| / (|g| + wd |w|), eta = 0.001."""
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(
        model, OptimizerConfig(name="lars", momentum=0.0, weight_decay=0.01), lr=2.0
    )
    model(torch.tensor([[1.0, -2.0, 0.5]])).sum().backward()
    gradient = model.weight.grad.clone()
    optimizer.step()
    trust = 0.001 * before.norm() / (gradient.norm() + 0.01 * before.norm())
    expected = before - 2.0 * trust * (gradient + 0.01 * before)
    torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_saved_state_continues_bit_for_bit(name):
    config = OptimizerConfig(name=name, weight_decay=0.01)
    model = network()
    optimizer = build_optimizer(model, config, lr=0.01)
    steps(model, optimizer, 3)
    twin = copy.deepcopy(model)
    twin_optimizer = build_optimizer(twin, config, lr=0.01)
    load_optimizer_tensors(
        twin_optimizer, {k: v.clone() for k, v in optimizer_tensors(optimizer).items()}
    )
    steps(model, optimizer, 2)
    steps(twin, twin_optimizer, 2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
