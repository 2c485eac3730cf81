"""Whether what a step has computed can be trusted, as a flag on the device; and, if not, what is wrong with it.

Dimensions: M networks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peerlearn.compute.guards import all_finite, gradients
from pretrain.cohort import Cohort
from pretrain.finite import Check
from pretrain.terms import Terms


def terms_are_finite(checks: Sequence[Check], parts: Sequence[Terms]) -> Tensor:
    """Whether all that the losses checked, and every term of every micro-batch, is finite: bool (), on the device."""
    flags = [check.finite_rows.all() for check in checks]
    flags += [torch.isfinite(torch.cat(list(terms))).all() for terms in parts]
    return torch.stack(flags).all()


def term_fault(parts: Sequence[Terms]) -> str | None:
    """Which term of which network is not finite, the first of them; None if all are."""
    for terms in parts:
        for name, term in zip(terms._fields, terms, strict=True):
            bad = (~torch.isfinite(term)).nonzero()
            if len(bad):
                return f"{name} of network {int(bad[0])} is not finite"
    return None


def gradient_fault(cohort: Cohort) -> str | None:
    """Which network's gradient is not finite, if any."""
    for m in range(len(cohort.backbones)):
        for name, part in cohort.parts(m):
            if not all_finite(gradients(part.parameters())):
                return f"the gradient of network {m}'s {name} is not finite"
    if cohort.gate is not None and not all_finite(gradients(cohort.gate.parameters())):
        return "the gradient of the gate is not finite"
    return None
