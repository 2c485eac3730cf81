"""The ring against a plain list."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.key_queue import KeyQueue


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 23), max_size=8))
def test_holds_the_last_keys_of_all_networks_in_lockstep(size, batches):
    queue = KeyQueue(networks=2, size=size, dim=1)
    ring: list[float | None] = [None] * size
    serial = 0
    for batch in batches:
        values = torch.arange(serial, serial + batch, dtype=torch.float32)
        queue.enqueue(torch.stack([values, -values]).unsqueeze(-1))
        for value in values.tolist():
            ring[serial % size] = value
            serial += 1
    assert queue.filled == min(serial, size)
    assert queue.cursor == serial % size
    expected = torch.tensor([value for value in ring if value is not None])
    assert torch.equal(queue.keys[0, : queue.filled, 0], expected)
    assert torch.equal(queue.keys[1, : queue.filled, 0], -expected)


def test_keys_of_another_shape_are_refused():
    queue = KeyQueue(2, 8, 4)
    with pytest.raises(ValueError, match=r"keys must be \(2, B, 4\), got \(3, 5, 4\)"):
        queue.enqueue(torch.zeros(3, 5, 4))


def test_state_round_trip_continues_alike_and_other_shapes_are_refused():
    a, b = KeyQueue(1, 5, 2), KeyQueue(1, 5, 2)
    a.enqueue(torch.randn(1, 7, 2))
    b.load_state_tensors({name: tensor.clone() for name, tensor in a.state_tensors().items()})
    more = torch.randn(1, 4, 2)
    a.enqueue(more)
    b.enqueue(more)
    assert torch.equal(a.keys, b.keys)
    assert (a.filled, a.cursor) == (b.filled, b.cursor) == (5, 1)
    with pytest.raises(ValueError, match="saved queue"):
        KeyQueue(1, 6, 2).load_state_tensors(a.state_tensors())


def test_enqueue_keeps_the_storage_in_place():
    queue = KeyQueue(1, 4, 2)
    before = queue.keys.data_ptr()
    queue.enqueue(torch.randn(1, 3, 2))
    assert queue.keys.data_ptr() == before
