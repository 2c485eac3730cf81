"""Gradients that are averaged while backward goes on, over real processes, against the plain average after it."""

import pytest
import torch
from torch import nn

from peerlearn.compute.dist import Ranks
from peerlearn.compute.gradient_average import GradientAverage
from tests.e2e.runs import ends, launch

RANK = """
import sys, torch
from torch import nn
from peerlearn.compute import dist
from peerlearn.compute.dist import start_ranks
from peerlearn.compute.gradient_average import GradientAverage
place = sys.argv[1]
dist._BUCKET_ELEMENTS = 150
ranks = start_ranks("cpu", timeout_seconds=60)
torch.manual_seed(0)
trunk = nn.Linear(7, 11)
branches = nn.ModuleList(nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 3)) for _ in range(3))
unused = nn.Linear(2, 2)
parameters = [*unused.parameters(), *trunk.parameters(), *branches.parameters()]
average = GradientAverage(parameters, ranks)
assert len(average._buckets) == 7
torch.manual_seed(1 + ranks.rank)

def loss():
    low = trunk(torch.randn(5, 7))
    return sum(branch(low).square().mean() for branch in branches)

sent = []
# The last of one micro-batch, of two, and of none: a fault that every rank has seen came before it.
for parts, faulty in ((1, False), (2, False), (1, True)):
    for p in parameters:
        p.grad = None
    for part in range(parts):
        value = loss()
        if part == parts - 1 and not faulty:
            average.begin()
        value.backward()
        sent.append(len(average._sent))
    expected = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    average.finish()
    ranks.average_(expected)
    for p, mean in zip(parameters, expected):
        assert (p.grad is None) == any(p is other for other in unused.parameters())
        assert p.grad is None or torch.equal(p.grad, mean)
torch.save(sent, f"{place}/sent-{ranks.rank}.pt")
torch.save([p.grad for p in trunk.parameters()], f"{place}/mean-{ranks.rank}.pt")
ranks.close()
"""


@pytest.mark.ddp
@pytest.mark.parametrize("processes", [2, 3])
def test_the_mean_is_the_plain_one_bit_for_bit_and_part_of_it_is_sent_in_backward(
    processes, tmp_path
):
    driver = tmp_path / "rank.py"
    driver.write_text(RANK)
    for code, output in ends(launch(processes, str(tmp_path), driver=driver)):
        assert code == 0, output
    means = [torch.load(tmp_path / f"mean-{rank}.pt") for rank in range(processes)]
    assert all(
        torch.equal(*pair) for other in means[1:] for pair in zip(means[0], other, strict=True)
    )
    # Only the first bucket, sent last, waits for the end: it holds a parameter without a gradient.
    assert torch.load(tmp_path / "sent-0.pt") == [6, 0, 6, 0]


def test_one_process_has_its_gradients_as_they_are():
    layer = nn.Linear(2, 1)
    average = GradientAverage(layer.parameters(), Ranks(torch.device("cpu")))
    average.begin()
    layer(torch.ones(1, 2)).sum().backward()
    average.finish()
    assert layer.weight.grad.tolist() == [[1, 1]]
