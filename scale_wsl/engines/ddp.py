"""The `ddp` engine: every rank holds the whole trunk, gradients are averaged by DistributedDataParallel."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scale_wsl.engines.base import Engine, StepResult, square_norm
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World
from scale_wsl.models.weights import materialise
from scale_wsl.shards import FlatShard, Source

__all__ = ["DDPEngine"]

# PyTorch 2.14 deprecates the second name for the first, which 2.9 does not have yet.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
_NO_BUFFER_SYNC: dict[str, Any] = {_SYNC_BUFFERS: False}


class DDPEngine(Engine):
    """DistributedDataParallel around the trunk; on one rank, the trunk itself."""

    def __init__(
        self, trunk: nn.Module, source: Source, settings: OptimizerSettings, world: World, config: EngineConfig
    ) -> None:
        super().__init__(trunk, settings, world, precision=config.precision, channels_last=config.channels_last)
        self.gradient_divisor = world.size
        materialise(trunk, source, world.device)
        if config.channels_last:
            # Gradients of 1x1 kernels then name their strides otherwise, for the same place in memory.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", category=UserWarning)
        self.optimizer = settings.of_module(trunk)
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

    def _features(self, images: Tensor, *, training: bool) -> Tensor:
        features: Tensor = (self.wrapped if training else self.trunk)(images)
        return features

    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """See `Engine.step`."""
        gradients = self._whole_gradients()
        square = square_norm(gradients, self.device) + head_square_norm
        result = self._step_if_finite(square, [gradients], self.optimizer.step, learning_rate, max_norm)
        self.optimizer.zero_grad()
        return result

    def weights(self) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.weights`."""
        return self._whole_weights()

    def optimizer_state(self, *, write: bool = False) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.optimizer_state`."""
        return self._whole_state()
