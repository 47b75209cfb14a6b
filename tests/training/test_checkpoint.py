from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scale_wsl.checkpoint import layout, reader, writer
from scale_wsl.errors import UserError
from scale_wsl.training import state
from scale_wsl.training.resume import CheckpointConfig, resume_from
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
        for of in ("trunk_tensors", "momentum"):
            reference, found = getattr(whole.engine, of)(), getattr(second.engine, of)()
            equal = equal and all(torch.equal(found[tensor], reference[tensor]) for tensor in reference)
        same[name] = equal and torch.equal(second.head.weight, whole.head.weight)
    return same


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_same_engine_on_as_many_ranks_goes_on_bit_for_bit(tmp_path: Path, size: int) -> None:
    for same in run_ranks(_whole_or_in_two_parts, size, tmp_path):
        assert same == dict.fromkeys(parity.ENGINES, True)


def test_it_holds_plain_names_and_no_pickle(written_on_two_ranks: Path) -> None:
    from safetensors import safe_open

    path = layout.newest(written_on_two_ranks / "zero3")
    assert path is not None
    names = set()
    for file in path.iterdir():
        assert file.name in ("meta.json", "tensors")
    for file in (path / "tensors").iterdir():
        assert file.suffix == ".safetensors"
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    assert {"trunk.conv1.weight", "trunk.layer1.1.bn3.bias", "head.weight", "momentum.head.bias"} <= names
    assert {f"momentum.{name}" for name in names if not name.startswith("momentum.")} <= names


# --- the folder ------------------------------------------------------------------------------------------------------


def _meta(step: int) -> layout.Meta:
    return layout.Meta(
        step=step,
        samples=step * 8,
        seed=0,
        vocabulary_hash="v",
        order="o",
        run_id="r",
        engine="ddp",
        world_size=1,
        recipe="",
    )


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def _save_steps(folder: Path, steps: list[int], keep: int) -> None:
    for step in steps:
        writer.save(folder, {"head": {"weight": torch.full((3, 2), float(step))}}, _meta(step), keep=keep)


