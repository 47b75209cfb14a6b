"""The engine protocol: what every way of sharding the trunk must do, stated once.

The gradient contract, wherever a gradient is computed: the step's gradient is

    (1/L) * d/dw  sum over all ranks and micro-batches of loss_i,     L = labelled images in the global batch.

The trainer divides each rank's summed loss by L; an engine that averages gradients over ranks gets a feature gradient
that is `gradient_divisor` times larger, so that the average is that sum. The hashtag head lives outside every engine;
only its gradient's norm comes in, because gradients are clipped by one norm over trunk and head.

A trunk comes on the meta device, and each engine gives it memory for what its ranks hold and values from a `Source`: no
rank holds the whole model unless the engine's nature is that every rank does (ddp, ZeRO-0/1/2).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World
from scale_wsl.shards import FlatShard, Source

__all__ = ["Engine", "StepResult", "clip_coefficient", "scale_gradient", "scale_gradients", "square_norm"]


_PIECE = 1 << 16  # elements


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
    if factor == 1:
        return x
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


def square_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements, float64; NaN and inf carry through.

    Short pieces are summed in the tensors' own type and added up in float64: within 1e-6 at any length, where one
    sum in fp32 is off by 0.7 % at 50M elements on a CPU, and one in float64 takes 20 times as long.
    """
    if device.type == "cpu":  # a GPU's kernel cuts pieces itself
        tensors = [piece for tensor in tensors for piece in torch.split(tensor.detach().reshape(-1), _PIECE)]
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


class Engine(abc.ABC):
    """A trunk that is trained over the ranks of the default process group.

    Attributes:
        trunk: the trunk itself, under plain (torchvision) parameter names.
        optimizer: the trunk's.
        gradient_divisor: what the engine divides the sum of the ranks' trunk gradients by.
        shapes: of the trunk's trained parameters, whole, by plain name, as they were before the engine sharded them.
    """

    trunk: nn.Module
    optimizer: torch.optim.Optimizer
    gradient_divisor: int

    def __init__(
        self, trunk: nn.Module, settings: OptimizerSettings, world: World, *, precision: str, channels_last: bool
    ) -> None:
        self.trunk = trunk
        self.settings = settings
        self.world = world
        self.device = world.device
        self.autocast = precision == "bf16"
        self.channels_last = channels_last
        self.shapes = {name: parameter.shape for name, parameter in trunk.named_parameters() if parameter.requires_grad}

    # --- training ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward; gradients are final after the `last` one."""

    @abc.abstractmethod
    def _features(self, images: Tensor, *, training: bool) -> Tensor:
        """Features `[N, D]` of images on the device; `training`: a backward pass will follow."""

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, D]` of normalised images `[N, 3, H, W]`, in training or evaluation mode."""
        training = self.trunk.training and torch.is_grad_enabled()
        if self.channels_last:  # activations stay so throughout; weights never are (DeepSpeed and FSDP2 refuse them)
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            features = self._features(images, training=training)
        return scale_gradient(features, self.gradient_divisor) if training else features

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (this rank's summed loss, divided by L) to trunk and head."""
        loss.backward()  # type: ignore[no-untyped-call]

    @abc.abstractmethod
    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """Clip by the joint norm (`max_norm` 0: do not clip), update the trunk and clear its gradients.

        `head_square_norm` is the float64 squared norm of the whole head's gradient, equal on every rank. Where the
        joint norm is not finite nothing is updated, on no rank.
        """

    def train(self, mode: bool = True) -> None:
        """Switch the trunk between training and evaluation."""
        self.trunk.train(mode)

    def _step_if_finite(
        self,
        square: Tensor,
        gradients: Iterable[list[Tensor]],
        update: Callable[[], Any],
        learning_rate: float,
        max_norm: float,
    ) -> StepResult:
        """Clip this rank's gradients by a joint norm, given squared and equal on all ranks, and `update`.

        Gradients come in lists of one device each.
        """
        norm = math.sqrt(float(square))
        applied = math.isfinite(norm)
        if applied:
            for one_device in gradients:
                scale_gradients(one_device, clip_coefficient(norm, max_norm))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            update()
        return StepResult(norm, applied)

    def _whole_gradients(self) -> list[Tensor]:
        """Gradients of the trunk's parameters, for engines in which every rank holds them whole."""
        return [parameter.grad for parameter in self.trunk.parameters() if parameter.grad is not None]

    # --- logical state -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def weights(self) -> Iterator[tuple[str, FlatShard]]:
        """This rank's part of every parameter and buffer, by plain name (collective; read only).

        Parameters are the fp32 ones that the optimizer steps. A shard may be valid only until the next one is taken.
        """

    @abc.abstractmethod
    def optimizer_state(self, *, write: bool = False) -> Iterator[tuple[str, FlatShard]]:
        """This rank's part of the optimizer's state, as `<state>.<plain parameter name>`; zeros before the first step.

        Collective. With `write`, what the caller puts into a shard before it takes the next one is loaded.
        """

    def load_optimizer_state(self, source: Source, prefix: str, updates: int) -> None:
        """Take over the state of a run that has taken `updates` steps (collective).

        `prefix` goes between the state's name and the parameter's in the source: `momentum.<prefix>conv1.weight`.
        """
        for name, shard in self.optimizer_state(write=True):
            state, _, parameter = name.partition(".")
            shard.fill(f"{state}.{prefix}{parameter}", source)
        self._set_updates(updates)

    def _set_updates(self, updates: int) -> None:
        self.settings.set_updates(self.optimizer, updates)

    def _copied(self, tensor: Tensor, *, lasting: bool = True) -> FlatShard:
        """A tensor that every rank holds whole."""
        return FlatShard.whole(tensor, self.world.size, self.world.rank, lasting=lasting)

    def _buffers(self) -> Iterator[tuple[str, FlatShard]]:
        """Statistics, which every rank holds whole, and which change with the next forward pass."""
        for name, buffer in self.trunk.named_buffers():
            yield name, self._copied(buffer, lasting=False)

    def _whole_weights(self) -> Iterator[tuple[str, FlatShard]]:
        """`weights` for engines in which every rank holds the whole trunk."""
        for name, parameter in self.trunk.named_parameters():
            yield name, self._copied(parameter)
        yield from self._buffers()

    def _whole_state(self) -> Iterator[tuple[str, FlatShard]]:
        """`optimizer_state` for engines in which every rank holds all of it."""
        for name, parameter in self.trunk.named_parameters():
            if parameter.requires_grad:
                for key, state in self.settings.states.items():
                    tensor = self.settings.state_tensor(self.optimizer, parameter, key)
                    yield f"{state}.{name}", self._copied(tensor)


def scale_gradients(gradients: list[Tensor], coefficient: float) -> None:
    """Multiply gradients in place; nothing is touched where there is nothing to clip."""
    if coefficient < 1.0 and gradients:
        torch._foreach_mul_(gradients, coefficient)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """The factor that clips gradients of the given norm: 1 where `max_norm` is 0 or not reached.

    The 1e-6 is that of `torch.nn.utils.clip_grad_norm_` and of DeepSpeed, so that all engines clip alike.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
