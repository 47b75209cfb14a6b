from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scale_wsl.checkpoint import writer
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.shards import FlatShard
from tests.checkpoint import states
from tests.ranks import run_ranks


def _save_each_kind(folder: Path, asynchronous: bool) -> None:
    for kind in states.KINDS:
        states.save(folder / kind, 1, kind, asynchronous=asynchronous)


def _load_each_kind(folder: Path) -> dict[tuple[str, str], list[str]]:
    wrong = {}
    for saved in states.KINDS:
        checkpoint = Checkpoint.open(folder / saved / "step-00000001")
        for kind in states.KINDS:
            empty = dict(states.shards(kind, {name: -torch.ones_like(t) for name, t in states.tensors().items()}))
            checkpoint.load(empty)
            expected = dict(states.shards(kind, states.tensors(1)))
            wrong[saved, kind] = states.differing(
                {name: shard.local for name, shard in empty.items()},
                {name: shard.local for name, shard in expected.items()},
            )
    return wrong


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_sharding_is_read_as_any_other_on_any_number_of_ranks(
    tmp_path: Path, size: int, asynchronous: bool
) -> None:
    run_ranks(_save_each_kind, size, tmp_path, asynchronous)
    for kind in states.KINDS:
        path = tmp_path / kind / "step-00000001"
        assert states.differing(states.contents(path), states.tensors(1)) == []
        assert Checkpoint.open(path).verify() > 4_000_000
    for readers in (1, 3):
        for wrong in run_ranks(_load_each_kind, readers, tmp_path):
            assert {key: names for key, names in wrong.items() if names} == {}


def _save_while_weights_change(folder: Path) -> None:
    live = states.tensors(1)
    with Saver(folder, keep=3) as saver:
        for step in (1, 2, 3):
            statistics = torch.full((7,), float(step))
            made = dict(states.shards("mixed", live))
            shards = {
                **made,
                "trunk.bn1.running_var": FlatShard.whole(statistics, dist.get_world_size(), dist.get_rank()),
            }
            saver.start(iter(shards.items()), states.meta(step))
            statistics.fill_(-1)  # as the next forward pass does
            saver.wait_staged()
            live = states.tensors(step + 1)
            for name, shard in states.shards("mixed", live):
                made[name].local.copy_(shard.local)  # as the optimizer does


def test_what_is_saved_is_the_step_that_was_not_what_came_later(tmp_path: Path) -> None:
    run_ranks(_save_while_weights_change, 2, tmp_path)
    for step in (1, 2, 3):
        expected = states.tensors(step) | {"trunk.bn1.running_var": torch.full((7,), float(step))}
        assert states.differing(states.contents(tmp_path / f"step-{step:08d}"), expected) == []


def _passing(memory: torch.Tensor) -> Iterator[tuple[str, FlatShard]]:
    """Tensors made one after another in the same memory, with a collective each."""
    for name, tensor in states.tensors(1).items():
        dist.barrier()
        values = memory[: tensor.numel()]
        values.copy_(tensor.view(-1))
        yield name, FlatShard(values, tensor.shape, 0, dist.get_world_size(), dist.get_rank())
        values.fill_(-1)


def _save_passing(folder: Path, asynchronous: bool) -> None:
    with Saver(folder, keep=1, asynchronous=asynchronous) as saver:
        saver.start(_passing(torch.zeros(2_000_000)), states.meta(1))


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])
def test_shards_that_are_made_one_by_one_are_saved_as_they_pass(tmp_path: Path, asynchronous: bool) -> None:
    run_ranks(_save_passing, 2, tmp_path, asynchronous)
    expected = {name: tensor.float() for name, tensor in states.tensors(1).items()}
    assert states.differing(states.contents(tmp_path / "step-00000001"), expected) == []


def _two_in_a_row(folder: Path) -> list[int]:
    """Steps that were published when the second save was begun."""
    begin, write = threading.Event(), writer.write_pieces

    def waiting(*arguments: object) -> object:
        begin.wait()
        return write(*arguments)  # type: ignore[arg-type]

    import scale_wsl.checkpoint.saver as module

    module.write_pieces = waiting  # type: ignore[assignment]
    with Saver(folder, keep=5) as saver:
        saver.start(states.shards("rows", states.tensors(1)), states.meta(1))
        saver.wait_staged()
        assert not (folder / "step-00000001").exists()  # training goes on while the disk is busy
        threading.Timer(0.2, begin.set).start()
        seen = []

        def shards() -> Iterator[tuple[str, FlatShard]]:
            seen.extend(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
            yield from states.shards("rows", states.tensors(2))

        saver.start(shards(), states.meta(2))
    return seen


def test_one_save_at_most_is_in_flight(tmp_path: Path) -> None:
    for seen in run_ranks(_two_in_a_row, 2, tmp_path):
        assert set(seen) == {1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def _one_rank_holds_less(folder: Path) -> str:
    made = dict(states.shards("rows", states.tensors(1)))
    if dist.get_rank():
        del made["trunk.bn1.weight"]
    with Saver(folder, keep=1) as saver:
        saver.start(iter(made.items()), states.meta(1))
        try:
            saver.wait()
        except RuntimeError as error:
            return str(error)
    return ""


def test_elements_that_nobody_holds_are_a_defect_and_no_checkpoint(tmp_path: Path) -> None:
    sentences = run_ranks(_one_rank_holds_less, 2, tmp_path)
    assert sentences[0] == sentences[1]
    assert "trunk.bn1.weight: 4 of its 7 elements are there" in sentences[0]
    assert list(tmp_path.iterdir()) == []


def _memory(folder: Path) -> list[int]:
    held = []
    with Saver(folder, keep=1) as saver:
        saver.reserve(20 << 20)
        for step in (1, 2):
            states_of = states.shards("rows", states.tensors(step))
            saver.start(states_of, states.meta(step))
            held.append(saver._staging.nbytes)
    return held


def test_host_memory_is_got_once(tmp_path: Path) -> None:
    (held,) = run_ranks(_memory, 1, tmp_path)
    assert held == [24 << 20, 24 << 20]
    assert states.differing(states.contents(tmp_path / "step-00000002"), states.tensors(2)) == []
