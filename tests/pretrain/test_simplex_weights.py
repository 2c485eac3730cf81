"""The ensemble's weights against scipy's optimisers, a duality gap computed apart, and cases with a known answer."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize, minimize_scalar
from torch import Tensor

from peerlearn.compute.guards import NonFiniteError
from pretrain import simplex_weights
from pretrain.simplex_weights import ensemble_weights

BOTH = pytest.mark.parametrize("per_class", [False, True])


def instance(
    networks: int, batch: int, classes: int, *, scale: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Networks that have much in common and know the labels somewhat."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (batch,), generator=generator)
    common = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    own = torch.randn(networks, batch, classes, generator=generator, dtype=torch.float64)
    z = 0.7 * common + 0.5 * own
    z[:, torch.arange(batch), labels] += torch.rand(
        networks, batch, generator=generator, dtype=torch.float64
    )
    return scale * z, labels


def cross_entropy_of(theta: Tensor, z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.einsum("mc,mbc->bc", theta.expand(len(z), z.shape[2]), z), labels)


def assert_solved(theta: Tensor, z: Tensor, labels: Tensor) -> float:
    """On the simplex, and with the promised gap, by autograd. Returns the cross-entropy."""
    assert theta.min() >= 0
    torch.testing.assert_close(theta.sum(0), torch.ones_like(theta[0]), rtol=0, atol=1e-12)
    columns = theta.reshape(len(theta), -1).clone().requires_grad_()
    value = cross_entropy_of(columns, z, labels)
    (grad,) = torch.autograd.grad(value, columns)
    vertices = torch.eye(len(theta), dtype=torch.float64)
    gap = sum(
        max(torch.dot(grad[:, s], columns.detach()[:, s] - vertex).item() for vertex in vertices)
        for s in range(columns.shape[1])
    )
    assert gap <= 1e-6 * max(1.0, value.item())
    return value.item()


def solve_by_scipy(z: Tensor, labels: Tensor, per_class: bool) -> float:
    """The lowest cross-entropy that SLSQP finds."""
    networks, _, classes = z.shape
    simplices = classes if per_class else 1

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(flat.reshape(networks, simplices), requires_grad=True)
        value = cross_entropy_of(theta, z, labels)
        (grad,) = torch.autograd.grad(value, theta)
        return value.item(), grad.numpy().ravel()

    found = minimize(
        objective,
        np.full(networks * simplices, 1 / networks),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * (networks * simplices),
        constraints={
            "type": "eq",
            "fun": lambda x: x.reshape(networks, simplices).sum(0) - 1,
            "jac": lambda x: np.tile(np.eye(simplices), networks),
        },
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return float(found.fun)


def solve_by_linear_programming(z: Tensor, labels: Tensor, per_class: bool) -> float:
    """The lowest mean_b max_c (z_e[b, c] - z_e[b, y_b]): of variables theta and one maximum per sample."""
    networks, batch, classes = z.shape
    simplices = classes if per_class else 1
    rows = []
    for b in range(batch):
        for c in range(classes):
            coefficients = np.zeros((networks, simplices))
            coefficients[:, c % simplices] += z[:, b, c].numpy()
            coefficients[:, labels[b] % simplices] -= z[:, b, labels[b]].numpy()
            rows.append(np.concatenate([coefficients.ravel(), -np.eye(batch)[b]]))
    sums = np.hstack([np.tile(np.eye(simplices), networks), np.zeros((simplices, batch))])
    found = linprog(
        np.concatenate([np.zeros(networks * simplices), np.full(batch, 1 / batch)]),
        A_ub=np.array(rows),
        b_ub=np.zeros(batch * classes),
        A_eq=sums,
        b_eq=np.ones(simplices),
        bounds=[(0, 1)] * (networks * simplices) + [(None, None)] * batch,
    )
    return float(found.fun)


class TestAgainstScipy:
    @BOTH
    @pytest.mark.parametrize("networks", range(2, 9))
    def test_as_low_as_slsqp(self, networks, per_class):
        for seed, (batch, classes) in enumerate([(12, 3), (5, 7), (30, 4)]):
            z, labels = instance(networks, batch, classes, seed=seed)
            theta = ensemble_weights(z, labels, per_class=per_class)
            assert theta.shape == ((networks, classes) if per_class else (networks,))
            value = assert_solved(theta, z, labels)
            assert value == pytest.approx(solve_by_scipy(z, labels, per_class), abs=2e-6)

    def test_two_networks_by_a_search_of_the_line(self):
        for seed in range(5):
            z, labels = instance(2, 40, 6, seed=seed)
            found = minimize_scalar(
                lambda t, z=z, y=labels: F.cross_entropy(t * z[0] + (1 - t) * z[1], y).item(),
                bounds=(0, 1),
                method="bounded",
                options={"xatol": 1e-9},
            )
            assert ensemble_weights(z, labels)[0].item() == pytest.approx(found.x, abs=2e-3)

    @settings(max_examples=60)
    @given(
        networks=st.integers(1, 8),
        batch=st.integers(1, 20),
        classes=st.integers(1, 12),
        per_class=st.booleans(),
        scale=st.sampled_from([1e-6, 0.1, 1.0, 10.0, 100.0, 1e4]),
        seed=st.integers(0, 10**6),
    )
    def test_any_shape(self, networks, batch, classes, per_class, scale, seed):
        z, labels = instance(networks, batch, classes, scale=scale, seed=seed)
        assert_solved(ensemble_weights(z, labels, per_class=per_class), z, labels)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("per_class", "batch"), [(False, 9), (True, 30), (True, 4)], ids=["one", "dense", "woodbury"]
)
def test_newton_step_by_the_hessian_of_autograd(per_class, batch, temperature):
    """A wrong Hessian would only be slow. So the step is held to the KKT system that defines it."""
    z, labels = instance(3, batch, 5)
    simplices = 5 if per_class else 1
    generator = torch.Generator().manual_seed(1)
    theta = torch.rand(3, simplices, generator=generator, dtype=torch.float64).softmax(0)
    weight = torch.rand(3, simplices, generator=generator, dtype=torch.float64) + 0.1
    target = torch.rand(3, simplices, generator=generator, dtype=torch.float64)

    def softened(flat: Tensor) -> Tensor:
        return temperature * cross_entropy_of(flat.view(3, simplices), z / temperature, labels)

    mixture = simplex_weights._Mixture(z.numpy(), labels.numpy(), per_class)
    point = mixture.evaluate(theta.numpy(), temperature)
    assert point.value == pytest.approx(softened(theta.flatten()).item(), rel=1e-12)
    step = mixture.newton_step(point.p, temperature, weight.numpy(), target.numpy(), 0.0)

    hessian = torch.autograd.functional.hessian(softened, theta.flatten())
    sums = torch.eye(simplices, dtype=torch.float64).repeat(1, 3)
    system = torch.cat(
        [
            torch.cat([hessian + weight.flatten().diag(), sums.T], 1),
            torch.cat([sums, torch.zeros(simplices, simplices)], 1),
        ]
    )
    right = torch.cat([target.flatten(), torch.zeros(simplices, dtype=torch.float64)])
    expected = torch.linalg.solve(system, right)[: 3 * simplices].view(3, simplices)
    torch.testing.assert_close(torch.from_numpy(step), expected, rtol=1e-9, atol=1e-12)


class TestByHand:
    def test_both_networks_are_needed(self):
        """One sample each that the other gets wrong: by symmetry half and half, and a cross-entropy of ln 2."""
        z = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[0.0, 2.0], [2.0, 0.0]]]).double()
        theta = ensemble_weights(z, torch.tensor([0, 0]))
        torch.testing.assert_close(theta, torch.tensor([0.5, 0.5]).double(), rtol=0, atol=1e-4)
        assert assert_solved(theta, z, torch.tensor([0, 0])) == pytest.approx(math.log(2))

    def test_interior_minimum(self):
        """Margins 4, -2 of one network and 0, 0 of the other: minus the derivative of the loss over theta_0,
        4 sigmoid(-4 t) - 2 sigmoid(2 t), is 0 for u = e^{2t} with 2 (1 + u) = u + u^3, whose root is 1.5213797."""
        z = torch.tensor([[[4.0, 0.0], [-2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]).double()
        theta = ensemble_weights(z, torch.tensor([0, 0]))
        assert theta[0].item() == pytest.approx(math.log(1.5213797) / 2, abs=1e-3)

    def test_a_vertex(self):
        """Margins 1 and 3 on every sample: the second network alone is best."""
        z = torch.zeros(2, 4, 3, dtype=torch.float64)
        labels = torch.tensor([0, 1, 2, 0])
        z[0, torch.arange(4), labels], z[1, torch.arange(4), labels] = 1.0, 3.0
        theta = ensemble_weights(z, labels)
        torch.testing.assert_close(theta, torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-5)

    def test_each_class_has_its_own_expert(self):
        """Network c alone tells class c from the others, the rest say the reverse."""
        labels = torch.arange(3).repeat(4)
        right = F.one_hot(labels, 3).double()
        z = torch.stack([torch.where(torch.arange(3) == c, right, -right) for c in range(3)])
        theta = ensemble_weights(z, labels, per_class=True)
        torch.testing.assert_close(theta, torch.eye(3).double(), rtol=0, atol=1e-4)

    @BOTH
    def test_one_network_weighs_1(self, per_class):
        z, labels = instance(1, 5, 4)
        theta = ensemble_weights(z, labels, per_class=per_class)
        assert torch.equal(theta, torch.ones_like(theta))


def perfect(z: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    z[1] = 5 * scale * F.one_hot(labels, z.shape[2])
    return z, labels


def duplicated(z: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    z[1] = z[3] = z[0]
    return z, labels


def all_equal(z: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return z[:1].expand_as(z), labels


def one_class(z: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return z, torch.zeros_like(labels)


def one_sample(z: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return z[:, :1], labels[:1]


def one_constant(z: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    z[2] = 0.0
    return z, labels


class TestHardCases:
    @BOTH
    @pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6])
    @pytest.mark.parametrize(
        "make", [perfect, duplicated, all_equal, one_class, one_sample, one_constant]
    )
    def test_degenerate(self, make, scale, per_class):
        z, labels = make(*instance(4, 32, 6, scale=scale), scale)
        assert_solved(ensemble_weights(z, labels, per_class=per_class), z, labels)

    @BOTH
    @pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
    @pytest.mark.parametrize("shape", [(2, 64, 10), (8, 32, 20), (3, 200, 30)])
    def test_huge_logits(self, shape, scale, per_class):
        z, labels = instance(*shape, scale=scale)
        assert_solved(ensemble_weights(z, labels, per_class=per_class), z, labels)

    @BOTH
    def test_imagenet(self, per_class):
        z, labels = instance(4, 256, 1000)
        assert_solved(ensemble_weights(z, labels, per_class=per_class), z, labels)

    @BOTH
    def test_a_large_common_part_costs_no_digits(self, per_class):
        z, labels = instance(3, 40, 5)
        common = 1e4 * torch.randn(40, 1, dtype=torch.float64, generator=torch.manual_seed(1))
        theta = ensemble_weights(z + common, labels, per_class=per_class)
        value = assert_solved(theta, z, labels)
        best = assert_solved(ensemble_weights(z, labels, per_class=per_class), z, labels)
        assert value == pytest.approx(best, abs=1e-6)

    @BOTH
    @pytest.mark.filterwarnings("error")
    def test_as_far_as_float32_goes(self, per_class):
        """Logits of 1e36: the cross-entropy is a sum of maxima, its minimum found by linear programming."""
        z, labels = instance(3, 8, 4, scale=1e36)
        theta = ensemble_weights(z.float(), labels, per_class=per_class).double()
        value = cross_entropy_of(theta.reshape(3, -1), z, labels).item() / 1e36
        lowest = solve_by_linear_programming(z / 1e36, labels, per_class)
        assert value == pytest.approx(lowest, rel=1e-5)


class TestContract:
    @BOTH
    def test_deterministic_and_without_gradient(self, per_class):
        z, labels = instance(3, 40, 5)
        z.requires_grad_()
        theta = ensemble_weights(z, labels, per_class=per_class)
        assert not theta.requires_grad
        assert torch.equal(theta, ensemble_weights(z, labels, per_class=per_class))

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_float_types(self, dtype, expected):
        z, labels = instance(3, 40, 5)
        theta = ensemble_weights(z.to(dtype), labels)
        assert theta.dtype == expected
        in_double = ensemble_weights(z.to(dtype).double(), labels)
        torch.testing.assert_close(theta.double(), in_double, rtol=1e-6, atol=1e-7)

    @BOTH
    def test_networks_in_another_order(self, per_class):
        z, labels = instance(4, 40, 5)
        order = torch.tensor([2, 0, 3, 1])
        theta = ensemble_weights(z, labels, per_class=per_class)
        swapped = ensemble_weights(z[order], labels, per_class=per_class)
        torch.testing.assert_close(swapped, theta[order], rtol=0, atol=1e-3)

    def test_not_finite(self):
        z, labels = instance(3, 5, 4)
        z[1, 2, 0] = math.nan
        with pytest.raises(NonFiniteError, match=r"network 1 .*logits\[1\].* 1 of 5 rows.* row 2"):
            ensemble_weights(z, labels)

    @pytest.mark.parametrize("bad", [-1, 4, -100])
    def test_labels_that_are_no_class(self, bad):
        z, labels = instance(3, 5, 4)
        labels[3] = bad
        with pytest.raises(ValueError, match=r"labels must be 0\.\.3, got"):
            ensemble_weights(z, labels)

    def test_shapes(self):
        z, labels = instance(3, 5, 4)
        with pytest.raises(ValueError, match=r"logits must be \(M, B, C\)"):
            ensemble_weights(z[0], labels)
        with pytest.raises(ValueError, match=r"labels must be \(B,\)"):
            ensemble_weights(z, labels[:4])

    @BOTH
    def test_out_of_reach_is_said_once_and_the_best_is_returned(
        self, per_class, monkeypatch, caplog
    ):
        monkeypatch.setattr(simplex_weights, "_MAX_STEPS", 3)
        simplex_weights._warn_once.cache_clear()
        z, labels = instance(4, 64, 10)
        with caplog.at_level(logging.WARNING):
            theta = ensemble_weights(z, labels, per_class=per_class)
            ensemble_weights(z, labels, per_class=per_class)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "duality gap of 1e-06" in caplog.text
        assert theta.min() >= 0
        torch.testing.assert_close(theta.sum(0), torch.ones_like(theta[0]))
        columns = theta.reshape(4, -1)
        uniform = torch.full_like(columns, 0.25)
        assert cross_entropy_of(columns, z, labels) < cross_entropy_of(uniform, z, labels)

    @BOTH
    def test_beyond_float64_training_goes_on(self, per_class):
        """Networks that cancel each other at 1e6: the gradient's own rounding is larger than the gap."""
        z, labels = instance(3, 64, 10, scale=1e6)
        z[1] = -z[0]
        theta = ensemble_weights(z, labels, per_class=per_class)
        assert torch.isfinite(theta).all()
        torch.testing.assert_close(theta.sum(0), torch.ones_like(theta[0]))
        # Equal weights of the two cancel to log 10.
        assert cross_entropy_of(theta.reshape(3, -1), z, labels) <= math.log(10)
