"""Normalisation layers that torch has not: BatchNorm that stays as loaded, and BatchNorm synchronised on any device.

Parameters and buffers carry BatchNorm's names, so state dicts interchange with plain BatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from scale_wsl.collectives import all_gather_rows, all_reduce, group_size

__all__ = ["FrozenBatchNorm2d", "SyncBatchNorm2d", "synchronise_batchnorm"]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that stays as it was loaded: always in evaluation mode, statistics never updated, nothing trained.

    Before weights are loaded it does almost nothing: mean 0, variance 1, weight 1, bias 0.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stays in evaluation mode, whatever `mode` asks for."""
        return super().train(False)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks of a group, on any device.

    torch's `nn.SyncBatchNorm` refuses a CPU, and a layer that must not count batches, as in recomputation.

    In training, every rank of the group calls it equally often; images per rank may differ. One all-gather of means and
    variances in the forward pass, one all-reduce of two sums in the backward pass, both in fp32 (float64 in float64).
    """

    group: ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same, normalised by the statistics of the whole group."""
        if not self.training or group_size(self.group) == 1:
            return super().forward(x)
        assert self.num_batches_tracked is None or isinstance(self.num_batches_tracked, Tensor)
        if self.num_batches_tracked is not None:  # None while activations are recomputed
            self.num_batches_tracked.add_(1)
        y: Tensor
        y, mean, unbiased = _SynchronisedBatchNorm.apply(x, self.weight, self.bias, self.eps, self.group)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return y


class _SynchronisedBatchNorm(torch.autograd.Function):
    """Returns `y`, and the group's mean and unbiased variance `[C]`, which are not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = x.to(weight.dtype)
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        own = torch.cat([mean, variance, mean.new_full((1,), x.numel() / x.shape[1])])
        ranks = all_gather_rows(own[None], group)
        means, variances, counts = torch.split(ranks, [len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        # The law of total variance: E[x^2] - mean^2 would cancel where the mean is large.
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.group = eps, group
        unbiased = variance * (total / (total - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, unbiased

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        # As if the statistics were constants ...
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # ... less what flows through them: dx -= weight * scale * (mean(dy) + xhat * mean(dy * xhat)), over the group.
        mean_dy, mean_dy_xhat = all_reduce(torch.stack([dbias, dweight]), ctx.group) / total
        per_channel = (1, -1, 1, 1)
        through_mean = (weight * scale * mean_dy).view(per_channel)
        through_variance = (weight * scale.square() * mean_dy_xhat).view(per_channel)
        correction = (x.to(weight.dtype) - mean.view(per_channel)).mul_(through_variance).add_(through_mean)
        return dx.sub_(correction), dweight, dbias, None, None


def synchronise_batchnorm(module: nn.Module, group: ProcessGroup | None) -> None:
    """Turn every trained BatchNorm of a module into one over the ranks of `group` (None: all), in place.

    Parameters and buffers stay the same objects.
    """
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d
            layer.group = group  # type: ignore[assignment]
