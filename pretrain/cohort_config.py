"""The networks of a pretraining run: a group of `pretrain.config.PretrainConfig`."""

from dataclasses import dataclass
from typing import Literal

from peerlearn.config import added, require

# Words of cohort.init that are no paths: no weights, and those that timm's cache holds.
RANDOM, TIMM = "random", "timm"


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """The networks that learn together.

    Attributes:
        networks: number of networks, M; 1 is the plain method without peers.
        backbones: architecture of the networks: one name for all of them, or a list of M names; any timm network, or a
            CIFAR network.
        share_stages: number of low stages that all networks share; 0 = none, all = the whole backbone (one network with
            M heads), null = the paper's rule (none for two networks; for more, all but the last stage of CIFAR networks
            and all but the last two of others; none where networks are frozen).
        frozen: numbers of the networks that teach and do not learn, from 0.
        init: weights that the networks start from: one for all, or a list of M. Each is a run, a step's folder, the
            folder of one network, a file of safetensors, timm (published weights that timm's cache holds) or random;
            null = random for all.
        embedding_dim: size of the embedding that the losses compare, D.
        projection: kind of projection head: linear, mlp (two layers with a ReLU between), or none (the features are
            the embedding, of size embedding_dim).
        small_images: whether ResNets get a 3x3 stem without max-pool.
        batch_norm_init: initial scales of batch norms: ones, or uniform (drawn from 0..1, as PyTorch did before 1.1).
        batch_norm_splits: number of parts of the global batch that are normalised apart, as on so many GPUs; 1 = one
            part per process.
        sync_batch_norm: whether batch norm takes the statistics of the whole global batch, over all processes.
    """

    networks: int = 2
    backbones: str | list[str] = "resnet18"
    share_stages: int | Literal["all"] | None = None
    frozen: list[int] = added(default_factory=list)
    init: str | list[str] | None = added(None)
    embedding_dim: int = 128
    projection: Literal["linear", "mlp", "none"] = "linear"
    small_images: bool = False
    batch_norm_init: Literal["ones", "uniform"] = "ones"
    batch_norm_splits: int = 1
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        require(self.networks >= 1, f"cohort.networks must be at least 1, got {self.networks}")
        require(
            isinstance(self.backbones, str) or len(self.backbones) in (1, self.networks),
            f"cohort.backbones must be one name or cohort.networks = {self.networks} names, "
            f"got {self.backbones}",
        )
        require(
            not isinstance(self.share_stages, int) or self.share_stages >= 0,
            f"cohort.share_stages must be all, null or at least 0, got {self.share_stages}",
        )
        require(
            self.share_stages != "all" or len({*self.architectures()}) == 1,
            f"cohort.share_stages all puts every head on one backbone, and cohort.backbones are {self.backbones}: "
            "name one",
        )
        self._check_frozen()
        require(
            not isinstance(self.init, list) or len(self.init) in (1, self.networks),
            f"cohort.init must be one word or cohort.networks = {self.networks} words, got {self.init}",
        )
        require(
            self.embedding_dim >= 1,
            f"cohort.embedding_dim must be at least 1, got {self.embedding_dim}",
        )
        require(
            self.batch_norm_splits >= 1,
            f"cohort.batch_norm_splits must be at least 1, got {self.batch_norm_splits}",
        )
        require(
            not (self.sync_batch_norm and self.batch_norm_splits > 1),
            "cohort.sync_batch_norm and cohort.batch_norm_splits exclude each other: the one joins "
            "what the other parts",
        )

    def _check_frozen(self) -> None:
        require(
            all(0 <= number < self.networks for number in self.frozen),
            f"cohort.frozen must hold numbers of networks, 0 to {self.networks - 1}, got {self.frozen}",
        )
        require(
            len({*self.frozen}) < self.networks,
            f"cohort.frozen must leave a network that learns, got {self.frozen} of {self.networks}",
        )
        require(
            not self.frozen or self.share_stages in (None, 0),
            f"cohort.share_stages must be 0 with cohort.frozen, got {self.share_stages}: what is shared would be "
            "frozen too",
        )

    def architectures(self) -> list[str]:
        """The M backbone names."""
        return for_each(self.backbones, self.networks)

    def initial(self) -> list[str]:
        """The M words for the weights that the networks start from."""
        return for_each(self.init or RANDOM, self.networks)


def for_each(words: str | list[str], networks: int) -> list[str]:
    """One word for each network, of one for all or as many as there are."""
    words = [words] if isinstance(words, str) else words
    return words * networks if len(words) == 1 else list(words)
