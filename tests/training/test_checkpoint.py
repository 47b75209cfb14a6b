from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scale_wsl.checkpoint import layout
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.errors import UserError
from scale_wsl.training import state
from scale_wsl.training.resume import CheckpointConfig, resume_from
from tests.checkpoint import states
from tests.engines import parity
from tests.ranks import run_ranks

BEFORE, AFTER = 3, 3
BATCH = 12  # on 1, 2 and 3 ranks
MOVES = {  # who writes -> who reads: each engine on either side, ZeRO stages mixed
    "ddp": ("ddp", "zero1", "zero3"),
    "zero2": ("zero2", "ddp", "zero3"),
    "zero3": ("zero3", "zero1", "zero0"),
}


@functools.cache
def reference() -> list[float]:
    return parity.reference_losses(BEFORE + AFTER, clip=0.5, batch=BATCH)


def _train_and_save(folder: Path, writers: list[str]) -> None:
    for name in writers:
        trainer = parity.make_trainer(name, accumulation=1, clip=0.5, batch=BATCH)
        parity.take_steps(trainer, BEFORE)
        parity.save(trainer, folder / name)


def _resume_and_train(folder: Path) -> dict[tuple[str, str], list[float]]:
    losses = {}
    for before, readers in MOVES.items():
        path = layout.newest(folder / before)
        assert path is not None
        for after in readers:
            trainer = parity.make_trainer(after, accumulation=1, clip=0.5, batch=BATCH, resume=path)
            losses[before, after] = parity.take_steps(trainer, AFTER)
    return losses


@pytest.fixture(scope="module")
def written_on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(_train_and_save, 2, folder, list(MOVES), timeout=600)
    return folder


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_engine_goes_on_from_any_other_at_any_world_size(written_on_two_ranks: Path, size: int) -> None:
    for (before, after), losses in run_ranks(_resume_and_train, size, written_on_two_ranks, timeout=600)[0].items():
        assert losses == pytest.approx(reference()[BEFORE:], rel=1e-5), f"{before} on 2 ranks -> {after} on {size}"


def _whole_or_in_two_parts(folder: Path) -> dict[str, bool]:
    same = {}
    for name in parity.ENGINES:
        whole = parity.make_trainer(name, accumulation=2, clip=0.5, batch=BATCH)
        expected = parity.take_steps(whole, BEFORE + AFTER)[BEFORE:]
        first = parity.make_trainer(name, accumulation=2, clip=0.5, batch=BATCH)
        parity.take_steps(first, BEFORE)
        path = parity.save(first, folder / name)
        second = parity.make_trainer(name, accumulation=2, clip=0.5, batch=BATCH, resume=path)
        equal = parity.take_steps(second, AFTER) == expected
        reference, found = parity.whole_state(whole), parity.whole_state(second)
        equal = equal and all(torch.equal(found[tensor], reference[tensor]) for tensor in reference)
        same[name] = equal and torch.equal(second.head.weight, whole.head.weight)
    return same


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_same_engine_on_as_many_ranks_goes_on_bit_for_bit(tmp_path: Path, size: int) -> None:
    for same in run_ranks(_whole_or_in_two_parts, size, tmp_path):
        assert same == dict.fromkeys(parity.ENGINES, True)


def test_it_holds_plain_names(written_on_two_ranks: Path) -> None:
    names = set(Checkpoint.open(layout.find(written_on_two_ranks / "zero3")).tensors)
    assert {"trunk.conv1.weight", "trunk.layer1.1.bn3.bias", "head.weight", "momentum.head.bias"} <= names
    assert {f"momentum.{name}" for name in names if not name.startswith("momentum.")} <= names


def _skip_some(folder: Path) -> int:
    trainer = parity.make_trainer("ddp", accumulation=1, clip=0.5, batch=BATCH)
    parity.take_steps(trainer, 1)
    with torch.no_grad():
        kept = trainer.head.bias.clone()
        trainer.head.bias.fill_(torch.inf)
    parity.take_steps(trainer, 1)
    with torch.no_grad():
        trainer.head.bias.copy_(kept)
    parity.take_steps(trainer, 1)
    resumed = parity.make_trainer("ddp", accumulation=1, clip=0.5, batch=BATCH, resume=parity.save(trainer, folder))
    return resumed.counter.updates


