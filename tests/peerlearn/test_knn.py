import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from peerlearn import knn
from peerlearn.knn import (
    KNNProtocol,
    ensemble_features,
    knn_scores,
    knn_sweep,
    knn_top1,
    unit_rows,
)
from peerlearn.runs.stop import StoppedError


@pytest.fixture(autouse=True)
def _forget_the_search() -> Iterator[None]:
    knn._faiss_search.cache_clear()
    yield
    knn._faiss_search.cache_clear()


@pytest.fixture
def no_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)


@pytest.fixture(params=["faiss", "torch"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test once per search, and makes sure that it is this search that runs."""
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "faiss", None)
        monkeypatch.setattr(knn, "_TILE_ELEMENTS", 320)  # a few queries at a time
    else:
        assert knn._faiss_search() is not None
        monkeypatch.setattr(knn, "_search_with_torch", None)


def random_problem(
    n: int, d: int, q: int, classes: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[: min(n, classes)] = torch.arange(min(n, classes))
    train = 3 * torch.randn(n, d, generator=generator)
    return train, labels, torch.randn(q, d, generator=generator)


def brute_force(
    train: Tensor, labels: Tensor, queries: Tensor, *, k: int, temperature: float, num_classes: int
) -> np.ndarray:
    scores = np.zeros((len(queries), num_classes))
    rows = train.double().numpy()
    for q, query in enumerate(queries.double().numpy()):
        cosines = [float(row @ query / math.sqrt((row @ row) * (query @ query))) for row in rows]
        for n in sorted(range(len(rows)), key=lambda n: -cosines[n])[:k]:
            scores[q, labels[n]] += math.exp(cosines[n] / temperature)
    return scores


def float32_tolerance(temperature: float) -> float:
    """An error e of a float32 cosine is a relative error e / temperature of its vote."""
    return 1e-6 + 5e-7 / temperature


@pytest.mark.usefixtures("search")
class TestScores:
    @pytest.mark.parametrize(
        ("n", "d", "q", "classes", "k", "temperature"),
        [
            (53, 7, 11, 4, 5, 0.1),
            (53, 7, 11, 4, 53, 0.07),
            (101, 16, 23, 10, 20, 0.07),
            (17, 3, 1, 3, 200, 0.5),
            (400, 5, 9, 2, 1, 0.1),  # one query is more than a tile
            (64, 8, 10, 5, 7, 0.02),
            (1, 1, 3, 1, 1, 10.0),
        ],
    )
    def test_equals_float64_brute_force(
        self, n: int, d: int, q: int, classes: int, k: int, temperature: float
    ) -> None:
        train, labels, queries = random_problem(n, d, q, classes)
        scores = knn_scores(
            train, labels, queries, k=k, temperature=temperature, num_classes=classes
        )
        expected = brute_force(
            train, labels, queries, k=k, temperature=temperature, num_classes=classes
        )
        assert scores.dtype == torch.float64
        assert scores.shape == (q, classes)
        np.testing.assert_allclose(scores, expected, rtol=float32_tolerance(temperature))

    @pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (13, 0.07), (89, 0.2)])
    def test_equals_scikit_learn(self, k: int, temperature: float) -> None:
        train, labels, queries = random_problem(89, 6, 31, 5, seed=1)
        oracle = KNeighborsClassifier(
            n_neighbors=k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        ).fit(train.double().numpy(), labels.numpy())
        scores = knn_scores(train, labels, queries, k=k, temperature=temperature, num_classes=5)
        np.testing.assert_allclose(
            scores / scores.sum(dim=1, keepdim=True),
            oracle.predict_proba(queries.double().numpy()),
            rtol=float32_tolerance(temperature),
        )
        top1 = knn_top1(scores, torch.from_numpy(oracle.predict(queries.double().numpy())))
        assert top1 == 100

    def test_closed_form_on_axes(self) -> None:
        train = torch.tensor([[5.0, 0], [0.1, 0], [0, 2], [-7, 0]])
        scores = knn_scores(
            train,
            torch.tensor([0, 0, 1, 2]),
            torch.tensor([[3.0, 0]]),
            k=4,
            temperature=0.5,
            num_classes=3,
        )
        expected = [[2 * math.exp(2), 1, math.exp(-2)]]
        np.testing.assert_allclose(scores, expected, rtol=1e-6)

    def test_only_the_nearest_k_vote(self) -> None:
        angles = torch.tensor([0.3, 0.1, 0.2, 0.4, -0.05])
        scores = knn_scores(
            torch.stack([angles.cos(), angles.sin()], dim=1),
            torch.tensor([0, 1, 2, 3, 4]),
            torch.tensor([[1.0, 0]]),
            k=3,
            temperature=0.1,
            num_classes=5,
        )
        vote = {n: math.exp(math.cos(float(angles[n])) / 0.1) for n in (1, 2, 4)}
        np.testing.assert_allclose(
            scores, [[0, vote[1], vote[2], 0, vote[4]]], rtol=float32_tolerance(0.1)
        )

    def test_duplicates_each_vote(self) -> None:
        train = torch.tensor([[1.0, 2]]).repeat(7, 1)
        labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
        query = torch.tensor([[2.0, 4]])
        scores = knn_scores(train, labels, query, k=7, temperature=0.1, num_classes=3)
        np.testing.assert_allclose(scores, np.exp(10) * np.array([[1, 2, 4]]), rtol=5e-6)
        # Which of the tied seven vote is open, that five of them do is not.
        five = knn_scores(train, labels, query, k=5, temperature=0.1, num_classes=3)
        assert float(five.sum()) == pytest.approx(5 * math.exp(10), rel=5e-6)

    def test_a_zero_vector_has_similarity_zero(self) -> None:
        train = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
        scores = knn_scores(
            train,
            torch.tensor([0, 1, 2]),
            torch.tensor([[0.0, 0], [2, 0]]),
            k=3,
            temperature=0.5,
            num_classes=3,
        )
        np.testing.assert_allclose(scores, [[1, 1, 1], [1, math.exp(2), 1]], rtol=1e-6)

    def test_classes_without_images_keep_their_column(self) -> None:
        train, _, queries = random_problem(9, 4, 5, 1)
        labels = torch.tensor([1, 3, 1, 3, 1, 3, 1, 3, 1])
        scores = knn_scores(train, labels, queries, k=9, temperature=0.1, num_classes=6)
        assert scores.shape == (5, 6)
        assert (scores[:, [0, 2, 4, 5]] == 0).all()
        assert (scores[:, [1, 3]] > 0).all()

    def test_no_queries(self) -> None:
        train, labels, queries = random_problem(9, 4, 0, 3)
        scores = knn_scores(train, labels, queries, k=2, temperature=0.1, num_classes=3)
        assert scores.shape == (0, 3)
        assert scores.dtype == torch.float64

    def test_a_low_temperature_does_not_overflow(self) -> None:
        train, labels, queries = random_problem(50, 6, 7, 4)
        queries[0] = train[0]  # exp(100), which float32 cannot hold
        scores = knn_scores(train, labels, queries, k=10, temperature=0.01, num_classes=4)
        expected = brute_force(train, labels, queries, k=10, temperature=0.01, num_classes=4)
        assert scores.dtype == torch.float64
        assert float(scores[0].max()) > torch.finfo(torch.float32).max
        np.testing.assert_allclose(scores, expected, rtol=float32_tolerance(0.01))

    def test_the_highest_score_is_finite(self) -> None:
        # Of many cosines of a row with itself, some round to a little over 1.
        train, labels, _ = random_problem(300, 33, 0, 1)
        highest = torch.finfo(torch.float64).max
        temperature = (1 + 1e-10) / math.log(highest)
        scores = knn_scores(train, labels, train, k=1, temperature=temperature, num_classes=1)
        assert scores.isfinite().all()
        assert float(scores.max()) > 0.99 * highest

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int16])
    def test_any_real_dtype(self, dtype: torch.dtype) -> None:
        train, labels, queries = random_problem(40, 6, 7, 4)
        train, queries = (10 * train).to(dtype), (10 * queries).to(dtype)
        labels = labels.to(torch.uint8)
        scores = knn_scores(train, labels, queries, k=5, temperature=0.1, num_classes=4)
        assert scores.dtype == torch.float64
        expected = brute_force(train, labels, queries, k=5, temperature=0.1, num_classes=4)
        np.testing.assert_allclose(scores, expected, rtol=float32_tolerance(0.1))

    def test_strided_inputs_that_need_gradients_are_read_and_left_alone(self) -> None:
        train, labels, queries = random_problem(40, 6, 7, 4)
        expected = knn_scores(train, labels, queries, k=5, temperature=0.1, num_classes=4)
        strided = train.T.contiguous().T.requires_grad_()
        wide = queries.repeat_interleave(2, dim=1)[:, ::2]
        before = strided.detach().clone(), wide.clone()
        scores = knn_scores(strided, labels, wide, k=5, temperature=0.1, num_classes=4)
        np.testing.assert_allclose(scores, expected, rtol=float32_tolerance(0.1))
        assert not scores.requires_grad
        assert torch.equal(strided, before[0])
        assert torch.equal(wide, before[1])

    def test_the_trainings_low_precision_does_not_reach_the_search(self) -> None:
        train, labels, queries = random_problem(300, 256, 40, 4)

        def scores() -> Tensor:
            return knn_scores(train, labels, queries, k=20, temperature=0.07, num_classes=4)

        expected = scores()
        torch.set_float32_matmul_precision("medium")
        set_by_training = torch.backends.mkldnn.matmul.fp32_precision
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(scores(), expected)
            assert torch.backends.mkldnn.matmul.fp32_precision == set_by_training
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")

    @given(
        seed=st.integers(0, 2**32 - 1),
        exponents=st.lists(st.integers(-90, 90), min_size=30, max_size=30),
    )
    @settings(max_examples=30, deadline=None)
    def test_scale_of_any_row_is_immaterial(self, seed: int, exponents: list[int]) -> None:
        train, labels, queries = random_problem(23, 5, 7, 3, seed=seed)
        scale = torch.tensor(exponents).float().exp2()[:, None]
        plain = knn_scores(train, labels, queries, k=6, temperature=0.1, num_classes=3)
        scaled = knn_scores(
            train * scale[:23], labels, queries * scale[23:], k=6, temperature=0.1, num_classes=3
        )
        # Powers of two round nowhere, hence not a bit may differ.
        assert torch.equal(scaled, plain)

    @given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), k=st.integers(1, 70))
    @settings(max_examples=30, deadline=None)
    def test_order_of_images_and_queries_is_immaterial(self, seed: int, n: int, k: int) -> None:
        train, labels, queries = random_problem(n, 6, 9, 4, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(n, generator=generator)
        query_order = torch.randperm(9, generator=generator)
        plain = knn_scores(train, labels, queries, k=k, temperature=0.1, num_classes=4)
        shuffled = knn_scores(
            train[order],
            labels[order],
            queries[query_order],
            k=k,
            temperature=0.1,
            num_classes=4,
        )
        np.testing.assert_allclose(shuffled, plain[query_order], rtol=float32_tolerance(0.1))


def nearly_alike(
    n: int, q: int, d: int, *, offset: float = 100.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten classes apart in three directions, beside a common direction that is ``offset`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n + q,), generator=generator)
    directions = torch.randn(3, d, generator=generator) / d**0.5
    small = torch.randn(10, 3, generator=generator)[labels]
    small = small + 0.45 * torch.randn(n + q, 3, generator=generator)
    features = offset * torch.randn(d, generator=generator) + small @ directions
    return features[:n], labels[:n], features[n:], labels[n:]


def votes_in_extended_precision(
    networks: list[tuple[Tensor, Tensor]], labels: Tensor, *, k: int, temperature: float
) -> np.ndarray:
    """Scores for ten classes by the mean over networks of their cosines, 64 bits of mantissa throughout."""
    cosines = np.longdouble(0)
    for train, queries in networks:
        rows, asked = (each.numpy().astype(np.longdouble) for each in (train, queries))
        rows, asked = (x / np.sqrt((x * x).sum(1, keepdims=True)) for x in (rows, asked))
        cosines = cosines + np.stack([(rows * each).sum(1) for each in asked]) / len(networks)
    scores = np.zeros((len(cosines), 10), dtype=np.longdouble)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    for q, neighbours in enumerate(nearest):
        for n in neighbours:
            scores[q, labels[n]] += np.exp(cosines[q, n] / temperature)
    return scores


@pytest.mark.usefixtures("search")
class TestFeaturesThatDifferLittle:
    @pytest.mark.parametrize("k", [1, 5, 20, 200])
    @pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
    @pytest.mark.parametrize("d", [8, 512])
    def test_the_predictions_are_those_of_a_more_precise_search(
        self, k: int, offset: float, d: int
    ) -> None:
        train, labels, queries, asked = nearly_alike(400, 80, d, offset=offset)
        scores = knn_scores(train, labels, queries, k=k, temperature=0.1, num_classes=10)
        expected = votes_in_extended_precision([(train, queries)], labels, k=k, temperature=0.1)
        assert scores.argmax(dim=1).tolist() == expected.argmax(axis=1).tolist()
        assert knn_top1(scores, asked) > 25

    def test_two_groups_far_apart_whose_images_are_nearly_alike(self) -> None:
        # No one mean brings both near zero.
        train, labels, queries, asked = nearly_alike(400, 80, 64, offset=1e4)
        for rows in (train, queries):
            rows[::2] = rows[::2] * torch.linspace(-1, 1, 64)
        scores = knn_scores(train, labels, queries, k=5, temperature=0.1, num_classes=10)
        expected = votes_in_extended_precision([(train, queries)], labels, k=5, temperature=0.1)
        assert scores.argmax(dim=1).tolist() == expected.argmax(axis=1).tolist()
        assert knn_top1(scores, asked) > 25

    def test_a_row_of_zeros_among_them(self) -> None:
        train, labels, queries, _ = nearly_alike(300, 60, 32, offset=1e3)
        plain = knn_scores(train, labels, queries, k=5, temperature=0.1, num_classes=10)
        train = torch.cat([train, torch.zeros(1, 32)])
        labels = torch.cat([labels, torch.tensor([3])])
        scores = knn_scores(train, labels, queries, k=5, temperature=0.1, num_classes=10)
        torch.testing.assert_close(scores, plain, rtol=1e-7, atol=0)

    def test_the_joint_features_of_networks(self) -> None:
        one, labels, asked_of_one, _ = nearly_alike(400, 100, 48, offset=300.0)
        other, _, asked_of_other, _ = nearly_alike(400, 100, 16, offset=3000.0)
        scores = knn_scores(
            ensemble_features([one, other]),
            labels,
            ensemble_features([asked_of_one, asked_of_other]),
            k=5,
            temperature=0.1,
            num_classes=10,
        )
        networks = [(one, asked_of_one), (other, asked_of_other)]
        expected = votes_in_extended_precision(networks, labels, k=5, temperature=0.1)
        assert scores.argmax(dim=1).tolist() == expected.argmax(axis=1).tolist()

    @given(
        seed=st.integers(0, 2**32 - 1),
        exponent=st.floats(-2, 4),
        d=st.integers(3, 40),
        k=st.integers(1, 30),
    )
    @settings(max_examples=25, deadline=None)
    def test_at_any_offset_and_size(self, seed: int, exponent: float, d: int, k: int) -> None:
        train, labels, queries, _ = nearly_alike(80, 15, d, offset=10**exponent, seed=seed)
        scores = knn_scores(train, labels, queries, k=k, temperature=0.07, num_classes=10)
        expected = votes_in_extended_precision([(train, queries)], labels, k=k, temperature=0.07)
        assert scores.argmax(dim=1).tolist() == expected.argmax(axis=1).tolist()


def test_float32_settles_nearly_every_query_of_features_that_are_spread_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, labels, queries, _ = nearly_alike(5000, 1000, 128, offset=1.0)
    again = []
    search = knn._search_in_float64

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        again.append(len(arguments[3]))
        return search(*arguments)

    monkeypatch.setattr(knn, "_search_in_float64", counted)
    knn_scores(train, labels, queries, k=20, temperature=0.1, num_classes=10)
    assert sum(again) < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": torch.ones(0, 4), "train_labels": torch.ones(0).long()}, "empty"),
        ({"train_labels": torch.zeros(5).long()}, r"train_labels must be \(6,\), not \(5,\)"),
        ({"train_labels": torch.zeros(6, 1).long()}, r"train_labels must be \(6,\)"),
        ({"train_labels": torch.zeros(6)}, "train_labels must be integers"),
        ({"train_labels": torch.tensor([0, 1, 2, 0, 1, 3])}, r"\[0, 3\], outside the 3 classes"),
        ({"train_labels": torch.tensor([0, 1, 2, 0, 1, -1])}, r"\[-1, 2\], outside"),
        ({"num_classes": 0}, "outside the 0 classes"),
        ({"features": torch.ones(2, 5)}, "train_features has 4 dimensions, features 5"),
        ({"features": torch.ones(4)}, r"features must be \(N, D\)"),
        ({"train_features": torch.ones(6, 4, 1)}, r"train_features must be \(N, D\)"),
        ({"train_features": torch.ones(6, 0)}, r"train_features must be \(N, D\) with D >= 1"),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 0.001}, "exceeds float64"),
        ({"temperature": 5e-324}, "exceeds float64"),
        ({"features": torch.tensor([[1, 2, 3, math.nan]])}, "^features has entries .* not finite"),
        ({"train_features": torch.full((6, 4), math.inf)}, "train_features has entries"),
        ({"train_features": torch.full((6, 4), -math.inf)}, "train_features has entries"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "train_features": torch.ones(6, 4),
        "train_labels": torch.tensor([0, 1, 2, 0, 1, 2]),
        "features": torch.ones(2, 4),
        "k": 3,
        "temperature": 0.1,
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message) as refused:
        knn_scores(**(arguments | change))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("no_faiss")
def test_a_missing_faiss_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    train, labels, queries = random_problem(9, 4, 5, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            knn_scores(train, labels, queries, k=2, temperature=0.1, num_classes=3)
    assert [record.name for record in caplog.records] == ["peerlearn.knn"]
    assert "pip install faiss-gpu" in caplog.text


@given(
    columns=st.integers(1, 200),
    k=st.integers(1, 12),
    levels=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_the_highest_of_long_rows_are_those_of_topk(
    columns: int, k: int, levels: int, seed: int
) -> None:
    """Of equal entries any may be chosen; each is where it is said to be, and none is chosen twice."""
    k = min(k, columns)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(levels, (5, columns), generator=generator).float()
    values, places = knn._highest(rows, k)
    assert torch.equal(values, rows.topk(k, dim=1).values)
    assert torch.equal(values, rows.gather(1, places))
    assert all(len(set(row.tolist())) == k for row in places)


@pytest.mark.usefixtures("no_faiss")
def test_the_torch_search_holds_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = unit_rows(torch.randn(30, 4)), unit_rows(torch.randn(50, 4))
    monkeypatch.setattr(knn, "_TILE_ELEMENTS", 100)
    sizes = []
    topk = Tensor.topk

    def watched(tile: Tensor, *args: int, **kwargs: int) -> object:
        sizes.append(tile.numel())
        return topk(tile, *args, **kwargs)

    monkeypatch.setattr(Tensor, "topk", watched)
    knn._search_with_torch(train.float(), queries.float(), 3)
    assert sizes == [90] * 16 + [60]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu_under_tf32() -> None:
    train, labels, queries = random_problem(1001, 256, 77, 10)
    expected = brute_force(train, labels, queries, k=50, temperature=0.07, num_classes=10)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            scores = knn_scores(
                train.cuda(), labels.cuda(), queries.cuda(), k=50, temperature=0.07, num_classes=10
            )
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert scores.device.type == "cuda"
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores.cpu(), expected, rtol=float32_tolerance(0.07))
    assert knn_top1(scores, scores.argmax(dim=1)) == 100


class TestTop1:
    def test_counts_in_percent(self) -> None:
        scores = torch.tensor([[1.0, 2, 0], [5, 4, 4.9], [0, 0, 1], [3, 1, 2]])
        assert knn_top1(scores, torch.tensor([1, 0, 0, 2])) == 50
        assert knn_top1(scores[:3], torch.tensor([1, 2, 2])) == pytest.approx(200 / 3)

    def test_a_tie_goes_to_the_lowest_class(self) -> None:
        scores = torch.zeros(40, 1000)
        scores[:, [7, 8, 500, 999]] = 3.5
        assert knn_top1(scores, torch.full((40,), 7)) == 100

    @pytest.mark.parametrize(
        ("scores", "labels", "message"),
        [
            (torch.ones(0, 3), torch.ones(0).long(), "Q >= 1"),
            (torch.ones(3), torch.ones(3).long(), r"\(Q, C\)"),
            (torch.ones(2, 3), torch.ones(3).long(), r"labels must be \(2,\)"),
            (torch.ones(2, 3), torch.tensor([0, 3]), "outside the 3 classes"),
        ],
    )
    def test_refusals(self, scores: Tensor, labels: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            knn_top1(scores, labels)


class TestProtocol:
    def test_defaults_are_the_colabs(self) -> None:
        assert KNNProtocol() == KNNProtocol(k=200, temperature=0.1)

    def test_the_stated_lowest_temperature(self) -> None:
        KNNProtocol(k=200, temperature=0.00143)
        with pytest.raises(ValueError, match="exceeds float64"):
            KNNProtocol(k=200, temperature=0.00141)


class TestEnsemble:
    def test_its_cosine_is_the_mean_of_the_networks_cosines(self) -> None:
        generator = torch.Generator().manual_seed(0)
        networks = [
            scale * torch.randn(11, d, generator=generator)
            for scale, d in ((1.0, 3), (1e-6, 8), (1e6, 5))
        ]
        ensemble = ensemble_features(networks)
        assert ensemble.shape == (11, 16)
        rows = unit_rows(ensemble)
        cosines = [torch.nn.functional.normalize(each.double(), dim=1) for each in networks]
        mean = torch.stack([each @ each.T for each in cosines]).mean(dim=0)
        torch.testing.assert_close(rows @ rows.T, mean, atol=1e-14, rtol=0)

    def test_one_network_is_itself_normalised(self) -> None:
        features = torch.tensor([[3.0, 4], [0, 0]])
        expected = torch.tensor([[0.6, 0.8], [0, 0]], dtype=torch.float64)
        torch.testing.assert_close(ensemble_features([features]), expected)

    def test_no_image_is_allowed(self) -> None:
        assert ensemble_features([torch.ones(0, 3), torch.ones(0, 2)]).shape == (0, 5)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ([], "at least one network"),
            ([torch.ones(3, 2), torch.ones(4, 2)], r"features of \[3, 4\] images"),
            ([torch.ones(3, 2), torch.full((3, 2), math.nan)], r"features\[1\] has entries"),
        ],
    )
    def test_refusals(self, features: list[Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ensemble_features(features)


class TestUnitRows:
    @pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1.0, 1e20, 5e37])
    def test_keeps_the_direction_at_any_scale(self, scale: float) -> None:
        rows = unit_rows(scale * torch.tensor([[3.0, -4, 0]]))
        tolerance = 1e-6 if scale > 1e-40 else 2e-3  # a subnormal has few digits
        expected = torch.tensor([[0.6, -0.8, 0]], dtype=torch.float64)
        torch.testing.assert_close(rows, expected, atol=tolerance, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_float64(self, dtype: torch.dtype) -> None:
        features = torch.randn(5, 3, dtype=dtype)
        kept = features.clone()
        rows = unit_rows(features)
        assert rows.dtype == torch.float64
        lengths = features.double().norm(dim=1, keepdim=True)
        torch.testing.assert_close(rows, features.double() / lengths, atol=1e-15, rtol=0)
        assert torch.equal(features, kept)

    @pytest.mark.parametrize("scale", [1e-300, 1e300])
    def test_float64_of_any_scale(self, scale: float) -> None:
        rows = unit_rows(scale * torch.tensor([[3.0, -4, 0]], dtype=torch.float64))
        expected = torch.tensor([[0.6, -0.8, 0]], dtype=torch.float64)
        torch.testing.assert_close(rows, expected, atol=1e-15, rtol=0)


@pytest.mark.usefixtures("search")
def test_a_sweep_is_every_protocol_on_its_own():
    train, labels, queries = random_problem(40, 5, 11, 4)
    protocols = [KNNProtocol(k=k, temperature=t) for k in (1, 3, 100) for t in (0.05, 0.5)]
    swept = knn_sweep(train, labels, queries, protocols=protocols, num_classes=4)
    for protocol, scores in zip(protocols, swept, strict=True):
        k, temperature = protocol.k, protocol.temperature
        alone = knn_scores(train, labels, queries, k=k, temperature=temperature, num_classes=4)
        torch.testing.assert_close(scores, alone)
        expected = brute_force(train, labels, queries, k=k, temperature=temperature, num_classes=4)
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_a_long_search_of_faiss_is_done_in_parts_between_which_it_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, labels, queries = random_problem(200, 16, 300, 5)
    settings = {"k": 7, "temperature": 0.1, "num_classes": 5}
    whole = knn_scores(train, labels, queries, **settings)
    checks = []
    monkeypatch.setattr(knn, "check_stop", lambda: checks.append(None))
    knn_scores(train, labels, queries, **settings)
    assert len(checks) == 1
    # 300 queries x 200 x 16 products are 10 parts of 100,000, and 5 of the fewest queries.
    monkeypatch.setattr(knn, "_UNINTERRUPTED_PRODUCTS", 1e5)
    knn_scores(train, labels, queries, **settings)
    assert len(checks) == 1 + 5
    monkeypatch.setattr(knn, "_FEWEST_QUERIES", 20)
    found = knn_scores(train, labels, queries, **settings)
    assert len(checks) >= 1 + 5 + 10
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=0)

    def stop() -> None:
        raise StoppedError("stopped by SIGTERM")

    monkeypatch.setattr(knn, "check_stop", stop)
    with pytest.raises(StoppedError, match="stopped by SIGTERM"):
        knn_scores(train, labels, queries, **settings)
