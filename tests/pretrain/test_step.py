"""What makes a step fast, and cannot be seen in its numbers."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peerlearn.compute.dist import Ranks
from pretrain.cohort import update_momentum
from pretrain.train import train_step
from tests.pretrain.test_host_waits import an_attempt


class Names(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def first_step(*more: str):
    attempt = an_attempt("cpu", *more)
    train_step(attempt, next(attempt.training.loader.epoch(0)))
    return attempt.training


def test_momentum_takes_two_operations_for_all_tensors_of_all_networks():
    method = an_attempt("cpu", "--cohort.networks", "3").training.method
    assert len(list(method.peers.parameters())) > 30
    with Names() as seen:
        update_momentum(method.peers, method.cohort, 0.9)
    assert seen.names == ["_foreach_mul_", "_foreach_add_"]


def test_convolutions_of_query_and_key_networks_are_given_channels_last(monkeypatch):
    seen: list[bool] = []
    plain = torch.nn.Conv2d.forward

    def forward(self, images):
        seen.extend(
            t.is_contiguous(memory_format=torch.channels_last) for t in (images, self.weight)
        )
        return plain(self, images)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    first_step("--cohort.batch_norm_splits", "4", "--cohort.networks", "2")
    # Four convolutions of two query and two key networks, and what the check of the image size ran once.
    assert len(seen) >= 2 * 4 * 4
    assert all(seen[-2 * 4 * 4 :])


def test_the_keys_of_all_networks_are_gathered_at_once(monkeypatch):
    shapes: list[tuple[int, ...]] = []
    plain = Ranks.gather

    def gather(self, tensor, dim=0):
        shapes.append(tuple(tensor.shape))
        return plain(self, tensor, dim)

    monkeypatch.setattr(Ranks, "gather", gather)
    first_step("--cohort.networks", "3")
    assert shapes == [(3, 32, 8)]
    shapes.clear()
    # Where keys are shuffled between parts of batch norm, the images too.
    first_step("--cohort.networks", "3", "--cohort.batch_norm_splits", "4")
    assert shapes == [(32, 1, 16, 16), (3, 32, 8)]
