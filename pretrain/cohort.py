"""A cohort: M networks that see the same images, and their momentum peers.

Dimensions: M networks, B batch, D embedding size, C classes.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlearn.backbones import create_backbone, patch_pixels
from peerlearn.compute.dist import Ranks
from peerlearn.compute.sync_batch_norm import sync_batch_norm
from peerlearn.counter_random import INITIAL_WEIGHTS, random_bits
from peerlearn.errors import UserError
from peerlearn.evaluation.features import eval_mode
from peerlearn.networks.shared_stages import (
    check_shared,
    default_share_stages,
    run_high_stages,
    run_low_stages,
    share_low_stages,
)
from pretrain.batch_norm import split_batch_norm
from pretrain.cohort_config import CohortConfig
from pretrain.compiled import Compiled
from pretrain.config import PretrainConfig
from pretrain.gates import EnsembleGate, PeerAttention
from pretrain.losses import widen

logger = logging.getLogger(__name__)


class Cohort(nn.Module):
    """M backbones, each with a projection head, a classifier, or both, of its own.

    The low stages, or all of them, may be one and the same modules in every backbone (section 3.1): they run once per
    forward and appear once among the parameters. Each backbone alone stays a complete network.

    Attributes:
        shared_stages: number of low stages that the backbones share; all = they are one and the same module.
        frozen: numbers of the networks that do not learn. They stay in eval mode, and no gradient reaches them.
        heads: M projections to the embedding, or none.
        classifiers: M linear layers to class logits, or none.
        gate: what the networks' logits are mixed by, in methods that learn it; or None.
        compiled: what runs the backbones in training; None = they run as they are, as they do in eval mode.
        here: numbers of the networks that this process holds, rising: all of them, unless the cohort is split between
            processes (`pretrain.parallel_config`). The others lie on the device "meta", with names and shapes and
            without memory, and take no part in what follows; M is then the number of those that are here.
    """

    def __init__(
        self,
        backbones: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        *,
        classifiers: Sequence[nn.Module] = (),
        shared_stages: int | Literal["all"] = 0,
        frozen: Collection[int] = (),
    ) -> None:
        super().__init__()
        if shared_stages == "all":
            backbones = [backbones[0]] * len(backbones)
        elif shared_stages:
            share_low_stages(backbones, shared_stages)
        self.backbones = nn.ModuleList(backbones)
        self.heads = nn.ModuleList(heads)
        self.classifiers = nn.ModuleList(classifiers)
        self.gate: nn.Module | None = None
        self.shared_stages = shared_stages
        self.compiled: Compiled | None = None
        self.frozen = frozenset(frozen)
        self.here: Sequence[int] = range(len(backbones))
        for part in self._frozen_parts():
            part.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to L2-normalised embeddings (M, B, D)."""
        return self.embed(self.branches(self.trunk(images)))

    def trunk(self, images: Tensor) -> Tensor:
        """What the shared stages make of images: (B, channels, H, W), or features (B, num_features) where they are all.

        Where none are shared: the images themselves.
        """
        if self.shared_stages == "all":
            return self._run(run_high_stages, 0, images, 0)
        return (
            self._run(run_low_stages, 0, images, self.shared_stages)
            if self.shared_stages
            else images
        )

    def branches(self, trunk: Tensor) -> list[Tensor]:
        """Every network's features (B, num_features) from what `trunk` gave."""
        if self.shared_stages == "all":
            return [trunk] * len(self.backbones)
        check_shared(list(self.backbones), self.shared_stages)
        return [self._run(run_high_stages, m, trunk, self.shared_stages) for m in self.here]

    def _run(
        self, stages: Callable[..., Tensor], network: int, images: Tensor, shared: int
    ) -> Tensor:
        """What stages of one network make of images, or of the trunk of so many shared stages."""
        backbone = self.backbones[network]
        if self.compiled is None or not backbone.training:
            return stages(backbone, images, shared)
        return self.compiled.call(stages, backbone, images, shared)

    def train(self, mode: bool = True) -> "Cohort":
        """Into training mode, or out of it. Frozen networks stay in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def _frozen_parts(self) -> Iterator[nn.Module]:
        return (part for m in self.frozen for _, part in self.parts(m))

    def keep(self, networks: Sequence[int]) -> None:
        """Leave all networks but these to other processes."""
        self.here = networks
        for m in set(range(len(self.backbones))) - set(networks):
            for _, part in self.parts(m):
                part.to("meta")

    def to_device(self, device: torch.device) -> "Cohort":
        """Move what is here, in place."""
        for m in self.here:
            for _, part in self.parts(m):
                part.to(device)
        if self.gate is not None:
            self.gate.to(device)
        return self

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Every network's features to L2-normalised embeddings (M, B, D)."""
        projected = (self.heads[m](f) for m, f in zip(self.here, features, strict=True))
        # Widened first: unit vectors of bf16 are off by a percent.
        return torch.stack([F.normalize(widen(embedding), dim=-1) for embedding in projected])

    def classify(self, features: Sequence[Tensor]) -> Tensor:
        """Every network's features to class logits (M, B, C)."""
        pairs = zip(self.here, features, strict=True)
        return torch.stack([widen(self.classifiers[m](f)) for m, f in pairs])

    def parts(self, network: int) -> Iterator[tuple[str, nn.Module]]:
        """The modules of one network, by name: backbone, head, classifier."""
        yield "backbone", self.backbones[network]
        if self.heads:
            yield "head", self.heads[network]
        if self.classifiers:
            yield "classifier", self.classifiers[network]


