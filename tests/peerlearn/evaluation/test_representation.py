import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from scipy.spatial.distance import pdist
from torch import Tensor

from peerlearn.evaluation import representation
from peerlearn.evaluation.representation import (
    alignment,
    feature_std,
    lidar,
    neighbour_agreement,
    peer_agreement,
    rankme,
    uniformity,
)

EPSILON = 1e-7


def gaussian(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def with_singular_values(values: list[float], n: int, d: int) -> Tensor:
    left, _ = torch.linalg.qr(gaussian(n, len(values), seed=1))
    right, _ = torch.linalg.qr(gaussian(d, len(values), seed=2))
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def unit(features: Tensor) -> np.ndarray:
    rows = features.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class TestRankMe:
    @pytest.mark.parametrize("rank", [1, 2, 7, 16])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_is_the_rank_where_singular_values_are_equal(self, rank: int, scale: float) -> None:
        features = with_singular_values([scale] * rank, 50, 16)
        # The epsilon of the absent directions adds at most 16e-7 log 1e7 to the entropy.
        assert rankme(features) == pytest.approx(rank, rel=3e-5)

    def test_equals_the_papers_formula_epsilon_included(self) -> None:
        values = [5.0, 2.0, 1.0, 1e-3, 1e-6]
        shares = [value / sum(values) + EPSILON for value in values] + [EPSILON] * 4
        expected = math.exp(-sum(share * math.log(share) for share in shares))
        assert rankme(with_singular_values(values, 31, 9)) == pytest.approx(expected, rel=1e-10)

    def test_isotropic_gaussian_has_nearly_all_dimensions(self) -> None:
        assert 31.9 < rankme(gaussian(20_000, 32)) <= 32

    def test_features_are_not_centred(self) -> None:
        assert rankme(gaussian(500, 8) + 1000) < 1.1

    @pytest.mark.parametrize("row", [[1.0, 2, 3], [0.0, 0, 0]])
    def test_collapsed_features_have_rank_one(self, row: list[float]) -> None:
        assert rankme(torch.tensor([row] * 9)) == pytest.approx(1, abs=1e-5)

    @given(n=st.integers(1, 12), d=st.integers(1, 12), seed=st.integers(0, 999))
    @settings(max_examples=40, deadline=None)
    def test_bounds_and_symmetries(self, n: int, d: int, seed: int) -> None:
        features = gaussian(n, d, seed)
        rotation, _ = torch.linalg.qr(gaussian(d, d, seed + 1))
        value = rankme(features)
        assert 1 - 1e-5 <= value <= min(n, d) * (1 + 1e-5)
        for same in (features.T, -3 * features, features @ rotation, features.flip(0)):
            assert rankme(same) == pytest.approx(value, rel=1e-9)

    def test_float32_and_bfloat16_are_lifted(self) -> None:
        features = gaussian(40, 6).bfloat16()
        assert rankme(features) == rankme(features.double())
        assert rankme(features.float()) == rankme(features.double())


class TestFeatureStd:
    @pytest.mark.parametrize("d", [1, 3, 64])
    def test_plus_and_minus_every_axis_is_exactly_isotropic(self, d: int) -> None:
        axes = torch.eye(d) * torch.arange(1, d + 1)  # normalised away
        assert feature_std(torch.cat([axes, -axes])) == pytest.approx(1 / math.sqrt(d), rel=1e-12)

    def test_gaussian_is_nearly_isotropic(self) -> None:
        assert feature_std(gaussian(5000, 100)) == pytest.approx(0.1, rel=0.005)

    @pytest.mark.parametrize("n", [1, 8])
    def test_collapsed_features_have_none(self, n: int) -> None:
        direction = torch.tensor([[1.0, -2, 0.5]])
        scales = torch.arange(1, n + 1)[:, None]
        assert feature_std(direction * scales) == pytest.approx(0, abs=1e-12)

    @given(n=st.integers(1, 20), d=st.integers(1, 9), seed=st.integers(0, 999))
    @settings(max_examples=40, deadline=None)
    def test_equals_numpy_and_is_at_most_isotropic(self, n: int, d: int, seed: int) -> None:
        features = gaussian(n, d, seed) + 0.3
        value = feature_std(features)
        assert value == pytest.approx(float(unit(features).std(axis=0).mean()), abs=1e-12)
        assert value <= 1 / math.sqrt(d) + 1e-12


class TestAlignment:
    def test_identical_views_are_at_zero(self) -> None:
        features = gaussian(9, 5)
        assert alignment(features, features) == 0
        assert alignment(features, 7 * features) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("angle", [0.1, 1.0, math.pi / 2, math.pi])
    def test_views_an_angle_apart(self, angle: float) -> None:
        start = torch.linspace(0, 5, 13, dtype=torch.float64)
        a = torch.stack([start.cos(), start.sin()], dim=1)
        b = torch.stack([(start + angle).cos(), (start + angle).sin()], dim=1)
        assert alignment(2 * a, 5 * b) == pytest.approx(2 - 2 * math.cos(angle), rel=1e-10)

    def test_is_a_mean_over_images(self) -> None:
        a = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
        b = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
        assert alignment(a, b) == pytest.approx((0 + 2 + 4) / 3)


class TestUniformity:
    # 100 elements a tile: one block, blocks that do not divide N, and one row a block.
    @pytest.mark.parametrize("n", [2, 3, 10, 23, 150])
    @pytest.mark.parametrize("offset", [0.0, 0.7])
    def test_equals_scipy(self, n: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(representation, "_TILE_ELEMENTS", 100)
        features = gaussian(n, 6, seed=n) + offset
        expected = math.log(np.exp(-2 * pdist(unit(features), "sqeuclidean")).mean())
        assert uniformity(features) == pytest.approx(expected, rel=1e-10)

    def test_closed_forms(self) -> None:
        opposite = torch.tensor([[1.0, 1], [-3, -3]])
        assert uniformity(opposite) == pytest.approx(-8, rel=1e-10)
        assert uniformity(torch.eye(7)) == pytest.approx(-4, rel=1e-10)
        assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-12)

    def test_regular_polygon(self) -> None:
        n = 17
        angles = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
        around = [math.exp(-2 * (2 - 2 * math.cos(2 * math.pi * step / n))) for step in range(1, n)]
        assert uniformity(torch.stack([angles.cos(), angles.sin()], dim=1)) == pytest.approx(
            math.log(sum(around) / (n - 1)), rel=1e-10
        )

    def test_images_that_are_nearly_alike_keep_their_digits(self) -> None:
        angles = 1e-7 * torch.arange(9, dtype=torch.float64)
        features = torch.stack([angles.cos(), angles.sin()], dim=1)
        pairs = [(i - j) ** 2 for i in range(9) for j in range(i)]
        expected = -2e-14 * sum(pairs) / len(pairs)
        assert uniformity(features) == pytest.approx(expected, rel=1e-6)

    def test_a_zero_row_is_at_distance_one_from_the_others(self) -> None:
        features = torch.tensor([[0.0, 0], [3, 0], [0, 5]])
        expected = math.log((2 * math.exp(-2) + math.exp(-4)) / 3)
        assert uniformity(features) == pytest.approx(expected, rel=1e-10)


class TestPeerAgreement:
    def test_mean_over_pairs(self) -> None:
        predictions = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]])
        # pairs agree on 3, 1 and 2 of 4 images
        assert peer_agreement(predictions) == pytest.approx(50)
        assert peer_agreement(predictions[:2]) == pytest.approx(75)

    def test_extremes(self) -> None:
        assert peer_agreement(torch.arange(12).repeat(4, 1)) == 100
        assert peer_agreement(torch.arange(4)[:, None].repeat(1, 6)) == 0

    def test_one_network_has_no_peer(self) -> None:
        assert math.isnan(peer_agreement(torch.tensor([[0, 1, 2]])))

    @given(seed=st.integers(0, 999), m=st.integers(2, 5), n=st.integers(1, 20))
    @settings(max_examples=40, deadline=None)
    def test_neither_the_order_of_networks_nor_the_names_of_classes_matter(
        self, seed: int, m: int, n: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        predictions = torch.randint(3, (m, n), generator=generator)
        renamed = torch.tensor([7, 0, 4])[predictions[torch.randperm(m, generator=generator)]]
        expected = np.mean(
            [
                np.mean(predictions[i].numpy() == predictions[j].numpy())
                for i in range(m)
                for j in range(m)
                if i != j
            ]
        )
        assert peer_agreement(predictions) == pytest.approx(100 * expected)
        assert peer_agreement(renamed) == pytest.approx(100 * expected)


EMPTY, FLAT = torch.ones(0, 3), torch.ones(3)
NAN, INFINITE = torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0], [math.inf]])


