"""The one adapter over torch.distributed's collectives: rows in, rows out, on every PyTorch version that we support.

Every function does nothing where there is nobody to talk to (torch.distributed is not initialised, or the group has one
rank), so callers need no special case for one process. Must never create a process group or keep one in a global.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = [
    "Pending",
    "all_gather_rows",
    "all_reduce",
    "exchange_rows",
    "group_rank",
    "group_size",
    "start_all_gather_rows",
    "start_reduce_scatter_rows",
]

# PyTorch 2.14 deprecates the names on the right for those on the left, which 2.9 does not have yet.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Pending:
    """A tensor that a collective is still filling (or, where `work` is None, has filled)."""

    tensor: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The tensor, filled; on a GPU its consumers are queued behind the collective and the host does not wait."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def group_size(group: ProcessGroup | None = None) -> int:
    """Ranks in `group` (None: the default group); 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: ProcessGroup | None = None) -> int:
    """This rank's place in `group` (None: the default group); 0 where torch.distributed is not initialised."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def start_all_gather_rows(rows: Tensor, group: ProcessGroup | None = None) -> Pending:
    """Begin to gather `[n, ...]` of each of g ranks as `[g*n, ...]` in rank order; n must be the same on all ranks."""
    size = group_size(group)
    if size == 1:
        return Pending(rows)
    gathered = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    return Pending(gathered, _all_gather(gathered, rows.contiguous(), group=group, async_op=True))


def all_gather_rows(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """`[n, ...]` of each of g ranks as `[g*n, ...]` in rank order; on one rank `rows` itself."""
    return start_all_gather_rows(rows, group).wait()


def start_reduce_scatter_rows(rows: Tensor, group: ProcessGroup | None = None, *, overwrite: bool = False) -> Pending:
    """Begin to sum `[g*n, ...]` over the g ranks, each rank receiving its own `[n, ...]`.

    With `overwrite`, `rows` may be changed, and what comes back may be a part of it: on a CPU, gloo adds up all rows on
    every rank anyway, and makes a copy of them to do so.
    """
    size = group_size(group)
    if size == 1:
        return Pending(rows)
    if overwrite and rows.device.type == "cpu":
        own = rows.view(size, -1, *rows.shape[1:])[group_rank(group)]
        return Pending(own, dist.all_reduce(rows, group=group, async_op=True))
    own = rows.new_empty(rows.shape[0] // size, *rows.shape[1:])
    return Pending(own, _reduce_scatter(own, rows.contiguous(), group=group, async_op=True))


def exchange_rows(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """`[g*n, ...]`, block r of which goes to rank r; returns the blocks `[g*n, ...]` that came, in rank order."""
    if group_size(group) == 1:
        return rows
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, rows.contiguous(), group=group)
    return received


def all_reduce(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the group in place, and return it; gradients do not flow through."""
    if group_size(group) > 1 and tensor.numel() > 0:
        with torch.no_grad():
            dist.all_reduce(tensor, group=group)
    return tensor
