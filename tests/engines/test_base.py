from __future__ import annotations

import math

import pytest
import torch

from scale_wsl.engines.base import clip_coefficient, square_norm

_CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 7], [3_000_000, 1 << 16, (1 << 16) + 1]])
def test_square_norm_is_near_at_any_length(sizes: list[int]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size).abs() + 1.0 for size in sizes]  # a sum of like signs, where fp32 would lose digits
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors)
    assert float(square_norm(tensors, _CPU)) == pytest.approx(expected, rel=1e-6)  # one sum is 2.6e-5 off


def test_square_norm_takes_any_layout_and_type() -> None:
    kernel = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert float(square_norm([kernel], _CPU)) == pytest.approx(float(kernel.square().sum()), rel=1e-6)
    exact = torch.randn(1000, dtype=torch.float64)
    assert float(square_norm([exact], _CPU)) == pytest.approx(float(exact.square().sum()), rel=1e-14)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_carries_through(value: float) -> None:
    tensor = torch.ones(100_000)
    tensor[77_777] = value
    assert not math.isfinite(float(square_norm([torch.ones(3), tensor], _CPU)))


def test_clipping_leaves_small_gradients_alone() -> None:
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(5.0, 0.0) == 1.0
    assert clip_coefficient(5.0, 1.0) == pytest.approx(0.2)
