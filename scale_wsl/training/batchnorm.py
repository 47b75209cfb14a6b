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
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    ]
    if world == 1 or not norms:
        return
    means = torch.cat([layer.running_mean for layer in norms])
    variances = torch.cat([layer.running_var for layer in norms])
    packed = torch.stack([means.double(), variances.double(), means.double().square()])  # one collective for the whole network
    dist.all_reduce(packed)
    mean, variance, square = packed / world
    if rule == "pooled":
        variance = variance + (square - mean.square()).clamp(min=0)
    sizes = [layer.num_features for layer in norms]
    with torch.no_grad():
        for layer, layer_mean, layer_variance in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
            layer.running_mean.copy_(layer_mean)
            layer.running_var.copy_(layer_variance)
