"""The weight of the terms between networks: how it rises, and what it does to a step."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from pretrain.cohort_config import CohortConfig
from pretrain.config import PretrainConfig
from pretrain.losses import MCLTerms, queue_terms_by_network
from pretrain.terms import mutual_weight, network_losses, objective
from tests.pretrain.embeddings import unit

CONFIG = PretrainConfig(alpha=0.5, beta=0.25)
OWN = dataclasses.replace(CONFIG, terms=["scl_hard"])


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "expected"),
    [
        # 1.5 x 7 = 10.5 steps: the rise ends between two steps.
        (1.5, 7, {0: 0.0, 1: 2 / 21, 7: 14 / 21, 10: 20 / 21, 11: 1.0, 1000: 1.0}),
        (0.3, 5, {0: 0.0, 1: 2 / 3, 2: 1.0}),
        (2.0, 4, {0: 0.0, 4: 0.5, 7: 7 / 8, 8: 1.0, 9: 1.0}),
        (1e-3, 3, {0: 0.0, 1: 1.0}),
        (0.0, 4, {0: 1.0, 1: 1.0}),
    ],
)
def test_the_weight_is_the_share_of_the_warmup_that_is_done(epochs, steps_per_epoch, expected):
    config = dataclasses.replace(CONFIG, mutual_warmup_epochs=epochs)
    found = {
        step: mutual_weight(step, config, steps_per_epoch=steps_per_epoch) for step in expected
    }
    assert found == pytest.approx(expected, rel=1e-15)
    assert all(found[step] == weight for step, weight in expected.items() if weight in (0, 1))


def test_the_weight_is_on_all_that_comes_from_peers_and_on_nothing_else():
    terms = MCLTerms(*(torch.tensor([1.0, 2.0]) * 10**power for power in range(4)))
    # 0.5 (1 + 0.5 x 10) + 0.25 x 0.5 (100 + 1000) for the first network.
    assert network_losses(terms, CONFIG, 0.5).tolist() == [140.5, 281.0]
    assert float(objective(terms, CONFIG, 0.5)) == 421.5
    some = dataclasses.replace(CONFIG, terms=["scl_hard", "icl_soft"])
    assert network_losses(terms, some, 0.5).tolist() == [125.5, 251.0]
    assert network_losses(terms, OWN, 0.5).tolist() == [0.5, 1.0]


def gradients(config: PretrainConfig, mutual: float | None, backend: str) -> tuple[Tensor, Tensor]:
    """Value and gradient of the objective; None = as it is without any weight: Eq. 6 itself."""
    query = unit(3, 6, 8, seed=1, dtype=torch.float32).requires_grad_()
    terms = queue_terms_by_network(
        query,
        unit(3, 6, 8, seed=2, dtype=torch.float32),
        unit(3, 20, 8, seed=3, dtype=torch.float32),
        temperature=0.2,
        backend=backend,
    )
    plain = terms.total(config.alpha, config.beta).sum()
    loss = plain if mutual is None else objective(terms, config, mutual)
    return loss.detach(), torch.autograd.grad(loss, query)[0]


@pytest.mark.parametrize("backend", ["reference", "flat"])
def test_no_weight_is_the_first_term_alone_and_full_weight_is_equation_6_bit_for_bit(backend):
    plain, own = gradients(CONFIG, None, backend), gradients(OWN, 1.0, backend)
    for found, expected in (
        (gradients(CONFIG, 1.0, backend), plain),
        (gradients(CONFIG, 0.0, backend), own),
    ):
        assert all(map(torch.equal, found, expected))
    # Where nothing else trains, a first step without any weight is a step of no gradient.
    assert not gradients(dataclasses.replace(CONFIG, terms=["icl_soft"]), 0.0, backend)[1].any()
    half = gradients(CONFIG, 0.5, backend)
    torch.testing.assert_close(half[1], (plain[1] + own[1]) / 2)
    assert all(
        not torch.equal(a[1], b[1]) for a, b in itertools.combinations((plain, own, half), 2)
    )


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_warmup_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match="mutual_warmup_epochs must be at least 0 and finite"):
        PretrainConfig(mutual_warmup_epochs=value)


@pytest.mark.parametrize(
    "settings", [{"cohort": CohortConfig(networks=1)}, {"terms": ["scl_hard"]}, {"beta": 0.0}]
)
def test_without_terms_between_networks_it_is_accepted_as_alpha_and_beta_are(settings):
    assert PretrainConfig(mutual_warmup_epochs=2.0, **settings).mutual_warmup_epochs == 2.0
