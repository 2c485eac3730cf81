"""Features with their labels, of several networks and of all of them together.

Dimension letters: N images, D feature dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from peerlearn.data.datasets import ImageDataset
from peerlearn.evaluation.feature_cache import Extraction, load_features
from peerlearn.evaluation.selection import ENSEMBLE, Selection
from peerlearn.knn import ensemble_features


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of some images: (N, D) by the networks' names, float32, the ensemble's float64; and labels (N,)."""

    features: Mapping[str, Tensor]
    labels: Tensor

    def part(self, index: Tensor) -> "FeatureSet":
        """The images of these numbers."""
        features = {name: found[index] for name, found in self.features.items()}
        return FeatureSet(features=features, labels=self.labels[index])


def load_feature_sets(
    selection: Selection, splits: Sequence[ImageDataset], how: Extraction
) -> list[FeatureSet]:
    """The features of labelled splits by the selected networks and, if it is selected, by their ensemble.

    All ranks call it together and all get all features.

    Raises:
        UserError: as `load_features` does.
    """
    sets = []
    for split in splits:
        assert split.labels is not None
        features = load_features(selection.folders, split, how)
        if selection.ensemble:
            features = with_ensemble(features)
        sets.append(FeatureSet(features=features, labels=split.labels))
    return sets


def with_ensemble(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features (N, D) by network, and the joint ones of all networks under the name ENSEMBLE."""
    return {**features, ENSEMBLE: ensemble_features(list(features.values()))}
