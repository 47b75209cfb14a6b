"""Activation checkpointing: parts of a trunk that forget their activations and compute them again in the backward pass.

A second forward pass must leave BatchNorm's running statistics alone, bit for bit. Must never change what is computed.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scale_wsl.errors import UserError

__all__ = ["Recomputable", "Recomputation", "Stage", "recompute", "residual_blocks", "stages", "statistics_kept"]


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Forward passes in this context use a batch's statistics and leave the running ones as they are.

    A momentum of 0 rather than `track_running_stats=False`: the same kernels run and save the same tensors, which
    recomputation requires.
    """
    kept = [
        (layer, layer.momentum, layer.num_batches_tracked)
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        for layer, _, _ in kept:
            layer.momentum = 0.0
            layer.num_batches_tracked = None
        yield
    finally:
        for layer, momentum, count in kept:
            layer.momentum = momentum
            layer.num_batches_tracked = count


class Recomputable(nn.Module, abc.ABC):
    """A part of the trunk that can be recomputed.

    Recomputation happens inside `forward`, so that an engine's hooks around the module see one call of it.

    Attributes:
        recomputed: whether activations inside are computed again in the backward pass instead of being kept.
    """

    recomputed = False

    @abc.abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """What the part does."""

    def forward(self, x: Tensor) -> Tensor:
        """`compute`, with or without its activations kept."""
        if not (self.recomputed and torch.is_grad_enabled()):
            return self.compute(x)
        result: Tensor = checkpoint(
            self.compute,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a trunk draws
            context_fn=lambda: (nullcontext(), statistics_kept(self)),
        )
        return result


class Stage(Recomputable, nn.Sequential):
    """The blocks between two changes of resolution."""

    def compute(self, x: Tensor) -> Tensor:
        """One block after another."""
        y: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]
        return y


@dataclass(frozen=True)
class Recomputation:
    """Which parts are recomputed: `none`, `blocks`, `every N blocks` or `stages`."""

    stages: bool = False
    every: int = 0  # residual blocks: one in so many; 0: none

    @classmethod
    def parse(cls, text: str, key: str) -> Recomputation:
        """Of a recipe's words.

        Raises:
            UserError: other words; names `key`.
        """
        plain = {"none": cls(), "blocks": cls(every=1), "stages": cls(stages=True)}
        if text in plain:
            return plain[text]
        matched = re.fullmatch(r"every ([1-9]\d{0,5}) blocks", text)
        if matched is None:
            raise UserError(f"{key} is {text!r}, but must be none, blocks, stages, or 'every 2 blocks' (or 3, 4, ...)")
        return cls(every=int(matched[1]))


def residual_blocks(trunk: nn.Module) -> Iterator[tuple[str, Recomputable]]:
    """Name and module of every residual block in order: the unit of recomputation and of sharding."""
    for name, module in trunk.named_modules():
        if isinstance(module, Recomputable) and not isinstance(module, Stage):
            yield name, module


def stages(trunk: nn.Module) -> Iterator[tuple[str, Stage]]:
    """Name and module of every stage in order."""
    for name, module in trunk.named_modules():
        if isinstance(module, Stage):
            yield name, module


def recompute(trunk: nn.Module, parts: Recomputation) -> None:
    """Mark the parts of a trunk that are recomputed: of every `parts.every` blocks the first, or whole stages."""
    for number, (_, block) in enumerate(residual_blocks(trunk)):
        block.recomputed = parts.every > 0 and number % parts.every == 0
    for _, stage in stages(trunk):
        stage.recomputed = parts.stages
