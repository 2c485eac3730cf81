"""MoCo and SimCLR steps against the algorithm written out plainly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from pretrain.cohort import Cohort
from pretrain.cohort_config import CohortConfig
from pretrain.config import PretrainConfig
from pretrain.losses import MCLTerms, queue_terms, view_terms
from pretrain.method import build_method
from pretrain.method_config import QueueConfig
from pretrain.methods import SimCLR
from pretrain.terms import objective

ALONE = Ranks(torch.device("cpu"))


def config(**settings) -> PretrainConfig:
    cohort = settings.pop("cohort", CohortConfig(networks=2, embedding_dim=5))
    queue = settings.pop("queue", QueueConfig(size=10, momentum=0.9))
    return PretrainConfig(**{"temperature": 0.2, "cohort": cohort, "queue": queue, **settings})


def toy_cohort(networks: int = 2, seed: int = 0) -> Cohort:
    """Networks without batch norm, so that batches may be cut anywhere."""
    torch.manual_seed(seed)
    backbones = [nn.Sequential(nn.Flatten(), nn.Linear(12, 8)) for _ in range(networks)]
    heads = [nn.Linear(8, 5) for _ in range(networks)]
    return Cohort(backbones, heads)


def views(step: int, batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    first, second = torch.randn(2, batch, 3, 2, 2, generator=generator)
    return first, second


def test_moco_steps_equal_the_algorithm_written_out():
    """Three steps: EMA before the keys, the queue without this batch's keys, wrap-around at K = 10."""
    settings = config()
    cohort = toy_cohort()
    reference = copy.deepcopy(cohort)
    key_networks = copy.deepcopy(cohort)
    queue: list[Tensor] = []
    method = build_method(cohort, settings, ALONE)
    optimizer = torch.optim.SGD(cohort.parameters(), lr=0.5)
    plain = torch.optim.SGD(reference.parameters(), lr=0.5)
    for step in range(3):
        method.begin_step(step)
        optimizer.zero_grad()
        loss = objective(method.terms(views(step)), settings)
        loss.backward()
        optimizer.step()
        method.end_step()

        for k, q in zip(key_networks.parameters(), reference.parameters(), strict=True):
            k.data = k.data * 0.9 + q.data * 0.1
        first, second = views(step)

        def embed(networks: Cohort, m: int, x: Tensor) -> Tensor:
            return F.normalize(networks.heads[m](networks.backbones[m](x)), dim=-1)

        query = torch.stack([embed(reference, m, first) for m in range(2)])
        with torch.no_grad():
            key = torch.stack([embed(key_networks, m, second) for m in range(2)])
        rows = torch.cat(queue, 1)[:, -10:] if queue else torch.zeros(2, 0, 5)
        expected = queue_terms(query, key, rows, temperature=0.2).total()
        plain.zero_grad()
        expected.backward()
        plain.step()
        queue.append(key)
        torch.testing.assert_close(loss, expected)
    for a, b in zip(cohort.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    ring = torch.cat(queue, 1)
    assert method.queue.filled == 10
    assert method.queue.cursor == 8
    torch.testing.assert_close(method.queue.keys[:, :8], ring[:, 10:18])
    torch.testing.assert_close(method.queue.keys[:, 8:], ring[:, 8:10])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_accumulation_gives_the_same_gradient_and_queue(parts):
    settings = config()
    whole, cut = toy_cohort(), toy_cohort()
    methods = [build_method(c, settings, ALONE) for c in (whole, cut)]
    for step in range(2):
        for method, count in zip(methods, (1, parts), strict=True):
            method.begin_step(step)
            method.cohort.zero_grad()
            for part in zip(*(view.chunk(count) for view in views(step)), strict=True):
                (objective(method.terms(part), settings) / count).backward()
            method.end_step()
        for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(methods[0].queue.keys, methods[1].queue.keys)


def test_the_symmetric_loss_is_the_sum_of_both_directions_and_enqueues_both_views():
    one_way, both = config(), config(symmetric=True)
    first, second = views(0)
    plain, swapped, symmetric = (
        build_method(toy_cohort(), settings, ALONE) for settings in (one_way, one_way, both)
    )
    for method in (plain, swapped, symmetric):
        method.begin_step(0)
    expected = [
        a + b
        for a, b in zip(plain.terms((first, second)), swapped.terms((second, first)), strict=True)
    ]
    for a, b in zip(symmetric.terms((first, second)), expected, strict=True):
        torch.testing.assert_close(a, b)
    for method in (plain, swapped, symmetric):
        method.end_step()
    # 12 keys into 10 rows: the last 10 stay.
    keys = torch.cat([plain.queue.keys[:, :6], swapped.queue.keys[:, :6]], 1)
    torch.testing.assert_close(symmetric.queue.keys[:, 2:], keys[:, 2:10])
    torch.testing.assert_close(symmetric.queue.keys[:, :2], keys[:, 10:])


def test_shuffled_keys_come_back_in_the_images_order_with_other_partners():
    """Shuffle-BN: without batch norm the shuffle is invisible; with it, a key's part is another one."""
    settings = config(cohort=CohortConfig(networks=2, embedding_dim=5, batch_norm_splits=2))
    cohort = toy_cohort()
    method = build_method(cohort, settings, ALONE)
    method.begin_step(0)
    _, second = views(0)
    torch.testing.assert_close(method._encode_keys(second)[:, 0], cohort(second))
    orders = []
    method.peers.forward = lambda x: orders.append(x) or torch.zeros(2, len(x), 5)
    for step in (1, 1, 2):
        method.begin_step(step)
        method._encode_keys(second)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], second)


def test_simclr_is_the_view_form_of_both_views():
    settings = config(method="simclr")
    cohort = toy_cohort()
    method = build_method(cohort, settings, ALONE)
    assert isinstance(method, SimCLR)
    first, second = views(0)
    expected = view_terms(torch.stack([cohort(first), cohort(second)], 1), temperature=0.2)
    for ours, oracle in zip(method.terms((first, second)), expected, strict=True):
        assert ours.shape == (2,)
        torch.testing.assert_close(ours.sum(), oracle)


def test_terms_switched_off_do_not_train():
    terms = MCLTerms(*(torch.full((2,), float(value)) for value in (1, 10, 100, 1000)))
    assert objective(terms, config(alpha=1.0, beta=1.0)).item() == 2222
    assert objective(terms, config(alpha=1.0, beta=1.0, terms=["scl_hard", "icl_soft"])) == 2002
    assert objective(terms, config(alpha=0.5, beta=0.1, terms=["scl_soft"])).item() == 10


def test_moco_state_round_trip():
    settings = config()
    method, twin = (
        build_method(toy_cohort(), settings, ALONE),
        build_method(toy_cohort(seed=1), settings, ALONE),
    )
    method.begin_step(0)
    method.terms(views(0))
    method.end_step()
    state = {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in method.state_tensors().items()
    }
    twin.load_state_tensors(state)
    assert torch.equal(twin.queue.keys, method.queue.keys)
    for a, b in zip(twin.peers.parameters(), method.peers.parameters(), strict=True):
        assert torch.equal(a, b)
    assert method.metrics() == {"queue/filled_percent": 60.0}
