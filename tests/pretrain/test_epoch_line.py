"""The line of an epoch."""

from pretrain.rows import scores_text


def test_accuracies_come_first():
    row = {"net/0/knn_top1": 61.234, "ensemble/knn_top1": 70.0, "net/0/rankme": 3.0, "loss": 1.0}
    assert scores_text(row, epoch=3) == "epoch 3  kNN top-1 %: net/0 61.23  ensemble 70.00"


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
        "cohort/neighbour_agreement": 34.56,
    }
    assert scores_text(row, epoch=2) == (
        "epoch 2  rankme: net/0 12.34  net/1 11.00  net/key-0 9.00  alignment: net/0 0.51  net/1 0.60  "
        "uniformity: net/0 -1.20  net/1 -1.33  agreement %: 34.6"
    )


def test_an_epoch_that_was_not_measured_is_its_number():
    assert scores_text({"loss": 1.0, "net/0/scl_hard": 2.0}, epoch=2) == "epoch 2"
