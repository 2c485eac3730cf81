"""The mutual contrastive losses (Yang et al., Mutual Contrastive Learning), as pure functions.

Dimensions: M networks, B anchors, K queue rows, D embedding size, N candidates of one softmax.

Every function takes L2-normalised embeddings and returns the four terms of the paper:

    scl_hard   Eq. 1   each network's own InfoNCE
    scl_soft   Eq. 2   KL from every peer's self-contrastive distribution P
    icl_hard   Eq. 4   InfoNCE of one network's anchor among a peer's candidates
    icl_soft   Eq. 5   KL between the interactive distributions Q_ab and Q_ba, both ways

NOTE: four readings of the paper are fixed here. Eq. 1 and 4 lack their exponentials in print. The hard
interactive term is the sum of two log-probabilities (first line of Eq. 4). The soft terms are true KL
divergences with a detached teacher, not cross-entropies: the gradient is the same and the value is 0 when
peers agree. The sum of Eq. 5 starts at the first candidate, since it would be no KL otherwise.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlearn.compute.device import full_float32
from pretrain.finite import require_finite
from pretrain.flat_loss import EXCLUDED, flat_batch_terms, flat_queue_terms
from pretrain.row_sums import TILE_BYTES, Form
from pretrain.soft_kl import soft_kl
from pretrain.triton_choice import runs_in_triton

# The number of logits of all pairs of networks from which on passes over tiles are faster (benchmarks/loss.py).
_FLAT_FROM_LOGITS = 2**15


class MCLTerms(NamedTuple):
    """The four terms: scalars summed over networks, or (M,) vectors with one entry per network.

    A per-network entry counts what teaches that network: an interactive term belongs to the network whose
    anchor it is, a soft term to its student.
    """

    scl_hard: Tensor
    scl_soft: Tensor
    icl_hard: Tensor
    icl_soft: Tensor

    def total(self, alpha: float = 0.5, beta: float = 0.1) -> Tensor:
        """Eq. 6: ``alpha * (scl_hard + scl_soft) + beta * (icl_hard + icl_soft)``."""
        return alpha * (self.scl_hard + self.scl_soft) + beta * (self.icl_hard + self.icl_soft)

    def summed(self) -> "MCLTerms":
        """Sum each term over the networks, as the paper does."""
        return MCLTerms(*(term.sum() for term in self))


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", Tensor, MCLTerms)


class Summed(Protocol[Arguments, Result]):
    """A loss as the sum over its networks.

    Attributes:
        by_network: takes the same arguments and gives one entry per network: (M,) in place of scalars.
    """

    by_network: Callable[Arguments, Result]

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The sum."""
        ...


