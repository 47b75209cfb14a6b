"""The tensors of a run - trunk, head and their optimizers' state - as shards under the checkpoint's names, and back.

What each engine keeps in its own way goes out and comes in as flat ranges; nothing here knows which engine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.engines.base import Engine
from scale_wsl.errors import UserError
from scale_wsl.models.head import ShardedHead
from scale_wsl.shards import FlatShard, Source

__all__ = ["fill_head", "load_head", "load_optimizer_state", "shards", "weights_of"]

_TRUNK, _HEAD = "trunk.", "head."


def shards(engine: Engine, head: ShardedHead, head_optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, FlatShard]]:
    """All that a checkpoint holds (collective); BatchNorm statistics must have been combined over the ranks."""
    for name, shard in engine.weights():
        yield _TRUNK + name, shard
    for name, shard in engine.optimizer_state():
        state, _, parameter = name.partition(".")
        yield f"{state}.{_TRUNK}{parameter}", shard
    yield from _head_weights(head)
    yield from _head_state(engine, head, head_optimizer)


class _Trunk:
    """The trunk's part of a checkpoint, under plain names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        return self.checkpoint.read(_TRUNK + name, shape, start, stop)


def weights_of(checkpoint: Checkpoint, trunk: nn.Module) -> Source:
    """The source of a trunk's weights and buffers in a checkpoint, for the engine that gives it memory.

    Raises:
        UserError: they are not those of this trunk, which may be on the meta device.
    """
    checkpoint.check({_TRUNK + name: tensor.shape for name, tensor in trunk.state_dict().items()})
    return _Trunk(checkpoint)


def load_head(checkpoint: Checkpoint, head: ShardedHead) -> None:
    """Fill the head's rows from a checkpoint.

    Raises:
        UserError: it is another head's.
    """
    checkpoint.load(dict(_head_weights(head)))


def fill_head(source: Source, head: ShardedHead) -> None:
    """Fill the head's rows from a source of any kind, of this head's vocabulary."""
    for name, shard in _head_weights(head):
        shard.fill(name, source)


def load_optimizer_state(
    checkpoint: Checkpoint, engine: Engine, head: ShardedHead, head_optimizer: torch.optim.Optimizer
) -> None:
    """Fill the optimizers' state of trunk and head from a checkpoint (collective).

    Raises:
        UserError: it is another optimizer's, or another network's.
    """
    stored = {name.partition(".")[0] for name in checkpoint.tensors} - {_TRUNK[:-1], _HEAD[:-1]}
    wanted = set(engine.settings.states.values())
    if stored != wanted:
        raise UserError(
            f"{checkpoint.path} has the state of another optimizer ({', '.join(sorted(stored)) or 'none'}) than this "
            f"recipe's ({', '.join(sorted(wanted)) or 'none'}): set optim.name and optim.momentum as in its meta.json"
        )
    names = {f"{state}.{_TRUNK}{name}": shape for state in wanted for name, shape in engine.shapes.items()}
    checkpoint.check(names)
    engine.load_optimizer_state(checkpoint, _TRUNK, checkpoint.meta.updates)
    checkpoint.load(dict(_head_state(engine, head, head_optimizer)))
    engine.settings.set_updates(head_optimizer, checkpoint.meta.updates)


def _head_weights(head: ShardedHead) -> Iterator[tuple[str, FlatShard]]:
    for name, parameter in head.named_parameters():
        yield _HEAD + name, _rows(head, parameter)


def _head_state(engine: Engine, head: ShardedHead, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, FlatShard]]:
    """The head's optimizer state, which is the optimizer's own memory; zeros before the first step."""
    for name, parameter in head.named_parameters():
        for key, state in engine.settings.states.items():
            yield f"{state}.{_HEAD}{name}", _rows(head, engine.settings.state_tensor(optimizer, parameter, key))


def _rows(head: ShardedHead, local: Tensor) -> FlatShard:
    """A tensor of the head's own rows (a parameter, its momentum) as a range of all rows."""
    row = local.shape[1:].numel()
    shape = torch.Size([head.vocabulary_size, *local.shape[1:]])
    copies, copy = head.replica_count, 0 if head.replicas is None else dist.get_rank(head.replicas)
    return FlatShard(local.detach().view(-1), shape, head.rows.start * row, copies, copy, lasting=True)
