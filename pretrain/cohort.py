"""A cohort: M networks that see the same images, and their momentum peers.

Dimensions: M networks, B batch, D embedding size.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlearn.backbones import create_backbone
from peerlearn.counter_random import INITIAL_WEIGHTS, random_bits
from peerlearn.dist import Ranks
from peerlearn.errors import UserError
from peerlearn.shared_stages import default_share_stages, forward_shared, share_low_stages
from pretrain.batch_norm import split_batch_norm, sync_batch_norm
from pretrain.config import CohortConfig
from pretrain.losses import widen


class Cohort(nn.Module):
    """M backbones, each with a projection head of its own.

    The low stages may be one and the same modules in every backbone (section 3.1): they run once per forward and
    appear once among the parameters. Each backbone alone stays a complete network.
    """

    def __init__(
        self, backbones: Sequence[nn.Module], heads: Sequence[nn.Module], *, shared_stages: int = 0
    ) -> None:
        super().__init__()
        if shared_stages:
            share_low_stages(backbones, shared_stages)
        self.backbones = nn.ModuleList(backbones)
        self.heads = nn.ModuleList(heads)
        self.shared_stages = shared_stages

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to L2-normalised embeddings (M, B, D)."""
        features = forward_shared(list(self.backbones), images, self.shared_stages)
        projected = (head(f) for head, f in zip(self.heads, features, strict=True))
        # Widened first: unit vectors of bf16 are off by a percent.
        return torch.stack([F.normalize(widen(embedding), dim=-1) for embedding in projected])


def build_cohort(
    config: CohortConfig,
    *,
    in_chans: int,
    image_size: int,
    seed: int,
    ranks: Ranks | None = None,
) -> Cohort:
    """Create the networks, each with initial weights of its own drawn from (seed, network).

    Args:
        config: what networks.
        in_chans: channels of the images.
        image_size: side of the images in pixels.
        seed: of the initial weights.
        ranks: the processes that train it together, over which batch norms are split or synchronised; None = this
            one alone.

    Raises:
        UserError: an unknown backbone, or one that the config's other keys do not fit.
    """
    backbones, heads = [], []
    for network, name in enumerate(config.architectures()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random_bits(INITIAL_WEIGHTS, seed, network)))
            backbone = create_backbone(
                name, in_chans=in_chans, small_images=config.small_images, image_size=image_size
            )
            heads.append(_build_head(config, backbone.num_features))  # type: ignore[arg-type]
        backbones.append(backbone)
    shared = config.share_stages
    if shared is None:
        shared = default_share_stages(backbones)
    cohort = Cohort(backbones, heads, shared_stages=shared)
    _set_up_batch_norm(cohort, config, ranks)
    return cohort.to(memory_format=torch.channels_last)


def _set_up_batch_norm(cohort: Cohort, config: CohortConfig, ranks: Ranks | None) -> None:
    world_size = ranks.world_size if ranks else 1
    if config.batch_norm_splits > 1 and config.batch_norm_splits % world_size:
        raise UserError(
            f"cohort.batch_norm_splits {config.batch_norm_splits} cannot be shared by {world_size} "
            f"processes: make it 1 or a multiple of {world_size}"
        )
    try:
        if config.batch_norm_splits > world_size:
            split_batch_norm(cohort, config.batch_norm_splits // world_size)
        if config.sync_batch_norm and ranks:
            sync_batch_norm(cohort, ranks)
    except ValueError as error:
        raise UserError(
            f"cohort.batch_norm_splits must be 1 and cohort.sync_batch_norm false here: {error}"
        ) from error


def _build_head(config: CohortConfig, num_features: int) -> nn.Module:
    if config.projection == "linear":
        return nn.Linear(num_features, config.embedding_dim)
    return nn.Sequential(
        nn.Linear(num_features, num_features),
        nn.ReLU(inplace=True),
        nn.Linear(num_features, config.embedding_dim),
    )


def momentum_peers(cohort: Cohort) -> Cohort:
    """A copy of the cohort that no gradient reaches: the key networks (MoCo). Shared stages stay shared."""
    return copy.deepcopy(cohort).requires_grad_(False)


@torch.no_grad()
def update_momentum(peers: Cohort, cohort: Cohort, momentum: float) -> None:
    """``key = momentum * key + (1 - momentum) * query`` for every parameter once, in place (MoCo Eq. 2).

    Buffers are left alone: the key networks' batch-norm statistics come from their own forward passes.
    """
    keys: list[Tensor] = list(peers.parameters())
    queries: list[Tensor] = list(cohort.parameters())
    torch._foreach_mul_(keys, momentum)
    torch._foreach_add_(keys, queries, alpha=1.0 - momentum)


def statistics(module: nn.Module) -> list[Tensor]:
    """The running means and variances of the batch norms, each once."""
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under its first name: a shared tensor appears once."""
    return {
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }


@torch.no_grad()
def load_named_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore `named_state` in place.

    Raises:
        ValueError: other names or shapes than the module's own.
    """
    own = named_state(module)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ValueError(f"the saved tensors do not match the networks, first at {odd[0]!r}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name!r} was saved as {tuple(state[name].shape)}, is {tuple(tensor.shape)}"
            )
        tensor.copy_(state[name])