@pytest.mark.parametrize("bad", [EMPTY, FLAT, NAN, INFINITE, torch.ones(3, 0)])
def test_refusals(bad: Tensor) -> None:
    for measure in (rankme, feature_std, uniformity, lambda a: alignment(a, a)):
        with pytest.raises(ValueError, match=r"must be \(N, D\)|empty|not finite"):
            measure(bad)


def test_refusals_of_one_measure() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        alignment(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"^b has entries"):
        alignment(torch.ones(1, 2), NAN)
    with pytest.raises(ValueError, match="at least two"):
        uniformity(torch.ones(1, 3))
    for bad in (FLAT, torch.ones(2, 0), torch.ones(0, 2)):
        with pytest.raises(ValueError, match=r"\(M, N\)"):
            peer_agreement(bad)


def exact_views(signal: list[float], d: int, noise: float, n: int = 40) -> Tensor:
    """Two views of n images in D dimensions: means of these variances, exactly, and noise of one in every dimension."""
    columns = torch.cat([torch.ones(n, 1, dtype=torch.float64), gaussian(n, len(signal) + d)], 1)
    # Orthogonal to each other, and to the mean.
    columns = torch.linalg.qr(columns).Q[:, 1:]
    means = torch.zeros(n, d, dtype=torch.float64)
    means[:, : len(signal)] = (
        columns[:, : len(signal)] * (torch.tensor(signal, dtype=torch.float64) * (n - 1)).sqrt()
    )
    off = columns[:, len(signal) :] * math.sqrt(noise * n / 2)
    return torch.stack([means + off, means - off]) + 3.0