def test_only_the_newest_are_kept_and_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run_ranks(_save_steps, 1, tmp_path, [1, 2, 10, 10], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    found = layout.newest(tmp_path)
    assert found is not None
    meta = layout.read_meta(found)
    assert dataclasses.replace(meta, files={}) == _meta(10)


@pytest.mark.parametrize("damage", ["cut", "missing", "meta", "format", "type"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(_save_steps, 1, tmp_path, [1, 2], 2)
    newest = tmp_path / "step-00000002"
    tensors = next((newest / "tensors").iterdir())
    content = json.loads((newest / "meta.json").read_text())
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "meta":
        (newest / "meta.json").write_text('{"format": 1, "step":')
    elif damage == "format":
        (newest / "meta.json").write_text(json.dumps(content | {"format": 99}))
    else:
        (newest / "meta.json").write_text(json.dumps(content | {"samples": "many"}))
    assert layout.newest(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002" in caplog.text
    with pytest.raises(UserError, match="step-00000002"):
        resume_from(CheckpointConfig(resume=str(newest)), tmp_path)


def test_what_has_just_been_saved_is_kept_beside_later_steps(tmp_path: Path) -> None:
    run_ranks(_save_steps, 1, tmp_path, [40, 50, 10, 20, 30], 2)
    assert _steps(tmp_path) == [20, 30, 40, 50]
    run_ranks(_save_steps, 1, tmp_path, [60], 1)
    assert _steps(tmp_path) == [60]


def test_leftovers_of_a_run_that_died_while_saving_are_no_checkpoint_and_go_at_the_next_save(tmp_path: Path) -> None:
    run_ranks(_save_steps, 1, tmp_path, [1], 2)
    whole = tmp_path / "step-00000001"
    for name in (".step-00000007.part", ".step-00000002.part", ".step-00000003.old", ".step-00000004.old.old"):
        shutil.copytree(whole, tmp_path / name)
    shutil.copytree(whole, tmp_path / ".step-mine.part")
    whole.rename(tmp_path / ".step-00000001.part")
    assert layout.newest(tmp_path) is None
    run_ranks(_save_steps, 1, tmp_path, [7], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-mine.part", "step-00000007"]


def test_a_step_that_was_being_replaced_when_the_run_died_is_whole(tmp_path: Path) -> None:
    run_ranks(_save_steps, 1, tmp_path, [7], 2)
    replaced = (tmp_path / "step-00000007").rename(tmp_path / "step-00000007.old")
    assert layout.newest(tmp_path) == replaced
    run_ranks(_save_steps, 1, tmp_path, [8], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007.old", "step-00000008"]


def test_an_earlier_run_is_neither_continued_nor_overwritten_unasked(tmp_path: Path) -> None:
    assert resume_from(CheckpointConfig(), tmp_path) is None
    assert resume_from(CheckpointConfig(resume="auto"), tmp_path) is None
    run_ranks(_save_steps, 1, tmp_path, [1], 2)
    with pytest.raises(UserError, match="--resume auto"):
        resume_from(CheckpointConfig(), tmp_path)
    assert resume_from(CheckpointConfig(resume="auto"), tmp_path) == tmp_path / "step-00000001"


def test_only_the_newest_of_the_runs_own_folder_is_gone_on_from_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run_ranks(_save_steps, 1, run, [1, 2, 3], 3)
    run_ranks(_save_steps, 1, other, [9], 3)

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


def test_a_file_list_with_impossible_names_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    run_ranks(_save_steps, 1, tmp_path, [1], 2)
    path = tmp_path / "step-00000001"
    content = json.loads((path / "meta.json").read_text())
    for name in ("a" * 300, "a\0b"):
        (path / "meta.json").write_text(json.dumps(content | {"files": {name: 1}}))
        with pytest.raises(UserError, match="is not whole"):
            layout.read_meta(path)


@pytest.mark.parametrize("every", ["", "often", "5", "1 hour"])
def test_how_often_to_save_is_checked_at_once(every: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.every"):
        CheckpointConfig(every=every)


def _load_other_network(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    try:
        reader.load_tensors(path, {name: torch.empty(shape) for name, shape in shapes.items()})
    except UserError as error:
        return str(error)
    return ""


def test_another_network_is_a_users_mistake(tmp_path: Path) -> None:
    run_ranks(_save_steps, 1, tmp_path, [1], 2)
    path = tmp_path / "step-00000001"
    (wrong_shape,) = run_ranks(_load_other_network, 1, path, {"head.weight": (4, 2)})
    assert "head.weight of shape [3, 2], but this recipe's is [4, 2]" in wrong_shape
    (missing,) = run_ranks(_load_other_network, 1, path, {"trunk.conv1.weight": (4, 2)})
    assert "has no trunk.conv1.weight" in missing


RICH = ("trunk.bn1.weight", "trunk.bn1.running_mean", "head.weight", "head.bias")


def _save_names(folder: Path, names: tuple[str, ...]) -> None:
    writer.save(folder, {name: torch.ones(3) for name in names}, _meta(1), keep=1)


@pytest.mark.parametrize(
    ("loaded", "says"),
    [
        (RICH, []),
        (("trunk.bn1.weight", "head.weight", "head.bias"), ["has trunk.bn1.running_mean", "model section", "recipe"]),
        (("trunk.bn1.weight", "trunk.bn1.running_mean", "head.weight"), ["has head.bias", "head section", "recipe"]),
        (("head.weight", "head.bias"), []),  # the trunk is not asked for
        (("momentum.head.weight", "momentum.head.bias"), []),
        (("momentum.head.weight",), ["has momentum.head.bias", "head section"]),
    ],
)
def test_a_checkpoint_with_more_tensors_is_another_networks(
    tmp_path: Path, loaded: tuple[str, ...], says: list[str]
) -> None:
    stored = (*RICH, *(f"momentum.{name}" for name in RICH if "running" not in name))
    run_ranks(_save_names, 1, tmp_path, stored)
    (sentence,) = run_ranks(_load_other_network, 1, tmp_path / "step-00000001", dict.fromkeys(loaded, (3,)))
    assert bool(sentence) == bool(says)
    for part in says:
        assert part in sentence


def _load_momentum_of(folder: Path, lost: str) -> str:
    trainer = parity.make_trainer("ddp", accumulation=1, clip=0.5, batch=BATCH)
    engine, head, optimizer = trainer.engine, trainer.head, trainer.head_optimizer
    momentum = {name: torch.ones_like(tensor) for name, tensor in engine.momentum().items() if name != lost}
    head_momentum = {name: torch.ones_like(tensor) for name, tensor in head.logical_tensors().items()}
    tensors = {"trunk": engine.trunk_tensors(), "momentum": {"trunk": momentum, "head": head_momentum}}
    path = writer.save(folder, tensors, _meta(1), keep=1)
    try:
        state.load_momentum(path, engine, head, optimizer)
    except UserError as error:
        return str(error)
    assert all(bool((tensor == 1).all()) and tensor.dtype == torch.float32 for tensor in engine.momentum().values())
    return ""


def test_momentum_that_is_missing_is_named(tmp_path: Path) -> None:
    assert run_ranks(_load_momentum_of, 1, tmp_path, "") == [""]
    (sentence,) = run_ranks(_load_momentum_of, 1, tmp_path, "layer1.0.conv2.weight")
    assert "has no momentum.trunk.layer1.0.conv2.weight" in sentence
