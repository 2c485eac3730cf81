"""The logit losses against loops over plain numbers, torch's own kl_div, and cases worked out by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlearn.compute.guards import NonFiniteError
from pretrain import distill
from pretrain.distill import (
    cl_ilr,
    cl_ilr_by_network,
    dml,
    dml_by_network,
    ensemble_teaching,
    ensemble_teaching_by_network,
    ensemble_weights,
    okddip,
    okddip_by_network,
    one,
    one_by_network,
    ramp,
    vanilla,
    vanilla_by_network,
)

Rows = list[list[float]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def simplex_rows(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).softmax(-1)


def probabilities(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(z / temperature) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def divergence(teacher: Rows, student: Rows, temperature: float) -> float:
    """T^2 KL, the mean over rows, in plain numbers."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        p, q = probabilities(t, temperature), probabilities(s, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(teacher)


def cross_entropy(logits: Rows, labels: list[int]) -> float:
    rows = [-math.log(probabilities(z, 1.0)[y]) for z, y in zip(logits, labels, strict=True)]
    return sum(rows) / len(rows)


def mixture(parts: list[Rows], weight: Callable[[int, int, int], float]) -> Rows:
    """sum_j weight(j, b, c) parts[j][b][c]."""
    batch, classes = len(parts[0]), len(parts[0][0])
    return [
        [sum(weight(j, b, c) * parts[j][b][c] for j in range(len(parts))) for c in range(classes)]
        for b in range(batch)
    ]


def torch_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )


def assert_gradients(ours: Tensor, oracle: Tensor, *leaves: Tensor) -> None:
    """The same gradient to every leaf, where none counts as zeros."""
    settings = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(ours, leaves, **settings)
    expected = torch.autograd.grad(oracle, leaves, **settings)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class TestVanilla:
    def test_by_loops(self):
        z, y = normal(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
        expected = [cross_entropy(rows, y.tolist()) for rows in z.tolist()]
        assert vanilla_by_network(z, y).tolist() == pytest.approx(expected, rel=1e-12)
        assert vanilla(z, y).item() == pytest.approx(sum(expected), rel=1e-12)

    def test_equal_logits_cost_log_c(self):
        assert vanilla(torch.zeros(2, 3, 8), torch.tensor([0, 1, 7])).item() == pytest.approx(
            2 * math.log(8)
        )

    def test_gradient_is_probability_minus_label(self):
        z, y = normal(2, 3, 4).requires_grad_(), torch.tensor([1, 0, 3])
        (grad,) = torch.autograd.grad(vanilla(z, y), z)
        for m in range(2):
            for b in range(3):
                p = probabilities(z[m, b].tolist(), 1.0)
                p[int(y[b])] -= 1
                assert grad[m, b].tolist() == pytest.approx([x / 3 for x in p], abs=1e-12)


class TestDml:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    @pytest.mark.parametrize("networks", [2, 4])
    def test_value_by_loops(self, networks, temperature):
        z = normal(networks, 5, 4)
        parts = z.tolist()
        expected = [
            sum(
                divergence(parts[peer], parts[m], temperature)
                for peer in range(networks)
                if peer != m
            )
            / (networks - 1)
            for m in range(networks)
        ]
        got = dml_by_network(z, temperature=temperature)
        assert got.tolist() == pytest.approx(expected, rel=1e-11)
        assert dml(z, temperature=temperature).item() == pytest.approx(sum(expected), rel=1e-11)

    @pytest.mark.parametrize("detach", [True, False])
    def test_gradient_by_kl_div(self, detach):
        z = normal(3, 5, 4).requires_grad_()
        oracle = sum(
            torch_kl(z[a].detach() if detach else z[a], z[b], 2.0) / 2
            for a in range(3)
            for b in range(3)
            if a != b
        )
        assert_gradients(dml(z, temperature=2.0, detach=detach), oracle, z)

    def test_a_detached_teacher_hears_nothing(self):
        z = normal(2, 5, 4).requires_grad_()
        (grad,) = torch.autograd.grad(dml_by_network(z)[0], z)
        assert grad[0].abs().max() > 1e-3
        assert torch.equal(grad[1], torch.zeros(5, 4, dtype=torch.float64))

    def test_by_hand(self):
        # Probabilities 1/2, 1/2 and 3/4, 1/4.
        z = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]], dtype=torch.float64)
        of_first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        of_second = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
        assert dml_by_network(z).tolist() == pytest.approx([of_first, of_second], rel=1e-12)


