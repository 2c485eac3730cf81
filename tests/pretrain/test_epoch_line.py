"""What a row of metrics.jsonl and an epoch's line tell."""

import dataclasses

import pytest
import torch

from peerlearn.runs.metrics import _accuracies, _of_each
from pretrain.config import PretrainConfig
from pretrain.losses import MCLTerms
from pretrain.rows import loss_row, scores_text
from pretrain.terms import SupervisedTerms, network_losses, objective

CONFIG = PretrainConfig(alpha=0.5, beta=0.25)
TERMS = MCLTerms(*(torch.tensor([1.0, 2.0, 4.0]) * 10**power for power in range(4)))
NOTHING = torch.zeros(0)


def test_a_networks_loss_is_its_own_part_of_the_objective():
    # 0.5 (1 + 10) + 0.25 (100 + 1000) = 280.5 for the first, and so many times as much for the others.
    assert network_losses(TERMS, CONFIG).tolist() == [280.5, 561.0, 1122.0]
    assert float(objective(TERMS, CONFIG)) == 280.5 * 7
    without = dataclasses.replace(CONFIG, terms=["scl_hard", "icl_soft"])
    assert network_losses(TERMS, without).tolist() == [250.5, 501.0, 1002.0]
    row = loss_row(TERMS, CONFIG)
    assert [row[f"net/{m}/loss"] for m in range(3)] == [280.5, 561.0, 1122.0]
    assert (row["loss"], row["net/1/icl_hard"]) == (280.5 * 7, 200.0)


@pytest.mark.parametrize("teaching", [NOTHING, torch.tensor([3.0, 5.0])])
def test_terms_that_a_supervised_run_leaves_out_count_for_nothing(teaching):
    terms = SupervisedTerms(*[NOTHING] * 4, torch.tensor([1.0, 2.0]), teaching)
    expected = [1.0, 2.0] if not len(teaching) else [4.0, 7.0]
    assert network_losses(terms, CONFIG).tolist() == expected
    assert float(objective(terms, CONFIG)) == sum(expected)


def test_the_bar_has_each_networks_loss_and_accuracy():
    row = {"loss": 3.0, "net/0/loss": 1.25, "net/1/loss": 1.75}
    assert _of_each(row) == " (1.250, 1.750)"
    assert _of_each({"loss": 3.0, "net/0/loss": 3.0}) == ""
    row = {"net/0/knn_top1": 70.12, "net/key-0/knn_top1": 69.0, "ensemble/knn_top1": 72.34}
    assert _accuracies(row | {"pixels/knn_top1": 80.0}) == "kNN 70.1, key-0 69.0, ensemble 72.3 %"
    assert _accuracies({"loss": 1.0}) == ""
    assert _accuracies({"net/0/knn_top1": 70.0, "net/0/linear_top1": 60.0}) == "kNN 70.0 %"


def test_accuracies_come_first():
    row = {"net/0/knn_top1": 61.234, "ensemble/knn_top1": 70.0, "net/0/rankme": 3.0, "loss": 1.0}
    knn = "epoch 3  kNN top-1 %: net/0 61.23  ensemble 70.00"
    assert scores_text(row, epoch=3) == knn
    row |= {"net/0/linear_top1": 58.5, "ensemble/linear_top1": 59.0}
    linear = "linear top-1 %: net/0 58.50  ensemble 59.00"
    assert scores_text(row, epoch=3) == f"{knn}  {linear}"


def test_without_labels_the_line_has_what_needs_none():
    row = {
        "net/0/rankme": 12.34,
        "net/1/rankme": 11.0,
        "net/key-0/rankme": 9.0,
        "net/0/feature_std": 0.1,
        "net/0/scl_hard": 2.0,
        "loss": 4.0,
        "net/0/alignment": 0.512,
        "net/0/uniformity": -1.2,
        "net/1/alignment": 0.6,
        "net/1/uniformity": -1.33,
        "net/0/lidar": 7.251,
        "net/1/lidar": 6.5,
        "cohort/neighbour_agreement": 34.56,
    }
    assert scores_text(row, epoch=2) == (
        "epoch 2  rankme: net/0 12.34  net/1 11.00  net/key-0 9.00  alignment: net/0 0.51  net/1 0.60  "
        "uniformity: net/0 -1.20  net/1 -1.33  lidar: net/0 7.25  net/1 6.50  agreement %: 34.6"
    )


def test_an_epoch_that_was_not_measured_is_its_number():
    assert scores_text({"loss": 1.0, "net/0/scl_hard": 2.0}, epoch=2) == "epoch 2"
