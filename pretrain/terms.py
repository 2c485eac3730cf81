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


Terms = MCLTerms | SupervisedTerms


def objective(terms: Terms, config: PretrainConfig) -> Tensor:
    """Eq. 6 over the terms that ``config.terms`` switches on and, supervised, Eq. 10: from (M,) vectors one scalar."""
    contrastive = MCLTerms(*terms[:4])
    off = {
        name: torch.zeros_like(term)
        for name, term in contrastive._asdict().items()
        if name not in config.terms
    }
    total = contrastive._replace(**off).total(config.alpha, config.beta).sum()
    return total + sum((term.sum() for term in terms[4:]), start=torch.zeros_like(total))
