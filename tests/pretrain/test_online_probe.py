"""The linear classifiers that learn beside the networks: what they learn, and that the networks do not notice."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import all_finite
from peerlearn.data.datasets import load_dataset
from pretrain.cohort_config import CohortConfig
from pretrain.config import DataConfig, MonitorConfig, PretrainConfig
from pretrain.method import build_method
from pretrain.method_config import QueueConfig
from pretrain.online_probe import OnlineProbe, build_probe
from pretrain.train import train_step
from tests.pretrain.test_host_waits import an_attempt
from tests.pretrain.test_methods import toy_cohort

ALONE = Ranks(torch.device("cpu"))
PROBED = ("--monitor.linear", "true")
CLASSES = 3


def drawn(step: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + width)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 4 + 7
    features[:, 0] = 2.5  # One that never varies.
    return features


def labels_of(step: int, rows: int) -> Tensor:
    return torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(step))


def test_steps_are_those_of_sgd_on_softmax_regression_written_out():
    """Three steps of two micro-batches: moving statistics, the mean gradient, momentum 0.9, the rate 3 / D."""
    widths, rows = (4, 6), 8
    probe = OnlineProbe(widths, CLASSES, ALONE, dtype=torch.float64)
    weights = [np.zeros((CLASSES, d)) for d in widths]
    biases = [np.zeros(CLASSES) for _ in widths]
    speeds = [(np.zeros((CLASSES, d)), np.zeros(CLASSES)) for d in widths]
    means, variances = ([np.zeros(d) for d in widths] for _ in range(2))
    for step in range(3):
        batch, labels = [drawn(step, rows, d) for d in widths], labels_of(step, rows)
        for part in (slice(0, 5), slice(5, 8)):
            probe.see([features[part] for features in batch], labels[part])
        probe.step()
        share = 1 / (step + 1)
        for m, features in enumerate(batch):
            x = features.numpy()
            means[m] += share * (x.mean(0) - means[m])
            variances[m] += share * (x.var(0) - variances[m])
            z = (x - means[m]) / np.sqrt(variances[m] + 1e-5 * variances[m].mean())
            scores = np.exp(z @ weights[m].T + biases[m])
            chances = scores / scores.sum(1, keepdims=True)
            truth = np.eye(CLASSES)[labels.numpy()]
            loss = -np.log((chances * truth).sum(1)).mean()
            assert probe.metrics()[f"net/{m}/linear_loss"] == pytest.approx(loss, rel=1e-12)
            slope = (chances - truth) / rows
            speeds[m] = (0.9 * speeds[m][0] + slope.T @ z, 0.9 * speeds[m][1] + slope.sum(0))
            weights[m] -= 3 / widths[m] * speeds[m][0]
            biases[m] -= 3 / widths[m] * speeds[m][1]
    tested = [drawn(9, 5, d) for d in widths]
    for m, logits in enumerate(probe.logits(tested)):
        z = (tested[m].numpy() - means[m]) / np.sqrt(variances[m] + 1e-5 * variances[m].mean())
        np.testing.assert_allclose(logits.numpy(), z @ weights[m].T + biases[m], rtol=1e-10)


def test_later_statistics_hold_a_tenth_of_the_newest_batch():
    probe = OnlineProbe([2], CLASSES, ALONE)
    for value in [0.0] * 30 + [10.0]:
        probe.see([torch.full((4, 2), value)], torch.zeros(4, dtype=torch.long))
        probe.step()
    torch.testing.assert_close(
        probe.state_tensors()["linear_probe"]["0.mean"], torch.full((2,), 1.0)
    )


def test_collapsed_features_leave_finite_classifiers():
    probe = OnlineProbe([5], CLASSES, ALONE)
    for step in range(3):
        probe.see([torch.full((6, 5), 0.3)], labels_of(step, 6))
        probe.step()
    tensors = [t for group in probe.state_tensors().values() for t in group.values()]
    assert len(tensors) == 7
    assert all_finite(tensors)
    assert probe.logits([torch.full((2, 5), 0.3)]).isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {"symmetric": True},
        {"method": "simclr", "queue": QueueConfig()},
        {"method": "simclr", "queue": QueueConfig(), "splits": 3},
    ],
)
def test_each_row_of_features_meets_the_label_of_its_image(settings, monkeypatch):
    """Of both views, in whatever order they are encoded."""
    splits = settings.pop("splits", 1)
    cohort_config = CohortConfig(networks=2, embedding_dim=5, batch_norm_splits=splits)
    queue = QueueConfig(size=10)
    config = PretrainConfig(
        **{"queue": queue, "cohort": cohort_config, "batch_size": 6, **settings}
    )
    cohort = toy_cohort()
    method = build_method(cohort, config, ALONE)
    method.probe = OnlineProbe([8, 8], 6, ALONE)
    seen: list[tuple[list[Tensor], Tensor]] = []
    monkeypatch.setattr(method.probe, "see", lambda *each: seen.append(each))
    first, second = torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 1, 5, 0, 4, 2])
    method.begin_step(0)
    method.terms((first, second), labels)
    given = [
        (m, int(label), row) for each, own in seen for m in (0, 1)
        for label, row in zip(own, each[m], strict=True)
    ]  # fmt: skip
    assert len(given) == 2 * 12
    for number, label in enumerate(labels.tolist()):
        for m in (0, 1):
            rows = [row for network, own, row in given if (network, own) == (m, label)]
            expected = cohort.backbones[m](torch.stack([first[number], second[number]]))
            torch.testing.assert_close(torch.stack(rows).sort(0)[0], expected.sort(0)[0])


@pytest.mark.parametrize(
    "more",
    [
        ("--symmetric", "true", "--accumulation_steps", "2", "--cohort.batch_norm_splits", "2"),
        ("--method", "simclr", "--precision", "bf16"),
    ],
)
def test_networks_are_bit_for_bit_those_of_a_run_without_it(more):
    """Weights, optimiser, batch-norm statistics, queue, and the random numbers that are drawn next."""
    found = []
    for words in ((), PROBED):
        attempt = an_attempt("cpu", *more, *words)
        training = attempt.training
        for batch in training.loader.epoch(0):
            train_step(attempt, batch)
            training.step += 1
        found.append((training.tensors(), torch.random.get_rng_state()))
    (without, drawn_without), (beside, drawn_beside) = found
    assert torch.equal(drawn_without, drawn_beside)
    probe = {beside.pop(group).popitem()[0] for group in beside.keys() - without.keys()}
    assert len(probe) == 2
    assert all(beside[group].keys() == without[group].keys() for group in without)
    for group, tensors in without.items():
        for name, tensor in tensors.items():
            assert torch.equal(beside[group][name], tensor), (group, name)


def copied(probe: OnlineProbe) -> dict[str, Tensor]:
    return {
        f"{group} {name}": tensor.clone()
        for group, tensors in probe.state_tensors().items()
        for name, tensor in tensors.items()
    }


def test_it_does_not_learn_from_a_step_that_is_skipped():
    attempt = an_attempt("cpu", *PROBED, "--accumulation_steps", "2")
    training = attempt.training
    probe = training.method.probe
    good, bad, later = training.loader.epoch(0)
    train_step(attempt, good)
    before = copied(probe)
    assert before["linear_probe 0.weight"].abs().max() > 0
    skipped = bad._replace(views=(bad.views[0] * float("nan"), bad.views[1]))
    attempt.skip = lambda *_, **__: training.guard.skip(0, "")
    assert train_step(attempt, skipped).skipped
    after = copied(probe)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    train_step(attempt, later)
    assert probe.state_tensors()["linear_probe"]["0.steps"].item() == 2
    assert all_finite(list(copied(probe).values()))


def test_without_labels_it_is_off_and_says_why(caplog):
    cohort = an_attempt("cpu").training.cohort
    digits = load_dataset("digits", "train", limit=20)
    assert digits.labels is not None
    assert build_probe(cohort, digits, ALONE) is not None
    partly = torch.where(torch.arange(20) == 3, -1, digits.labels)
    with caplog.at_level(logging.WARNING):
        assert build_probe(cohort, replace(digits, labels=None), ALONE) is None
        assert build_probe(cohort, replace(digits, labels=partly), ALONE) is None
        assert build_probe(cohort, replace(digits, name="fashion_mnist_classes"), ALONE) is None
    assert caplog.messages == [
        *["the linear probe is off: digits train has not a label for every image"] * 2,
        "the linear probe is off: the splits of digits are of different classes",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "supervised"}, "monitor.linear must be false with method supervised"),
        ({"method": "prototypical"}, "monitor.linear must be false with method prototypical"),
        ({"data": DataConfig(split="test")}, "data.split must not be test with monitor.linear"),
    ],
)
def test_where_it_would_be_of_no_use_it_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        PretrainConfig(monitor=MonitorConfig(linear=True), **settings)
