"""Batch norm over two real processes, whose batches have several sizes, against plain batch norm over all pixels."""

import pytest
import torch
from torch import nn

from tests.e2e.runs import ends, launch

CHANNELS = 3
SIZES = [(2, 5, 7), (1, 4, 9)]
RANK = """
import os, sys, torch
from torch import nn
from peerlearn.compute.dist import start_ranks
from peerlearn.compute.sync_batch_norm import sync_batch_norm
place = sys.argv[1]
ranks = start_ranks("cpu", timeout_seconds=60)
layers = nn.Sequential(nn.BatchNorm2d(3))
layers.load_state_dict(torch.load(f"{place}/norm.pt"))
sync_batch_norm(layers, ranks)
images, factors = torch.load(f"{place}/batch-{ranks.rank}.pt")
images.requires_grad_()
output = layers(images)
(output * factors).sum().backward()
seen = {"output": output.detach(), "gradient": images.grad, "state": layers.state_dict()}
seen |= {name: getattr(layers[0], name).grad for name in ("weight", "bias")}
torch.save(seen, f"{place}/seen-{ranks.rank}.pt")
layers.eval()
torch.save(layers(images).detach(), f"{place}/eval-{ranks.rank}.pt")
"""


def pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, channels, H, W) -> (channels, B H W)."""
    return images.transpose(0, 1).flatten(1)


@pytest.mark.ddp
def test_batches_of_unlike_sizes_are_normalised_as_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(CHANNELS)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias)
    torch.save(
        {f"0.{name}": tensor for name, tensor in norm.state_dict().items()}, tmp_path / "norm.pt"
    )
    batches = []
    for rank, (count, height, width) in enumerate(SIZES):
        shape = (count, CHANNELS, height, width)
        images = torch.randn(shape, generator=generator) * (1 + rank) + 3 * rank
        batches.append((images, torch.randn(shape, generator=generator)))
        torch.save(batches[rank], tmp_path / f"batch-{rank}.pt")
    driver = tmp_path / "rank.py"
    driver.write_text(RANK)
    for code, output in ends(launch(2, str(tmp_path), driver=driver)):
        assert code == 0, output

    together = torch.cat([pixels(images) for images, _ in batches], 1)[None, :, None]
    factors = torch.cat([pixels(each) for _, each in batches], 1)[None, :, None]
    together.requires_grad_()
    expected = norm.train()(together)
    (expected * factors).sum().backward()
    seen = [torch.load(tmp_path / f"seen-{rank}.pt") for rank in (0, 1)]
    for name, whole in (("output", expected), ("gradient", together.grad)):
        ours = torch.cat([pixels(each[name]) for each in seen], 1)[None, :, None]
        torch.testing.assert_close(ours, whole.detach(), rtol=1e-4, atol=1e-5, msg=name)
    for name in ("weight", "bias"):
        total = seen[0][name] + seen[1][name]
        torch.testing.assert_close(total, getattr(norm, name).grad, rtol=1e-4, atol=1e-5)
    for each in seen:
        for name, tensor in norm.state_dict().items():
            torch.testing.assert_close(each["state"][f"0.{name}"], tensor, rtol=1e-5, atol=1e-6)
    for name, tensor in seen[0]["state"].items():
        assert torch.equal(tensor, seen[1]["state"][name]), name
    norm.eval()
    for rank, (images, _) in enumerate(batches):
        torch.testing.assert_close(torch.load(tmp_path / f"eval-{rank}.pt"), norm(images).detach())
