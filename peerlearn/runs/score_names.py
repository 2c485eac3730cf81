"""Names of what is measured of networks, as metrics.jsonl has them: ``net/0/knn_top1`` is knn_top1 of network "0".

    net/0/FIGURE  net/key-0/FIGURE                of a network, of its momentum network
    ensemble/FIGURE  weighted_ensemble/FIGURE     of all networks together
    pixels/FIGURE                                 of the raw images, which a network has to beat
    knn/k ...                                     what the kNN figures were measured by

Figures that end in _top1 are accuracies in percent.
"""

from typing import NamedTuple

ENSEMBLE, WEIGHTED_ENSEMBLE, PIXELS = "ensemble", "weighted-ensemble", "pixels"

TOP1 = "_top1"
KNN_TOP1 = "knn" + TOP1
KNN_K, KNN_TEMPERATURE = "knn/k", "knn/temperature"
KNN_TRAIN_IMAGES, KNN_TEST_IMAGES = "knn/train_images", "knn/test_images"

_NETWORK = "net/"


class ScoreName(NamedTuple):
    """What is measured, and of what.

    Attributes:
        network: "0", "key-0", ENSEMBLE, WEIGHTED_ENSEMBLE or PIXELS, as ``--network`` and result files have it.
        figure: knn_top1, rankme, ...
    """

    network: str
    figure: str


def measured_part(network: str | int) -> str:
    """How a network's names begin: ``net/0``, ``ensemble``."""
    if network in (ENSEMBLE, WEIGHTED_ENSEMBLE, PIXELS):
        return str(network).replace("-", "_")
    return f"{_NETWORK}{network}"


def score_name(network: str | int, figure: str) -> str:
    """The name of a figure of a network."""
    return f"{measured_part(network)}/{figure}"


def parse_score_name(name: str) -> ScoreName | None:
    """What `score_name` made the name of; None for other names, as of a loss."""
    part, _, figure = name.rpartition("/")
    for network in (ENSEMBLE, WEIGHTED_ENSEMBLE, PIXELS):
        if part == measured_part(network):
            return ScoreName(network, figure)
    if not part.startswith(_NETWORK):
        return None
    return ScoreName(part.removeprefix(_NETWORK), figure)