def summed(loss: Callable[Arguments, Result]) -> Summed[Arguments, Result]:
    """Make a function that returns (M,) vectors return their sums; unsummed it stays there as ``by_network``."""

    @functools.wraps(loss)
    def total(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        terms = loss(*args, **kwargs)
        return terms.summed() if isinstance(terms, MCLTerms) else terms.sum()

    loss.__doc__ = f"`{loss.__name__}` before the sum over networks: one entry per network, (M,)."
    loss.__name__ = loss.__qualname__ = f"{loss.__name__}_by_network"
    decorated = cast("Summed[Arguments, Result]", total)
    decorated.by_network = loss
    return decorated


@summed
def queue_terms(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    soft_temperature: float = 1.0,
    same_sample_positive: bool = True,
    filled: int | None = None,
    backend: Literal["auto", "reference", "flat", "triton"] = "auto",
    tile_bytes: int = TILE_BYTES,
) -> MCLTerms:
    """MCL with a queue of negatives per network (MoCo, section 3.4): four scalars.

    The anchor of network m is ``query[m, i]``, its positive ``key[m, i]``, its negatives the queue of m. Against
    peer b, the same sample's own embedding ``query[b, i]`` is a second positive and is live: it pulls on both
    networks. No gradient reaches key or queue.

    Args:
        query: (M, B, D) float, L2-normalised.
        key: (M, B, D), embeddings of the momentum networks for the other view, L2-normalised.
        queue: (M, K, D), L2-normalised; row k holds the same image in every network's queue.
        temperature: tau, divides every cosine.
        soft_temperature: T; the soft terms compare softmax(logits / T) and are multiplied by T squared.
        same_sample_positive: False leaves ``query[b, i]`` out of the interactive candidates.
        filled: only the first ``filled`` queue rows exist, 0..K; None means all of them.
        backend: "reference" is the readable computation; "flat" makes passes over tiles of the queue, can be
            differentiated once, and trusts that vectors are of unit length (far longer ones overflow); "triton" does so
            in kernels for CUDA, and where it cannot is "flat"; "auto" picks the faster one for the size, as far as that
            has been measured: never "triton" so far.
        tile_bytes: memory of "flat" for tiles in bytes. If the exponentials of all M x M x B x K logits fit, they are
            kept for backward, which is faster than to compute them again.

    Raises:
        NonFiniteError: an input holds NaN or Inf.
        ValueError: shapes, ``filled`` or temperatures that make no sense.

    Example:
        >>> import torch
        >>> from pretrain.losses import queue_terms
        >>> same = torch.nn.functional.normalize(torch.ones(2, 4, 8), dim=-1)  # M = 2, B = 4, D = 8
        >>> terms = queue_terms(same, same, same[:, :3], temperature=0.1)  # K = 3
        >>> [round(float(term), 3) for term in terms]  # 2 ln(K + 1), 0, 4 ln(K + 2), 0
        [2.773, 0.0, 6.438, 0.0]
        >>> round(float(terms.total()), 3)
        2.03
    """
    _check_queue_arguments(query, key, queue, filled, backend)
    _check_temperatures(temperature, soft_temperature)
    # Rows never written are sliced away rather than masked: they have no logit at all.
    rows = queue[:, :filled].detach()
    with full_float32(query.device):
        query, key = widen(query), widen(key.detach())
        require_finite("scl_hard", "query", query)
        require_finite("scl_hard", "key", key)
        if backend in ("flat", "triton") or (
            backend == "auto" and _flat_wins(query, rows.shape[1])
        ):
            form = Form(temperature, soft_temperature, tile_bytes)
            if backend == "triton":
                form = form._replace(in_triton=runs_in_triton(query, form))
            return MCLTerms(
                *flat_queue_terms(query, key, rows, form, same_sample_positive=same_sample_positive)
            )
        rows = widen(rows)
        require_finite("scl_hard", "queue", rows)
        # Index order: network of the anchor, network of the candidates, anchor, candidate.
        same = torch.einsum("abd,cbd->acb", query, query)
        positive = torch.einsum("abd,cbd->acb", query, key)
        negative = torch.einsum("abd,ckd->acbk", query, rows)
        logits = torch.cat([same.unsqueeze(-1), positive.unsqueeze(-1), negative], -1) / temperature
        own = [logits[m, m, :, 1:] for m in range(len(query))]
        cross = logits if same_sample_positive else logits[..., 1:]
        positives = 2 if same_sample_positive else 1
        return _mutual_terms(
            query,
            own,
            cross,
            own_hard=lambda log_p: -log_p[:, 0].mean(),
            cross_hard=lambda log_q: -log_q[:, :positives].sum(-1).mean(),
            soft_temperature=soft_temperature,
        )


queue_terms_by_network = queue_terms.by_network


@summed
def batch_terms(
    embedding: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    soft_temperature: float = 1.0,
    same_sample_positive: bool = True,
    num_negatives: int | None = None,
    generator: torch.Generator | None = None,
) -> MCLTerms:
    """MCL within a labelled batch (supervised, section 3.3): four scalars.

    The other samples of an anchor's class are its positives (the mean of their log-probabilities counts), the
    samples of other classes its negatives. An anchor without a positive is left out of the hard terms that need
    one. Everything is live except the teachers of the soft terms. Large batches without ``num_negatives`` are computed
    in passes over tiles, and can be differentiated once.

    Args:
        embedding: (M, B, D) float, L2-normalised.
        labels: (B,) integer classes.
        temperature: tau, divides every cosine.
        soft_temperature: T; the soft terms compare softmax(logits / T) and are multiplied by T squared.
        same_sample_positive: False leaves a peer's embedding of the anchor's own sample out of its candidates.
        num_negatives: keep this many negatives per anchor, drawn at random, the same for every network; None
            keeps all.
        generator: source of that draw; None uses torch's global one.

    Raises:
        NonFiniteError: an input holds NaN or Inf.
        ValueError: shapes or temperatures that make no sense, or more negatives asked for than an anchor has.
    """
    if embedding.ndim != 3 or labels.shape != embedding.shape[1:2]:
        raise ValueError(
            "embedding must be (M, B, D) and labels (B,), "
            f"got {tuple(embedding.shape)} and {tuple(labels.shape)}"
        )
    _check_temperatures(temperature, soft_temperature)
    labels = labels.to(embedding.device)
    if num_negatives is None and _flat_wins(embedding, len(labels)):
        form = Form(temperature, soft_temperature, TILE_BYTES)
        with full_float32(embedding.device):
            embedding = widen(embedding)
            require_finite("scl_hard", "embedding", embedding)
            return MCLTerms(
                *flat_batch_terms(
                    embedding, labels, form, same_sample_positive=same_sample_positive
                )
            )
    same = torch.eye(len(labels), dtype=torch.bool, device=embedding.device)
    positive = (labels[:, None] == labels[None, :]) & ~same
    negative = ~(positive | same)
    if num_negatives is not None:
        negative = _draw_negatives(negative, num_negatives, generator)
    has_positive = positive.any(-1)
    positive_share = positive.to(widen(embedding).dtype)
    positive_share /= positive_share.sum(-1, keepdim=True).clamp(min=1)

    def label_hard(log_p: Tensor) -> Tensor:
        per_anchor = -(log_p.masked_fill(~positive, 0.0) * positive_share).sum(-1)
        return per_anchor.sum() / has_positive.sum().clamp(min=1)

    def cross_hard(log_q: Tensor) -> Tensor:
        if not same_sample_positive:
            return label_hard(log_q)
        return label_hard(log_q) - log_q.diagonal().mean()

    with full_float32(embedding.device):
        embedding = widen(embedding)
        require_finite("scl_hard", "embedding", embedding)
        logits = torch.einsum("abd,ckd->acbk", embedding, embedding) / temperature
        own_candidates = positive | negative
        cross_candidates = own_candidates | same if same_sample_positive else own_candidates
        own = [logits[m, m].masked_fill(~own_candidates, EXCLUDED) for m in range(len(embedding))]
        cross = logits.masked_fill(~cross_candidates, EXCLUDED)
        return _mutual_terms(
            embedding,
            own,
            cross,
            own_hard=label_hard,
            cross_hard=cross_hard,
            soft_temperature=soft_temperature,
        )


batch_terms_by_network = batch_terms.by_network


@summed
def view_terms(
    views: Tensor,
    *,
    temperature: float,
    soft_temperature: float = 1.0,
    same_sample_positive: bool = True,
    num_negatives: int | None = None,
    generator: torch.Generator | None = None,
) -> MCLTerms:
    """MCL over two views per image (SimCLR): `batch_terms` of the 2B embeddings, the image being the label.

    Args:
        views: (M, 2, B, D) float, L2-normalised: every network's embedding of both views of each image.

    The other arguments, the result and what is raised are those of `batch_terms`.
    """
    if views.ndim != 4 or views.shape[1] != 2:
        raise ValueError(f"views must be (M, 2, B, D), got {tuple(views.shape)}")
    labels = torch.arange(views.shape[2], device=views.device).repeat(2)
    return batch_terms.by_network(
        views.flatten(1, 2),
        labels,
        temperature=temperature,
        soft_temperature=soft_temperature,
        same_sample_positive=same_sample_positive,
        num_negatives=num_negatives,
        generator=generator,
    )


view_terms_by_network = view_terms.by_network


def _mutual_terms(
    anchor: Tensor,
    own: list[Tensor],
    cross: Tensor,
    *,
    own_hard: Callable[[Tensor], Tensor],
    cross_hard: Callable[[Tensor], Tensor],
    soft_temperature: float,
) -> MCLTerms:
    """Assemble the four terms of each network from its logits.

    Args:
        anchor: (M, B, D), whence the graph hangs where a term has nothing to sum.
        own: M tensors (B, N), logits of P_m.
        cross: (M, M, B, N'), logits of Q_ab at [a, b].
        own_hard, cross_hard: from log-probabilities (B, N) to the scalar hard loss.
        soft_temperature: T.
    """
    networks = range(len(own))
    nothing = anchor.sum(dim=(1, 2)) * 0.0
    scl_hard, scl_soft, icl_hard, icl_soft = (list(nothing) for _ in range(4))
    for m in networks:
        scl_hard[m] = scl_hard[m] + own_hard(F.log_softmax(own[m], -1))
        for peer in networks:
            if peer == m:
                continue
            scl_soft[m] = scl_soft[m] + soft_kl(own[peer], own[m], soft_temperature).mean()
            icl_hard[m] = icl_hard[m] + cross_hard(F.log_softmax(cross[m, peer], -1))
            icl_soft[m] = (
                icl_soft[m] + soft_kl(cross[peer, m], cross[m, peer], soft_temperature).mean()
            )
    return MCLTerms(*(torch.stack(term) for term in (scl_hard, scl_soft, icl_hard, icl_soft)))


def _draw_negatives(negative: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Keep ``count`` of each row's True entries of the (B, B) mask, drawn uniformly."""
    fewest = int(negative.sum(-1).min())
    if not 0 < count <= fewest:
        raise ValueError(
            f"num_negatives is {count}, but an anchor of this batch has {fewest} negatives: "
            f"choose 1 to {fewest} or a larger batch"
        )
    device = generator.device if generator is not None else negative.device
    lot = torch.rand(negative.shape, generator=generator, device=device).to(negative.device)
    kept = lot.masked_fill(~negative, -1.0).topk(count, -1).indices
    return torch.zeros_like(negative).scatter_(-1, kept, True)


def _check_queue_arguments(
    query: Tensor, key: Tensor, queue: Tensor, filled: int | None, backend: str
) -> None:
    if query.ndim != 3 or key.shape != query.shape:
        raise ValueError(
            "query and key must be (M, B, D) alike, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if queue.ndim != 3 or (queue.shape[0], queue.shape[2]) != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"queue must be (M, K, D) with M, D of query {tuple(query.shape)}, "
            f"got {tuple(queue.shape)}"
        )
    if filled is not None and not 0 <= filled <= queue.shape[1]:
        raise ValueError(f"filled must be 0..{queue.shape[1]} or None, got {filled}")
    if backend not in ("auto", "reference", "flat", "triton"):
        raise ValueError(
            f"backend must be 'auto', 'reference', 'flat' or 'triton', got {backend!r}"
        )


def _flat_wins(anchors: Tensor, candidates: int) -> bool:
    networks, batch, _ = anchors.shape
    return networks**2 * batch * candidates >= _FLAT_FROM_LOGITS


def _check_temperatures(temperature: float, soft_temperature: float) -> None:
    if not (temperature > 0 and soft_temperature > 0):
        raise ValueError(
            "temperature and soft_temperature must be positive, "
            f"got {temperature} and {soft_temperature}"
        )


def widen(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is: what losses are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