class TestLiDAR:
    @pytest.mark.parametrize("rank", [1, 3, 8])
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_is_the_number_of_directions_that_tell_images_apart_alike(self, rank, scale):
        views = exact_views([4.0] * rank, 8, noise=1.0) * scale
        assert lidar(views) == pytest.approx(rank, rel=3e-5)

    def test_directions_count_by_their_ratio_of_signal_to_noise(self):
        """Of the variance of the mean of two views, half the noise is none of the images'."""
        signal, noise = [9.0, 2.0, 0.7, 0.4], 1.0
        values = [(s - noise / 2) / (noise * (1 + 1e-4)) for s in signal[:3]] + [0.0] * 3
        shares = [value / sum(values) + EPSILON for value in values]
        expected = math.exp(-sum(share * math.log(share) for share in shares))
        assert lidar(exact_views(signal, 6, noise)) == pytest.approx(expected, rel=1e-9)

    def test_agrees_with_scipys_generalised_eigenvalues(self):
        views = torch.stack([gaussian(60, 7, seed=9) * torch.arange(1, 8)] * 4)
        views += torch.stack([gaussian(60, 7, seed=s) @ gaussian(7, 7) for s in range(4)])
        rows = views.numpy()
        within = sum(np.cov(rows[:, i], rowvar=False) for i in range(60)) / 60
        between = np.cov(rows.mean(0), rowvar=False) - within / 4
        ridge = 1e-4 * np.trace(within) / 7 * np.eye(7)
        values = eigh(between, within + ridge, eigvals_only=True).clip(0)
        shares = values / values.sum() + EPSILON
        assert lidar(views) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
        assert lidar(views.flip(0)) == pytest.approx(lidar(views), rel=1e-12)

    def test_two_views_show_what_fifty_do(self):
        """Signals 8, 4 and 2 in three of ten dimensions of noise 1: in the limit of many images, 2.6 directions."""
        signal = torch.tensor([8.0, 4.0, 2.0] + [0.0] * 7).sqrt()
        views = torch.stack([gaussian(4000, 10, seed=99) * signal] * 50)
        views += torch.stack([gaussian(4000, 10, seed=s) for s in range(50)])
        expected = math.exp(-sum(p * math.log(p) for p in (8 / 14, 4 / 14, 2 / 14)))
        assert lidar(views) == pytest.approx(expected, rel=0.03)
        assert lidar(views[:2]) == pytest.approx(expected, rel=0.06)

    def test_without_noise_it_is_the_rank_of_the_images(self):
        views = exact_views([2.0, 2.0, 2.0], 5, noise=0.0)
        assert lidar(views) == pytest.approx(3, rel=3e-5)

    def test_it_is_one_where_nothing_tells_images_apart(self):
        assert lidar(exact_views([], 5, noise=1.0)) == pytest.approx(1, abs=1e-4)
        assert lidar(torch.ones(2, 9, 5)) == pytest.approx(1, abs=1e-4)

    def test_half_precision_is_widened(self):
        views = exact_views([4.0, 1.0], 5, noise=1.0).half()
        assert lidar(views) == lidar(views.double())

    @pytest.mark.parametrize(
        "bad", [gaussian(9, 3), torch.ones(1, 9, 3), torch.ones(2, 3, 3), torch.ones(2, 9, 0)]
    )
    def test_refusals(self, bad):
        with pytest.raises(ValueError, match=r"must be \(Q, N, D\)"):
            lidar(bad)
        with pytest.raises(ValueError, match="not finite"):
            lidar(torch.full((2, 9, 3), math.nan))


