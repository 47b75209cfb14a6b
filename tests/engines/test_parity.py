"""Every engine, on any number of ranks and with accumulation, is the same training as one float64 process."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn

from scale_wsl.training.schedule import OptimConfig
from tests.engines import parity
from tests.ranks import run_ranks

STEPS = 20


@functools.cache
def reference(clip: float) -> list[float]:
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


def _unclipped_losses() -> dict[str, list[float]]:
    return {name: parity.take_steps(parity.make_trainer(name, accumulation=1, clip=0.0), 5) for name in parity.ENGINES}


def test_without_clipping_nothing_is_clipped() -> None:
    """DeepSpeed clips at 1.0 unless it is told otherwise, and these gradients are larger."""
    assert reference(0.0)[4] != pytest.approx(reference(1.0)[4], rel=1e-4)
    for name, losses in run_ranks(_unclipped_losses, 2)[0].items():
        assert losses == pytest.approx(reference(0.0)[:5], rel=1e-5), name


def _losses_with_batchnorm_over_two_ranks() -> dict[str, list[float]]:
    settings = {"batchnorm_group": 2}
    return {
        name: parity.take_steps(
            parity.make_trainer(name, accumulation=1, clip=1.0, norm=nn.BatchNorm2d, settings=settings), 3
        )
        for name in parity.ENGINES
    }


def test_batchnorm_over_a_part_of_the_ranks_is_that_of_their_images() -> None:
    expected, of_all = (parity.reference_losses(3, 1.0, norm_parts=parts) for parts in (2, 1))
    assert expected[2] != pytest.approx(of_all[2], rel=1e-4)
    for name, losses in run_ranks(_losses_with_batchnorm_over_two_ranks, 4)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), name


def _losses_with_head_groups() -> list[float]:
    return parity.take_steps(parity.make_trainer("zero2", accumulation=1, clip=1.0, group_size=2), 5)


def test_heads_in_groups_of_two_are_the_same_training() -> None:
    for losses in run_ranks(_losses_with_head_groups, 4):
        assert losses == pytest.approx(reference(1.0)[:5], rel=1e-5)


def _bf16_losses() -> dict[str, tuple[list[float], set[torch.dtype]]]:
    found = {}
    for name in parity.ENGINES:
        trainer = parity.make_trainer(name, accumulation=4, clip=1.0, precision="bf16")
        losses = parity.take_steps(trainer, 5)
        shards = (*trainer.engine.weights(), *trainer.engine.optimizer_state())
        found[name] = (losses, {shard.local.dtype for _, shard in shards})
    return found


def test_bf16_stays_near_fp32_and_keeps_everything_in_fp32() -> None:
    """The bound is what bf16's 8 bits of mantissa leave of a loss after a few layers: 1 %, seen 0.03 %."""
    for name, (losses, dtypes) in run_ranks(_bf16_losses, 2)[0].items():
        assert losses == pytest.approx(reference(1.0)[:5], rel=1e-2), name
        assert losses != pytest.approx(reference(1.0)[:5], rel=1e-7), f"{name} did not compute in bf16"
        assert dtypes == {torch.float32}, name


def _adam_losses(name: str) -> dict[str, list[float]]:
    optim = OptimConfig(name=name, weight_decay=0.05)
    found = {}
    for engine in (*parity.ENGINES, "zero3_offload"):
        trainer = parity.make_trainer(engine, accumulation=2, clip=1.0, optim=optim, rate=parity.constant(0.001))
        found[engine] = parity.take_steps(trainer, 5)
    return found


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_on_every_engine_is_torchs_adam_in_one_float64_process(name: str) -> None:
    expected = parity.reference_losses(5, 1.0, adam=name)
    for engine, losses in run_ranks(_adam_losses, 2, name)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), engine
    assert expected != pytest.approx(reference(1.0)[:5], rel=1e-3)


FROZEN = r"^conv1|^bn1|layer1\.0|conv2"  # a stem and a block, and one kernel amid others that are trained


def _partly_frozen() -> dict[str, tuple[list[float], set[str], set[str]]]:
    """Losses, what is still as it began, and what has momentum."""
    found = {}
    initial = dict(parity.make_trunk().named_parameters())
    for engine in parity.ENGINES:
        trainer = parity.make_trainer(engine, accumulation=2, clip=1.0, trunk=parity.freeze(parity.describe(), FROZEN))
        losses, state = parity.take_steps(trainer, 5), parity.whole_state(trainer)
        found[engine] = (
            losses,
            {name for name, value in initial.items() if torch.equal(state[f"trunk.{name}"], value.detach())},
            {name for name in initial if f"momentum.trunk.{name}" in state},
        )
    return found


def test_frozen_kernels_are_kept_and_the_rest_is_trained() -> None:
    expected = parity.reference_losses(5, 1.0, frozen=FROZEN)
    assert expected[4] != pytest.approx(reference(1.0)[4], rel=1e-4)
    names = {name for name, _ in parity.describe().named_parameters()}
    frozen = {name for name in names if re.search(FROZEN, name)}
    for engine, (losses, kept, momentum) in run_ranks(_partly_frozen, 2)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), engine
        assert kept == frozen, engine
        assert momentum == names - frozen, engine
