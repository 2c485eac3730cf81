"""The passes over tiles of the queue against the readable computation, which other tests hold to the definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlearn.compute.guards import NonFiniteError
from pretrain.flat_loss import flat_batch_terms
from pretrain.losses import batch_terms, batch_terms_by_network, queue_terms, queue_terms_by_network
from pretrain.row_sums import Form
from tests.pretrain.embeddings import errors_against_float64, unit, vectors


def values_and_gradient(query: Tensor, key: Tensor, queue: Tensor, weights: Tensor, **keys):
    query = query.detach().requires_grad_()
    terms = torch.stack(tuple(queue_terms_by_network(query, key, queue, **keys)))
    (gradient,) = torch.autograd.grad((terms * weights).sum(), query)
    return terms.detach(), gradient


@given(
    networks=st.integers(1, 4),
    batch=st.integers(1, 6),
    rows=st.integers(0, 40),
    filled=st.none() | st.integers(0, 40),
    temperature=st.sampled_from([0.01, 0.02, 0.07, 0.5, 2.0]),
    soft_temperature=st.sampled_from([0.1, 0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 100.0]),
    same=st.booleans(),
    tile_bytes=st.sampled_from([1, 3000, 2**24]),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_reference_in_float64(
    networks, batch, rows, filled, temperature, soft_temperature, same, tile_bytes, seed
):
    """Values of each network, and the gradient of any weighting of them; tiles that do not divide the queue evenly."""
    query, key = unit(networks, batch, 7, seed=seed), unit(networks, batch, 7, seed=seed + 100)
    queue = unit(networks, rows, 7, seed=seed + 200)
    weights = torch.rand(4, networks, generator=torch.Generator().manual_seed(seed)).double()
    keys = {
        "temperature": temperature,
        "soft_temperature": soft_temperature,
        "same_sample_positive": same,
        "filled": None if filled is None else min(filled, rows),
        "tile_bytes": tile_bytes,
    }
    ours = values_and_gradient(query, key, queue, weights, backend="flat", **keys)
    exact = values_and_gradient(query, key, queue, weights, backend="reference", **keys)
    for mine, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9 / temperature)


@pytest.mark.parametrize("soft_temperature", [0.1, 1.0, 3.0, 5.0, 100.0])
@pytest.mark.parametrize("tau", [0.01, 0.07, 0.5])
@pytest.mark.parametrize("networks", [1, 2, 8])
@pytest.mark.parametrize("kind", ["random", "near", "duplicated", "one direction"])
def test_the_numerical_promise_in_float32(networks, tau, soft_temperature, kind):
    """Value: 1e-5 max(|v|, max(1, M (M - 1)) / tau). Gradient: 1e-5 max(|g|, M / (tau^2 sqrt(B)))."""
    keys = {"temperature": tau, "soft_temperature": soft_temperature, "tile_bytes": 20_000}
    for value_error, gradient_error in errors_against_float64(
        *vectors(kind, networks), backend="flat", **keys
    ):
        assert value_error <= 1
        assert gradient_error <= 1


@pytest.mark.parametrize(("tau", "soft_temperature"), [(0.07, 3.0), (0.1, 1.0), (0.01, 3.0)])
def test_random_unit_vectors_keep_five_digits(tau, soft_temperature):
    query, key = (unit(3, 16, 128, seed=seed, dtype=torch.float32) for seed in (1, 2))
    queue = unit(3, 1000, 128, seed=3, dtype=torch.float32)
    keys = {"temperature": tau, "soft_temperature": soft_temperature}
    weights = torch.ones(4, 3)
    ours = values_and_gradient(query, key, queue, weights, backend="flat", **keys)
    exact = values_and_gradient(
        query.double(), key.double(), queue.double(), weights, backend="reference", **keys
    )
    assert ((ours[0] - exact[0]) / exact[0]).abs().max() < 1e-5
    assert (ours[1] - exact[1]).norm() / exact[1].norm() < 1e-5


def test_a_queue_of_half_precision_is_read_as_it_is():
    query, key = (unit(2, 4, 16, seed=seed, dtype=torch.float32) for seed in (1, 2))
    queue = unit(2, 33, 16, seed=3).half()
    weights = torch.ones(4, 2)
    keys = {"temperature": 0.1, "backend": "flat", "tile_bytes": 4000}
    ours = values_and_gradient(query, key, queue, weights, **keys)
    widened = values_and_gradient(query, key, queue.float(), weights, **keys)
    for mine, expected in zip(ours, widened, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("tile_bytes", [4000, 2**24])
@pytest.mark.parametrize("changed", ["key", "queue"])
def test_what_is_changed_before_backward_is_refused(changed, tile_bytes):
    inputs = {"key": unit(2, 3, 4, seed=1), "queue": unit(2, 50, 4, seed=2)}
    query = unit(2, 3, 4, seed=3).requires_grad_()
    loss = queue_terms(query, **inputs, temperature=0.1, backend="flat", tile_bytes=tile_bytes)
    inputs[changed][0, 0, 0] = 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total().backward()


def test_a_second_derivative_is_refused():
    query = unit(2, 3, 4, seed=3).requires_grad_()
    loss = queue_terms(
        query, unit(2, 3, 4, seed=1), unit(2, 9, 4, seed=2), temperature=0.1, backend="flat"
    )
    with pytest.raises(RuntimeError, match="the flat loss can be differentiated once"):
        torch.autograd.grad(loss.total(), query, create_graph=True)


def test_no_gradient_reaches_key_or_queue():
    leaves = [unit(2, n, 4, seed=n).requires_grad_() for n in (3, 3, 9)]
    loss = queue_terms(*leaves, temperature=0.1, backend="flat").total()
    query, key, queue = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert query.abs().sum() > 0
    assert key is None
    assert queue is None


@pytest.mark.parametrize("where", ["query", "key", "queue"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_input_names_term_network_and_tensor(where, value):
    inputs = {name: unit(2, n, 4, seed=n) for name, n in (("query", 3), ("key", 3), ("queue", 5))}
    inputs[where][1, 2, 0] = value
    with pytest.raises(NonFiniteError, match=rf"scl_hard of network 1 .* {where}\[1\].* row 2"):
        queue_terms(**inputs, temperature=0.1, backend="flat")


def test_under_autocast_it_is_computed_in_float32():
    query, key, queue = (unit(2, n, 16, seed=n, dtype=torch.float32) for n in (4, 4, 90))
    weights = torch.ones(4, 2)
    keys = {"temperature": 0.1, "backend": "flat"}
    plain = values_and_gradient(query, key[:, :4], queue, weights, **keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = values_and_gradient(query, key[:, :4], queue, weights, **keys)
    for mine, expected in zip(under, plain, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, expected)


def test_auto_takes_it_for_large_sizes():
    """Equal to its bits, which differ from those of the reference."""
    query, key = (unit(2, 64, 32, seed=seed, dtype=torch.float32) for seed in (1, 2))
    queue = unit(2, 256, 32, seed=3, dtype=torch.float32)
    weights = torch.ones(4, 2)
    auto, flat, reference = (
        values_and_gradient(query, key, queue, weights, temperature=0.1, backend=backend)[1]
        for backend in ("auto", "flat", "reference")
    )
    assert torch.equal(auto, flat)
    assert not torch.equal(auto, reference)


def test_the_same_bits_again():
    query, key, queue = (unit(3, n, 16, seed=n, dtype=torch.float32) for n in (5, 5, 700))
    keys = {"temperature": 0.1, "backend": "flat"}
    runs = [
        values_and_gradient(query, key, queue, torch.ones(4, 3), tile_bytes=tile_bytes, **keys)
        for tile_bytes in (10_000, 10_000)
    ]
    for one, other in itertools.pairwise(runs):
        assert all(torch.equal(mine, expected) for mine, expected in zip(one, other, strict=True))


@given(
    networks=st.integers(1, 4),
    batch=st.integers(2, 13),
    classes=st.integers(1, 13),
    temperature=st.sampled_from([0.01, 0.07, 0.5]),
    soft_temperature=st.sampled_from([0.5, 1.0, 3.0, 100.0]),
    same=st.booleans(),
    tile_bytes=st.sampled_from([1, 9000, 2**24]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_the_labelled_form_equals_the_reference_in_float64(
    networks, batch, classes, temperature, soft_temperature, same, tile_bytes, seed
):
    """Anchors and candidates are live; anchors without a positive and batches of one class are among these."""
    embedding = unit(networks, batch, 7, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (batch,), generator=generator)
    weights = torch.rand(4, networks, generator=generator).double()

    def weighted(terms: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad((terms * weights).sum(), leaf)
        return terms.detach(), gradient

    leaf = embedding.clone().requires_grad_()
    form = Form(temperature, soft_temperature, tile_bytes)
    ours = weighted(flat_batch_terms(leaf, labels, form, same_sample_positive=same), leaf)
    readable = batch_terms_by_network(
        leaf,
        labels,
        temperature=temperature,
        soft_temperature=soft_temperature,
        same_sample_positive=same,
    )
    exact = weighted(torch.stack(tuple(readable)), leaf)
    for mine, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-8 / temperature)


def test_large_labelled_batches_take_the_passes_and_draws_of_negatives_do_not():
    embedding = unit(2, 128, 32, seed=1, dtype=torch.float32)
    labels = torch.arange(64).repeat(2)
    flat = flat_batch_terms(embedding, labels, Form(0.1, 1.0, 2**24), same_sample_positive=True)
    ours = batch_terms_by_network(embedding, labels, temperature=0.1)
    assert torch.equal(torch.stack(tuple(ours)), flat)
    leaf = embedding.clone().requires_grad_()
    drawn = batch_terms(
        leaf, labels, temperature=0.1, num_negatives=126, generator=torch.Generator().manual_seed(0)
    )
    # All negatives are kept, and the readable form can be differentiated twice.
    torch.testing.assert_close(torch.stack(tuple(drawn)), flat.sum(1), rtol=1e-5, atol=1e-5)
    torch.autograd.grad(drawn.total(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="or a smaller batch"):
        torch.autograd.grad(
            batch_terms(leaf, labels, temperature=0.1).total(), leaf, create_graph=True
        )
