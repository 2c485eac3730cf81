"""What a step's loss is made of, and how it is put together. Dimension: M networks."""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import PretrainConfig
from pretrain.losses import MCLTerms


class SupervisedTerms(NamedTuple):
    """The terms of supervised training: (M,) vectors, or (0,) where the config leaves a term out.

    The first four are those of `MCLTerms`. ``cross_entropy`` is each network's own (Eq. 7), ``teaching`` what it learns
    from its peers' logits.
    """

    scl_hard: Tensor
    scl_soft: Tensor
    icl_hard: Tensor
    icl_soft: Tensor
    cross_entropy: Tensor
    teaching: Tensor


class PrototypicalTerms(NamedTuple):
    """The terms of few-shot training: (M,) vectors, or (0,) where the config leaves a term out.

    The first four are those of `MCLTerms`. ``prototypical`` is each network's own loss of the episode's queries.
    """

    scl_hard: Tensor
    scl_soft: Tensor
    icl_hard: Tensor
    icl_soft: Tensor
    prototypical: Tensor


Terms = MCLTerms | SupervisedTerms | PrototypicalTerms


# What a network learns from its peers.
_MUTUAL = ("scl_soft", "icl_hard", "icl_soft")


def mutual_weight(step: int, config: PretrainConfig, *, steps_per_epoch: int) -> float:
    """The factor of the terms between networks at optimiser step ``step``, counted from 0.

    It rises linearly from 0 to 1 over ``config.mutual_warmup_epochs``; where they are 0 it is 1 from the start.
    """
    warmup_steps = config.mutual_warmup_epochs * steps_per_epoch
    return step / warmup_steps if step < warmup_steps else 1.0


def objective(terms: Terms, config: PretrainConfig, mutual: float = 1.0) -> Tensor:
    """Eq. 6 over the terms that ``config.terms`` switches on, and the other terms: from (M,) vectors one scalar.

    Args:
        terms: (M,) vectors.
        config: which terms count, and by how much.
        mutual: factor of the terms between networks, by `mutual_weight`.
    """
    total = _contrastive(terms, config, mutual).sum()
    return total + sum((term.sum() for term in terms[4:]), start=torch.zeros_like(total))


def network_losses(terms: Terms, config: PretrainConfig, mutual: float = 1.0) -> Tensor:
    """What each network adds to `objective`: (M,)."""
    parts = (_contrastive(terms, config, mutual), *terms[4:])
    return torch.stack([part for part in parts if len(part)]).sum(0)


def _contrastive(terms: Terms, config: PretrainConfig, mutual: float) -> Tensor:
    """(M,), or (0,) where no contrastive term trains."""
    contrastive = MCLTerms(*terms[:4])
    weighted = {name: getattr(contrastive, name) * mutual for name in _MUTUAL}
    off = {
        name: torch.zeros_like(term)
        for name, term in contrastive._asdict().items()
        if name not in config.terms
    }
    return contrastive._replace(**(weighted | off)).total(config.alpha, config.beta)
