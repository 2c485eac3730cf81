"""The four terms against an independent float64 re-derivation, closed forms and the published MoCo code's sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlearn.compute.guards import NonFiniteError
from pretrain.losses import (
    MCLTerms,
    batch_terms,
    queue_terms,
    queue_terms_by_network,
    view_terms,
)
from pretrain.soft_kl import soft_kl
from tests.pretrain.embeddings import errors_against_float64, unit, vectors


def soften(logits: Tensor, temperature: float) -> Tensor:
    scaled = torch.exp(logits / temperature - (logits / temperature).max())
    return scaled / scaled.sum()


def plain_kl(teacher: Tensor, student: Tensor, soft_temperature: float) -> Tensor:
    p = soften(teacher, soft_temperature).detach()
    q = soften(student, soft_temperature)
    return soft_temperature**2 * (p * (p.log() - q.log())).sum()


def mutual_by_loops(own, cross, own_hard, cross_hard, soft_temperature) -> MCLTerms:
    """own[m][i], cross[a][b][i] are lists of logit vectors; the hard functions take (i, probabilities)."""
    networks = range(len(own))
    batch = len(own[0])
    scl_hard = sum(own_hard(m) for m in networks)
    zero = scl_hard * 0
    scl_soft, icl_hard, icl_soft = zero, zero, zero
    for a in networks:
        for b in networks:
            if a == b:
                continue
            icl_hard = icl_hard + cross_hard(a, b)
            for i in range(batch):
                scl_soft = scl_soft + plain_kl(own[b][i], own[a][i], soft_temperature) / batch
                if a < b:
                    pair = plain_kl(cross[a][b][i], cross[b][a][i], soft_temperature) + plain_kl(
                        cross[b][a][i], cross[a][b][i], soft_temperature
                    )
                    icl_soft = icl_soft + pair / batch
    return MCLTerms(scl_hard, scl_soft, icl_hard, icl_soft)


def queue_by_loops(query, key, queue, *, temperature, soft_temperature=1.0, same=True, filled=None):
    """losses.md form 1, one anchor and one candidate at a time."""
    networks, batch, _ = query.shape
    rows = queue.shape[1] if filled is None else filled

    def logits(a: int, b: int, i: int, with_same: bool) -> Tensor:
        candidates = [query[b, i]] if with_same else []
        candidates += [key[b, i], *(queue[b, k] for k in range(rows))]
        return torch.stack([torch.dot(query[a, i], c) for c in candidates]) / temperature

    own = [[logits(m, m, i, False) for i in range(batch)] for m in range(networks)]
    cross = [
        [[logits(a, b, i, same) for i in range(batch)] for b in range(networks)]
        for a in range(networks)
    ]

    def own_hard(m: int) -> Tensor:
        return sum(-soften(own[m][i], 1.0)[0].log() for i in range(batch)) / batch

    def cross_hard(a: int, b: int) -> Tensor:
        positives = 2 if same else 1
        return (
            sum(-soften(cross[a][b][i], 1.0)[:positives].log().sum() for i in range(batch)) / batch
        )

    return mutual_by_loops(own, cross, own_hard, cross_hard, soft_temperature)


def batch_by_loops(embedding, labels, *, temperature, soft_temperature=1.0, same=True):
    """losses.md form 2, one anchor at a time."""
    networks, batch, _ = embedding.shape

    def columns(i: int, with_same: bool) -> list[int]:
        return [j for j in range(batch) if with_same or j != i]

    def logits(a: int, b: int, i: int, with_same: bool) -> Tensor:
        return (
            torch.stack(
                [torch.dot(embedding[a, i], embedding[b, j]) for j in columns(i, with_same)]
            )
            / temperature
        )

    own = [[logits(m, m, i, False) for i in range(batch)] for m in range(networks)]
    cross = [
        [[logits(a, b, i, same) for i in range(batch)] for b in range(networks)]
        for a in range(networks)
    ]

    def positives_part(rows: list[Tensor], with_same: bool) -> Tensor:
        losses = []
        for i in range(batch):
            log_p = soften(rows[i], 1.0).log()
            places = [
                place
                for place, j in enumerate(columns(i, with_same))
                if j != i and labels[j] == labels[i]
            ]
            if places:
                losses.append(-log_p[places].mean())
        return torch.stack(losses).mean() if losses else rows[0].sum() * 0

    def cross_hard(a: int, b: int) -> Tensor:
        loss = positives_part(cross[a][b], same)
        if same:
            loss = loss + sum(-soften(cross[a][b][i], 1.0)[i].log() for i in range(batch)) / batch
        return loss

    return mutual_by_loops(
        own, cross, lambda m: positives_part(own[m], False), cross_hard, soft_temperature
    )


def assert_equal_with_gradients(ours, oracle, leaf: Tensor) -> None:
    """Each of the four values, and the gradient of each, equal to 1e-10."""
    for name, a, b in zip(MCLTerms._fields, ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        ga, gb = (torch.autograd.grad(t, leaf, retain_graph=True)[0] for t in (a, b))
        torch.testing.assert_close(
            ga, gb, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    ("networks", "batch", "rows", "filled", "soft_temperature"),
    [(1, 3, 5, None, 1.0), (2, 4, 7, None, 3.0), (3, 2, 5, 3, 1.0), (4, 1, 3, None, 0.5)],
)
def test_queue_form_equals_the_definition(networks, batch, rows, filled, soft_temperature, same):
    query = unit(networks, batch, 6, seed=1).requires_grad_()
    key, queue = unit(networks, batch, 6, seed=2), unit(networks, rows, 6, seed=3)
    settings_ = {"temperature": 0.2, "soft_temperature": soft_temperature, "filled": filled}
    ours = queue_terms(query, key, queue, same_sample_positive=same, **settings_)
    assert_equal_with_gradients(
        ours, queue_by_loops(query, key, queue, same=same, **settings_), query
    )


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    ("networks", "labels", "soft_temperature"),
    [
        (1, [0, 0, 1, 1], 1.0),
        (2, [0, 1, 0, 1, 2], 3.0),
        (3, [0, 0, 0, 1, 1, 2], 1.0),
        (2, [0, 1, 2], 1.0),
        (2, [4, 4, 4], 1.0),
    ],
)
def test_labelled_form_equals_the_definition(networks, labels, soft_temperature, same):
    embedding = unit(networks, len(labels), 5, seed=4).requires_grad_()
    labels = torch.tensor(labels)
    settings_ = {"temperature": 0.3, "soft_temperature": soft_temperature}
    ours = batch_terms(embedding, labels, same_sample_positive=same, **settings_)
    oracle = batch_by_loops(embedding, labels, same=same, **settings_)
    assert_equal_with_gradients(ours, oracle, embedding)


def test_view_form_is_the_labelled_form_with_the_image_as_label():
    views = unit(2, 2, 3, 5, seed=5).requires_grad_()
    ours = view_terms(views, temperature=0.2)
    oracle = batch_by_loops(views.flatten(1, 2), torch.tensor([0, 1, 2, 0, 1, 2]), temperature=0.2)
    assert_equal_with_gradients(ours, oracle, views)


@pytest.mark.parametrize("networks", [2, 3])
def test_reproduces_the_published_moco_code_number_for_number(networks):
    """Its sums: cross-entropy with target 0 within and between networks, and kl_div at T = 3, times 9."""
    tau, t = 0.07, 3.0
    query = unit(networks, 6, 8, seed=6).requires_grad_()
    key, queue = unit(networks, 6, 8, seed=7), unit(networks, 11, 8, seed=8)

    def logits(a: int, b: int) -> Tensor:
        positive = (query[a] * key[b]).sum(1, keepdim=True)
        return torch.cat([positive, query[a] @ queue[b].T], 1) / tau

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        return (
            F.kl_div(
                F.log_softmax(student / t, 1),
                F.softmax(teacher.detach() / t, 1),
                reduction="batchmean",
            )
            * t
            * t
        )

    target = torch.zeros(6, dtype=torch.long)
    everyone = range(networks)
    total = sum(F.cross_entropy(logits(m, m), target) for m in everyone)
    for a in everyone:
        for b in everyone:
            if a != b:
                total = total + F.cross_entropy(logits(a, b), target)
                total = total + kl(logits(a, a), logits(b, b)) + kl(logits(a, b), logits(b, a))
    ours = queue_terms(
        query, key, queue, temperature=tau, soft_temperature=t, same_sample_positive=False
    ).total(alpha=1.0, beta=1.0)
    torch.testing.assert_close(ours, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, query)[0], torch.autograd.grad(total, query)[0]
    )


def test_a_single_network_with_alpha_1_beta_0_is_exactly_info_nce():
    query, key, queue = unit(1, 9, 16, seed=9), unit(1, 9, 16, seed=10), unit(1, 31, 16, seed=11)
    logits = torch.cat([(query[0] * key[0]).sum(1, keepdim=True), query[0] @ queue[0].T], 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(9, dtype=torch.long))
    ours = queue_terms(query, key, queue, temperature=0.07).total(alpha=1.0, beta=0.0)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)


def test_identical_vectors_give_the_logarithm_of_the_number_of_candidates():
    one = torch.ones(2, 4, 3, dtype=torch.float64) / math.sqrt(3)
    queue = torch.ones(2, 7, 3, dtype=torch.float64) / math.sqrt(3)
    terms = queue_terms(one, one, queue, temperature=0.07)
    assert terms.scl_hard.item() == pytest.approx(2 * math.log(8))
    assert terms.icl_hard.item() == pytest.approx(2 * 2 * math.log(9))
    assert terms.scl_soft.item() == 0.0
    assert terms.icl_soft.item() == 0.0


@pytest.mark.parametrize("networks", [1, 2, 4])
def test_the_first_step_has_no_negatives_and_finite_gradients(networks):
    query = unit(networks, 5, 8, seed=12).requires_grad_()
    key, queue = unit(networks, 5, 8, seed=13), torch.full((networks, 6, 8), math.nan)
    terms = queue_terms(query, key, queue.double(), temperature=0.1, filled=0)
    assert terms.scl_hard.item() == 0.0
    assert terms.scl_soft.item() == 0.0
    assert terms.icl_hard.item() >= networks * (networks - 1) * 2 * math.log(2) - 1e-12
    terms.total().backward()
    assert torch.isfinite(query.grad).all()
    without = queue_terms(
        query, key, queue.double(), temperature=0.1, filled=0, same_sample_positive=False
    )
    assert without.icl_hard.item() == 0.0


def test_no_gradient_reaches_key_or_queue_and_the_same_sample_pulls_on_both_networks():
    query = unit(2, 3, 4, seed=14).requires_grad_()
    key = unit(2, 3, 4, seed=15).requires_grad_()
    queue = unit(2, 5, 4, seed=16).requires_grad_()
    by_network = queue_terms_by_network(query, key, queue, temperature=0.2)
    for term in by_network:
        gradients = torch.autograd.grad(
            term.sum(), (query, key, queue), allow_unused=True, retain_graph=True
        )
        assert gradients[0].abs().sum() > 0
        assert gradients[1] is None
        assert gradients[2] is None
    # The interactive term of network 0 alone moves network 1, only through the same-sample candidate.
    moved = torch.autograd.grad(by_network.icl_hard[0], query, retain_graph=True)[0]
    assert moved[1].abs().sum() > 0
    without = queue_terms_by_network(query, key, queue, temperature=0.2, same_sample_positive=False)
    assert torch.autograd.grad(without.icl_hard[0], query)[0][1].abs().sum() == 0


def test_the_soft_teacher_is_detached():
    teacher = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    soft_kl(teacher, student, 2.0).sum().backward()
    assert teacher.grad is None
    expected = 2.0 * (F.softmax(student / 2, -1) - F.softmax(teacher / 2, -1))
    torch.testing.assert_close(student.grad, expected.detach())


@given(
    temperature=st.sampled_from([0.05, 0.5, 1.0, 4.0, 100.0, 1e4]),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_soft_kl_keeps_its_digits_in_float32(temperature, scale, seed):
    """The textbook form errs by 1e-7 T^2 here; the floor left is the square of float32's precision."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(4, 33, generator=generator).mul(3)
    student = teacher + scale * torch.randn(4, 33, generator=generator)
    ours = soft_kl(teacher, student, temperature).double()
    exact = soft_kl(teacher.double(), student.double(), temperature)
    assert (ours >= 0).all()
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-12 * temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 100.0, 1e4])
def test_the_gradient_of_the_soft_kl_sums_to_zero_in_float32(temperature):
    """It is T (q - p). A rounding that all candidates have in common adds up where their embeddings are the same."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 51, generator=generator).mul(3)
    student = (teacher + 1e-2 * torch.randn(8, 51, generator=generator)).requires_grad_()
    soft_kl(teacher, student, temperature).sum().backward()
    assert student.grad is not None
    assert student.grad.double().sum(-1).abs().max() < 1e-7


def test_soft_kl_equals_the_textbook_form_in_float64():
    for scale in (1e-3, 0.05, 1.0, 20.0, 200.0):
        teacher, student = scale * unit(5, 19, seed=17) * 4, scale * unit(5, 19, seed=18) * 4
        log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
        textbook = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(soft_kl(teacher, student, 1.0), textbook, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("soft_temperature", [0.1, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("tau", [0.01, 0.07, 0.5])
@pytest.mark.parametrize("networks", [1, 2, 8])
@pytest.mark.parametrize("kind", ["random", "near", "duplicated", "one direction"])
def test_the_numerical_promise_in_float32(networks, tau, soft_temperature, kind):
    errors = errors_against_float64(
        *vectors(kind, networks),
        temperature=tau,
        soft_temperature=soft_temperature,
        backend="reference",
    )
    for value_error, gradient_error in errors:
        assert value_error <= 1
        assert gradient_error <= 1


def test_losses_are_float32_under_autocast():
    query, key, queue = (unit(2, n, 16, seed=n, dtype=torch.float32) for n in (4, 4, 9))
    plain = queue_terms(query, key[:, :4], queue, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = queue_terms(query, key[:, :4], queue, temperature=0.1)
    for a, b in zip(plain, under, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["query", "key", "queue"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_input_names_term_network_and_tensor(where, value):
    inputs = {"query": unit(2, 3, 4), "key": unit(2, 3, 4), "queue": unit(2, 5, 4)}
    inputs[where][1, 2, 0] = value
    with pytest.raises(NonFiniteError, match=rf"scl_hard of network 1 .* {where}\[1\].* row 2"):
        queue_terms(**inputs, temperature=0.1)


def test_a_non_finite_embedding_names_its_network():
    embedding = unit(3, 4, 4)
    embedding[2, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"network 2 .*embedding\[2\].*row 0"):
        batch_terms(embedding, torch.tensor([0, 0, 1, 1]), temperature=0.1)


def test_all_negatives_kept_equals_none_dropped_and_one_kept_is_among_them():
    embedding, labels = unit(2, 6, 5, seed=23), torch.tensor([0, 0, 1, 1, 2, 2])
    everything = batch_terms(embedding, labels, temperature=0.2)
    drawn = batch_terms(embedding, labels, temperature=0.2, num_negatives=4)
    for a, b in zip(everything, drawn, strict=True):
        torch.testing.assert_close(a, b)
    # One network, one negative kept: -log P is a two-way softmax with one of the four negatives.
    generator = torch.Generator().manual_seed(0)
    ours = batch_terms(embedding[:1], labels, temperature=0.2, num_negatives=1, generator=generator)
    similarity = embedding[0] @ embedding[0].T / 0.2
    choices = []
    for i in range(6):
        positive = similarity[i, i ^ 1]
        negatives = [similarity[i, j] for j in range(6) if j // 2 != i // 2]
        choices.append([F.softplus(n - positive).item() for n in negatives])
    low, high = (sum(f(c) for c in choices) / 6 for f in (min, max))
    assert low <= ours.scl_hard.item() <= high
    with pytest.raises(ValueError, match="num_negatives is 5"):
        batch_terms(embedding, labels, temperature=0.2, num_negatives=5)


def test_the_negatives_drawn_are_the_same_columns_for_every_network():
    """Networks with equal embeddings then agree exactly, whatever was drawn."""
    embedding = unit(1, 8, 5, seed=24).expand(2, -1, -1)
    labels = torch.arange(8) // 2
    terms = batch_terms(embedding, labels, temperature=0.2, num_negatives=2)
    assert terms.scl_soft.item() < 1e-28
    assert terms.icl_soft.item() < 1e-28


def test_per_network_terms_sum_to_the_scalars_and_total_weighs_them():
    query, key, queue = unit(3, 4, 6, seed=25), unit(3, 4, 6, seed=26), unit(3, 7, 6, seed=27)
    terms = queue_terms(query, key, queue, temperature=0.2)
    by_network = queue_terms_by_network(query, key, queue, temperature=0.2)
    for scalar, vector in zip(terms, by_network, strict=True):
        assert vector.shape == (3,)
        torch.testing.assert_close(vector.sum(), scalar)
    expected = 0.5 * (terms.scl_hard + terms.scl_soft) + 0.1 * (terms.icl_hard + terms.icl_soft)
    torch.testing.assert_close(terms.total(), expected)


def test_a_soft_term_counts_for_its_student_and_teaches_it_alone():
    query = unit(2, 4, 6, seed=28).requires_grad_()
    key, queue = unit(2, 4, 6, seed=29), unit(2, 7, 6, seed=30)
    by_network = queue_terms_by_network(
        query, key, queue, temperature=0.2, same_sample_positive=False
    )
    cross = [
        torch.cat([(query[a] * key[b]).sum(1, keepdim=True), query[a] @ queue[b].T], 1) / 0.2
        for a, b in ((0, 0), (1, 1), (0, 1), (1, 0))
    ]
    p_0, p_1, q_01, q_10 = cross
    torch.testing.assert_close(by_network.scl_soft[0], soft_kl(p_1, p_0, 1.0).mean())
    torch.testing.assert_close(by_network.scl_soft[1], soft_kl(p_0, p_1, 1.0).mean())
    torch.testing.assert_close(by_network.icl_soft[0], soft_kl(q_10, q_01, 1.0).mean())
    for term in (by_network.scl_soft, by_network.icl_soft):
        gradient = torch.autograd.grad(term[0], query, retain_graph=True)[0]
        assert gradient[0].abs().sum() > 0
        assert gradient[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"filled": 6}, "filled must be"),
        ({"backend": "fast"}, "backend must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"key": torch.zeros(2, 2, 4)}, "query and key"),
        ({"queue": torch.zeros(3, 5, 4)}, "queue must be"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changed, message):
    arguments = {"query": unit(2, 3, 4), "key": unit(2, 3, 4), "queue": unit(2, 5, 4)}
    with pytest.raises(ValueError, match=message):
        queue_terms(**{**arguments, "temperature": 0.1, **changed})
