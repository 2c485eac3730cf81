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
        about: what the metric is, in a sentence; "" where nobody has said it.
    """

    group: str
    title: str
    about: str = ""


# The group and the name before people of each figure, in the order of the page. `metric_guide` has what they are.
_NAMES = {
    KNN_TOP1: (ACCURACY, "kNN top-1"),
    LINEAR_TOP1: (ACCURACY, "Online linear probe, top-1"),
    EPISODE_TOP1: (ACCURACY, "Few-shot accuracy"),
    "test" + TOP1: (ACCURACY, "Test top-1"),
    "validation" + TOP1: (ACCURACY, "Validation top-1"),
    "test" + TOP5: (ACCURACY, "Test top-5"),
    "validation" + TOP5: (ACCURACY, "Validation top-5"),
    "loss": (LOSS, "Loss"),
    "scl_hard": (LOSS, "Contrastive loss, scl_hard"),
    "scl_soft": (LOSS, "Contrastive mimicry, scl_soft"),
    "icl_hard": (LOSS, "Interactive loss, icl_hard"),
    "icl_soft": (LOSS, "Interactive mimicry, icl_soft"),
    "cross_entropy": (LOSS, "Cross-entropy, cross_entropy"),
    "rankme": (LABEL_FREE, "RankMe"),
    "lidar": (LABEL_FREE, "LiDAR"),
    "alignment": (LABEL_FREE, "Alignment"),
    "uniformity": (LABEL_FREE, "Uniformity"),
    "feature_std": (LABEL_FREE, "Spread of the features"),
    AGREEMENT: (LABEL_FREE, "Agreement of the peers"),
    NEIGHBOUR_AGREEMENT: (LABEL_FREE, "Shared neighbours"),
    "lr": (TRAINING, "Learning rate"),
    "gradient_norm": (TRAINING, "Norm of the gradient"),
    "ensemble_weight": (TRAINING, "Weight in the weighted ensemble"),
    "mutual_weight": (TRAINING, "Weight of the terms between networks"),
    "queue/filled_percent": (TRAINING, "Queue filled"),
    "queue/momentum": (TRAINING, "Momentum of the key networks"),
    "exchange_bytes_per_rank": (TRAINING, "Bytes sent to other networks"),
    "gradient_bytes_per_rank": (TRAINING, "Bytes of gradients sent"),
    "skipped_steps": (TRAINING, "Skipped steps"),
    "unreadable_images": (TRAINING, "Unreadable images"),
    "images_per_second": (SPEED, "Images per second"),
    "data_wait_percent": (SPEED, "Waiting for data"),
    "peak_memory_mb": (SPEED, "Most memory"),
}


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
    if _is_total(each):
        return -1
    known = list(_NAMES)
    return known.index(each.figure) if each.figure in known else len(known)


def _is_total(each: Metric) -> bool:
    """Whether it is the loss of all networks together, whose size is another than that of each."""
    return not each.network and each.figure == "loss"


def kind(each: Metric) -> Kind:
    """What a metric is called, and where it stands."""
    known = (FIGURES if each.network else FIELDS).get(each.figure)
    about = f"{known.text[:1].upper()}{known.text[1:]}." if known else ""
    unit = f" ({known.unit})" if known and known.unit != "1" else ""
    if each.figure in _NAMES:
        group, title = _NAMES[each.figure]
        # A name before people tells what is counted.
        unit = unit if known and known.unit == "%" else ""
        return Kind(group, f"{'Total loss' if _is_total(each) else title}{unit}", about)
    if each.network and each.figure.endswith(TOP1):
        return Kind(ACCURACY, f"{each.figure.removesuffix(TOP1)} top-1 (%)")
    # Memory and clocks are known by their words.
    is_clock = known is None and any(word in each.figure for word in CLOCK_WORDS)
    return Kind(SPEED if is_clock else OTHER, f"{each.figure}{unit}", about)


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
