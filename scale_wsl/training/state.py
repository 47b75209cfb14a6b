"""The tensors of a run - trunk, head and their momentum - under the logical checkpoint's names.

What each engine keeps in its own way goes out and comes in whole, or by global row; nothing here knows which engine.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from scale_wsl.checkpoint import reader, writer
from scale_wsl.checkpoint.layout import Meta
from scale_wsl.engines.base import Engine
from scale_wsl.models.head import ShardedHead

__all__ = ["load_momentum", "load_weights", "save"]


def save(
    folder: Path,
    engine: Engine,
    head: ShardedHead,
    head_optimizer: torch.optim.Optimizer,
    meta: Meta,
    *,
    keep: int,
) -> Path:
    """Publish a checkpoint of everything (collective); BatchNorm statistics must have been combined over the ranks."""
    tensors = {
        "trunk": engine.trunk_tensors(),
        "head": head.logical_tensors(),
        "momentum": {"trunk": engine.momentum(), "head": _head_momentum(head, head_optimizer)},
    }
    return writer.save(folder, tensors, meta, keep=keep)


def load_weights(path: Path, trunk: nn.Module, head: ShardedHead) -> None:
    """Fill trunk and head from a checkpoint (collective).

    To be called before an engine wraps the trunk: DeepSpeed makes its own fp32 copies from what it is given.
    """
    reader.load_tensors(path, {"trunk": trunk.state_dict(), "head": head.logical_tensors()})


def load_momentum(path: Path, engine: Engine, head: ShardedHead, head_optimizer: torch.optim.Optimizer) -> None:
    """Fill the momentum of trunk and head from a checkpoint (collective), whose weights have been loaded before.

    Whole shapes are those of the checkpoint's own weights, which `load_weights` has compared with the trunk's; the
    engine may by now have sharded its parameters.
    """
    shapes = reader.shapes(path)
    trunk = {
        name: torch.empty(shapes.get(f"trunk.{name}", ()), dtype=torch.float32, device=parameter.device)
        for name, parameter in engine.trunk.named_parameters()
        if parameter.requires_grad
    }
    momentum = {"trunk": trunk, "head": _head_momentum(head, head_optimizer)}
    reader.load_tensors(path, {"momentum": momentum})
    engine.load_momentum(trunk)


def _head_momentum(head: ShardedHead, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The head's momentum by global row, sharing memory with the optimizer's; zeros before the first step."""
    momentum = {}
    for name, parameter in head.named_parameters():
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum[name] = head.global_view(state["momentum_buffer"])
    return momentum