def build_networks(
    config: PretrainConfig,
    *,
    in_chans: int,
    image_size: int,
    num_classes: int,
    ranks: Ranks | None = None,
) -> Cohort:
    """`build_cohort` with what the method of a run needs; ``num_classes`` is 0 for those without labels."""
    return build_cohort(
        config.cohort,
        in_chans=in_chans,
        image_size=image_size,
        seed=config.seed,
        projects=config.contrastive,
        num_classes=num_classes,
        teaching=config.supervised.teaching if num_classes else "none",
        ranks=ranks,
    )


def build_cohort(
    config: CohortConfig,
    *,
    in_chans: int,
    image_size: int,
    seed: int,
    projects: bool = True,
    num_classes: int = 0,
    teaching: str = "none",
    ranks: Ranks | None = None,
) -> Cohort:
    """Create the networks, each with initial weights of its own drawn from (seed, network).

    Args:
        config: what networks.
        in_chans: channels of the images.
        image_size: side of the images in pixels.
        seed: of the initial weights.
        projects: whether networks have projection heads.
        num_classes: C, of the networks' classifiers; 0 = they have none.
        teaching: of `pretrain.method_config.SupervisedConfig`, some of which learn a gate.
        ranks: the processes that train it together, over which batch norms are split or synchronised; None = this
            one alone.

    Raises:
        UserError: an unknown backbone, or one that the config's other keys do not fit.
    """
    backbones, heads, classifiers = [], [], []
    names = config.architectures()
    for network, name in enumerate(names):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random_bits(INITIAL_WEIGHTS, seed, network)))
            try:
                backbone = create_backbone(
                    name, in_chans=in_chans, small_images=config.small_images, image_size=image_size
                )
            except UserError as error:
                raise UserError(f"cohort.backbones: {error}") from error
            if config.batch_norm_init == "uniform":
                _draw_scales(backbone)
            width = int(backbone.num_features)  # type: ignore[arg-type]
            if projects:
                heads.append(_build_head(config, width))
            if num_classes:
                classifiers.append(nn.Linear(width, num_classes))
        if name not in names[:network]:
            _check_image_size(name, backbone, in_chans=in_chans, image_size=image_size)
        backbones.append(backbone)
    shared = config.share_stages
    if shared is None:
        shared = 0 if config.frozen else default_share_stages(backbones)
    cohort = Cohort(
        backbones, heads, classifiers=classifiers, shared_stages=shared, frozen=config.frozen
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_bits(INITIAL_WEIGHTS, seed, config.networks)))
        cohort.gate = _build_gate(cohort, teaching, in_chans=in_chans, image_size=image_size)
    _set_up_batch_norm(cohort, config, ranks)
    return cohort.to(memory_format=torch.channels_last)


@torch.no_grad()
def _check_image_size(name: str, backbone: nn.Module, *, in_chans: int, image_size: int) -> None:
    """Make sure that the network takes images of this size; warn where it looks at a part of them alone.

    Raises:
        UserError: it does not.
    """
    try:
        with eval_mode([backbone]):
            backbone(torch.zeros(1, in_chans, image_size, image_size))
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"network {name!r} cannot take images of {image_size} pixels "
            f"({' '.join(str(error).split()) or 'they do not fit'}): change data.image_size"
        ) from error
    patch = patch_pixels(backbone)
    seen = image_size - image_size % patch
    if seen < image_size:
        logger.warning(
            "network %s cuts images into patches, and of %d x %d pixels it sees the first %d x %d: "
            "make data.image_size a multiple of %d",
            *(name, image_size, image_size, seen, seen, patch),
        )