class TestEnsembleTeaching:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    @pytest.mark.parametrize("per_class", [False, True])
    def test_value_by_loops(self, per_class, temperature):
        z, y = normal(3, 6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
        theta = ensemble_weights(z, y, per_class=per_class)
        parts = z.tolist()
        ensemble = mixture(parts, lambda m, b, c: float(theta[m, c] if per_class else theta[m]))
        expected = [divergence(ensemble, rows, temperature) for rows in parts]
        got = ensemble_teaching_by_network(z, y, temperature=temperature, per_class=per_class)
        assert got.tolist() == pytest.approx(expected, rel=1e-11)
        scalar = ensemble_teaching(z, y, temperature=temperature, per_class=per_class)
        assert scalar.item() == pytest.approx(sum(expected), rel=1e-11)

    def test_gradient_to_the_students_only(self):
        z, y = normal(3, 6, 4).requires_grad_(), torch.tensor([0, 1, 2, 3, 0, 1])
        theta = ensemble_weights(z, y)
        ensemble = torch.einsum("m,mbc->bc", theta, z.detach())
        oracle = sum(torch_kl(ensemble, student, 2.0) for student in z)
        assert_gradients(ensemble_teaching(z, y, temperature=2.0), oracle, z)

    @pytest.mark.parametrize("shape", [(3,), (3, 4)])
    def test_given_weights_are_used_as_they_are(self, shape):
        z, y = normal(3, 6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
        theta = normal(*shape, seed=7).softmax(0)
        parts = z.tolist()
        ensemble = mixture(
            parts, lambda m, b, c: float(theta[m, c] if theta.ndim == 2 else theta[m])
        )
        expected = sum(divergence(ensemble, rows, 1.0) for rows in parts)
        got = ensemble_teaching(z, y, weights=theta.requires_grad_())
        assert got.item() == pytest.approx(expected, rel=1e-11)
        assert not got.requires_grad

    def test_a_perfect_network_is_the_teacher(self):
        y = torch.tensor([0, 1, 2, 0])
        perfect = 40.0 * F.one_hot(y, 3).double()
        z = torch.stack([-perfect, perfect])
        losses = ensemble_teaching_by_network(z, y)
        assert losses[1].item() == pytest.approx(0.0, abs=1e-5)
        assert losses[0].item() > 10

    def test_of_one_network_is_nothing(self):
        z = normal(1, 3, 4).requires_grad_()
        loss = ensemble_teaching(z, torch.tensor([0, 1, 2]))
        assert loss.item() == pytest.approx(0.0, abs=1e-15)
        assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-15


class TestClIlr:
    @pytest.mark.parametrize("networks", [2, 4])
    def test_value_by_loops(self, networks):
        z = normal(networks, 5, 4)
        parts = z.tolist()
        expected = []
        for m in range(networks):
            others = [part for peer, part in enumerate(parts) if peer != m]
            target = mixture(others, lambda j, b, c: 1 / (networks - 1))
            expected.append(0.7 * divergence(target, parts[m], 3.0))
        got = cl_ilr_by_network(z, weight=0.7)
        assert got.tolist() == pytest.approx(expected, rel=1e-11)
        assert cl_ilr(z, weight=0.7).item() == pytest.approx(sum(expected), rel=1e-11)

    @pytest.mark.parametrize("detach", [True, False])
    def test_gradient_by_kl_div(self, detach):
        z = normal(3, 5, 4).requires_grad_()
        oracle = 0
        for m in range(3):
            target = (z.sum(0) - z[m]) / 2
            oracle = oracle + 0.7 * torch_kl(target.detach() if detach else target, z[m], 3.0)
        assert_gradients(cl_ilr(z, weight=0.7, detach=detach), oracle, z)

    def test_by_hand(self):
        # Head 0 sees logits (3 ln 3, 0), over T: probabilities 3/4, 1/4; itself it says 1/2, 1/2. T = 3.
        others = [2 * math.log(2), 6 * math.log(3) - 2 * math.log(2)]
        z = torch.tensor([[[x, 0.0]] for x in (0.0, *others)], dtype=torch.float64)
        got = cl_ilr_by_network(z)[0].item()
        assert got == pytest.approx(9 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-12)


class TestOne:
    def test_value_by_loops(self):
        z, gate, y = normal(3, 5, 4), simplex_rows(5, 3, seed=1), torch.tensor([0, 3, 1, 1, 2])
        parts = z.tolist()
        ensemble = mixture(parts, lambda m, b, c: float(gate[b, m]))
        own = cross_entropy(ensemble, y.tolist())
        taught = [0.6 * divergence(ensemble, rows, 3.0) for rows in parts]
        got = one_by_network(z, gate, y, weight=0.6)
        assert got.tolist() == pytest.approx([own / 3 + t for t in taught], rel=1e-11)
        assert one(z, gate, y, weight=0.6).item() == pytest.approx(own + sum(taught), rel=1e-11)

    @pytest.mark.parametrize("detach", [True, False])
    def test_gradient_by_kl_div(self, detach):
        z, y = normal(3, 5, 4).requires_grad_(), torch.tensor([0, 3, 1, 1, 2])
        gate = simplex_rows(5, 3, seed=1).requires_grad_()
        ensemble = torch.einsum("bm,mbc->bc", gate, z)
        teacher = ensemble.detach() if detach else ensemble
        oracle = F.cross_entropy(ensemble, y)
        oracle = oracle + sum(0.6 * torch_kl(teacher, student, 3.0) for student in z)
        assert_gradients(one(z, gate, y, weight=0.6, detach=detach), oracle, z, gate)

    def test_by_hand(self):
        # Mixed: (ln 3, 0), of which class 0 has 3/4. At T = 1 the networks say 1/2, 1/2 and 9/10, 1/10.
        z = torch.tensor([[[0.0, 0.0]], [[2 * math.log(3), 0.0]]], dtype=torch.float64)
        gate = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        own = math.log(4 / 3) / 2
        first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
        second = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
        got = one_by_network(z, gate, torch.tensor([0]), temperature=1.0, weight=2.0)
        assert got.tolist() == pytest.approx([own + 2 * first, own + 2 * second], rel=1e-12)


class TestOkddip:
    @pytest.mark.parametrize("peers", [1, 3])
    def test_value_by_loops(self, peers):
        z, attention = normal(peers + 1, 5, 4), simplex_rows(5, peers, peers, seed=1)
        parts = z.tolist()
        expected = []
        for i in range(peers):
            target = mixture(parts[:-1], lambda j, b, c, i=i: float(attention[b, i, j]))
            expected.append(0.4 * divergence(target, parts[i], 3.0))
        mean = mixture(parts[:-1], lambda j, b, c: 1 / peers)
        expected.append(0.4 * divergence(mean, parts[-1], 3.0))
        got = okddip_by_network(z, attention, weight=0.4)
        assert got.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-14)
        scalar = okddip(z, attention, weight=0.4)
        assert scalar.item() == pytest.approx(sum(expected), rel=1e-11)

    @pytest.mark.parametrize("detach", [True, False])
    def test_gradient_by_kl_div(self, detach):
        z = normal(4, 5, 6).requires_grad_()
        attention = simplex_rows(5, 3, 3, seed=1).requires_grad_()
        targets = [sum(attention[:, i, j, None] * z[j] for j in range(3)) for i in range(3)]
        targets.append((z[0] + z[1] + z[2]) / 3)
        oracle = sum(
            0.4 * torch_kl(target.detach() if detach else target, student, 3.0)
            for target, student in zip(targets, z, strict=True)
        )
        assert_gradients(okddip(z, attention, weight=0.4, detach=detach), oracle, z, attention)

    def test_the_attention_learns_by_default(self):
        z, attention = normal(4, 5, 6), simplex_rows(5, 3, 3, seed=1).requires_grad_()
        (grad,) = torch.autograd.grad(okddip(z, attention), attention)
        assert grad.abs().max() > 1e-3

    def test_by_hand(self):
        # At T = 1: peer 0 says 1/2, 1/2 and is to say 3/4, 1/4; peer 1 says 9/10, 1/10 and is its own target;
        # the leader says 1/2, 1/2 and the peers' mean, logits (ln 3, 0), 3/4, 1/4.
        z = torch.tensor([[[0.0, 0.0]], [[2 * math.log(3), 0.0]], [[1.0, 1.0]]]).double()
        attention = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]).double()
        loss = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        got = okddip_by_network(z, attention, temperature=1.0, weight=2.0)
        assert got.tolist() == pytest.approx([2 * loss, 0.0, 2 * loss], rel=1e-6, abs=1e-12)


