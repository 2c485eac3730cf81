"""The metrics that a page draws: what each is called before people, and with which others it stands."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from peerlearn.runs.export_folders import KEY_PREFIX
from peerlearn.runs.metric_guide import FIELDS, FIGURES
from peerlearn.runs.metrics import CLOCK_WORDS
from peerlearn.runs.score_names import (
    AGREEMENT,
    ENSEMBLE,
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
    PIXELS,
    TOP1,
    TOP5,
    WEIGHTED_ENSEMBLE,
    parse_score_name,
)

ACCURACY, LOSS, LABEL_FREE = "Accuracy", "Loss", "Without labels"
TRAINING, SPEED, OTHER = "Training", "Speed", "Other metrics"
GROUPS = (ACCURACY, LOSS, LABEL_FREE, TRAINING, SPEED, OTHER)

# Names that tell how others were measured: they stand in the captions of those, by the words here.
_OF_VALIDATION = {"validation/images": "validation images (n)"}
_OF_TEST = {"test/images": "test images (n)"}
# Of these words, a protocol's n of images is told by one.
IMAGES_WORDS = (*_OF_TEST.values(), *_OF_VALIDATION.values())
PROTOCOLS = {
    KNN_TOP1: {
        KNN_K: "k",
        KNN_TEMPERATURE: "temperature",
        KNN_TRAIN_IMAGES: "training images",
        KNN_TEST_IMAGES: "test images (n)",
    },
    EPISODE_TOP1: {
        EPISODE_WAYS: "ways",
        EPISODE_SHOTS: "shots",
        EPISODE_QUERIES: "queries",
        EPISODE_COUNT: "episodes (n)",
    },
    "validation" + TOP1: _OF_VALIDATION,
    "validation" + TOP5: _OF_VALIDATION,
    "test" + TOP1: _OF_TEST,
    "test" + TOP5: _OF_TEST,
}
_PROTOCOL_NAMES = {name for names in PROTOCOLS.values() for name in names}


class Kind(NamedTuple):
    """A kind of metric, which all networks of a figure share.

    Attributes:
        group: group of figures that it stands in.
        title: name of the metric with its unit.
        about: what the metric is, in a sentence; "" where its name says it.
    """

    group: str
    title: str
    about: str = ""


_KINDS = {
    KNN_TOP1: Kind(ACCURACY, "kNN top-1 (%)", "Weighted kNN on the features."),
    LINEAR_TOP1: Kind(
        ACCURACY,
        "Online linear probe, top-1 (%)",
        "Linear classifiers that learn beside the networks.",
    ),
    EPISODE_TOP1: Kind(ACCURACY, "Few-shot accuracy (%)", "Mean over validation episodes."),
    "test" + TOP1: Kind(ACCURACY, "Test top-1 (%)", "The networks' own classifiers."),
    "validation" + TOP1: Kind(ACCURACY, "Validation top-1 (%)", "The networks' own classifiers."),
    "test" + TOP5: Kind(ACCURACY, "Test top-5 (%)", "The networks' own classifiers."),
    "validation" + TOP5: Kind(ACCURACY, "Validation top-5 (%)", "The networks' own classifiers."),
    "loss": Kind(LOSS, "Loss", "The loss of each network: what its terms add up to."),
    "scl_hard": Kind(LOSS, "Contrastive loss, scl_hard", "Each network's own contrastive term."),
    "scl_soft": Kind(
        LOSS,
        "Contrastive mimicry, scl_soft",
        "How far a network's similarities lie from its peers'.",
    ),
    "icl_hard": Kind(
        LOSS, "Interactive loss, icl_hard", "Contrast of a network's anchors with its peers' keys."
    ),
    "icl_soft": Kind(
        LOSS,
        "Interactive mimicry, icl_soft",
        "How far the interactive similarities of two networks lie apart.",
    ),
    "cross_entropy": Kind(
        LOSS,
        "Cross-entropy, cross_entropy",
        "Each network's own classifier on its training images.",
    ),
    "rankme": Kind(
        LABEL_FREE, "RankMe", "Effective number of dimensions that the features fill; more is more."
    ),
    "lidar": Kind(
        LABEL_FREE,
        "LiDAR",
        "Effective number of dimensions in which images differ more than the views of one.",
    ),
    "alignment": Kind(
        LABEL_FREE, "Alignment", "Mean squared distance of two views of an image; less is closer."
    ),
    "uniformity": Kind(
        LABEL_FREE,
        "Uniformity",
        "Log of the mean Gaussian potential of pairs; less is more even.",
    ),
    "feature_std": Kind(
        LABEL_FREE,
        "Spread of the features",
        "Standard deviation of normalised features; 0 is collapse.",
    ),
    AGREEMENT: Kind(
        LABEL_FREE, "Agreement of the peers (%)", "Share of kNN answers that two networks share."
    ),
    NEIGHBOUR_AGREEMENT: Kind(
        LABEL_FREE,
        "Shared neighbours (%)",
        "Share of nearest neighbours that two networks have in common.",
    ),
    "lr": Kind(TRAINING, "Learning rate"),
    "gradient_norm": Kind(TRAINING, "Norm of the gradient"),
    "ensemble_weight": Kind(
        TRAINING, "Weight in the weighted ensemble", "Of each network, mean over the classes."
    ),
    "queue/filled_percent": Kind(TRAINING, "Queue filled (%)"),
    "queue/momentum": Kind(TRAINING, "Momentum of the key networks"),
    "skipped_steps": Kind(TRAINING, "Skipped steps (count)", "Steps that were not finite."),
    "unreadable_images": Kind(TRAINING, "Unreadable images in the epoch (count)"),
    "images_per_second": Kind(SPEED, "Images per second", "Over all processes."),
    "data_wait_percent": Kind(
        SPEED, "Waiting for data (%)", "Share of the time in which the loop waits for batches."
    ),
}
# The loss of all networks together, whose size is another than that of each.
_TOTAL = Kind(LOSS, "Total loss", "The loss that is minimised: the sum over the networks.")


class Metric(NamedTuple):
    """A name of a metric.

    Attributes:
        figure: what all networks' names share; the name itself where it is of no network.
        network: network of the name; "" of none.
    """

    figure: str
    network: str


def metric(name: str) -> Metric:
    """The network and the figure of a name in metrics.jsonl."""
    parsed = parse_score_name(name)
    return Metric(name, "") if parsed is None else Metric(parsed.figure, parsed.network)


def drawn(names: Iterable[str]) -> Iterator[Metric]:
    """The metrics that have a figure, in the order of their kinds; of names that are unknown, in alphabetical order."""
    found = [metric(name) for name in names if name not in _PROTOCOL_NAMES]
    yield from sorted(found, key=lambda each: (_place(each), each.figure, rank(each.network)))


def _place(each: Metric) -> int:
    if not each.network and each.figure == "loss":
        return -1
    known = list(_KINDS)
    return known.index(each.figure) if each.figure in known else len(known)


def kind(each: Metric) -> Kind:
    """What a metric is called, and where it stands."""
    if not each.network and each.figure == "loss":
        return _TOTAL
    if each.figure in _KINDS:
        return _KINDS[each.figure]
    if each.network and each.figure.endswith(TOP1):
        return Kind(ACCURACY, f"{each.figure.removesuffix(TOP1)} top-1 (%)")
    known = (FIGURES if each.network else FIELDS).get(each.figure)
    if known is not None:
        unit = "" if known.unit == "1" else f" ({known.unit})"
        return Kind(OTHER, f"{each.figure}{unit}", f"{known.text[:1].upper()}{known.text[1:]}.")
    # Memory and clocks.
    is_clock = any(word in each.figure for word in CLOCK_WORDS)
    return Kind(SPEED if is_clock else OTHER, each.figure)


def rank(network: str) -> tuple[bool, str]:
    """The order of networks: query networks by number, momentum networks, ensembles, raw pixels."""
    order = {ENSEMBLE: "~1", WEIGHTED_ENSEMBLE: "~2", PIXELS: "~3"}
    return (not network.isdecimal(), order.get(network, network.zfill(8)))


def network_text(network: str) -> str:
    """A network's name before people."""
    named = {ENSEMBLE: "ensemble", WEIGHTED_ENSEMBLE: "weighted ensemble", PIXELS: "raw pixels"}
    # Result files have further names, such as that of the ensemble of logits.
    is_of_cohort = network.removeprefix(KEY_PREFIX).isdecimal()
    return named.get(network, f"network {network}" if is_of_cohort else network)
