"""Every engine's checkpoint goes on under every engine, on other world sizes and in other head groups."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scale_wsl.checkpoint import layout
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.training import state
from scale_wsl.training.loop import Trainer
from scale_wsl.training.schedule import OptimConfig
from tests.engines import grid, parity
from tests.ranks import run_ranks

BEFORE, AFTER = 3, 5
# (ranks, head group) of who saves and of who loads.
MOVES = (((2, 2), (1, 1)), ((2, 1), (4, 2)), ((4, 4), (3, 3)))


def _trainer(name: str, group: int, resume: Path | None = None, optim: OptimConfig | None = None) -> Trainer:
    """With BatchNorm over all ranks: per rank, it would be another network on another number of ranks."""
    return parity.make_trainer(
        name,
        accumulation=1,
        clip=1.0,
        group_size=group,
        batch=grid.BATCH,
        trunk=grid.describe("batch per rank"),
        rate=parity.constant(grid.RATE),
        of_batch={"seed": 16, "side": grid.SIDE},
        settings={"batchnorm_group": 0},
        resume=resume,
        optim=optim,
    )


def _save_each(folder: Path, group: int, optim: OptimConfig | None = None) -> dict[str, list[float]]:
    """Train and save with each engine; the losses of going on without a break."""
    losses = {}
    for name in grid.ENGINES:
        trainer = _trainer(name, group, optim=optim)
        parity.take_steps(trainer, BEFORE)
        trainer.combine_batchnorm("mean")
        parity.save(trainer, folder / name)
        losses[name] = parity.take_steps(trainer, AFTER)
    return losses


def _differing(trainer: Trainer, checkpoint: Checkpoint) -> Iterator[str]:
    """Names of what this rank does not hold as it was saved, bit for bit."""
    held = dict(state.shards(trainer.engine, trainer.head, trainer.head_optimizer))
    if held.keys() != checkpoint.tensors.keys():
        yield from held.keys() ^ checkpoint.tensors.keys()
    for name, shard in held.items():
        saved: Tensor = checkpoint.read(name, shard.shape, shard.start, shard.stop)
        if not torch.equal(saved, shard.local):
            yield name


def _load_each(folder: Path, group: int) -> dict[tuple[str, str], tuple[list[str], list[float]]]:
    """What differs after loading, and the losses of going on; by who saved and who loads."""
    found, groups = {}, parity.Groups()
    for before in grid.ENGINES:
        path = layout.find(folder / before)
        checkpoint = Checkpoint.open(path)
        for after in grid.ENGINES:
            trainer = _trainer(after, group, path)
            differing = list(_differing(trainer, checkpoint))
            found[before, after] = (differing, parity.take_steps(trainer, AFTER))
            del trainer
            groups.release(after)
        gc.collect()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), MOVES, ids=lambda place: "ranks {}, head group {}".format(*place))
def test_every_ordered_pair_of_engines(writer: tuple[int, int], reader: tuple[int, int], tmp_path: Path) -> None:
    """Weights, momentum and BatchNorm statistics bit for bit, and the next five losses to 1e-5."""
    expected = run_ranks(_save_each, writer[0], tmp_path, writer[1], timeout=600)[0]
    ranks = run_ranks(_load_each, reader[0], tmp_path, reader[1], timeout=900)
    for (before, after), (_, losses) in ranks[0].items():
        assert losses == pytest.approx(expected[before], rel=1e-5), f"{before} -> {after}"
    for found in ranks:
        assert {pair: differing for pair, (differing, _) in found.items() if differing} == {}


ADAMW = OptimConfig(name="adamw", weight_decay=0.05)


def _load_adam(folder: Path) -> dict[tuple[str, str], tuple[list[str], list[float]]]:
    """Each engine goes on from the one before it, the first from the last."""
    found = {}
    for before, after in zip((grid.ENGINES[-1], *grid.ENGINES), grid.ENGINES, strict=False):
        path = layout.find(folder / before)
        trainer = _trainer(after, 3, path, ADAMW)
        differing = list(_differing(trainer, Checkpoint.open(path)))
        found[before, after] = (differing, parity.take_steps(trainer, AFTER))
    return found


def test_adam_goes_on_under_another_engine(tmp_path: Path) -> None:
    """Losses to 1e-4: Adam divides by the root of a mean of squares, which enlarges fp32's rounding."""
    expected = run_ranks(_save_each, 2, tmp_path, 2, ADAMW, timeout=300)[0]
    ranks = run_ranks(_load_adam, 3, tmp_path, timeout=300)
    for (before, after), (_, losses) in ranks[0].items():
        assert losses == pytest.approx(expected[before], rel=1e-4), f"{before} -> {after}"
    for found in ranks:
        assert {pair: differing for pair, (differing, _) in found.items() if differing} == {}
