from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from scale_wsl.training.batchnorm import combine_statistics
from tests.ranks import run_ranks

ROWS = 64


def _statistics(rule: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Each rank sees its own part of one batch once, so that the running statistics are the part's (momentum 1)."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=1.0), nn.GroupNorm(1, 3), nn.BatchNorm1d(3))
    module[0].weight.data.copy_(torch.eye(3))
    module[0].bias.data.zero_()
    rows = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5
    module(rows.chunk(dist.get_world_size())[dist.get_rank()])
    combine_statistics(module, rule)
    norm = module[1]
    return norm.running_mean, norm.running_var, int(norm.num_batches_tracked)


def test_all_ranks_get_the_mean_of_their_statistics() -> None:
    rows = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5
    halves = rows.chunk(2)
    for mean, variance, batches in run_ranks(_statistics, 2, "mean"):
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(variance, sum(half.var(0) for half in halves) / 2)
        assert batches == 1


def test_pooled_statistics_are_those_of_all_rows_together() -> None:
    rows = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5
    # Within ranks unbiased, between ranks the ranks' means around their mean: the law of total variance.
    halves = rows.chunk(2)
    expected = sum(half.var(0) for half in halves) / 2 + torch.stack([half.mean(0) for half in halves]).var(
        0, correction=0
    )
    results = run_ranks(_statistics, 2, "pooled")
    for mean, variance, _ in results:
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(variance, expected)
    assert torch.equal(results[0][1], results[1][1])


def test_one_rank_keeps_its_own() -> None:
    (mean, _, _), *_ = run_ranks(_statistics, 1, "pooled")
    rows = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5
    torch.testing.assert_close(mean, rows.mean(0))