def _set_up_batch_norm(cohort: Cohort, config: CohortConfig, ranks: Ranks | None) -> None:
    world_size = ranks.world_size if ranks else 1
    try:
        if config.batch_norm_splits > world_size:
            split_batch_norm(cohort, config.batch_norm_splits // world_size)
        if config.sync_batch_norm and ranks:
            sync_batch_norm(cohort, ranks)
    except ValueError as error:
        raise UserError(
            f"cohort.batch_norm_splits must be 1 and cohort.sync_batch_norm false here: {error}"
        ) from error


def _draw_scales(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight)


def _build_head(config: CohortConfig, num_features: int) -> nn.Module:
    if config.projection == "none":
        if num_features != config.embedding_dim:
            raise UserError(
                f"cohort.projection none compares the networks' features, of size {num_features} here: set "
                f"cohort.embedding_dim to {num_features}, got {config.embedding_dim}"
            )
        return nn.Identity()
    if config.projection == "linear":
        return nn.Linear(num_features, config.embedding_dim)
    return nn.Sequential(
        nn.Linear(num_features, num_features),
        nn.ReLU(inplace=True),
        nn.Linear(num_features, config.embedding_dim),
    )


def _build_gate(
    cohort: Cohort, teaching: str, *, in_chans: int, image_size: int
) -> nn.Module | None:
    """What ONE and OKDDip mix logits by; and that the networks have the trunk they need."""
    networks = len(cohort.backbones)
    if teaching in ("cl_ilr", "one") and not cohort.shared_stages:
        raise UserError(
            f"supervised.teaching {teaching} is defined for networks on a shared trunk: set cohort.share_stages to "
            "1 or more"
        )
    if teaching == "one":
        with torch.no_grad(), eval_mode([cohort]):
            trunk = cohort.trunk(torch.zeros(1, in_chans, image_size, image_size))
        return EnsembleGate(trunk.shape[1], networks)
    if teaching == "okddip":
        widths = {int(backbone.num_features) for backbone in cohort.backbones}  # type: ignore[arg-type]
        if len(widths) > 1:
            raise UserError(
                "supervised.teaching okddip compares the networks' features, which must be of one width: "
                f"cohort.backbones give {sorted(widths)}"
            )
        return PeerAttention(widths.pop(), networks - 1)
    return None


def momentum_peers(cohort: Cohort) -> Cohort:
    """A copy of the cohort that no gradient reaches: the key networks (MoCo). Shared stages stay shared.

    Frozen networks are not copied: they are their own momentum networks.
    """
    kept = {id(part): part for m in cohort.frozen for _, part in cohort.parts(m)}
    return copy.deepcopy(cohort, kept).requires_grad_(False)


@torch.no_grad()
def update_momentum(peers: Cohort, cohort: Cohort, momentum: float) -> None:
    """``key = momentum * key + (1 - momentum) * query`` for every parameter that learns once, in place (MoCo Eq. 2).

    Buffers are left alone: the key networks' batch-norm statistics come from their own forward passes.
    """
    pairs = zip(peers.parameters(), cohort.parameters(), strict=True)
    moving = [(key, query) for key, query in pairs if query.requires_grad and not query.is_meta]
    keys: list[Tensor] = [key for key, _ in moving]
    queries: list[Tensor] = [query for _, query in moving]
    if not moving:
        # All that are here are frozen, and torch takes no empty list.
        return
    torch._foreach_mul_(keys, momentum)
    torch._foreach_add_(keys, queries, alpha=1.0 - momentum)


def statistics(module: nn.Module) -> list[Tensor]:
    """The running means and variances of the batch norms that are in training mode, each once."""
    # Networks have other buffers too, such as blur kernels and tables of positions, which stay as they are.
    return [
        buffer
        for part in module.modules()
        if part.training
        for name, buffer in part.named_buffers(recurse=False)
        if name in ("running_mean", "running_var") and not buffer.is_meta
    ]


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under its first name: a shared tensor appears once."""
    return {
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }


@torch.no_grad()
def load_named_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore `named_state` in place, of networks that are here.

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
        if not tensor.is_meta:
            tensor.copy_(state[name])
