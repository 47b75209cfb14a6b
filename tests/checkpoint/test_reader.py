from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.errors import UserError
from scale_wsl.shards import FlatShard, Source
from tests.checkpoint import states
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def saved_on_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(states.save_steps, 3, folder, [1])
    return folder / "step-00000001"


def test_any_range_of_any_tensor(saved_on_three: Path) -> None:
    source: Source = Checkpoint.open(saved_on_three)
    numbers = random.Random(7)
    for name, tensor in states.tensors(1).items():
        count = tensor.numel()
        for _ in range(30):
            start = numbers.randint(0, count)
            stop = numbers.randint(start, count)
            found = source.read(name, tensor.shape, start, stop)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor.view(-1)[start:stop])
        with pytest.raises(ValueError, match="has no elements"):
            source.read(name, tensor.shape, 0, count + 1)


def test_another_network_is_a_users_mistake(saved_on_three: Path) -> None:
    checkpoint = Checkpoint.open(saved_on_three)
    with pytest.raises(UserError, match=r"head\.weight of shape \[5, 4\], but this recipe's is \[4, 4\]"):
        checkpoint.read("head.weight", (4, 4), 0, 0)
    with pytest.raises(UserError, match=r"has no trunk\.conv2\.weight: .* model section"):
        checkpoint.read("trunk.conv2.weight", (4, 4), 0, 16)


RICH = ("trunk.bn1.weight", "trunk.bn1.running_mean", "head.weight", "head.bias")


def _save_names(folder: Path, names: tuple[str, ...]) -> None:
    with Saver(folder, keep=1) as saver:
        saver.start(((name, FlatShard.whole(torch.ones(3))) for name in names), states.meta(1))


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rich")
    stepped = [name for name in RICH if "running" not in name]
    stored = (*RICH, *(f"momentum.{name}" for name in stepped), *(f"exp_avg.{name}" for name in stepped))
    run_ranks(_save_names, 1, folder, stored)
    return folder / "step-00000001"


@pytest.mark.parametrize(
    ("loaded", "says"),
    [
        (RICH, []),
        (("trunk.bn1.weight", "head.weight", "head.bias"), ["has trunk.bn1.running_mean", "model section", "recipe"]),
        (("trunk.bn1.weight", "trunk.bn1.running_mean", "head.weight"), ["has head.bias", "head section", "recipe"]),
        (("head.weight", "head.bias"), []),  # the trunk is not asked for
        (("momentum.head.weight", "momentum.head.bias"), []),
        (("momentum.head.weight",), ["has momentum.head.bias", "head section"]),
        (("exp_avg.head.weight",), ["has exp_avg.head.bias", "head section"]),
    ],
)
def test_a_checkpoint_with_more_tensors_is_another_networks(
    rich: Path, loaded: tuple[str, ...], says: list[str]
) -> None:
    shards = {name: FlatShard.whole(torch.zeros(3)) for name in loaded}
    if says:
        with pytest.raises(UserError) as caught:
            Checkpoint.open(rich).load(shards)
        for part in says:
            assert part in str(caught.value)
    else:
        Checkpoint.open(rich).load(shards)
        assert all(bool((shard.local == 1).all()) for shard in shards.values())


def test_ranks_check_about_equal_shares_that_are_everything(saved_on_three: Path) -> None:
    checkpoint = Checkpoint.open(saved_on_three)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert total == sum(t.nbytes for t in states.tensors(1).values())
    for size in (1, 2, 3):
        told: list[int] = []
        shares = [checkpoint.verify(rank, size, told.append) for rank in range(size)]
        assert sum(shares) == total == sum(told)
        largest = max(chunk.length * t.itemsize for t in checkpoint.tensors.values() for chunk in t.chunks)
        assert max(shares) <= total / size + largest


def test_other_types_are_converted(saved_on_three: Path) -> None:
    expected = states.tensors(1)["head.weight"]
    for dtype in (torch.float64, torch.bfloat16):
        shard = FlatShard(torch.zeros(7, dtype=dtype), expected.shape, 3)
        Checkpoint.open(saved_on_three).load({"head.weight": shard} | {"head.bias": FlatShard.whole(torch.zeros(5))})
        assert torch.equal(shard.local, expected.view(-1)[3:10].to(dtype))
