"""Training with a sampled head: it resumes exactly, skips what is not finite, and leaves untouched rows alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from scale_wsl.errors import UserError
from scale_wsl.models.head_optimizer import HeadSGD
from scale_wsl.training.loop import Trainer
from tests.engines import parity
from tests.ranks import run_ranks
from tests.training.launching import TINY, Ranks

_SAMPLED = 4


def _trainer(group_size: int, resume: Path | None = None) -> Trainer:
    trainer = parity.make_trainer("ddp", accumulation=2, clip=1.0, group_size=group_size, resume=resume)
    trainer.head.sampled = _SAMPLED
    return trainer


def _tensors(trainer: Trainer) -> list[torch.Tensor]:
    head = [*trainer.head.parameters()]
    momentum = [trainer.head_optimizer.state[parameter]["momentum_buffer"] for parameter in head]
    trunk = [shard.local for _, shard in trainer.engine.weights()]
    return [tensor.detach().clone() for tensor in [*head, *momentum, *trunk]]


def _resume(folder: Path, group_size: int) -> tuple[bool, list[float], list[float]]:
    undisturbed = _trainer(group_size)
    losses = parity.take_steps(undisturbed, 4)
    first = _trainer(group_size)
    again = parity.take_steps(first, 2)
    path = parity.save(first, folder)
    second = _trainer(group_size, resume=path)
    again += parity.take_steps(second, 2)
    same = all(torch.equal(a, b) for a, b in zip(_tensors(undisturbed), _tensors(second), strict=True))
    return same, losses, again


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_sampled_run_resumes_bit_for_bit(tmp_path: Path, group_size: int) -> None:
    for same, losses, again in run_ranks(_resume, 2, tmp_path, group_size):
        assert same
        assert losses == again
        assert all(math.isfinite(loss) for loss in losses)


def _everything(group_size: int) -> tuple[list[float], list[float]]:
    """Losses with every class drawn, and with the full softmax."""
    sampled, full = _trainer(group_size), parity.make_trainer("ddp", accumulation=2, clip=1.0, group_size=group_size)
    sampled.head.sampled = parity.LABELS
    return parity.take_steps(sampled, 5), parity.take_steps(full, 5)


@pytest.mark.parametrize("group_size", [1, 2])
def test_drawing_everything_is_the_same_training(group_size: int) -> None:
    """Norm, clipping, accumulation, replicas and momentum, all through sparse gradients."""
    for sampled, full in run_ranks(_everything, 2, group_size):
        assert sampled == pytest.approx(full, rel=1e-5)


def _poisoned() -> tuple[bool, int, list[float]]:
    trainer = _trainer(0)
    parity.take_steps(trainer, 2)
    before = _tensors(trainer)
    bias = trainer.head.bias
    assert bias is not None
    kept = bias.detach().clone()
    bias.data.fill_(math.nan)
    parity.take_steps(trainer, 1)
    bias.data.copy_(kept)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, _tensors(trainer), strict=True))
    return unchanged, trainer.interval.skipped, parity.take_steps(trainer, 2)


def test_a_step_that_is_not_finite_is_skipped() -> None:
    for unchanged, skipped, losses in run_ranks(_poisoned, 2):
        assert unchanged
        assert skipped == 1
        assert all(math.isfinite(loss) for loss in losses)


def _refused() -> str:
    trainer = _trainer(0)
    assert isinstance(trainer.head_optimizer, HeadSGD)
    try:
        Trainer(
            engine=trainer.engine,
            head=trainer.head,
            head_optimizer=torch.optim.SGD(trainer.head.parameters(), lr=0.1),
            batches=trainer.batches,
            accumulation=1,
            world=trainer.world,
            optim=trainer.optim,
            learning_rate=trainer.learning_rate,
            max_corrupt=1.0,
            seed=0,
            counter=trainer.counter,
        )
    except UserError as error:
        return str(error)
    return ""


def test_another_optimizer_is_refused() -> None:
    (sentence,) = run_ranks(_refused, 1)
    assert "head.sampled is 4, but optim.name is torch.optim.sgd.SGD" in sentence


def test_a_recipe_can_ask_for_all_of_it(emoji_corpus: Path, tmp_path: Path) -> None:
    """Group size by cost, sampling and smoothing, from the command line to the evaluation's table."""
    settings = ["head.group_size=auto", "head.sampled=20", "head.smoothing=0.1", "schedule.length=6 steps"]
    data = [f"data.train={emoji_corpus}", f"data.validation={emoji_corpus}", f"run.folder={tmp_path / 'run'}"]
    ranks = Ranks([*TINY, *data, "tracking.enabled=false", "batch.micro=4", *settings], 2, tmp_path / "out")
    assert ranks.wait() == [0, 0], ranks.output()
    assert "expected calibration error" in ranks.output()