def test_steps_that_were_skipped_are_no_updates(tmp_path: Path) -> None:
    assert run_ranks(_skip_some, 1, tmp_path) == [2]
    meta = layout.read_meta(layout.find(tmp_path))
    assert (meta.step, meta.updates) == (3, 2)


# --- what a run goes on from -----------------------------------------------------------------------------------------


def test_an_earlier_run_is_neither_continued_nor_overwritten_unasked(tmp_path: Path) -> None:
    assert resume_from(CheckpointConfig(), tmp_path) is None
    assert resume_from(CheckpointConfig(resume="auto"), tmp_path) is None
    run_ranks(states.save_steps, 1, tmp_path, [1], 2)
    with pytest.raises(UserError, match="--resume auto"):
        resume_from(CheckpointConfig(), tmp_path)
    assert resume_from(CheckpointConfig(resume="auto"), tmp_path) == tmp_path / "step-00000001"


def test_only_the_newest_of_the_runs_own_folder_is_gone_on_from_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run_ranks(states.save_steps, 1, run, [1, 2, 3], 3)
    run_ranks(states.save_steps, 1, other, [9], 3)

    def resume(path: Path | str, folder: Path) -> Path | None:
        return resume_from(CheckpointConfig(resume=str(path)), folder)

    elsewhere = other / "step-00000009"
    assert resume(elsewhere, tmp_path / "new") == elsewhere
    for refused in (elsewhere, run / "step-00000002"):
        with pytest.raises(UserError, match=r"run\.folder.*--resume auto.*remove"):
            resume(refused, run)
    newest = run / "step-00000003"
    assert resume(newest, run) == newest
    monkeypatch.chdir(run)
    assert resume("step-00000003", run) == Path("step-00000003")
    (newest / "meta.json").unlink()  # the newest whole one is now the one before
    assert resume(run / "step-00000002", run) == run / "step-00000002"
    for damaged in run.iterdir():
        (damaged / "meta.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        resume("auto", run)
    with pytest.raises(UserError, match="has other checkpoints"):
        resume(elsewhere, run)


@pytest.mark.parametrize("resume", ["", "auto"])
def test_a_folder_that_cannot_be_read_is_a_users_mistake(
    tmp_path: Path, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CheckpointConfig(resume=resume)
    with pytest.raises(UserError, match=r"cannot look for checkpoints in .*: File name too long"):
        resume_from(config, tmp_path / ("a" * 300))
    monkeypatch.setattr(Path, "iterdir", _forbidden)  # permissions would not hold an administrator back
    with pytest.raises(UserError, match=r"cannot look for checkpoints in .*: Permission denied"):
        resume_from(config, tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "nowhere"])
def test_a_checkpoint_that_cannot_be_read_is_a_users_mistake(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a whole checkpoint"):
        resume_from(CheckpointConfig(resume=name), tmp_path)


def _forbidden(path: Path) -> Iterator[Path]:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("every", ["", "often", "5", "1 hour"])
def test_how_often_to_save_is_checked_at_once(every: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.every"):
        CheckpointConfig(every=every)


def _load_momentum_of(folder: Path, lost: str) -> str:
    trainer = parity.make_trainer("ddp", accumulation=1, clip=0.5, batch=BATCH)
    engine, head, optimizer = trainer.engine, trainer.head, trainer.head_optimizer
    made = dict(state.shards(engine, head, optimizer))
    for name in [name for name in made if name.startswith("momentum.")]:
        made[name].local.fill_(1)
    made.pop(f"momentum.trunk.{lost}", None)
    with Saver(folder, keep=1) as saver:
        saver.start(iter(made.items()), states.meta(1))
    try:
        state.load_optimizer_state(Checkpoint.open(folder / "step-00000001"), engine, head, optimizer)
    except UserError as error:
        return str(error)
    momentum = [shard.local for _, shard in engine.optimizer_state()]
    assert all(bool((tensor == 1).all()) and tensor.dtype == torch.float32 for tensor in momentum)
    return ""


def test_momentum_that_is_missing_is_named(tmp_path: Path) -> None:
    assert run_ranks(_load_momentum_of, 1, tmp_path, "") == [""]
    (sentence,) = run_ranks(_load_momentum_of, 1, tmp_path, "layer1.0.conv2.weight")
    assert "has no momentum.trunk.layer1.0.conv2.weight" in sentence
