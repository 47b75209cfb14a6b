from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from scale_wsl.engines.world import World, agree, joined_world, same_everywhere
from scale_wsl.errors import UserError
from tests.ranks import run_ranks


def _agree(failing: list[int], same: bool) -> str:
    rank = dist.get_rank()
    world = World(rank, dist.get_world_size(), rank, torch.device("cpu"))
    try:
        with agree(world):
            if rank in failing:
                raise UserError("no such folder" if same else f"no folder on host {rank}")
    except UserError as error:
        return str(error)
    return ""


def test_a_mistake_that_one_rank_sees_stops_all_with_its_sentence() -> None:
    assert run_ranks(_agree, 3, [2], True) == ["rank 2: no such folder"] * 3
    assert run_ranks(_agree, 3, [], True) == [""] * 3
    assert run_ranks(_agree, 3, [0, 1, 2], True) == ["no such folder"] * 3
    assert run_ranks(_agree, 3, [1, 2], False) == ["rank 1: no folder on host 1"] * 3


def _facts(differs: bool) -> str:
    rank = dist.get_rank()
    world = World(rank, dist.get_world_size(), rank, torch.device("cpu"))
    try:
        same_everywhere(world, {"recipe": "r", "checkpoint": f"step {rank if differs else 0}"})
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_would_do_different_things_do_nothing() -> None:
    assert run_ranks(_facts, 2, False) == ["", ""]
    for sentence in run_ranks(_facts, 2, True):
        assert "rank 1 has another checkpoint than rank 0 (step 1 and step 0)" in sentence


def test_without_a_launcher_there_is_one_rank() -> None:
    with joined_world() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_a_launchers_nonsense_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE"), joined_world():
        pass
