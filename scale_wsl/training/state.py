"""The tensors of a run - trunk, head and their momentum - as shards under the checkpoint's names, and back.

What each engine keeps in its own way goes out and comes in whole, or by global row; nothing here knows which engine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.engines.base import Engine
from scale_wsl.models.head import ShardedHead
from scale_wsl.shards import FlatShard

__all__ = ["load_momentum", "load_weights", "shards"]


def shards(engine: Engine, head: ShardedHead, head_optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, FlatShard]]:
    """All that a checkpoint holds (collective); BatchNorm statistics must have been combined over the ranks."""
    size, rank = dist.get_world_size(), dist.get_rank()
    parameters = dict(engine.trunk.named_parameters())
    for name, tensor in engine.trunk_tensors().items():
        # BatchNorm statistics change with the next forward pass.
        yield f"trunk.{name}", FlatShard.whole(tensor, size, rank, lasting=name in parameters)
    for name, tensor in engine.momentum().items():
        yield f"momentum.trunk.{name}", FlatShard.whole(tensor, size, rank, lasting=True)
    for name, parameter in head.named_parameters():
        yield f"head.{name}", _rows(head, parameter)
    for name, momentum in _head_momentum(head, head_optimizer).items():
        yield f"momentum.head.{name}", _rows(head, momentum)


def load_weights(checkpoint: Checkpoint, trunk: nn.Module, head: ShardedHead) -> None:
    """Fill trunk and head from a checkpoint.

    To be called before an engine wraps the trunk: DeepSpeed makes its own fp32 copies from what it is given.
    """
    weights = {f"trunk.{name}": FlatShard.whole(tensor) for name, tensor in trunk.state_dict().items()}
    checkpoint.load(weights | {f"head.{name}": _rows(head, parameter) for name, parameter in head.named_parameters()})


def load_momentum(
    checkpoint: Checkpoint, engine: Engine, head: ShardedHead, head_optimizer: torch.optim.Optimizer
) -> None:
    """Fill the momentum of trunk and head from a checkpoint (collective), whose weights have been loaded before.

    Whole shapes are those of the checkpoint's own weights, which `load_weights` has compared with the trunk's; the
    engine may by now have sharded its parameters.
    """
    trunk = {
        name: torch.empty(_shape(checkpoint, f"trunk.{name}"), dtype=torch.float32, device=parameter.device)
        for name, parameter in engine.trunk.named_parameters()
        if parameter.requires_grad
    }
    checkpoint.load({f"momentum.trunk.{name}": FlatShard.whole(tensor) for name, tensor in trunk.items()})
    rows = _head_momentum(head, head_optimizer)
    checkpoint.load({f"momentum.head.{name}": _rows(head, momentum) for name, momentum in rows.items()})
    engine.load_momentum(trunk)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    stored = checkpoint.tensors.get(name)
    return stored.shape if stored else ()


def _rows(head: ShardedHead, local: Tensor) -> FlatShard:
    """A tensor of the head's own rows (a parameter, its momentum) as a range of all rows."""
    row = local[0].numel() if len(local) else 1
    shape = torch.Size([head.vocabulary_size, *local.shape[1:]])
    copies, copy = head.replica_count, 0 if head.replicas is None else dist.get_rank(head.replicas)
    return FlatShard(local.detach().view(-1), shape, head.rows.start * row, copies, copy, lasting=True)


def _head_momentum(head: ShardedHead, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The head's momentum, which is the optimizer's own memory; zeros before the first step."""
    momentum = {}
    for name, parameter in head.named_parameters():
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum[name] = state["momentum_buffer"]
    return momentum
