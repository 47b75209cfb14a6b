"""The engine protocol: what every way of sharding the trunk must do, stated once.

The gradient contract, wherever a gradient is computed: the step's gradient is

    (1/L) * d/dw  sum over all ranks and micro-batches of loss_i,     L = labelled images in the global batch.

The trainer divides each rank's summed loss by L; an engine that averages gradients over ranks gets a feature gradient
that is `gradient_divisor` times larger, so that the average is that sum. The hashtag head lives outside every engine;
only its gradient's norm comes in, because gradients are clipped by one norm over trunk and head.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scale_wsl.recipe import setting

__all__ = [
    "Engine",
    "EngineConfig",
    "StepResult",
    "clip_coefficient",
    "decay_groups",
    "scale_gradient",
    "scale_gradients",
    "sgd",
    "square_norm",
]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Section `engine`: how the trunk is sharded and in which precision it computes."""

    name: str = setting("ddp", "how the trunk is sharded over the ranks", choices=("ddp", "deepspeed"))
    ds_config: str = setting(
        "", "DeepSpeed's JSON file, in the working folder or in ds_configs/; --ds_config FILE also sets engine.name"
    )
    precision: str = setting(
        "fp32", "compute type of the trunk; weights, BatchNorm and reductions stay fp32", choices=("fp32", "bf16")
    )
    batchnorm: str = setting(
        "mean",
        "how the ranks' BatchNorm statistics become one before evaluation and saving: their mean, or pooled variances",
        choices=("mean", "pooled"),
    )


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the joint gradient norm before clipping, and whether the weights were updated."""

    gradient_norm: float
    applied: bool


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, whose gradient is `factor` times larger."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: weight decay for matrices and kernels, none for biases, BatchNorm and GroupNorm.

    No decay on normalisation parameters: Goyal et al. 2017, section 5.1, which the paper's recipe follows.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def sgd(module: nn.Module, *, momentum: float, nesterov: bool, weight_decay: float) -> torch.optim.SGD:
    """SGD over `decay_groups`; its learning rate is set before every step."""
    return torch.optim.SGD(decay_groups(module, weight_decay), lr=0.0, momentum=momentum, nesterov=nesterov)


def square_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements, accumulated in float64; NaN and inf carry through."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
    return total


class Engine(abc.ABC):
    """A trunk that is trained over the ranks of the default process group.

    Attributes:
        trunk: the trunk itself, under plain (torchvision) parameter names.
        optimizer: the trunk's SGD.
        gradient_divisor: what the engine divides the sum of the ranks' trunk gradients by.
    """

    trunk: nn.Module
    optimizer: torch.optim.SGD
    gradient_divisor: int

    @abc.abstractmethod
    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward; gradients are final after the `last` one."""

    @abc.abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, D]` of normalised images `[N, 3, H, W]`, in training or evaluation mode."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (this rank's summed loss, divided by L) to trunk and head."""

    @abc.abstractmethod
    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """Clip by the joint norm (`max_norm` 0: do not clip), update the trunk and clear its gradients.

        `head_square_norm` is the float64 squared norm of the whole head's gradient, equal on every rank. Where the
        joint norm is not finite nothing is updated, on no rank.
        """

    @abc.abstractmethod
    def trunk_tensors(self) -> dict[str, Tensor]:
        """Whole parameters and buffers by plain name, fp32 (collective; read only)."""

    @abc.abstractmethod
    def momentum(self) -> dict[str, Tensor]:
        """Whole momentum buffers by plain parameter name, zeros before the first step (collective; read only)."""

    @abc.abstractmethod
    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Take over whole momentum buffers by plain parameter name (collective)."""

    def train(self, mode: bool = True) -> None:
        """Switch the trunk between training and evaluation."""
        self.trunk.train(mode)

    def _step_whole(
        self, update: Callable[[], Any], learning_rate: float, head_square_norm: Tensor, max_norm: float
    ) -> StepResult:
        """`step` for engines in which every rank holds the whole gradient: clip it, then `update`."""
        gradients = [parameter.grad for parameter in self.trunk.parameters() if parameter.grad is not None]
        norm = math.sqrt(float(square_norm(gradients, head_square_norm.device) + head_square_norm))
        applied = math.isfinite(norm)
        if applied:
            scale_gradients(gradients, clip_coefficient(norm, max_norm))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            update()
        return StepResult(norm, applied)


def scale_gradients(gradients: list[Tensor], coefficient: float) -> None:
    """Multiply gradients in place; nothing is touched where there is nothing to clip."""
    if coefficient < 1.0 and gradients:
        torch._foreach_mul_(gradients, coefficient)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """The factor that clips gradients of the given norm: 1 where `max_norm` is 0 or not reached.

    The 1e-6 is that of `torch.nn.utils.clip_grad_norm_` and of DeepSpeed, so that all engines clip alike.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
