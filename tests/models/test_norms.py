from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from scale_wsl.models.norms import SyncBatchNorm2d, synchronise_batchnorm
from scale_wsl.models.recompute import statistics_kept
from tests.ranks import run_ranks

_Found = dict[str, NDArray[Any]]  # not tensors, whose memory would go with the rank


def _images(count: int, dtype: torch.dtype) -> torch.Tensor:
    """With a mean far from 0 in one channel, where a variance by E[x^2] - E[x]^2 would cancel."""
    images = torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images[:, 1] += 1000.0
    return images.to(dtype)


def _layer(dtype: torch.dtype) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, -1.0]))
    return layer


def _pass(layer: nn.Module, images: torch.Tensor, upstream: torch.Tensor) -> _Found:
    """Two forward and backward passes; the gradients of the second."""
    layer(images)
    x = images.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad, **dict(layer.named_buffers())}
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {name: tensor.numpy() for name, tensor in found.items()}


def _share(splits: list[int], dtype: torch.dtype, layout: torch.memory_format, group_of: int) -> _Found:
    """This rank's images through a synchronised layer; groups of so many ranks see the same splits of all images."""
    layer = nn.Sequential(_layer(dtype))
    groups = [
        dist.new_group(list(range(first, first + group_of))) for first in range(0, dist.get_world_size(), group_of)
    ]
    synchronise_batchnorm(layer, groups[dist.get_rank() // group_of])
    assert type(layer[0]) is SyncBatchNorm2d
    mine = dist.get_rank() % group_of
    images = _images(sum(splits), dtype).split(splits)[mine].contiguous(memory_format=layout)
    upstream = _upstream(sum(splits), dtype).split(splits)[mine]
    return _pass(layer[0], images, upstream)


def _upstream(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("splits", "ranks"), [([4, 4], 2), ([1, 5], 2), ([2, 3, 1], 3), ([3, 3], 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_ranks_together_are_one_batchnorm_over_all_images(
    splits: list[int], ranks: int, layout: torch.memory_format
) -> None:
    count = sum(splits)
    expected = _pass(_layer(torch.float64), _images(count, torch.float64), _upstream(count, torch.float64))
    found = run_ranks(_share, ranks, splits, torch.float64, layout, len(splits))
    group = found[: len(splits)]
    for name in ("y", "dx"):
        np.testing.assert_allclose(np.concatenate([part[name] for part in group]), expected[name], 1e-9, 1e-9)
    for name in ("dweight", "dbias"):  # each rank's share, as of any parameter: the engine adds them up
        np.testing.assert_allclose(sum(part[name] for part in group), expected[name], 1e-9, 1e-9)
    for part in found:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            np.testing.assert_allclose(part[name], expected[name], 1e-12, 1e-12)


def test_in_fp32_it_is_as_exact_as_batchnorm() -> None:
    exact = _pass(_layer(torch.float64), _images(8, torch.float64), _upstream(8, torch.float64))
    plain = _pass(_layer(torch.float32), _images(8, torch.float32), _upstream(8, torch.float32))
    parts = run_ranks(_share, 2, [4, 4], torch.float32, torch.contiguous_format, 2)
    for name in ("y", "dx"):
        ours = np.concatenate([part[name] for part in parts])
        error, usual = (float(abs(found - exact[name]).max()) for found in (ours, plain[name]))
        assert error <= 3 * usual + 1e-6, name


def _on_one_rank() -> tuple[_Found, _Found]:
    layer = nn.Sequential(_layer(torch.float32))
    synchronise_batchnorm(layer, None)
    images, upstream = _images(4, torch.float32), _upstream(4, torch.float32)
    return _pass(layer[0], images, upstream), _pass(_layer(torch.float32), images, upstream)


def test_alone_it_is_batchnorm_bit_for_bit() -> None:
    ours, plain = run_ranks(_on_one_rank, 1)[0]
    assert all((ours[name] == plain[name]).all() for name in plain)


def _recompute() -> bool:
    layer = nn.Sequential(_layer(torch.float32))
    synchronise_batchnorm(layer, None)
    layer(_images(4, torch.float32))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with statistics_kept(layer):
        layer(_images(4, torch.float32) * 2)
    return all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())


def test_recomputation_leaves_its_statistics_alone() -> None:
    assert run_ranks(_recompute, 2) == [True, True]
