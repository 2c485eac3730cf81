"""What a row of metrics.jsonl tells of a step. Dimension: M networks."""

import torch

from peerlearn.compute.guards import gradients
from peerlearn.runs.score_names import (
    NEIGHBOUR_AGREEMENT,
    TOP1,
    measured_part,
    parse_score_name,
    score_name,
)
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.terms import Terms, network_losses, objective

# Figures of a network that need no labels: what a table calls them, and how many decimals it shows.
LABEL_FREE = {
    "rankme": ("RankMe", 1),
    "alignment": ("alignment", 2),
    "uniformity": ("uniformity", 2),
    "lidar": ("LiDAR", 1),
}


def loss_row(terms: Terms, config: PretrainConfig, mutual: float = 1.0) -> dict[str, float]:
    """The loss, by `objective`, and every network's own loss and terms, from (M,) vectors."""
    named = {"loss": network_losses(terms, config, mutual), **terms._asdict()}
    values = torch.cat([objective(terms, config, mutual).view(1), *named.values()]).tolist()
    row = {"loss": values.pop(0)}
    for name, term in named.items():
        for m in range(len(term)):
            row[score_name(m, name)] = values.pop(0)
    return row


def gradient_norms(cohort: Cohort) -> dict[str, float]:
    """The norm of every network's gradient, with its head and classifier, shared stages counted in each.

    The terms are sums over networks and pairs, so their scale grows with M; this shows by how much.
    """
    norms = {}
    for m in range(len(cohort.backbones)):
        own = gradients(p for _, part in cohort.parts(m) for p in part.parameters())
        # Frozen networks have none.
        if own:
            norms[score_name(m, "gradient_norm")] = torch.linalg.vector_norm(
                torch.stack(torch._foreach_norm(own))
            )
    # All networks of this process may be frozen.
    values = torch.stack([*norms.values()]).tolist() if norms else []
    return dict(zip(norms, values, strict=True))


def scores_text(row: dict[str, float], *, epoch: int) -> str:
    """One line of an epoch's accuracies: knn_top1 and linear_top1, test_top1, validation_top1 or episode_top1.

    Images without labels have none: the line then holds the figures that need no labels.
    """
    named = {name: value for key, value in row.items() if (name := parse_score_name(key))}
    figures = {
        name.figure: f"{name.figure.removesuffix(TOP1).replace('knn', 'kNN')} top-1 %"
        for name in named
        if name.figure.endswith(TOP1)
    } or {name.figure: name.figure for name in named if name.figure in LABEL_FREE}
    parts = [f"epoch {epoch}"]
    for figure, title in figures.items():
        values = {name.network: value for name, value in named.items() if name.figure == figure}
        each = "  ".join(f"{measured_part(m)} {value:.2f}" for m, value in values.items())
        parts.append(f"{title}: {each}")
    if NEIGHBOUR_AGREEMENT in row:
        parts.append(f"agreement %: {row[NEIGHBOUR_AGREEMENT]:.1f}")
    return "  ".join(parts)
