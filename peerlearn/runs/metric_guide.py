"""What the fields of metrics.jsonl are: every name that a run may write, with its unit and its meaning.

`score_names` has how the names of networks' figures are put together.
"""

from typing import NamedTuple

from peerlearn.runs.score_names import (
    AGREEMENT,
    EPISODE_COUNT,
    EPISODE_QUERIES,
    EPISODE_SHOTS,
    EPISODE_TOP1,
    EPISODE_WAYS,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TEST_IMAGES,
    KNN_TOP1,
    KNN_TRAIN_IMAGES,
    LINEAR_TOP1,
    NEIGHBOUR_AGREEMENT,
    TOP1,
    parse_score_name,
)


class Meaning(NamedTuple):
    """What a field holds.

    Attributes:
        unit: unit of its values; "1" of a plain number.
        text: what it is, a noun phrase.
    """

    unit: str
    text: str


# Fields of a whole row.
FIELDS = {
    "step": Meaning("steps", "number of steps done; 0 is the row of the untrained networks"),
    "epoch": Meaning("epochs", "steps done, divided by the steps of an epoch"),
    "seconds": Meaning("seconds", "time since this start of the run; it begins again at a resumption"),
    "attempt": Meaning("1", "number of the start that wrote the row, from 1"),
    "cpu_seconds": Meaning(
        "seconds", "processor time of the main process since this start of the run, without workers that decode images"
    ),
    "peak_memory_mb": Meaning("MB", "most memory that the main process has held, of 2**20 bytes"),
    "loss": Meaning("1", "objective of the step: sum over networks, mean over processes"),
    "images_per_second": Meaning("images/s", "training images per second since the last row"),
    "data_wait_percent": Meaning("%", "share of that time in which the loop waited for its batches"),
    "lr": Meaning("1", "learning rate of the step, scaled to the batch and scheduled"),
    "skipped_steps": Meaning("steps", "number of steps skipped so far for NaN or Inf"),
    "loss_scale": Meaning("1", "factor of the loss in fp16"),
    "unreadable_images": Meaning("images", "number of images of this epoch that could not be read"),
    "queue/filled_percent": Meaning("%", "share of the queue that holds keys"),
    "queue/momentum": Meaning("1", "momentum of the key networks, where it follows a schedule"),
    "exchange_bytes_per_rank": Meaning(
        "bytes",
        "keys, embeddings and their gradients that the main process has sent in the step, with parallel.cohort",
    ),
    "gradient_bytes_per_rank": Meaning(
        "bytes", "gradients of weights that it has sent to processes of the same networks, there"
    ),
    "mutual_weight": Meaning(
        "1", "factor of the terms between networks, where mutual_warmup_epochs has it rise"
    ),
    "teaching_weight": Meaning("1", "weight of the teaching in the loss, which may be faded in"),
    "validation/images": Meaning("images", "number of images that validation figures are of"),
    "test/images": Meaning("images", "number of images that test figures are of"),
    KNN_K: Meaning("images", "number of neighbours that vote"),
    KNN_TEMPERATURE: Meaning("1", "temperature of the votes"),
    KNN_TRAIN_IMAGES: Meaning("images", "number of images that vote"),
    KNN_TEST_IMAGES: Meaning("images", "number of images that are asked"),
    AGREEMENT: Meaning("%", "share of test images on which two networks' kNN answers agree, mean over pairs"),
    NEIGHBOUR_AGREEMENT: Meaning(
        "%", "share of images whose nearest other image is the same for two networks, mean over pairs"
    ),
    EPISODE_WAYS: Meaning("classes", "number of classes of a validation episode"),
    EPISODE_SHOTS: Meaning("images", "number of support images of each class of an episode"),
    EPISODE_QUERIES: Meaning("images", "number of query images of each class of an episode"),
    EPISODE_COUNT: Meaning("episodes", "number of validation episodes"),
    "ap": Meaning("%", "average precision of a detector on its validation split, mean over IoU .50 to .95"),
    "ap50": Meaning("%", "average precision at IoU .50"),
    "ap75": Meaning("%", "average precision at IoU .75"),
    "loss_classifier": Meaning("1", "cross-entropy of a detector's boxes over the classes"),
    "loss_box_reg": Meaning("1", "loss of a detector's corners"),
    "loss_objectness": Meaning("1", "cross-entropy of the regions, object or not"),
    "loss_rpn_box_reg": Meaning("1", "loss of the regions' corners"),
}  # fmt: skip

# Figures of a network, or of several together.
FIGURES = {
    "loss": Meaning("1", "loss of the network: its terms by their weights"),
    "scl_hard": Meaning("1", "InfoNCE of the network's embeddings among its own candidates (Eq. 1)"),
    "scl_soft": Meaning(
        "1", "KL divergence of its probabilities among its candidates from each peer's among the peer's own (Eq. 2)"
    ),
    "icl_hard": Meaning("1", "InfoNCE of the network's embeddings among its peers' candidates (Eq. 4)"),
    "icl_soft": Meaning(
        "1", "KL divergence of its probabilities among a peer's candidates from the peer's among the network's (Eq. 5)"
    ),
    "cross_entropy": Meaning("1", "cross-entropy of the network's classifier (Eq. 7)"),
    "teaching": Meaning("1", "loss by which the network learns from its peers' logits"),
    "prototypical": Meaning("1", "cross-entropy of an episode's queries over its prototypes"),
    "gradient_norm": Meaning("1", "norm of the gradient of the network, its head and its shared stages"),
    "ensemble_weight": Meaning("1", "weight of the network in the weighted ensemble, mean over classes"),
    "linear_loss": Meaning("1", "cross-entropy of the online linear classifier on the newest batch"),
    KNN_TOP1: Meaning("%", "top-1 accuracy of weighted kNN"),
    LINEAR_TOP1: Meaning("%", "top-1 accuracy of the online linear classifier"),
    EPISODE_TOP1: Meaning("%", "mean top-1 accuracy over validation episodes"),
    f"validation{TOP1}": Meaning("%", "top-1 accuracy on held-out training images"),
    "validation_top5": Meaning("%", "top-5 accuracy on held-out training images"),
    f"test{TOP1}": Meaning("%", "top-1 accuracy on the watched test images"),
    "test_top5": Meaning("%", "top-5 accuracy on the watched test images"),
    "rankme": Meaning("1", "RankMe, the effective rank of the features: from 1 to their number"),
    "feature_std": Meaning("1", "standard deviation of the normalised features, mean over dimensions"),
    "alignment": Meaning("1", "mean squared distance of the embeddings of two views of an image"),
    "uniformity": Meaning("1", "log of the mean Gaussian potential of two images' embeddings"),
    "lidar": Meaning("1", "LiDAR, the effective rank of what tells images apart in the embedding"),
}  # fmt: skip


def meaning_of(name: str) -> Meaning | None:
    """What a field of metrics.jsonl is; None for a name that no run writes."""
    parsed = parse_score_name(name)
    if parsed and name not in FIELDS:
        return FIGURES.get(parsed.figure)
    return FIELDS.get(name)
