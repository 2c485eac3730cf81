"""Names of the networks' figures in metrics.jsonl: ``net/0/knn_top1`` is the figure knn_top1 of network "0".

    net/0/FIGURE  net/key-0/FIGURE                a network, and its momentum network
    ensemble/FIGURE  weighted_ensemble/FIGURE     all networks together
    pixels/FIGURE                                 the raw images, which a network has to beat
    knn/k ...  episode/ways ...                   the protocol of the kNN figures, and of few-shot episodes
    cohort/FIGURE                                 how far the networks agree

Figures that end in _top1 are accuracies in percent.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

ENSEMBLE, WEIGHTED_ENSEMBLE, PIXELS = "ensemble", "weighted-ensemble", "pixels"

TOP1, TOP5 = "_top1", "_top5"
KNN_TOP1 = "knn" + TOP1
KNN_K, KNN_TEMPERATURE = "knn/k", "knn/temperature"
KNN_TRAIN_IMAGES, KNN_TEST_IMAGES = "knn/train_images", "knn/test_images"
LINEAR_TOP1 = "linear" + TOP1
EPISODE_TOP1 = "episode" + TOP1
EPISODE_WAYS, EPISODE_SHOTS = "episode/ways", "episode/shots"
EPISODE_QUERIES, EPISODE_COUNT = "episode/queries", "episode/episodes"
# Of the kNN's answers; and, without labels, of nearest neighbours.
AGREEMENT, NEIGHBOUR_AGREEMENT = "cohort/agreement", "cohort/neighbour_agreement"

_NETWORK = "net/"


class ScoreName(NamedTuple):
    """A network and a figure.

    Attributes:
        network: name of the network for ``--network`` and in result files: "0", "key-0", ENSEMBLE,
            WEIGHTED_ENSEMBLE or PIXELS.
        figure: name of the figure: knn_top1, rankme, ...
    """

    network: str
    figure: str


def measured_part(network: str | int) -> str:
    """The beginning of a network's names: ``net/0``, ``ensemble``."""
    if network in (ENSEMBLE, WEIGHTED_ENSEMBLE, PIXELS):
        return str(network).replace("-", "_")
    return f"{_NETWORK}{network}"


def score_name(network: str | int, figure: str) -> str:
    """The name of a network's figure."""
    return f"{measured_part(network)}/{figure}"


def protocol_of(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The protocol of a kind of figures, by the names in a row's: k, temperature, ... of the kind knn."""
    return {key.removeprefix(f"{kind}/"): row[key] for key in row if key.startswith(f"{kind}/")}


def parse_score_name(name: str) -> ScoreName | None:
    """The network and the figure of a name that `score_name` made; None for other names, such as that of a loss."""
    part, _, figure = name.rpartition("/")
    for network in (ENSEMBLE, WEIGHTED_ENSEMBLE, PIXELS):
        if part == measured_part(network):
            return ScoreName(network, figure)
    if not part.startswith(_NETWORK):
        return None
    return ScoreName(part.removeprefix(_NETWORK), figure)
