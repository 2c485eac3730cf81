"""How well a cohort tells the validation classes apart, while it trains on others.

Dimension: M networks.
"""

import torch

from peerlearn.data.datasets import select_images
from peerlearn.data.unreadable import Unreadable, warn_of_unreadable
from peerlearn.evaluation.episodes import (
    Episodes,
    draw_from,
    nearest_centroid,
    score_episodes,
)
from peerlearn.evaluation.features import extract_features
from peerlearn.knn import ensemble_features
from peerlearn.runs.score_names import (
    ENSEMBLE,
    EPISODE_COUNT,
    EPISODE_QUERIES,
    EPISODE_SHOTS,
    EPISODE_TOP1,
    EPISODE_WAYS,
    score_name,
)
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.training_data import TrainingData


def validation_episodes(config: PretrainConfig, data: TrainingData, *, episodes: int) -> Episodes:
    """Episodes of the validation classes.

    Raises:
        UserError: there are fewer classes than ways, or one has too few images.
    """
    assert data.validation is not None
    settings = config.prototypical
    return draw_from(
        data.validation,
        ways=settings.validation_ways,
        shots=settings.validation_shots or settings.shots,
        queries=settings.validation_queries,
        episodes=episodes,
        seed=config.seed,
    )


class EpisodeMonitor:
    """Watches accuracy over episodes of the validation classes, the same episodes after every epoch.

    Raises:
        UserError: there are fewer validation classes than ways, or one has too few images.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: TrainingData,
        *,
        image_size: int,
        device: torch.device,
    ) -> None:
        assert data.validation is not None
        self.config = config
        self.image_size = image_size
        self.device = device
        drawn = validation_episodes(config, data, episodes=config.prototypical.validation_episodes)
        # Images that no episode takes need not be encoded.
        both = torch.cat([drawn.support, drawn.query], dim=2)
        taken, numbers = both.unique(return_inverse=True)
        shots = drawn.support.shape[2]
        self._validation = select_images(data.validation, taken)
        self._episodes = Episodes(numbers[:, :, :shots], numbers[:, :, shots:])

    def measure(self, cohort: Cohort) -> dict[str, float]:
        """Top-1 in percent of every network and of their joint features, by their names in metrics.jsonl."""
        unreadable: list[Unreadable] = []
        encoded = extract_features(
            list(cohort.backbones),
            self._validation,
            image_size=self.image_size,
            batch_size=self.config.batch_size,
            device=self.device,
            workers=self.config.data.workers,
            unreadable=unreadable,
        )
        warn_of_unreadable(self._validation, unreadable, "are seen as black by the monitor")
        features = {str(m): each for m, each in enumerate(encoded)}
        if len(encoded) > 1:
            features[ENSEMBLE] = ensemble_features(list(encoded))
        settings = self.config.prototypical
        row = {}
        for network, each in features.items():
            scorer = nearest_centroid(each, distance=settings.distance)
            result = score_episodes(each.shape[1], self._episodes, scorer)
            row[score_name(network, EPISODE_TOP1)] = result.mean
        _, ways, shots = self._episodes.support.shape
        protocol = {
            EPISODE_WAYS: ways,
            EPISODE_SHOTS: shots,
            EPISODE_QUERIES: settings.validation_queries,
            EPISODE_COUNT: len(self._episodes),
        }
        return row | protocol
