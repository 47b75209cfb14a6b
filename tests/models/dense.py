"""The dense reference: k-hot cross-entropy as the formula has it, with an `N x V` target."""

from __future__ import annotations

import torch
from torch import Tensor


def random_targets(images: int, classes: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids `[N, most]` and mass 1/k; k from 0 to `most`, drawn with replacement, so that tags come twice in a row."""
    numbers = torch.Generator().manual_seed(seed)
    k = torch.randint(0, most + 1, (images, 1), generator=numbers)
    k[: most + 1, 0] = torch.arange(most + 1)[:images]  # each k at least once
    ids = torch.randint(0, classes, (images, most), generator=numbers)
    if most > 1 and images > most:
        ids[most, 1] = ids[most, 0]  # and one row with a duplicate for certain
    pads = torch.arange(most) >= k
    return ids.masked_fill(pads, -1), (1 / k.clamp(min=1)).expand(-1, most).masked_fill(pads, 0.0).contiguous()


def dense_loss(features: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over images and each image's share `[N]`."""
    images = torch.arange(len(ids))[:, None].expand_as(ids)
    target = torch.zeros(len(ids), len(weight), dtype=features.dtype)
    target.index_put_((images, ids.clamp(min=0)), mass.to(features.dtype), accumulate=True)
    image_loss = -(target * (features @ weight.t() + bias).log_softmax(1)).sum(1)
    return image_loss.sum(), image_loss


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest number of the reference (at least 0.1: with one class, all are 0)."""
    if theirs.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=0.1))
