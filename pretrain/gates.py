"""What mixes the logits of several networks: ONE's gate, OKDDip's attention, and the rescaled gradient of CL-ILR.

Dimensions: M networks, P peers, B batch, D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EnsembleGate(nn.Module):
    """ONE's gate: how much each network counts in the ensemble, for every image (Lan et al., NeurIPS 2018).

    ``softmax(ReLU(BN(fc(GAP(features)))))``, of the features that the networks share.
    """

    def __init__(self, channels: int, networks: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, networks)
        # Of images of one pixel: split and synchronised batch norm know that kind.
        self.norm = nn.BatchNorm2d(networks)

    def forward(self, features: Tensor) -> Tensor:
        """From (B, channels, H, W), or pooled already (B, channels), to (B, M), every row positive with sum 1."""
        pooled = features.mean(dim=(2, 3)) if features.ndim == 4 else features
        scores = self.norm(self.fc(pooled)[:, :, None, None]).flatten(1)
        return F.softmax(F.relu(scores), dim=-1)


class PeerAttention(nn.Module):
    """OKDDip's attention: how much each peer counts in the target of each, for every image (Chen et al., AAAI 2020).

    ``a_ij = softmax_j(q_i . k_j)``, where the projections q and k are shared by the peers and have no bias.
    """

    def __init__(self, num_features: int, peers: int) -> None:
        super().__init__()
        width = max(1, num_features // 8)
        self.peers = peers
        self.query = nn.Linear(num_features, width, bias=False)
        self.key = nn.Linear(num_features, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """From the peers' features (P, B, D) to (B, P, P), where row i holds the weights of peer i's target.

        Raises:
            ValueError: other than P peers.
        """
        if features.ndim != 3 or len(features) != self.peers:
            raise ValueError(f"features must be ({self.peers}, B, D), got {tuple(features.shape)}")
        scores = torch.einsum("ibd,jbd->bij", self.query(features), self.key(features))
        return F.softmax(scores, dim=-1)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied by ``factor`` on its way back: 1/n below n heads in CL-ILR (Song and Chai,
    NeurIPS 2018, "backpropagation rescaling")."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None
