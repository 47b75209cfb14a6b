"""Every engine, on any number of ranks and with accumulation, is the same training as one float64 process."""

from __future__ import annotations

import functools

import pytest

from tests.engines import parity
from tests.ranks import run_ranks

STEPS = 20


@functools.cache
def reference(clip: float) -> list[float]:
    import torch

    torch.set_num_threads(1)
    return parity.reference_losses(STEPS, clip)


def _losses_of_all_engines(clip: float) -> dict[tuple[str, int], list[float]]:
    return {
        (name, accumulation): parity.take_steps(parity.make_trainer(name, accumulation=accumulation, clip=clip), STEPS)
        for name in parity.ENGINES
        for accumulation in (1, 4)
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_equal_the_float64_process(size: int) -> None:
    clip = 1.0
    for (name, accumulation), losses in run_ranks(_losses_of_all_engines, size, clip, timeout=600)[0].items():
        assert losses == pytest.approx(reference(clip), rel=1e-5), f"{name}, accumulation {accumulation}"