class TestNeighbourAgreement:
    def test_nearest_images_by_hand(self):
        """On a circle: 0 and 1, 2 and 3 are pairs in the first; the second brings 1 and 2 together."""

        def circle(*degrees: float) -> Tensor:
            angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
            return torch.stack([angles.cos(), angles.sin()], dim=1)

        first = circle(0, 10, 90, 105) * torch.tensor([[1.0], [9.0], [2.0], [3.0]])
        second = circle(0, 60, 90, 150)
        # Nearest: 1 0 3 2, and 1 2 1 2.
        assert neighbour_agreement([first, second]) == 50.0
        assert neighbour_agreement([first, first, second]) == pytest.approx((100 + 50 + 50) / 3)

    def test_agrees_with_scipy(self):
        both = [gaussian(50, d, seed=d) + offset for d, offset in ((7, 0.0), (9, 100.0))]
        nearest = []
        for features in both:
            distances = np.full((50, 50), np.inf)
            upper = np.triu_indices(50, 1)
            distances[upper] = pdist(unit(features))
            nearest.append(np.minimum(distances, distances.T).argmin(1))
        assert neighbour_agreement(both) == 100 * float((nearest[0] == nearest[1]).mean())

    def test_one_network_has_no_pair_and_one_image_no_neighbour(self):
        assert math.isnan(neighbour_agreement([gaussian(5, 3)]))
        with pytest.raises(ValueError, match="at least two images"):
            neighbour_agreement([gaussian(1, 3)])