TEACHING: dict[str, Callable[..., Tensor]] = {
    "dml": lambda z, **k: dml(z, **k),
    "dml_live": lambda z, **k: dml(z, detach=False, **k),
    "ensemble_teaching": lambda z, **k: ensemble_teaching(z, labels_for(z), **k),
    "ensemble_teaching_per_class": lambda z, **k: ensemble_teaching(
        z, labels_for(z), per_class=True, **k
    ),
    "cl_ilr": lambda z, **k: cl_ilr(z, **k),
    "cl_ilr_live": lambda z, **k: cl_ilr(z, detach=False, **k),
    "okddip": lambda z, **k: okddip(z, attention_for(z), **k),
    "one": lambda z, **k: one(z, gate_for(z), labels_for(z), **k),
}


def labels_for(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1]) % z.shape[2]


def gate_for(z: Tensor) -> Tensor:
    return simplex_rows(z.shape[1], z.shape[0], seed=3)


def attention_for(z: Tensor) -> Tensor:
    return simplex_rows(z.shape[1], len(z) - 1, len(z) - 1, seed=4)


class TestAll:
    @pytest.mark.parametrize("name", TEACHING)
    def test_networks_that_agree_teach_nothing(self, name):
        z = normal(1, 5, 4).expand(3, 5, 4).clone().requires_grad_()
        loss = TEACHING[name](z)
        if name == "one":
            loss = loss - F.cross_entropy(z[0], labels_for(z))
        assert loss.item() == pytest.approx(0.0, abs=1e-15)
        if name != "one":
            assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-14

    @pytest.mark.parametrize("name", TEACHING)
    def test_temperature_squared(self, name):
        """Softer by T, of logits T times as large: T^2 the loss."""
        z = normal(3, 5, 4)
        fixed = {}
        if name.startswith("ensemble_teaching"):
            fixed = {"weights": normal(3, seed=9).softmax(0)}
        hard, soft = (TEACHING[name](t * z, temperature=t, **fixed) for t in (1.0, 3.0))
        if name == "one":
            hard, soft = (
                loss - F.cross_entropy((gate_for(z).T.unsqueeze(-1) * t * z).sum(0), labels_for(z))
                for loss, t in ((hard, 1.0), (soft, 3.0))
            )
        assert soft.item() == pytest.approx(9 * hard.item(), rel=1e-10)

    @pytest.mark.parametrize("name", [n for n in TEACHING if n != "ensemble_teaching_per_class"])
    def test_a_shift_of_a_networks_logits_changes_nothing(self, name):
        z = normal(3, 5, 4)
        shifted = z + normal(3, 5, 1, seed=8)
        assert TEACHING[name](shifted).item() == pytest.approx(TEACHING[name](z).item(), rel=1e-5)

    @pytest.mark.parametrize("name", TEACHING)
    @pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0])
    @pytest.mark.parametrize("temperature", [1.0, 20.0])
    def test_float32_keeps_its_digits(self, name, spread, temperature):
        """Also of peers that nearly agree, where the textbook's p (log p - log q) loses all."""
        z32 = (3 * normal(1, 7, 10) + spread * normal(4, 7, 10, seed=5)).float()
        fixed = {}
        if name.startswith("ensemble_teaching"):
            fixed = {"weights": normal(4, seed=9).softmax(0).float()}
        leaf32, leaf64 = z32.clone().requires_grad_(), z32.double().requires_grad_()
        value32 = TEACHING[name](leaf32, temperature=temperature, **fixed)
        value64 = TEACHING[name](leaf64, temperature=temperature, **fixed)
        assert value32.dtype == torch.float32
        pairs = 4 * 3
        assert abs(value32.item() - value64.item()) <= 1e-5 * max(value64.item(), pairs)
        (grad32,) = torch.autograd.grad(value32, leaf32)
        (grad64,) = torch.autograd.grad(value64, leaf64)
        error = (grad32.double() - grad64).norm().item()
        assert error <= 1e-5 * max(grad64.norm().item(), 4 / math.sqrt(7))

    @pytest.mark.parametrize("name", TEACHING)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_widened(self, name, dtype):
        z = normal(3, 6, 4).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = TEACHING[name](z)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(TEACHING[name](z.double()).item(), rel=1e-5)

    @pytest.mark.parametrize("name", TEACHING)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_named(self, name, bad):
        z = normal(3, 6, 4)
        z[2, 4, 1] = bad
        term = name.replace("_live", "").replace("_per_class", "")
        with pytest.raises(
            NonFiniteError, match=rf"^{term} of network 2 .*logits\[2\].* 1 of 6 rows.* row 4"
        ):
            TEACHING[name](z)

    @settings(max_examples=25)
    @given(
        networks=st.integers(2, 5),
        batch=st.integers(1, 5),
        classes=st.integers(1, 6),
        scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
        seed=st.integers(0, 10**6),
    )
    def test_never_negative_and_finite(self, networks, batch, classes, scale, seed):
        z = scale * normal(networks, batch, classes, seed=seed)
        for name, loss_of in TEACHING.items():
            leaf = z.float().requires_grad_()
            loss = loss_of(leaf)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert 0 <= loss.item() < math.inf, name
            assert torch.isfinite(grad).all(), name

    def test_non_finite_gates_are_named(self):
        z, y = normal(3, 5, 4), labels_for(normal(3, 5, 4))
        gate, attention = gate_for(z), attention_for(z)
        gate[3, 1] = math.nan
        attention[2, 1, 0] = math.nan
        with pytest.raises(NonFiniteError, match=r"^one of network 1 .*gate\[1\].* row 3"):
            one(z, gate, y)
        with pytest.raises(NonFiniteError, match=r"^okddip of network 1 .*attention\[1\].* row 2"):
            okddip(z, attention)
        with pytest.raises(NonFiniteError, match=r"^vanilla of network 0 "):
            vanilla(z * math.nan, y)
        with pytest.raises(NonFiniteError, match=r"^ensemble_teaching of network 2 .*weights"):
            ensemble_teaching(z, y, weights=torch.tensor([0.5, 0.5, math.nan]))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda z, y: dml(z[:1]), "dml needs 2 or more networks, got 1"),
            (lambda z, y: cl_ilr(z[:1]), "cl_ilr needs 2 or more networks, got 1"),
            (lambda z, y: okddip(z[:1], torch.ones(5, 0, 0)), "okddip needs 2 or more networks"),
            (lambda z, y: dml(z, temperature=0.0), "temperature must be positive"),
            (lambda z, y: cl_ilr(z, temperature=-1.0), "temperature must be positive"),
            (lambda z, y: one(z, gate_for(z), y, temperature=0.0), "temperature must be positive"),
            (lambda z, y: okddip(z, attention_for(z), temperature=math.nan), "temperature must"),
            (lambda z, y: ensemble_teaching(z, y, temperature=0.0), "temperature must be positive"),
            (lambda z, y: vanilla(z[0], y), r"logits must be \(M, B, C\)"),
            (lambda z, y: vanilla(z[:, :0], y[:0]), r"logits must be \(M, B, C\)"),
            (lambda z, y: vanilla(z, y[:-1]), r"labels must be \(B,\)"),
            (lambda z, y: ensemble_teaching(z, y[:, None]), r"labels must be \(B,\)"),
            (lambda z, y: one(z, gate_for(z).T, y), r"gate must be \(B, M\)"),
            (lambda z, y: okddip(z, torch.ones(5, 3, 3)), r"attention must be \(B, M-1, M-1\)"),
            (lambda z, y: ensemble_teaching(z, y, weights=torch.ones(2)), "weights must be"),
            (lambda z, y: ensemble_teaching(z, y, weights=torch.ones(3, 3)), "weights must be"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, call, message):
        z = normal(3, 5, 4)
        with pytest.raises(ValueError, match=message) as error:
            call(z, labels_for(z))
        assert "\n" not in str(error.value)

    def test_every_public_name_exists(self):
        assert all(callable(getattr(distill, name)) for name in distill.__all__)


@pytest.mark.parametrize(
    ("epoch", "length", "expected"),
    [
        (0, 80, math.exp(-5)),
        (40, 80, math.exp(-1.25)),
        (60, 80, math.exp(-0.3125)),
        (80, 80, 1.0),
        (299, 80, 1.0),
        (5, 10, math.exp(-1.25)),
    ],
)
def test_ramp(epoch, length, expected):
    assert ramp(epoch, length) == pytest.approx(expected, rel=1e-12)


def test_ramp_lasts_80_epochs_by_default_and_rises():
    assert ramp(40.0) == pytest.approx(math.exp(-1.25))
    assert np.all(np.diff([ramp(e) for e in np.linspace(0, 80, 20)]) > 0)
