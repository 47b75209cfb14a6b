"""The `ddp` engine: every rank holds the whole trunk, gradients are averaged by DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scale_wsl.engines.base import Engine, StepResult, scale_gradient
from scale_wsl.engines.world import World

__all__ = ["DDPEngine"]

# PyTorch 2.14 deprecates the second name for the first, which 2.9 does not have yet.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
_NO_BUFFER_SYNC: dict[str, Any] = {_SYNC_BUFFERS: False}


class DDPEngine(Engine):
    """DistributedDataParallel around the trunk; on one rank, the trunk itself."""

    def __init__(self, trunk: nn.Module, optimizer: torch.optim.SGD, world: World, precision: str) -> None:
        self.trunk = trunk
        self.optimizer = optimizer
        self.gradient_divisor = world.size
        self.device = world.device
        self.autocast = precision == "bf16"
        # Buffers are BatchNorm statistics: per rank while training, combined by the trainer's stated rule.
        self.wrapped: nn.Module = (
            DistributedDataParallel(
                trunk,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_NO_BUFFER_SYNC,
            )
            if world.size > 1 and any(parameter.requires_grad for parameter in trunk.parameters())
            else trunk
        )

        if isinstance(self.wrapped, DistributedDataParallel):
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Let DDP put its buckets in order before the first step instead of after it (collective).

        DDP sorts gradients into other buckets after its first backward pass. From three ranks on, an element's place in
        its bucket decides in which order ranks are added up, so the first step of a resumed run would differ in the
        last bit from the same step of a run that was not interrupted.
        """
        self.trunk.eval()  # leaves BatchNorm's statistics alone
        self.wrapped(torch.zeros(1, 3, 64, 64, device=self.device)).sum().backward()
        self.optimizer.zero_grad()
        self.trunk.train()

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients stay on their rank until the last micro-batch of a step."""
        wrapped = self.wrapped
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
            yield

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, D]`; see `Engine.forward`."""
        training = self.trunk.training and torch.is_grad_enabled()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            features: Tensor = (self.wrapped if training else self.trunk)(images)
        return scale_gradient(features, self.gradient_divisor) if training else features

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """See `Engine.step`."""
        result = self._step_whole(self.optimizer.step, learning_rate, head_square_norm, max_norm)
        self.optimizer.zero_grad()
        return result

    def trunk_tensors(self) -> dict[str, Tensor]:
        """See `Engine.trunk_tensors`."""
        return dict(self.trunk.state_dict())

    def momentum(self) -> dict[str, Tensor]:
        """See `Engine.momentum`."""
        buffers = {}
        for name, parameter in self.trunk.named_parameters():
            if parameter.requires_grad:
                buffer = self.optimizer.state[parameter].get("momentum_buffer")
                buffers[name] = torch.zeros_like(parameter) if buffer is None else buffer
        return buffers

    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        """See `Engine.load_momentum`."""
        for name, parameter in self.trunk.named_parameters():
            if parameter.requires_grad:
                self.optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter, copy=True)
