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


def objective(terms: Terms, config: PretrainConfig) -> Tensor:
    """Eq. 6 over the terms that ``config.terms`` switches on, and the other terms: from (M,) vectors one scalar."""
    total = _contrastive(terms, config).sum()
    return total + sum((term.sum() for term in terms[4:]), start=torch.zeros_like(total))


def network_losses(terms: Terms, config: PretrainConfig) -> Tensor:
    """What each network adds to `objective`: (M,)."""
    parts = (_contrastive(terms, config), *terms[4:])
    return torch.stack([part for part in parts if len(part)]).sum(0)


def _contrastive(terms: Terms, config: PretrainConfig) -> Tensor:
    """(M,), or (0,) where no contrastive term trains."""
    contrastive = MCLTerms(*terms[:4])
    off = {
        name: torch.zeros_like(term)
        for name, term in contrastive._asdict().items()
        if name not in config.terms
    }
    return contrastive._replace(**off).total(config.alpha, config.beta)
