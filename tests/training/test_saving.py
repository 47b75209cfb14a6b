"""Saving while training goes on: what is saved, and what happens when it fails, between the trainer's own steps."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from scale_wsl.checkpoint import layout, writer
from scale_wsl.checkpoint import saver as saving
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.errors import UserError
from scale_wsl.shards import FlatShard
from scale_wsl.training import state
from scale_wsl.training.loop import Trainer
from tests.checkpoint import states
from tests.engines import parity
from tests.engines.test_offload import require_disk_io
from tests.ranks import run_ranks
from tests.training import launching


def _shards(trainer: Trainer) -> Iterator[tuple[str, FlatShard]]:
    return state.shards(trainer.engine, trainer.head, trainer.head_optimizer)


def _save_slowly(folder: Path) -> dict[str, dict[str, tuple[int, NDArray[Any]]]]:
    """Save between two steps, with a copy that takes longer than forward and backward; this rank's part of it."""
    in_blocks = saving._in_blocks

    def slowly(pairs: Any) -> Iterator[Any]:
        time.sleep(1)
        yield from in_blocks(pairs)

    saving._in_blocks = slowly
    expected = {}
    for name in ("ddp", "fsdp", "fairscale", "zero2", "zero3"):
        trainer = parity.make_trainer(name, accumulation=1, clip=0.5, batch=12, norm=nn.BatchNorm2d)
        parity.take_steps(trainer, 2)
        trainer.combine_batchnorm("mean")
        expected[name] = {key: (shard.start, shard.local.clone().numpy()) for key, shard in _shards(trainer)}
        with Saver(folder / name, keep=1) as saver:
            trainer.saver = saver
            saver.start(_shards(trainer), states.meta(2))
            parity.take_steps(trainer, 2)
    return expected


def test_the_next_steps_forward_and_update_do_not_reach_what_is_being_saved(tmp_path: Path) -> None:
    for expected in run_ranks(_save_slowly, 2, tmp_path):
        for name, tensors in expected.items():
            stored = states.contents(tmp_path / name / "step-00000002")
            assert any(key.endswith("running_mean") for key in stored)
            for key, (start, mine) in tensors.items():
                part = stored[key].flatten().numpy()[start : start + len(mine)]
                assert np.array_equal(part, mine), f"{name}: {key}"


def _disk_fills_up(folder: Path) -> tuple[str, int]:
    """What stops training, and after how many more steps at most."""
    trainer = parity.make_trainer("ddp", accumulation=1, clip=0.5, batch=12)
    write = writer.write_stream

    def full(*arguments: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    with Saver(folder, keep=2) as saver:
        trainer.saver = saver
        parity.take_steps(trainer, 1)
        saver.start(_shards(trainer), states.meta(1))
        parity.take_steps(trainer, 1)
        saver.wait()
        writer.write_stream = full
        saver.start(_shards(trainer), states.meta(2))
        thread = saver._thread
        assert thread is not None
        thread.join()
        before = trainer.counter.step
        try:
            parity.take_steps(trainer, 1)
        except UserError as error:
            return str(error), trainer.counter.step - before
    return "nothing was raised", -1


def test_a_save_that_fails_is_told_at_the_next_step_by_all_ranks(tmp_path: Path) -> None:
    results = run_ranks(_disk_fills_up, 2, tmp_path)
    assert results == [(f"cannot save {tmp_path}/step-00000002: No space left on device (rank 1)", 0)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def _one_rank_knows_first(folder: Path) -> str:
    """Rank 0 has not heard of the failure when the next step begins, since its own part still runs."""
    trainer = parity.make_trainer("ddp", accumulation=1, clip=0.5, batch=12)
    failure_of = Saver._failure_of

    def later(self: Saver, mine: Any, final: Path) -> Any:
        failure = failure_of(self, mine, final)
        if failure is not None and dist.get_rank() == 0:
            time.sleep(2)
        return failure

    Saver._failure_of = later  # type: ignore[method-assign]
    writer.write_stream = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO)))
    with Saver(folder, keep=2) as saver:
        trainer.saver = saver
        saver.start(_shards(trainer), states.meta(1))
        while dist.get_rank() == 1 and not saver.failed:
            time.sleep(0.01)
        try:
            parity.take_steps(trainer, 1)
        except UserError as error:
            return str(error)
    return "nothing was raised"


def test_ranks_that_hear_of_a_failure_at_different_times_stop_together(tmp_path: Path) -> None:
    sentence = f"cannot save {tmp_path}/step-00000001: Input/output error (rank 0)"
    assert run_ranks(_one_rank_knows_first, 2, tmp_path) == [sentence] * 2


def _save_a_run_on_disk(argv: list[str]) -> tuple[int, str, list[bool]]:
    """The run's exit code and output, and which saves were to go on beside training."""
    from scale_wsl.training.pretrain import main

    asynchronous, start = [], Saver.start

    def recorded(saver: Saver, *arguments: Any) -> None:
        asynchronous.append(saver.asynchronous)
        start(saver, *arguments)

    Saver.start = recorded  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(argv, launching.ROOT / "recipes" / "pretrain" / "emoji.yaml")
    return code, printed.getvalue(), asynchronous


@pytest.mark.slow
def test_what_is_on_disk_is_not_copied_to_memory_to_save_it(emoji_corpus: Path, tmp_path: Path) -> None:
    require_disk_io()
    run = tmp_path / "run"
    argv = [*launching.TINY, "--ds_config", "zero3_nvme.json", f"data.train={emoji_corpus}", "tracking.enabled=false"]
    argv += [f"data.validation={emoji_corpus}", f"run.folder={run}", "batch.micro=4", "schedule.length=2 steps"]
    (code, printed, asynchronous), *_ = run_ranks(_save_a_run_on_disk, 2, argv, process_group=False, timeout=900)
    assert code == 0
    assert "training waits for each checkpoint" in printed
    assert asynchronous == [False]
    assert layout.read_meta(run / "checkpoints" / "step-00000002").step == 2
    assert not (run / "offloaded").exists()
