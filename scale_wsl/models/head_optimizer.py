"""Momentum SGD for the head's rows: all of them, or, where the loss is sampled, only those that a step touched.

Must never change a row, or its momentum, that a sampled step did not touch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scale_wsl.errors import UserError
from scale_wsl.models.head import ShardedHead

__all__ = ["HeadSGD", "check_optimizer", "update_rows"]

_ROWS_AT_ONCE = 4096  # of a sparse update, which needs a few copies of the rows it works on


class HeadSGD(torch.optim.SGD):
    """`torch.optim.SGD` over a head; weight decay on the weight alone, none on the bias (Goyal et al. 2017, 5.1).

    Dense gradients take PyTorch's fused kernel, which needs no memory beside weight, gradient and momentum. Sparse
    ones, which the sampled softmax makes, take `update_rows`. State is PyTorch's own, `momentum_buffer` of the weight's
    whole shape, in both cases.

    Its `step` must come after `head.sync_gradients()`; `zero_grad` keeps the weight gradient's memory for the next
    step.

    Args:
        head: whose rows of this rank are updated, on its final device.
        momentum: factor of the momentum.
        nesterov: whether the step looks ahead by one momentum.
        weight_decay: of the weight.
        lr: learning rate; loops set `param_groups[i]["lr"]` before every step.
    """

    def __init__(
        self, head: ShardedHead, *, momentum: float, nesterov: bool, weight_decay: float, lr: float = 0.0
    ) -> None:
        groups: list[dict[str, Any]] = [{"params": [head.weight], "weight_decay": weight_decay}]
        if head.bias is not None:
            groups.append({"params": [head.bias], "weight_decay": 0.0})
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        self._head = head

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every row that has a gradient.

        Raises:
            ValueError: a closure is given, which this optimizer does not call.
        """
        if closure is not None:
            raise ValueError("HeadSGD takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.grad.is_sparse:
                    continue
                state = self.state[parameter]
                if group["momentum"] and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                gradient, parameter.grad = parameter.grad.coalesce(), None
                update_rows(
                    parameter,
                    state.get("momentum_buffer"),
                    gradient.indices()[0],
                    gradient.values(),
                    lr=float(group["lr"]),
                    momentum=group["momentum"],
                    nesterov=group["nesterov"],
                    weight_decay=group["weight_decay"],
                )
        super().step()  # the dense ones

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; see `ShardedHead.zero_grad`."""
        self._head.zero_grad(set_to_none)


@torch.no_grad()
def update_rows(
    parameter: Tensor,
    buffer: Tensor | None,
    rows: Tensor,
    values: Tensor,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """One step of `torch.optim.SGD`'s rule on some rows; no other row's weight or momentum changes by one bit.

    So momentum is lazy: a row's momentum and weight decay once for every step that touches the row, not for the steps
    in between, and a row that is touched in every step is updated as by `torch.optim.SGD`. (A dense update would move
    every row in every step, by what is left of its momentum and by weight decay.)

    Args:
        parameter: `[v, ...]`, updated in place.
        buffer: its momentum, `[v, ...]`, updated in place, zero where a row was never touched; None without momentum.
        rows: int64 `[s]`, distinct.
        values: `[s, ...]`, the gradient of these rows; left as it is.
        lr: learning rate.
        momentum: factor of the momentum.
        nesterov: whether to look ahead.
        weight_decay: times the weight, added to the gradient.
    """
    for some, gradient in zip(torch.split(rows, _ROWS_AT_ONCE), torch.split(values, _ROWS_AT_ONCE), strict=True):
        weight = parameter[some]
        step = gradient.add(weight, alpha=weight_decay)
        if buffer is not None and momentum:
            moving = buffer[some].mul_(momentum).add_(step)
            buffer.index_copy_(0, some, moving)
            step = step.add_(moving, alpha=momentum) if nesterov else moving
        parameter.index_copy_(0, some, weight.add_(step, alpha=-lr))


def check_optimizer(sampled: int, optimizer: str) -> None:
    """Refuse a sampled loss whose optimizer would move the rows that a step does not touch.

    Raises:
        UserError: `sampled` classes with another optimizer than SGD (`HeadSGD`).
    """
    if sampled and optimizer != "sgd":
        raise UserError(
            f"head.sampled is {sampled}, but optim.name is {optimizer}: sampled rows can be updated by SGD only; set "
            "head.sampled=0 or optim.name=sgd"
        )
