"""The guard of networks that have nothing to remember. With statistics: tests/pretrain/test_properties.py."""

import pytest
from torch import nn

from peerlearn.compute.guards import DivergedError, StepGuard


def test_networks_without_buffers_are_guarded_too() -> None:
    guard = StepGuard([nn.Linear(2, 2), nn.LayerNorm(2)], max_skipped_in_a_row=2)
    guard.remember()
    guard.skip(0, "a reason")
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    guard.remember()
    with pytest.raises(DivergedError, match="2 steps in a row"):
        guard.skip(1, "a reason")
