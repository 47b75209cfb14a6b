"""One set of BatchNorm statistics out of those that each rank gathered over its own micro-batches (the paper's rule).

Combined before evaluation and before saving, in place on every rank, so that what is evaluated is what is saved, and a
run that goes on is the run that was resumed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["combine_statistics"]


def combine_statistics(module: nn.Module, rule: str) -> None:
    """Give every rank's BatchNorm layers the same running statistics (collective, in place).

    Args:
        module: on each rank, with layers in the same order.
        rule: "mean" averages the ranks' running means and variances; "pooled" adds the variance of the ranks' means to
            the variance (the law of total variance), as if one layer had seen all ranks' images.
    """
    world = dist.get_world_size()
    norms = [
        (layer.running_mean, layer.running_var)
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    found = [(mean, variance) for mean, variance in norms if mean is not None and variance is not None]
    if world == 1 or not found:
        return
    means = torch.cat([mean for mean, _ in found]).double()
    variances = torch.cat([variance for _, variance in found]).double()
    packed = torch.stack([means, variances, means.square()])  # one collective for the whole network
    dist.all_reduce(packed)
    means, variances, squares = packed / world
    if rule == "pooled":
        variances = variances + (squares - means.square()).clamp(min=0)
    sizes = [len(mean) for mean, _ in found]
    with torch.no_grad():
        for (mean, variance), new_mean, new_variance in zip(
            found, means.split(sizes), variances.split(sizes), strict=True
        ):
            mean.copy_(new_mean)
            variance.copy_(new_variance)
