"""A run that is killed, or moved to other ranks, ends with what an undisturbed run ends with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.training.launching import TINY, Ranks, losses, newest_tensors

STEPS = 100
SAVED_EVERY = 10


def _arguments(corpus: Path, run: Path, *more: str, steps: int = STEPS) -> list[str]:
    return [
        *TINY,
        f"data.train={corpus}",
        f"data.validation={corpus}",
        f"run.folder={run}",
        f"schedule.length={steps} steps",
        "schedule.evaluate_every=40 steps",
        f"checkpoint.every={SAVED_EVERY} steps",
        "checkpoint.keep=20",
        "tracking.enabled=true",
        f"tracking.uri=sqlite:///{run}/mlflow.db",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["--ds_config", "zero2.json"], ["engine.name=ddp"]], ids=["zero2", "ddp"])
def test_kill_9_at_three_random_steps_changes_no_bit(emoji_corpus: Path, tmp_path: Path, engine: list[str]) -> None:
    batch = ["batch.micro=4", "head.bias=true", "optim.clip=5"]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    whole = Ranks([*engine, *_arguments(emoji_corpus, undisturbed, *batch)], 2, tmp_path / "a")
    assert whole.wait() == [0, 0], whole.output()

    numbers = random.Random(20260101)
    for kill in sorted(numbers.sample(range(SAVED_EVERY + 1, STEPS), 3)):
        ranks = Ranks(
            [*engine, *_arguments(emoji_corpus, disturbed, *batch), "--resume", "auto"], 2, tmp_path / f"k{kill}"
        )
        ranks.wait_for(f"step {kill}/{STEPS}")
        ranks.kill()
    last = Ranks([*engine, *_arguments(emoji_corpus, disturbed, *batch), "--resume", "auto"], 2, tmp_path / "z")
    assert last.wait() == [0, 0], last.output()
    assert "going on from" in last.output()

    expected = losses(undisturbed)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(disturbed) == expected
    tensors, reference = newest_tensors(disturbed), newest_tensors(undisturbed)
    assert tensors.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.slow
def test_another_engine_and_other_world_sizes_go_on_alike(emoji_corpus: Path, tmp_path: Path) -> None:
    def arguments(run: Path, micro: int) -> list[str]:
        # GroupNorm: BatchNorm's statistics are per rank, so they are another network's on another world size.
        more = ["model.norm=group", "model.norm_groups=8", f"batch.micro={micro}", "optim.lr=0.002"]
        return _arguments(emoji_corpus, run, *more, steps=20)

    undisturbed = tmp_path / "undisturbed"
    whole = Ranks(["--ds_config", "zero2.json", *arguments(undisturbed, 6)], 2, tmp_path / "a")
    assert whole.wait() == [0, 0], whole.output()
    middle = undisturbed / "checkpoints" / f"step-{SAVED_EVERY:08d}"
    expected = {step: value for step, (value,) in losses(undisturbed).items() if step > SAVED_EVERY}
    # Weights; momentum is a difference of nearly equal steps, and is compared through what it does to them.
    reference = {key: whole for key, whole in newest_tensors(undisturbed).items() if not key.startswith("momentum.")}
    for name, engine, size, micro in (
        ("ddp on 2", ["engine.name=ddp"], 2, 6),
        ("zero3 on 1", ["--ds_config", "zero3.json"], 1, 12),
        ("zero1 on 3", ["--ds_config", "zero1.json"], 3, 4),
    ):
        run = tmp_path / name.replace(" ", "-")
        ranks = Ranks([*engine, *arguments(run, micro), "--resume", str(middle)], size, run)
        assert ranks.wait() == [0] * size, ranks.output()
        found = {step: value for step, (value,) in losses(run).items()}
        assert found == pytest.approx(expected, rel=1e-5), name
        tensors = newest_tensors(run)
        for key, whole in reference.items():
            assert (tensors[key] - whole).norm() <= 1e-5 * whole.norm(), f"{name}: {key}"
