"""Maps of features and nearest neighbours, against scikit-learn and brute force in float64."""

import re

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances

from peerlearn.data.datasets import ImageDataset
from peerlearn.knn import unit_rows
from peerlearn.report.feature_maps import (
    FeatureMap,
    chance_percent,
    map_features,
    nearest_on_map,
    neighbour_percent,
    principal_components,
)
from peerlearn.report.map_picture import map_markup, map_picture
from peerlearn.report.neighbours import nearest_images, varied

RANDOM = np.random.default_rng(3)


def groups(classes: int, each: int, dimensions: int = 20) -> tuple[torch.Tensor, np.ndarray]:
    """Features of classes that lie far apart."""
    labels = np.repeat(np.arange(classes), each)
    centres = RANDOM.standard_normal((classes, dimensions)) * 10
    return torch.from_numpy(
        centres[labels] + RANDOM.standard_normal((len(labels), dimensions))
    ), labels


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_principal_components_are_those_of_scikit_learn(shape):
    features = RANDOM.standard_normal(shape)
    scores, shares = principal_components(features)
    oracle = PCA(5).fit(features)
    np.testing.assert_allclose(
        np.abs(scores[:, :5]), np.abs(oracle.transform(features)), atol=1e-10
    )
    np.testing.assert_allclose(shares[:5], oracle.explained_variance_ratio_, atol=1e-12)
    places = np.abs(scores[:, :5]).argmax(0)
    assert (scores[places, range(5)] > 0).all()


def test_maps_keep_groups_together_and_repeat():
    features, labels = groups(4, 20)
    found, again = map_features(features), map_features(features)
    assert found is not None
    assert again is not None
    assert np.array_equal(again.neighbours, found.neighbours)
    assert np.array_equal(again.components, found.components)
    assert neighbour_percent(found.neighbours, labels) == 100.0
    oracle = PCA(2).fit(unit_rows(features).numpy()).explained_variance_ratio_
    assert found.explained_percent == pytest.approx(tuple(100 * oracle))
    assert found.perplexity == pytest.approx(79 / 3)


def test_features_that_are_all_the_same_have_no_map():
    assert map_features(torch.ones(20, 5) * torch.rand(20, 1, dtype=torch.float64)) is None


def test_few_images_lower_the_perplexity():
    found = map_features(torch.from_numpy(RANDOM.standard_normal((10, 4))))
    assert found is not None
    assert found.perplexity == 3


def test_nearest_on_the_map():
    points = RANDOM.standard_normal((50, 2))
    distances = pairwise_distances(points)
    np.fill_diagonal(distances, np.inf)
    assert np.array_equal(nearest_on_map(points), distances.argmin(1))


def test_shares_of_a_map():
    points = np.array([[0.0, 0], [1, 0], [5, 0], [6.5, 0]])
    assert neighbour_percent(points, np.array([0, 0, 1, 0])) == 50.0
    # Of the 12 ordered pairs, 6 are of class 0.
    assert chance_percent(np.array([0, 0, 1, 0])) == pytest.approx(50.0)


def test_neighbours_are_those_of_brute_force_in_float64():
    known, asked = RANDOM.standard_normal((300, 9)), RANDOM.standard_normal((5, 9))
    numbers, cosines = nearest_images(torch.from_numpy(known), torch.from_numpy(asked), 5)
    expected = 1 - pairwise_distances(asked, known, metric="cosine")
    order = np.argsort(-expected, axis=1)[:, :5]
    assert np.array_equal(numbers.numpy(), order)
    np.testing.assert_allclose(cosines.numpy(), np.take_along_axis(expected, order, 1), atol=1e-12)


def test_queries_are_of_different_classes_first():
    assert varied(torch.tensor([3, 3, 1, 3, 0, 1]), 4) == [0, 1, 2, 4]
    assert varied(torch.tensor([3, 3, 1, 3, 0, 1]), 2) == [0, 2]


@pytest.mark.parametrize("classes", [1000, 100, 11])
def test_many_classes_have_no_legend_but_a_sentence(classes):
    labels = np.repeat(np.arange(classes), 1000 // classes)
    components, neighbours = RANDOM.standard_normal((2, len(labels), 2))
    found = FeatureMap(
        components=components, explained_percent=(30, 20), neighbours=neighbours, perplexity=30
    )
    names = tuple(f"name-{number}" for number in range(classes))
    images = ImageDataset(
        name="a", split="test", images=torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8),
        labels=torch.from_numpy(labels), class_names=names, mean=(0.5,), std=(0.5,),
    )  # fmt: skip
    picture = map_picture("m", found, images, who="Network 0", drawn_from="images")
    assert f"{classes:,} classes are too many for a legend" in picture.caption
    assert "name-" not in picture.image
    assert len(picture.image) < 40_000
    # As many points as there are images, on each of the two maps.
    assert len(places(picture.image)) == 2 * len(labels)
    agreeing = len(places(picture.image, "m-0"))
    shares = [neighbour_percent(each, labels) for each in (found.components, found.neighbours)]
    assert agreeing == pytest.approx(sum(shares) / 100 * len(labels))


def test_ten_classes_have_a_legend_and_looks_of_their_own():
    labels = np.repeat(np.arange(10), 5)
    points = RANDOM.standard_normal((50, 2))
    found = FeatureMap(
        components=points, explained_percent=(30, 20), neighbours=points, perplexity=9
    )
    names = [f"<{number}>" for number in range(10)]
    markup = map_markup("m", found, labels, names)
    assert "&lt;9&gt;" in markup
    assert "<9>" not in markup
    looks = re.findall(r'<path fill="([^"]*)" fill-opacity=".8" d="([^"]*)"', markup)
    assert len(set(looks)) == 10
    # Two maps and the legend.
    assert len(places(markup, "m-3")) == 11


def places(markup: str, marker: str = "") -> list[str]:
    found = re.findall(r'marker-start="url\(#([^)]*)\)"[^>]* points="([^"]*)"', markup)
    texts = [points for name, points in found if marker in ("", name)]
    return re.findall(r"[\d.]+ [\d.]+", " ".join(texts))
