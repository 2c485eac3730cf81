"""What the classifiers make of features whose answer is known."""

from functools import partial

import pytest
import torch

from linear_eval.classifiers import (
    Classified,
    InputTransform,
    Problem,
    _Candidate,
    _choose,
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
    features[:, 5] = 0.1
    transform = InputTransform("standardised", features[:40])
    expected = StandardScaler().fit(features[:40].double()).transform(features.double())
    standardised = transform(features)
    torch.testing.assert_close(standardised[:, :5], torch.from_numpy(expected)[:, :5])
    assert not standardised[:, 5].any()


@pytest.mark.parametrize("inputs", ["standardised", "unit"])
def test_inputs_of_features_that_differ_little_keep_their_digits(inputs):
    generator = torch.Generator().manual_seed(0)
    features = 1e4 + torch.randn(60, 8, generator=generator)
    wide = features.double()
    expected = {
        "standardised": (wide - wide.mean(0)) / wide.std(0, correction=0),
        "unit": wide / wide.norm(dim=1, keepdim=True),
    }[inputs]
    torch.testing.assert_close(
        InputTransform(inputs, features)(features), expected, rtol=1e-10, atol=1e-15
    )


def test_what_is_no_more_than_the_rounding_of_a_few_features_is_not_blown_up():
    few = torch.tensor([[0.3, 1.0], [0.3 + 3e-8, 2.0], [0.3, 4.0]])
    transform = InputTransform("standardised", few)
    assert not transform(torch.tensor([[0.9, 2.0]]))[0, 0]


@pytest.mark.parametrize(
    ("correct", "warned"),
    [
        ([1, 2, 3], "the best c is the largest of those tried, 100: one beyond it"),
        ([3, 2, 1], "the best c is the smallest of those tried, 0.01: one beyond it"),
        ([1, 3, 2], None),
        ([1, 3, 3], None),  # the grid reaches far enough
        ([2, 2, 2], None),
        ([3], None),
    ],
)
def test_the_edge_of_a_grid_is_told(caplog, correct, warned):
    labels = torch.zeros(4).long()
    held_out = one_network(torch.zeros(4, 1), labels)

    def classify_first(count, features):
        return torch.nn.functional.one_hot((torch.arange(4) >= count).long(), 2)

    candidates = [
        _Candidate({"inputs": kind, "c": c}, partial(classify_first, count))
        for kind, penalty in (("raw", 0), ("unit", 1))
        for c, count in zip((0.01, 1.0, 100.0), (each - penalty for each in correct), strict=False)
    ]
    chosen, choice = _choose(candidates, held_out, "0")
    assert chosen.settings["c"] == (0.01, 1.0, 100.0)[correct.index(max(correct))]
    assert choice["chosen"] == chosen.settings
    told = [each.getMessage() for each in caplog.records]
    assert len(told) == (warned is not None)
    if warned:
        assert told[0].startswith(f"network 0: {warned}")
        assert told[0].endswith("extend penalties_c")


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
