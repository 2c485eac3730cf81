"""Heads trained side by side against torch's own linear layer, autograd and SGD, one at a time."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from linear_eval.heads import LinearHeads

LRS = [0.01, 0.3, 30.0]
FACTORS = [1.0, 1.0, 0.5, 0.1, 0.1]


def batches(steps: int, *, size: int = 12, features: int = 7, classes: int = 5) -> list:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size - step % 3, features, generator=generator),
            torch.randint(classes, (size - step % 3,), generator=generator),
        )
        for step in range(steps)
    ]


def make_heads(lrs: list[float], **changes) -> LinearHeads:
    settings = {"momentum": 0.9, "weight_decay": 0.0, "nesterov": False, "seed": 3}
    return LinearHeads(7, 5, lrs=lrs, device=torch.device("cpu"), **{**settings, **changes})


def torch_head(start: Tensor, lr: float, **settings) -> tuple[Tensor, Tensor, list[float]]:
    """Weight (D, C), bias (C,) and losses of one torch.nn.Linear after the same steps."""
    layer = torch.nn.Linear(*start.shape)
    with torch.no_grad():
        layer.weight.copy_(start.T)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, **settings)
    losses = []
    for (features, labels), factor in zip(batches(len(FACTORS)), FACTORS, strict=True):
        optimizer.param_groups[0]["lr"] = lr * factor
        optimizer.zero_grad()
        loss = cross_entropy(layer(features), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return layer.weight.detach().T, layer.bias.detach(), losses


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.0},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    ],
    ids=str,
)
def test_every_head_is_torchs_linear_layer_trained_alone(settings):
    heads = make_heads(LRS, **settings)
    start = heads.weight[:, 0].clone()
    losses = [
        heads.step(features, labels, factor=factor)
        for (features, labels), factor in zip(batches(len(FACTORS)), FACTORS, strict=True)
    ]
    for number, lr in enumerate(LRS):
        weight, bias, expected = torch_head(start, lr, **settings)
        torch.testing.assert_close(heads.weight[:, number], weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(heads.bias[number], bias, rtol=1e-4, atol=1e-4)
        assert [float(each[number]) for each in losses] == pytest.approx(expected, rel=1e-4)


def test_a_head_among_thirteen_learns_what_it_learns_alone():
    lrs = [0.001 * 2**power for power in range(13)]
    together, alone = make_heads(lrs), make_heads([lrs[7]])
    for features, labels in batches(6):
        together.step(features, labels, factor=1.0)
        alone.step(features, labels, factor=1.0)
    torch.testing.assert_close(together.weight[:, 7], alone.weight[:, 0], rtol=1e-5, atol=1e-6)


def test_a_head_that_diverges_leaves_the_others_alone():
    heads, without = make_heads([0.1, 1e38]), make_heads([0.1])
    for features, labels in batches(20):
        heads.step(1e3 * features, labels, factor=1.0)
        without.step(1e3 * features, labels, factor=1.0)
    assert not heads.weight[:, 1].isfinite().all()
    torch.testing.assert_close(heads.weight[:, 0], without.weight[:, 0], rtol=1e-5, atol=1e-6)


def test_the_start_is_the_published_one_and_the_seeds():
    heads = LinearHeads(
        400, 50, lrs=[1.0, 2.0], momentum=0, weight_decay=0, nesterov=False, seed=5,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert float(heads.weight.std()) == pytest.approx(0.01, rel=0.02)
    assert float(heads.weight.mean()) == pytest.approx(0.0, abs=3e-4)
    assert torch.equal(heads.weight[:, 0], heads.weight[:, 1])
    assert not heads.bias.any()
    assert torch.equal(make_heads([1.0]).weight, make_heads([1.0]).weight)
    assert not torch.equal(make_heads([1.0]).weight, make_heads([1.0], seed=4).weight)
