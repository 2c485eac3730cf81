"""The queue of negatives (MoCo): one ring per network, all moving in lockstep.

Dimensions: M networks, B batch, K queue rows, D embedding size.
"""

import torch
from torch import Tensor


class KeyQueue:
    """The last K keys of M networks. Row k holds the same image in every network's ring.

    The queue is no module and no buffer: nothing broadcasts or averages it between processes. Each process
    enqueues the same gathered keys and so holds the same queue.

    Attributes:
        keys: (M, K, D), only the first ``filled`` rows are keys.
        filled: how many rows have ever been written, 0..K.
        cursor: the row the next key goes to, 0..K-1.
    """

    def __init__(
        self,
        networks: int,
        size: int,
        dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if min(networks, size, dim) < 1:
            raise ValueError(
                f"networks, size and dim must be at least 1, got {networks}, {size}, {dim}"
            )
        self.keys = torch.zeros(networks, size, dim, device=device, dtype=dtype)
        self.filled = 0
        self.cursor = 0

    @property
    def size(self) -> int:
        """K, the rows of each ring."""
        return self.keys.shape[1]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys (M, B, D) over the oldest rows. Any B: the ring wraps, and of B > K the last K stay.

        Raises:
            ValueError: keys of another M or D.
        """
        networks, _, dim = self.keys.shape
        if keys.ndim != 3 or (keys.shape[0], keys.shape[2]) != (networks, dim):
            raise ValueError(f"keys must be ({networks}, B, {dim}), got {tuple(keys.shape)}")
        batch = keys.shape[1]
        kept = min(batch, self.size)
        start = self.cursor + batch - kept
        rows = torch.arange(start, start + kept, device=self.keys.device) % self.size
        self.keys[:, rows] = keys[:, batch - kept :].to(self.keys)
        self.cursor = (self.cursor + batch) % self.size
        self.filled = min(self.filled + batch, self.size)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the rings and their two counters."""
        return {
            "keys": self.keys,
            "filled": torch.tensor(self.filled),
            "cursor": torch.tensor(self.cursor),
        }

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restore `state_tensors`.

        Raises:
            ValueError: rings of another shape.
        """
        if state["keys"].shape != self.keys.shape:
            raise ValueError(
                f"the saved queue is {tuple(state['keys'].shape)}, "
                f"this run's is {tuple(self.keys.shape)}"
            )
        self.keys.copy_(state["keys"])
        self.filled = int(state["filled"])
        self.cursor = int(state["cursor"])
