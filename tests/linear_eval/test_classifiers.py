"""What the classifiers make of features whose answer is known."""

import pytest
import torch

from linear_eval.classifiers import (
    Classified,
    InputTransform,
    Problem,
    classify_by_logistic_regression,
    classify_by_sgd,
    kept_batches,
    mean_of_logits,
)
from linear_eval.config import LinearConfig
from peerlearn.compute.schedules import ScheduleConfig
from peerlearn.data.subsets import hold_out
from peerlearn.errors import UserError
from peerlearn.evaluation.classification import top1
from peerlearn.evaluation.feature_sets import FeatureSet

CPU = torch.device("cpu")
CLASSES = 4
CONSTANT = ScheduleConfig(name="constant")


def blobs(n: int, *, seed: int, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Four clusters, far apart in a plane of a space of 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    centres = torch.zeros(CLASSES, 16)
    centres[range(4), [0, 1, 0, 1]] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    return centres[labels] + spread / 4 * torch.randn(n, 16, generator=generator), labels


def problem(config: LinearConfig, train: FeatureSet, test: FeatureSet) -> Problem:
    fit, held_out = train, None
    if config.candidates > 1:
        fit_index, held_index = hold_out(train.labels, config.held_out_percent, seed=config.seed)
        fit, held_out = train.part(fit_index), train.part(held_index)
    return Problem(train=train, fit=fit, held_out=held_out, test=test, classes=CLASSES)


def classify(config: LinearConfig, train: FeatureSet, test: FeatureSet) -> dict[str, Classified]:
    whole = problem(config, train, test)
    if config.method == "logistic_regression":
        return classify_by_logistic_regression(config, whole, device=CPU, quiet=True)
    batches = kept_batches(whole.fit, batch_size=32, seed=config.seed, device=CPU)
    return classify_by_sgd(config, whole, batches, device=CPU, quiet=True)


def one_network(features: torch.Tensor, labels: torch.Tensor) -> FeatureSet:
    return FeatureSet(features={"0": features}, labels=labels)


SGD = {"epochs": 10, "base_lr": [0.5], "schedule": CONSTANT}
LOGISTIC = {"method": "logistic_regression"}


@pytest.mark.parametrize("settings", [SGD, LOGISTIC, {**SGD, "base_lr": [1e-5, 0.5]}], ids=str)
def test_separable_classes_are_told_apart_without_an_error(settings):
    config = LinearConfig(checkpoint="x", **settings)
    test = one_network(*blobs(203, seed=1))
    found = classify(config, one_network(*blobs(200, seed=0)), test)
    assert top1(found["0"].logits, test.labels) == 100.0


@pytest.mark.parametrize("settings", [SGD, {**LOGISTIC, "penalties_c": [0.01]}], ids=str)
def test_shuffled_labels_stay_at_chance(settings):
    """Of 2000 test images 25 % are right by chance; four standard deviations are 3.9."""
    config = LinearConfig(checkpoint="x", **settings)
    features, labels = blobs(400, seed=0)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    test = one_network(*blobs(2000, seed=1))
    shuffled_test = test.labels[torch.randperm(2000, generator=torch.Generator().manual_seed(1))]
    found = classify(config, one_network(features, shuffled), test)
    assert top1(found["0"].logits, shuffled_test) == pytest.approx(25.0, abs=3.9)


def test_the_best_candidate_is_chosen_on_held_out_images_and_all_are_told():
    """Learning rates far too small lose; the test images are not asked."""
    config = LinearConfig(
        checkpoint="x",
        **{**SGD, "epochs": 3, "base_lr": [1e-12, 0.5, 1e-11]},
        inputs=["raw", "unit"],
    )
    found = classify(config, one_network(*blobs(400, seed=0)), one_network(*blobs(64, seed=1)))
    choice = found["0"].choice
    assert choice["chosen"]["base_lr"] == 0.5
    scores = {(each["inputs"], each["base_lr"]): each["top1"] for each in choice["held_out_top1"]}
    assert len(scores) == 6
    assert scores["raw", 0.5] == 100.0 > scores["raw", 1e-12]


def test_the_choice_does_not_know_the_test_labels():
    """Whatever the test images are, the same candidate is chosen."""
    config = LinearConfig(checkpoint="x", **LOGISTIC, penalties_c=[1e-5, 1.0, 10.0])
    train = one_network(*blobs(100, seed=0, spread=3.0))
    one, other = (
        classify(config, train, one_network(*blobs(n, seed=seed, spread=3.0)))
        for n, seed in ((40, 1), (90, 2))
    )
    assert one["0"].choice == other["0"].choice


def test_the_chosen_c_is_fitted_again_on_all_training_images():
    config = LinearConfig(
        checkpoint="x", **LOGISTIC, penalties_c=[1e-4, 0.1], inputs=["standardised"]
    )
    train = one_network(*blobs(80, seed=0, spread=2.0))
    test = one_network(*blobs(30, seed=1))
    found = classify(config, train, test)["0"]
    c = found.choice["chosen"]["c"]
    again = classify(
        LinearConfig(checkpoint="x", **LOGISTIC, penalties_c=[c], inputs=["standardised"]),
        train,
        test,
    )["0"]
    torch.testing.assert_close(found.logits, again.logits)


def test_a_classifier_that_diverged_is_one_line():
    config = LinearConfig(checkpoint="x", **{**SGD, "base_lr": [1e38]})
    features, labels = blobs(64, seed=0)
    images = one_network(1e6 * features, labels)
    with pytest.raises(UserError, match=r"classifier of network 0 has diverged: lower base_lr"):
        classify(config, images, images)


def test_networks_are_judged_apart():
    features, labels = blobs(200, seed=0)
    test_features, test_labels = blobs(80, seed=1)
    noise = torch.randn(200, 3), torch.randn(80, 3)
    config = LinearConfig(checkpoint="x", **SGD)
    found = classify(
        config,
        FeatureSet(features={"0": features, "1": noise[0]}, labels=labels),
        FeatureSet(features={"0": test_features, "1": noise[1]}, labels=test_labels),
    )
    assert top1(found["0"].logits, test_labels) == 100.0
    assert top1(found["1"].logits, test_labels) < 60
    expected = (found["0"].logits.double() + found["1"].logits.double()) / 2
    torch.testing.assert_close(mean_of_logits(found), expected)


def test_standardised_inputs_are_scikit_learns_and_constants_are_harmless():
    from sklearn.preprocessing import StandardScaler

    features = 5 + 3 * torch.randn(50, 6) * torch.tensor([1.0, 10, 0.1, 1e-3, 100, 0])
    transform = InputTransform("standardised", features[:40])
    expected = StandardScaler().fit(features[:40].double()).transform(features.double())
    found = transform(features)
    torch.testing.assert_close(
        found[:, :5], torch.from_numpy(expected)[:, :5].float(), rtol=1e-3, atol=1e-3
    )
    assert not found[:, 5].any()


def test_every_epoch_sees_every_image_once_in_another_order():
    features = torch.arange(10.0).view(-1, 1)
    batches = kept_batches(
        one_network(features, torch.arange(10)), batch_size=4, seed=2, device=CPU
    )
    assert batches.steps_per_epoch == 3
    orders = []
    for number in (0, 1, 0):
        parts = [(found["0"][:, 0], labels) for found, labels in batches.epoch(number)]
        assert [len(labels) for _, labels in parts] == [4, 4, 2]
        assert all(torch.equal(found.long(), labels) for found, labels in parts)
        orders.append(torch.cat([labels for _, labels in parts]).tolist())
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] == orders[2] != orders[1]
