"""NaN and Inf in what losses are given: which term, which network, which row.

Dimensions: M networks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.compute.guards import NonFiniteError


class Check(NamedTuple):
    """What was looked at.

    Attributes:
        term: term whose computation it would spoil.
        name: name of the tensor.
        finite_rows: bool (M, rows), on the device.
    """

    term: str
    name: str
    finite_rows: Tensor


_deferred: ContextVar[list[Check] | None] = ContextVar("deferred", default=None)


def require_finite(term: str, name: str, tensor: Tensor, *, at_once: bool = False) -> None:
    """Make sure that no network's (rows, N) slice of the (M, rows, N) tensor holds NaN or Inf.

    Within `deferred_checks` it only notes what there is to see.

    Args:
        term: term whose computation it would spoil, for the message.
        name: name of the tensor, likewise.
        at_once: look now in any case.

    Raises:
        NonFiniteError: a slice does; the message names term, network and row.
    """
    check = Check(term, name, torch.isfinite(tensor.detach()).all(-1))
    checks = _deferred.get()
    if checks is not None and not at_once:
        checks.append(check)
    elif fault := first_fault([check]):
        raise NonFiniteError(fault)


@contextmanager
def deferred_checks() -> Iterator[list[Check]]:
    """Collect what `require_finite` looks at, so that a training step need not wait for the device at each."""
    checks: list[Check] = []
    token = _deferred.set(checks)
    try:
        yield checks
    finally:
        _deferred.reset(token)


def first_fault(checks: Sequence[Check]) -> str | None:
    """What the first check says that found NaN or Inf; None if none did."""
    for term, name, finite_rows in checks:
        if not finite_rows.all():
            network = int((~finite_rows).any(-1).nonzero()[0])
            bad = (~finite_rows[network]).nonzero().flatten()
            return (
                f"{term} of network {network} is not finite: {name}[{network}] holds NaN or Inf "
                f"in {len(bad)} of {finite_rows.shape[1]} rows, the first is row {int(bad[0])}"
            )
    return None
