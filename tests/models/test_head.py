from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scale_wsl.errors import UserError
from scale_wsl.models.head import HeadConfig, ShardedHead, head_mesh, initial_rows
from scale_wsl.models.head_optimizer import HeadSGD
from scale_wsl.models.sharded_softmax import shard_rows
from tests.models.dense import dense_loss, random_targets, relative_error
from tests.ranks import run_ranks

_D, _B, _K = 6, 7, 5  # features, images per rank, most tags of an image
_VOCABULARIES = (1, 3, 17, 1001)
_BOUNDS = (1e-12, 2e-5, 0.06)  # relative errors in float64, fp32, bf16 (whose logits near 10 are off by up to 0.03)


@dataclass(frozen=True)
class _Dense:
    """One process that holds everything: all ranks' images, all rows."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor
    mass: Tensor

    @classmethod
    def draw(cls, classes: int, images: int) -> _Dense:
        numbers = torch.Generator().manual_seed(classes)
        shapes = [(images, _D), (classes, _D), (classes,)]
        drawn = [torch.randn(shape, dtype=torch.float64, generator=numbers).requires_grad_() for shape in shapes]
        return cls(*drawn, *random_targets(images, classes, _K, seed=classes))


def _head(full: _Dense, dtype: torch.dtype, group_size: int = 0, chunk_rows: int = 0) -> ShardedHead:
    head = ShardedHead(len(full.weight), _D, mesh=head_mesh(group_size), dtype=dtype, chunk_rows=chunk_rows)
    with torch.no_grad():
        head.weight.copy_(full.weight[head.rows.start : head.rows.stop])
        head.bias.copy_(full.bias[head.rows.start : head.rows.stop])
    return head


def _errors(classes: int, dtype: torch.dtype, group_size: int, chunk_rows: int) -> dict[str, float]:
    """Relative errors of this rank's losses, gradients and predictions against the dense reference's."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    full = _Dense.draw(classes, world * _B)
    total, image_loss = dense_loss(full.features, full.weight, full.bias, full.ids, full.mass)
    (total * 0.37).backward()  # type: ignore[no-untyped-call]

    head = _head(full, dtype, group_size, chunk_rows)
    mine = slice(rank * _B, (rank + 1) * _B)
    held = slice(head.rows.start, head.rows.stop)
    ids, mass = full.ids[mine], full.mass[mine]
    unlabelled = mass.sum(1) == 0
    features = full.features.detach()[mine].to(dtype).requires_grad_()
    for half in (slice(0, 3), slice(3, _B)):  # two micro-batches, of which gradients are the sum
        output = head.loss(features[half], ids[half], mass[half])
        (output.loss * 0.37).backward()
    head.sync_gradients()

    with torch.no_grad():
        evaluated = head.loss(features, ids, mass)
        logits = full.features @ full.weight.t() + full.bias
        expected = logits.log_softmax(1)
    assert features.grad is not None
    assert bool((features.grad[unlabelled] == 0).all())
    assert bool((evaluated.row_loss[unlabelled] == 0).all())
    assert evaluated.loss.grad_fn is None
    everybody = evaluated.loss.double()
    if dist.is_initialized():
        dist.all_reduce(everybody)
    group = head.group_size
    of_group = slice(rank // group * group * _B, (rank // group + 1) * group * _B)
    errors = {
        "total": relative_error(everybody, total),
        "row_loss": relative_error(evaluated.row_loss, image_loss[mine]),
        "features": relative_error(features.grad, full.features.grad[mine]),
        "weight": relative_error(head.weight.grad, full.weight.grad[held]),
        "bias": relative_error(head.bias.grad, full.bias.grad[held]),
        "log_probabilities": relative_error(head.local_log_probabilities(features), expected[of_group, held]),
    }
    entries = expected.exp()[mine].gather(1, ids.clamp(min=0))
    assert evaluated.target_probability is not None
    errors["target_probability"] = relative_error(
        evaluated.target_probability, entries.masked_fill(mass == 0, 0.0).sum(1)
    )
    for k in (1, 5):
        values, places = head.top_k(features, k)
        best, best_places = expected[mine].topk(min(k, classes))
        errors[f"top_{k}"] = relative_error(values, best)
        assert torch.equal(places, best_places) or dtype != torch.float64
    return errors


def _worst(dtype: torch.dtype, group_size: int, chunks: tuple[int, ...]) -> float:
    cases = [(classes, chunk) for classes in _VOCABULARIES for chunk in chunks]
    return max(max(_errors(classes, dtype, group_size, chunk).values()) for classes, chunk in cases)


def _all_types(group_size: int) -> list[float]:
    types = (torch.float64, torch.float32, torch.bfloat16)
    return [_worst(dtype, group_size, (0, 4) if dtype != torch.float64 else (0, 1, 4)) for dtype in types]


@pytest.mark.parametrize(("world", "group_size"), [(1, 0), (2, 0), (3, 0), (4, 0), (4, 2), (2, 1)])
def test_equals_one_dense_process(world: int, group_size: int) -> None:
    """Uneven and empty shards (V of 1, 3, 17 and 1,001), k from 0 to 5 with duplicates, any chunk, replicas too."""
    for errors in run_ranks(_all_types, world, group_size):
        assert all(error < bound for error, bound in zip(errors, _BOUNDS, strict=True)), errors


def test_equals_one_dense_process_without_a_process_group() -> None:
    errors = _all_types(0)
    assert all(error < bound for error, bound in zip(errors, _BOUNDS, strict=True)), errors


# --- initial weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_every_sharding_starts_from_the_same_rows(ranks: int) -> None:
    classes = 2500
    whole = ShardedHead(classes, 3, seed=4)
    shards = [initial_rows(4, shard_rows(classes, ranks, rank), 3) for rank in range(ranks)]
    assert torch.equal(torch.cat(shards), whole.weight)
    assert not torch.equal(whole.weight, ShardedHead(classes, 3, seed=5).weight)
    assert float(whole.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert bool((whole.bias == 0).all())
    assert initial_rows(4, range(classes, classes), 3).shape == (0, 3)


# --- misuse ------------------------------------------------------------------------------------------------------


def _differing_batches() -> list[str]:
    head = ShardedHead(17, _D, mesh=head_mesh())
    rank, said = dist.get_rank(), []
    for b, K in ((2 + rank, 3), (2, 3 + rank)):
        ids, mass = random_targets(b, 17, K, seed=0)
        try:
            head.loss(torch.ones(b, _D), ids, mass)
        except ValueError as error:
            said.append(str(error))
    return said


def test_ranks_whose_batches_differ_are_told_so() -> None:
    for said in run_ranks(_differing_batches, 2):
        assert said == [
            "ranks of one head group have batches of different shapes [b, K]: [[2, 3], [3, 3]]",
            "ranks of one head group have batches of different shapes [b, K]: [[2, 3], [2, 4]]",
        ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features": torch.ones(3, _D + 1)}, "do not fit a head of 6 features"),
        ({"features": torch.ones(2, _D)}, "do not fit"),
        ({"mass": torch.ones(3, 2, dtype=torch.float64)}, "mass float32, not torch.int64 and torch.float64"),
        ({"ids": torch.ones(3, 2, dtype=torch.int32)}, "ids must be int64"),
        ({"ids": torch.full((3, 2), 17)}, "class 17 is beyond the 17"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Tensor], sentence: str) -> None:
    inputs: dict[str, Any] = {
        "features": torch.ones(3, _D),
        "ids": torch.ones(3, 2, dtype=torch.int64),
        "mass": torch.ones(3, 2),
    }
    with pytest.raises(ValueError, match=sentence):
        ShardedHead(17, _D).loss(**(inputs | change))


def test_group_size_must_divide_the_world() -> None:
    with pytest.raises(UserError, match=r"head\.group_size is 2, but must divide the 1 ranks"):
        head_mesh(2)
    with pytest.raises(UserError, match=r"head\.chunk_rows is -1"):
        HeadConfig(chunk_rows=-1)
    with pytest.raises(ValueError, match="at least one class"):
        ShardedHead(0, 4)


def _train_few_classes() -> list[tuple[int, bool]]:
    """For each vocabulary, how many rows this rank holds and whether they are finite after two steps of SGD."""
    found = []
    for classes in (1, 3, 17):
        head = ShardedHead(classes, _D, mesh=head_mesh())
        optimizer = HeadSGD(head, momentum=0.9, nesterov=True, weight_decay=1e-4, lr=0.1)
        ids, mass = random_targets(_B, classes, _K, seed=0)
        for _ in range(2):
            head.loss(torch.ones(_B, _D), ids, mass).loss.backward()
            head.sync_gradients()
            optimizer.step()
            optimizer.zero_grad()
        found.append((len(head.weight), bool(head.weight.isfinite().all())))
    return found


def test_ranks_without_rows_train_along() -> None:
    found = run_ranks(_train_few_classes, 4)
    assert [[rows for rows, _ in rank] for rank in found] == [[1, 1, 5], [0, 1, 5], [0, 1, 5], [0, 0, 2]]
    assert all(finite for rank in found for _, finite in rank)
