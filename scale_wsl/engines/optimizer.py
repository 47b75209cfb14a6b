"""The optimizers that step trunk and head: which parameters they decay, and what their state is called in a checkpoint.

Every engine steps with the same `torch.optim` class; sharding changes which elements a rank steps, never the rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scale_wsl.models.head import ShardedHead
from scale_wsl.models.head_optimizer import HeadSGD

__all__ = ["OptimizerSettings"]

# By `optim.name`: for each of the state's tensors, torch's name and the checkpoint's.
_STATES = {
    "sgd": {"momentum_buffer": "momentum"},
    "adam": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "adamw": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
}


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What an optimizer needs to know beside its learning rate, which is set before every step."""

    name: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4

    @property
    def states(self) -> dict[str, str]:
        """For each tensor of the state that is as large as its parameter: torch's name, and the checkpoint's."""
        return {} if self.name == "sgd" and self.momentum == 0 else _STATES[self.name]

    def groups(self, parameters: Iterable[tuple[nn.Parameter, bool]]) -> list[dict[str, Any]]:
        """Optimizer groups of (parameter, whether it is a kernel or matrix): only those are decayed.

        No decay on biases and normalisation: Goyal et al. 2017, section 5.1, which the paper's recipe follows.
        """
        listed = [(parameter, decayed) for parameter, decayed in parameters if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter, decayed in listed if decayed], "weight_decay": self.weight_decay},
            {"params": [parameter for parameter, decayed in listed if not decayed], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def of_module(self, module: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of a module's parameters, which must have their own shapes."""
        return self.build(self.groups((parameter, parameter.ndim > 1) for parameter in module.parameters()))

    def of_head(self, head: ShardedHead) -> torch.optim.Optimizer:
        """An optimizer of the hashtag head's rows, which for SGD can be those that a step has touched."""
        if self.name != "sgd":
            return self.of_module(head)
        return HeadSGD(head, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over `groups`, at learning rate 0."""
        if not groups:  # everything is frozen; torch refuses to optimise nothing
            groups = [{"params": [torch.zeros(0, requires_grad=True)], "weight_decay": 0.0}]
        if self.name == "sgd":
            # The fused kernel makes no copies; the plain one makes two of every parameter, and a flat partition of ZeRO
            # is a single one.
            return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, nesterov=self.nesterov, fused=True)
        adam = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        return adam(groups, lr=0.0, betas=(self.beta1, self.beta2), eps=self.eps)

    def state_tensor(self, optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> Tensor:
        """A parameter's state tensor of torch's name `key`; the state is made, all zeros, before the first step."""
        state = optimizer.state[parameter]
        for name in self.states:
            # SGD's momentum starts as the first gradient, which is what a buffer of zeros becomes.
            if state.get(name) is None:
                state[name] = torch.zeros_like(parameter)
        if self.name != "sgd" and "step" not in state:
            state["step"] = torch.tensor(0.0)
        found: Tensor = state[key]
        return found

    def set_updates(self, optimizer: torch.optim.Optimizer, updates: int) -> None:
        """Tell an optimizer how many steps it has taken: Adam corrects its bias by it."""
        if self.name != "sgd":
            for state in optimizer.state.values():
                state["step"] = torch.tensor(float(updates))
