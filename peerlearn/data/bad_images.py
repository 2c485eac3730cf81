"""The book of images that could not be read: counted per epoch, listed once each, too many of them stop the run."""

from collections.abc import Sequence
from typing import Any

from peerlearn.compute.dist import Ranks
from peerlearn.data.unreadable import Unreadable, check_unreadable_rate
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory


class UnreadableImages:
    """What all ranks together met; the same on each of them."""

    def __init__(self, images: int, max_percent: float) -> None:
        self._images = images
        self._max_percent = max_percent
        self._epoch = 0
        self._known: dict[int, Unreadable] = {}
        self._in_epoch: set[int] = set()

    @property
    def in_epoch(self) -> int:
        """How many images of this epoch another took the place of; one drawn several times counts once."""
        return len(self._in_epoch)

    def begin_epoch(self, epoch: int) -> None:
        """Count anew, unless the epoch is the one that was begun already."""
        if epoch != self._epoch:
            self._epoch, self._in_epoch = epoch, set()

    def note(self, found: Sequence[Unreadable], *, ranks: Ranks, run: RunDirectory) -> None:
        """Enter what the ranks met in a step; the main rank writes an event for each file not met before.

        Raises:
            UserError: too many of an epoch's images cannot be read.
        """
        for image in (Unreadable(*item) for part in ranks.collect(found) for item in part):
            self._in_epoch.add(image.index)
            if image.index not in self._known:
                self._known[image.index] = image
                if ranks.main:
                    run.event("image_unreadable", path=image.path, reason=image.reason)
        try:
            check_unreadable_rate(
                self.in_epoch, self._images, self._max_percent, list(self._known.values())
            )
        except UserError as error:
            raise ranks.told_once(error) from error

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, plain values."""
        known = [list(image) for image in self._known.values()]
        return {"epoch": self._epoch, "in_epoch": sorted(self._in_epoch), "known": known}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        self._epoch, self._in_epoch = state["epoch"], set(state["in_epoch"])
        self._known = {item[0]: Unreadable(*item) for item in state["known"]}
