"""A loss or gradient that is not finite on one rank updates nothing on any rank, and training goes on after it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scale_wsl.errors import UserError
from scale_wsl.loading.loader import Batch
from scale_wsl.training.loop import Trainer
from scale_wsl.training.preemption import Preemption
from tests.engines import parity
from tests.ranks import run_ranks


def _poisoned(batches: Iterator[Batch], steps: set[int]) -> Iterator[Batch]:
    """Images of infinities on the last rank in some steps: BatchNorm's statistics, loss and gradients are NaN there."""
    for step, batch in enumerate(batches):
        if step in steps and dist.get_rank() == dist.get_world_size() - 1:
            yield dataclasses.replace(batch, images=torch.full(batch.images.shape, math.inf))
        else:
            yield batch


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = {f"trunk.{name}": shard.local for name, shard in trainer.engine.weights()}
    tensors |= {name: shard.local for name, shard in trainer.engine.optimizer_state()}
    for name, parameter in trainer.head.named_parameters():
        tensors[f"head.{name}"] = parameter
        buffer = trainer.head_optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.head.{name}"] = buffer
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _skip_and_go_on() -> dict[str, tuple[bool, bool, bool, list[float]]]:
    found = {}
    for name in parity.ENGINES:
        trainer = parity.make_trainer(name, accumulation=1, clip=1.0, norm=nn.BatchNorm2d)
        trainer.batches = _poisoned(trainer.batches, {2})
        parity.take_steps(trainer, 2)
        before = _state(trainer)
        parity.take_steps(trainer, 1)
        after = _state(trainer)
        unchanged = all(torch.equal(before[tensor], after[tensor]) for tensor in before)
        skipped = trainer.interval.skipped == 1 and trainer.counter.step == 3
        losses = parity.take_steps(trainer, 2)
        moved = not torch.equal(before["head.weight"], _state(trainer)["head.weight"]) or not len(trainer.head.rows)
        found[name] = (unchanged, skipped, moved, losses)
    return found


def test_a_poisoned_step_is_skipped_on_every_rank_and_engine() -> None:
    for results in run_ranks(_skip_and_go_on, 2):
        for name, (unchanged, skipped, moved, losses) in results.items():
            assert unchanged, name
            assert skipped, name
            assert moved, name
            assert all(math.isfinite(loss) for loss in losses), name
            assert losses == pytest.approx(results["ddp"][-1], rel=1e-4), name


def _always_poisoned() -> str:
    trainer = parity.make_trainer("zero2", accumulation=1, clip=0.0)
    trainer.optim = dataclasses.replace(trainer.optim, max_skipped=2)
    trainer.batches = _poisoned(trainer.batches, set(range(100)))
    try:
        for _ in range(4):
            trainer.step(Preemption())
    except UserError as error:
        return str(error)
    return ""


def test_a_run_that_never_recovers_stops_with_advice_on_every_rank() -> None:
    for sentence in run_ranks(_always_poisoned, 2):
        assert "3 steps in a row" in sentence
        assert "optim.lr" in sentence
