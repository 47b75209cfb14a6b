from __future__ import annotations

import torch
import torch.distributed as dist

from scale_wsl import collectives
from tests.ranks import run_ranks


def _rows(rank: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(count * 2).view(count, 2) + 100 * rank).to(dtype)


def _everything() -> list[bool]:
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (collectives.group_rank(), collectives.group_size()) == (rank, size)
    correct = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64):
        transposed = _rows(rank, 3, dtype).t().contiguous().t()  # the right numbers in the wrong memory order
        gathered = collectives.all_gather_rows(transposed)
        correct.append(torch.equal(gathered, torch.cat([_rows(other, 3, dtype) for other in range(size)])))
    mine = _rows(rank, 3 * size)
    total = torch.stack([_rows(other, 3 * size) for other in range(size)]).sum(0)
    own = slice(3 * rank, 3 * rank + 3)
    correct.append(torch.equal(collectives.start_reduce_scatter_rows(mine.clone()).wait(), total[own]))
    received = torch.cat([_rows(other, 3 * size)[own] for other in range(size)])
    correct.append(torch.equal(collectives.exchange_rows(mine), received))
    summed = mine.clone()
    correct.append(collectives.all_reduce(summed) is summed and torch.equal(summed, total))
    correct.append(collectives.all_gather_rows(torch.empty(0, 3)).shape == (0, 3))
    pending = collectives.start_all_gather_rows(mine[:1])
    correct.append((pending.work is None) == (size == 1) and pending.wait().shape == (size, 2))
    return correct


def test_rows_come_in_rank_order() -> None:
    for size in (1, 3):
        for correct in run_ranks(_everything, size):
            assert all(correct), correct


def test_without_a_process_group_nothing_is_done() -> None:
    rows = _rows(0, 4)
    assert (collectives.group_rank(), collectives.group_size()) == (0, 1)
    assert collectives.all_gather_rows(rows) is rows
    assert collectives.start_reduce_scatter_rows(rows).wait() is rows
    assert collectives.exchange_rows(rows) is rows
    assert collectives.all_reduce(rows) is rows
