"""The optimiser of a cohort: one over all networks, as Eq. 6 is one loss."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peerlearn.config import require

if TYPE_CHECKING:
    # Reading a config should not wait for torch.
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser; the learning rate is `base_lr` of the run.

    Attributes:
        name: name of the optimiser: sgd, lars or adamw.
        momentum: momentum factor of sgd and lars.
        nesterov: whether sgd and lars use Nesterov momentum.
        weight_decay: factor of the L2 penalty (sgd, lars) or of the decoupled decay (adamw).
        decay_norm_and_bias: whether batch-norm weights and biases decay too, as in MoCo.
    """

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        require(
            0 <= self.momentum < 1, f"optimizer.momentum must be within 0..1, got {self.momentum}"
        )
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay must be at least 0, got {self.weight_decay}",
        )


def build_optimizer(
    cohort: "nn.Module", config: OptimizerConfig, *, lr: float
) -> "torch.optim.Optimizer":
    """SGD (MoCo), LARS (You et al. 2017) or AdamW over the cohort's parameters.

    With ``decay_norm_and_bias`` all parameters decay, as in MoCo. Without it vectors and scalars (batch-norm weights,
    biases) do not decay, and LARS does not adapt their learning rate.
    """
    import torch

    parameters = [p for p in cohort.parameters() if p.requires_grad]
    if config.decay_norm_and_bias:
        groups = [{"params": parameters, "weight_decay": config.weight_decay}]
    else:
        groups = [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if config.name == "lars":
        from timm.optim.lars import Lars

        return Lars(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)


def optimizer_tensors(optimizer: "torch.optim.Optimizer") -> dict[str, "torch.Tensor"]:
    """The optimiser's state as named tensors: ``<parameter number>.<name>``.

    Parameters on the device "meta", which another process trains, have their numbers and no state.
    """
    import torch

    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def bytes_to_come(optimizer: "torch.optim.Optimizer") -> int:
    """Size of the state that the optimiser will have after its first step, of the parameters that have none yet."""
    import torch

    moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return sum(moments * p.nbytes for p in parameters if p not in optimizer.state)


def load_optimizer_tensors(
    optimizer: "torch.optim.Optimizer", tensors: dict[str, "torch.Tensor"]
) -> None:
    """Restore what `optimizer_tensors` returned. Learning rates and decay stay those of the config."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        if not parameters[int(number)].is_meta:
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
