"""When a training saves its state. Apart from what saves, so that a config does not wait for torch."""

import math
from dataclasses import dataclass

from peerlearn.config import require


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When the state of training is saved.

    Attributes:
        every_steps: number of steps between two saves; null = one save after every epoch. The last step is always
            saved.
        keep_last: number of the newest saves that stay.
        keep_every_steps: step numbers whose multiples stay too, however old; null = none.
        max_missed: number of saves in a row that the disk may refuse before the run stops.
        max_seconds: longest time for a save; one that takes longer hangs, and the process ends itself, so that a
            supervisor can start it anew.
    """

    every_steps: int | None = None
    keep_last: int = 2
    keep_every_steps: int | None = None
    max_missed: int = 3
    max_seconds: float = 1800.0

    def __post_init__(self) -> None:
        require(
            self.every_steps is None or self.every_steps >= 1,
            f"checkpoint.every_steps must be at least 1, got {self.every_steps}",
        )
        require(
            self.keep_every_steps is None or self.keep_every_steps >= 1,
            f"checkpoint.keep_every_steps must be null or at least 1, got {self.keep_every_steps}",
        )
        require(
            self.max_missed >= 1,
            f"checkpoint.max_missed must be at least 1, got {self.max_missed}",
        )
        require(
            0 < self.max_seconds < math.inf,
            f"checkpoint.max_seconds must be positive and finite, got {self.max_seconds}",
        )
        require(
            self.keep_last >= 2,
            f"checkpoint.keep_last must be at least 2, so that one save stands while the next is "
            f"written, got {self.keep_last}",
        )
