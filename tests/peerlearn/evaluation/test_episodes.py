import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from peerlearn.errors import UserError
from peerlearn.evaluation import episodes as module
from peerlearn.evaluation.episodes import (
    Episodes,
    draw_episodes,
    logistic_regression,
    nearest_centroid,
    read_episodes,
    score_episodes,
    write_episodes,
)

SUPPORT = [[[4], [11], [15]], [[23], [10], [22]]]
QUERY = [[[9, 19], [26, 21], [0, 5]], [[13, 28], [5, 20], [17, 2]]]
SIZE = {"ways": 3, "shots": 2, "queries": 4}


def labelled(
    classes: int = 6, of_each: int = 11, d: int = 7, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(of_each)
    centres = torch.randn(classes, d, generator=generator)
    common = offset * torch.randn(d, generator=generator)
    noise = torch.randn(len(labels), d, generator=generator)
    return common + centres[labels] + noise, labels


class TestDraw:
    def test_every_row_is_of_one_class_and_no_image_comes_twice(self):
        labels = torch.tensor([4, 9, 4, 4, 9, 7, 7, 9, 4, 7, 7, 9, 4])
        drawn = draw_episodes(labels, ways=2, shots=1, queries=3, episodes=200, seed=1)
        images = torch.cat([drawn.support, drawn.query], dim=2)
        assert images.shape == (200, 2, 4)
        classes = labels[images]
        assert (classes == classes[:, :, :1]).all()
        assert (classes[:, 0, 0] != classes[:, 1, 0]).all()
        assert all(len(set(row)) == 4 for row in images.flatten(0, 1).tolist())
        # Each of the three pairs of classes, and each image, is drawn about as often.
        pairs = classes[:, :, 0].sort(dim=1).values.unique(dim=0, return_counts=True)[1]
        assert pairs.tolist() == pytest.approx([200 / 3] * 3, abs=25)
        first = images[classes == 9].bincount(minlength=13)[labels == 9]
        assert first.float().std(correction=0) < 1e-9  # all four of four are taken each time
        support = drawn.support.flatten().bincount(minlength=13)[labels == 4]
        assert support.tolist() == pytest.approx([200 * 2 / 3 / 5] * 5, abs=18)

    def test_an_episode_is_a_function_of_seed_and_number(self, monkeypatch):
        _, labels = labelled()
        many = draw_episodes(labels, **SIZE, episodes=40, seed=3)
        monkeypatch.setattr(module, "_TILE_WORDS", 1)
        few = draw_episodes(labels, **SIZE, episodes=7, seed=3)
        assert torch.equal(few.support, many.support[:7])
        assert torch.equal(few.query, many.query[:7])
        other = draw_episodes(labels, **SIZE, episodes=40, seed=4)
        assert not torch.equal(other.support, many.support)

    def test_episodes_of_more_shots_have_the_same_classes(self):
        _, labels = labelled()
        one, five = (
            draw_episodes(labels, ways=4, shots=s, queries=3, episodes=30, seed=0) for s in (1, 5)
        )
        assert torch.equal(labels[one.support[:, :, 0]], labels[five.support[:, :, 0]])
        assert torch.equal(one.support[:, :, 0], five.support[:, :, 0])

    def test_these_are_the_episodes_of_every_machine(self):
        drawn = draw_episodes(
            torch.arange(5).repeat(6), ways=3, shots=1, queries=2, episodes=2, seed=0
        )
        assert drawn.support.tolist() == SUPPORT
        assert drawn.query.tolist() == QUERY

    def test_too_few_classes_or_images_are_named(self):
        labels = torch.tensor([0, 0, 0, 1, 1, 5])
        with pytest.raises(UserError, match=r"of 4 ways need as many classes, and there are 3"):
            draw_episodes(labels, ways=4, shots=1, queries=1, episodes=1, seed=0)
        with pytest.raises(UserError, match=r"1 shots and 1 queries .* class 5 has 1 image:"):
            draw_episodes(labels, ways=2, shots=1, queries=1, episodes=1, seed=0)


def accuracies_one_by_one(features: Tensor, drawn: Episodes, classify) -> list[float]:
    found = []
    for support, query in zip(drawn.support, drawn.query, strict=True):
        ways = np.arange(len(support))
        learnt = features[support.flatten()].double().numpy()
        asked = features[query.flatten()].double().numpy()
        predicted = classify(learnt, np.repeat(ways, support.shape[1]), asked)
        found.append(100 * float((predicted == np.repeat(ways, query.shape[1])).mean()))
    return found


def by_cosine(learnt: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    means = np.stack([learnt[labels == way].mean(0) for way in np.unique(labels)])
    means, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (means, asked))
    return (asked @ means.T).argmax(1)


class TestScore:
    @pytest.mark.parametrize("tile", [1, 500, 2**20])
    @pytest.mark.parametrize("offset", [0.0, 1e3])
    def test_equals_scikit_learns_nearest_centroid(self, monkeypatch, tile, offset):
        monkeypatch.setattr(module, "_TILE_ELEMENTS", tile)
        features, labels = labelled(offset=offset)
        drawn = draw_episodes(labels, **SIZE, episodes=25, seed=0)
        result = score_episodes(7, drawn, nearest_centroid(features, distance="sqeuclidean"))
        expected = accuracies_one_by_one(
            features, drawn, lambda x, y, asked: NearestCentroid().fit(x, y).predict(asked)
        )
        assert result.accuracies.tolist() == pytest.approx(expected)
        assert 40 < result.mean < 95

    @pytest.mark.parametrize("offset", [0.0, 1e3])
    def test_cosine_equals_the_formula(self, offset):
        features, labels = labelled(offset=offset)
        drawn = draw_episodes(labels, **SIZE, episodes=25, seed=0)
        result = score_episodes(7, drawn, nearest_centroid(features, distance="cosine"))
        assert result.accuracies.tolist() == pytest.approx(
            accuracies_one_by_one(features, drawn, by_cosine)
        )

    @pytest.mark.parametrize("penalty_c", [0.01, 1.0])
    def test_logistic_regression_equals_scikit_learns_on_the_features_as_they_are(self, penalty_c):
        features, labels = labelled(offset=2.0)
        drawn = draw_episodes(labels, **SIZE, episodes=12, seed=0)
        result = score_episodes(7, drawn, logistic_regression(features, penalty_c=penalty_c))
        expected = accuracies_one_by_one(
            features,
            drawn,
            lambda x, y, asked: (
                LogisticRegression(C=penalty_c, tol=1e-8, max_iter=5000).fit(x, y).predict(asked)
            ),
        )
        assert result.accuracies.tolist() == pytest.approx(expected)

    def test_closed_form_and_its_interval(self):
        # One number an image: class 0 at 0, class 1 at 10, but for two strays of class 1 at 1.
        features = torch.tensor([0.0, 0, 0, 10, 10, 1, 1])[:, None]
        drawn = Episodes(
            torch.tensor([[[0], [3]], [[0], [5]]]),
            torch.tensor([[[1, 2], [4, 5]], [[1, 2], [4, 6]]]),
        )
        result = score_episodes(1, drawn, nearest_centroid(features, distance="sqeuclidean"))
        assert result.accuracies.tolist() == [75, 100]
        assert result.mean == 87.5
        assert result.ci95 == pytest.approx(1.96 * math.sqrt(2 * 12.5**2) / math.sqrt(2))

    def test_one_episode_has_no_interval(self):
        features, labels = labelled()
        drawn = draw_episodes(labels, **SIZE, episodes=1, seed=0)
        scorer = nearest_centroid(features, distance="sqeuclidean")
        assert math.isnan(score_episodes(7, drawn, scorer).ci95)

    @pytest.mark.parametrize("distance", ["sqeuclidean", "cosine"])
    def test_shuffled_labels_are_chance(self, distance):
        features, labels = labelled(of_each=40)
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
        drawn = draw_episodes(labels, ways=5, shots=1, queries=15, episodes=400, seed=0)
        result = score_episodes(7, drawn, nearest_centroid(features, distance=distance))
        assert result.mean == pytest.approx(20, abs=4 * result.ci95)
        assert result.ci95 < 0.7


class TestFile:
    def test_a_round_trip(self, tmp_path):
        _, labels = labelled()
        drawn = {
            s: draw_episodes(labels, ways=3, shots=s, queries=4, episodes=5, seed=0) for s in (1, 2)
        }
        write_episodes(tmp_path / "new" / "e.json", drawn, fingerprint="abc")
        kept = read_episodes(
            tmp_path / "new" / "e.json",
            [2],
            ways=3,
            queries=4,
            episodes=5,
            images=66,
            fingerprint="abc",
        )
        assert list(kept) == [2]
        assert torch.equal(kept[2].support, drawn[2].support)
        assert torch.equal(kept[2].query, drawn[2].query)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"fingerprint": "abd"}, "is of other images"),
            ({"shots": [1, 3]}, "no 5 episodes of 3 ways, 3 shots and 4 queries: set"),
            ({"queries": 5}, "no 5 episodes of 3 ways, 1 shots and 5 queries, but 5 of 3, 1 and 4"),
            ({"episodes": 6}, "no 6 episodes"),
            ({"ways": 2}, "no 5 episodes of 2 ways"),
            ({"images": 65}, "numbers images beyond the 65 that there are"),
        ],
    )
    def test_other_episodes_are_refused(self, tmp_path, change, message):
        _, labels = labelled()
        drawn = {1: draw_episodes(labels, ways=3, shots=1, queries=4, episodes=5, seed=0)}
        write_episodes(tmp_path / "e.json", drawn, fingerprint="abc")
        asked = {
            "shots": [1],
            "ways": 3,
            "queries": 4,
            "episodes": 5,
            "images": 66,
            "fingerprint": "abc",
        } | change
        with pytest.raises(UserError, match=message):
            read_episodes(tmp_path / "e.json", **asked)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"images": 1, "episodes": {"x": 1}}',
            '{"images": 1, "episodes": {"1": {"support": [[1], [1, 2]], "query": []}}}',
        ],
    )
    def test_what_is_no_list_of_episodes_is_one_line(self, tmp_path, text):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(UserError, match="holds no episodes") as refused:
            read_episodes(
                tmp_path / "e.json", [1], ways=3, queries=4, episodes=5, images=66, fingerprint="a"
            )
        assert "\n" not in str(refused.value)
