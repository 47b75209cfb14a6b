"""The tensors of a run - trunk, head and their momentum - under the logical checkpoint's names.

What each engine keeps in its own way goes out and comes in whole, or by global row; nothing here knows which engine.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_wsl.engines.base import Engine
from scale_wsl.models.head import ShardedHead
from scale_wsl.shards import FlatShard
from scale_wsl.training import checkpoint

__all__ = ["load_momentum", "load_weights", "save"]


def _whole(shard: FlatShard) -> Tensor:
    whole = torch.zeros(shard.shape.numel(), dtype=shard.local.dtype)
    if shard.copy == 0:
        whole[shard.start : shard.stop] = shard.local
    if dist.get_world_size() > 1:
        dist.all_reduce(whole)
    return whole.view(shard.shape)


class _Tensors:
    """Whole tensors, as a source."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        return self.tensors[name].flatten()[start:stop]


def save(
    folder: Path,
    engine: Engine,
    head: ShardedHead,
    head_optimizer: torch.optim.Optimizer,
    meta: checkpoint.Meta,
    *,
    keep: int,
) -> Path:
    """Publish a checkpoint of everything (collective); BatchNorm statistics must have been combined over the ranks."""
    state = {name.removeprefix("momentum."): _whole(shard) for name, shard in engine.optimizer_state()}
    tensors = {
        "trunk": {name: _whole(shard) for name, shard in engine.weights()},
        "head": head.logical_tensors(),
        "momentum": {"trunk": state, "head": _head_momentum(head, head_optimizer)},
    }
    return checkpoint.save(folder, tensors, meta, keep=keep)


def load_weights(path: Path, trunk: nn.Module, head: ShardedHead) -> _Tensors:
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in trunk.state_dict().items()}
    checkpoint.load_tensors(path, {"trunk": tensors, "head": head.logical_tensors()})
    return _Tensors(tensors)


def load_momentum(path: Path, engine: Engine, head: ShardedHead, head_optimizer: torch.optim.Optimizer) -> None:
    trunk = {name: torch.empty(shape) for name, shape in engine.shapes.items()}
    momentum = {"trunk": trunk, "head": _head_momentum(head, head_optimizer)}
    checkpoint.load_tensors(path, {"momentum": momentum})
    engine.load_optimizer_state(_Tensors({f"momentum.{name}": tensor for name, tensor in trunk.items()}), "", 0)


def _head_momentum(head: ShardedHead, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The head's momentum by global row, sharing memory with the optimizer's; zeros before the first step."""
    momentum = {}
    for name, parameter in head.named_parameters():
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum[name] = head.global_view(state["momentum_buffer"])
    return momentum
