"""Splits of different classes, as few-shot learning has them."""

from collections.abc import Sequence

from peerlearn.data.datasets import ImageDataset


def check_disjoint(splits: Sequence[ImageDataset]) -> None:
    """Make sure that no class stands in two splits.

    Raises:
        UserError: one does.
    """
