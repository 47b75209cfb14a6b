from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.sampled_softmax import Sampling, sampled_cross_entropy
from scale_wsl.models.sharded_softmax import Shard, khot_cross_entropy, shard_rows
from tests.models.dense import random_targets, relative_error
from tests.models.test_sharded_softmax import _Allocations
from tests.ranks import run_ranks

_D, _B, _K = 6, 6, 4


@dataclasses.dataclass(frozen=True)
class _Uncorrected(Sampling):
    """As if every class had come in for certain: no logQ correction."""

    def rows(self, held: range) -> tuple[Tensor, Tensor]:
        rows, q = super().rows(held)
        return rows, torch.ones_like(q)


# --- which classes -----------------------------------------------------------------------------------------------


@given(st.integers(1, 200_000), st.data())
def test_every_sharding_draws_the_same_rows(classes: int, data: Any) -> None:
    sampled = data.draw(st.integers(1, min(classes, 3000)))
    sampling = Sampling(classes, sampled, seed=1, draw=data.draw(st.integers(0, 10**12)))
    rows, q = sampling.rows(range(classes))
    assert len(rows) == sampled == len(set(rows.tolist()))
    assert rows.tolist() == sorted(rows.tolist())
    assert 0 <= int(rows[0]) <= int(rows[-1]) < classes
    assert bool((q > 0).all())
    ranks = data.draw(st.integers(1, 9))
    shards = [shard_rows(classes, ranks, rank) for rank in range(ranks)]
    pieces = [sampling.rows(shard) for shard in shards]
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), rows)
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), q)
    assert all(len(piece[0]) <= sampling.most(len(shards[0])) for piece in pieces)


def test_rows_come_in_as_often_as_their_probability_says() -> None:
    classes, sampled, draws = 70_001, 900, 400  # two strata, of unequal size
    counts, q = torch.zeros(classes), torch.zeros(classes, dtype=torch.float64)
    for draw in range(draws):
        rows, probabilities = Sampling(classes, sampled, 0, draw).rows(range(classes))
        counts[rows] += 1
        q[rows] = probabilities
    assert float((1 / q[q > 0]).mean()) == pytest.approx(classes / sampled, rel=1e-3)
    # Over blocks of 1,000 rows the count is binomial with mean 5,143, standard deviation 71.
    blocks = counts[:70_000].view(-1, 1000).sum(1)
    assert float((blocks - draws * 1000 * sampled / classes).abs().max()) < 5 * 71


def test_a_draw_is_a_function_of_its_numbers() -> None:
    one, same, later, other = (
        Sampling(1000, 30, seed, draw).rows(range(1000))[0] for seed, draw in ((0, 5), (0, 5), (0, 6), (1, 5))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, later)
    assert not torch.equal(one, other)


# --- the estimate ------------------------------------------------------------------------------------------------


def _large(learned: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """20,000 classes with logits of standard deviation 2; those of an image's classes are raised by `learned`."""
    numbers = torch.Generator().manual_seed(0)
    features = torch.randn(64, 64, generator=numbers)
    weight = torch.randn(20_000, 64, generator=numbers) / 4
    ids, mass = random_targets(64, 20_000, 5, seed=0)
    for row, own in zip(features, ids, strict=True):
        some = weight[own[own >= 0].unique()]
        row += learned * torch.linalg.pinv(some) @ torch.ones(len(some))
    inputs = [features.requires_grad_(), weight.requires_grad_(), torch.zeros(20_000).requires_grad_()]
    return inputs, ids, mass


def _gradient(inputs: list[Tensor], loss: Tensor) -> Tensor:
    for tensor in inputs:
        tensor.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
    return torch.cat([(one.to_dense() if one.is_sparse else one).flatten() for one in gradients])


def _sampled(kind: type[Sampling], learned: float, draws: int = 16) -> tuple[float, float, float]:
    """The full loss of a labelled image, the sampled one, and the cosine of the gradients; means over some draws."""
    inputs, ids, mass = _large(learned)
    labelled = int((mass.sum(1) > 0).sum())
    full, _ = khot_cross_entropy(*inputs, ids, mass, Shard(20_000))
    exact = _gradient(inputs, full)
    losses, gradients = [], []
    for draw in range(draws):
        loss, _ = sampled_cross_entropy(*inputs, ids, mass, Shard(20_000), kind(20_000, 400, 0, draw))
        gradients.append(_gradient(inputs, loss))
        losses.append(float(loss.detach()) / labelled)
    cosine = torch.cosine_similarity(torch.stack(gradients).mean(0), exact, dim=0)
    return float(full.detach()) / labelled, sum(losses) / draws, float(cosine)


def test_two_percent_of_the_classes_come_near_the_full_loss_with_the_correction_and_not_without() -> None:
    full, corrected, _ = _sampled(Sampling, learned=0.0)
    _, uncorrected, _ = _sampled(_Uncorrected, learned=0.0)
    assert corrected == pytest.approx(full, abs=0.1)
    assert uncorrected < full - 3
    # Once the images' own classes have some probability, a denominator that is too small hides what is left to learn.
    full, corrected, cosine = _sampled(Sampling, learned=10.0)
    _, uncorrected, worse = _sampled(_Uncorrected, learned=10.0)
    assert corrected == pytest.approx(full, abs=0.4)  # Jensen's part: logits vary more here
    assert uncorrected < full - 2
    assert cosine > 0.9
    assert worse < 0.6


def test_the_partition_function_is_unbiased() -> None:
    """exp(loss + target logits) is the estimate of Z: its mean over draws is Z, within what chance allows."""
    classes, draws = 200, 600
    numbers = torch.Generator().manual_seed(1)
    features = torch.randn(8, 4, dtype=torch.float64, generator=numbers).requires_grad_()
    weight = torch.randn(classes, 4, dtype=torch.float64, generator=numbers).requires_grad_()
    ids, mass = torch.arange(8)[:, None], torch.ones(8, 1)
    logits = (features @ weight.t()).detach()
    estimates = []
    for draw in range(draws):
        shard, sampling = Shard(classes), Sampling(classes, 20, 0, draw)
        _, row_loss = sampled_cross_entropy(features, weight, None, ids, mass, shard, sampling)
        estimates.append((row_loss + logits.gather(1, ids)[:, 0]).exp())
    found = torch.stack(estimates)
    error = (found.mean(0) - logits.exp().sum(1)) / (found.std(0) / draws**0.5)
    assert float(error.abs().max()) < 4  # standard errors, the largest of eight


# --- ranks -------------------------------------------------------------------------------------------------------


def _problem(classes: int, world: int, bias: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(classes)
    shapes = [(world * _B, _D), (classes, _D), (classes,)]
    full = [torch.randn(shape, dtype=torch.float64, generator=numbers) for shape in shapes]
    return full, *random_targets(world * _B, classes, _K, seed=classes)


def _on_ranks(classes: int, sampled: int, images_of: int, options: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradients of `images_of * B` images, as whole arrays on every rank (V rows, N images)."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    full, ids, mass = _problem(classes, images_of)
    head = ShardedHead(classes, _D, mesh=head_mesh(), dtype=torch.float64, seed=3, sampled=sampled, **options)
    with torch.no_grad():
        head.weight.copy_(full[1][head.rows.start : head.rows.stop])
        if head.bias is not None:
            head.bias.copy_(full[2][head.rows.start : head.rows.stop])
    each = len(ids) // world
    mine = slice(rank * each, (rank + 1) * each)
    features = full[0][mine].requires_grad_()
    output = head.loss(features, ids[mine], mass[mine], scale=0.3, draw=7)
    output.loss.backward()
    head.sync_gradients()
    found = {"loss": output.row_loss, "features": features.grad}
    for name, parameter in head.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        found[name] = gradient.to_dense() if gradient.is_sparse else gradient
        if sampled:
            assert gradient.is_sparse
            assert torch.equal(gradient.coalesce().indices(), gradient.indices())
    gathered: dict[str, Any] = {}
    for name, local in found.items():
        assert local is not None
        pieces: list[Any] = [local.numpy()]
        if world > 1:
            pieces = [None] * world
            dist.all_gather_object(pieces, local.numpy())
        gathered[name] = np.concatenate(pieces)
    return gathered


def _compare(ours: dict[str, Any], theirs: dict[str, Any], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert relative_error(torch.from_numpy(ours[name]), torch.from_numpy(theirs[name])) < bound, name


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [1, 3, 17, 1001])
def test_drawing_everything_is_the_full_softmax(classes: int, smoothing: float) -> None:
    options = {"smoothing": smoothing, "chunk_rows": 4}
    _compare(_on_ranks(classes, classes, 2, options), _on_ranks(classes, 0, 2, options), 1e-10)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.2, "chunk_rows": 5}, {"bias": False}])
def test_any_number_of_ranks_gives_the_numbers_of_one(world: int, options: dict[str, Any]) -> None:
    for classes, sampled in ((3, 1), (17, 5), (1001, 60), (1001, 1001)):
        for ours in run_ranks(_on_ranks, world, classes, sampled, world, options):
            _compare(ours, _on_ranks(classes, sampled, world, options), 1e-10)


def test_evaluation_is_over_all_classes() -> None:
    full, ids, mass = _problem(1001, 1)
    sampled, whole = (ShardedHead(1001, _D, dtype=torch.float64, sampled=size) for size in (30, 0))
    with torch.no_grad():
        ours, theirs = (head.loss(full[0], ids, mass) for head in (sampled, whole))
    assert torch.equal(ours.row_loss, theirs.row_loss)


def test_nothing_of_the_vocabularys_size_is_made() -> None:
    classes, images = 100_000, 8
    full, ids, mass = _problem(classes, 1)
    head = ShardedHead(classes, _D, sampled=500)
    features = full[0].float().requires_grad_()
    with _Allocations(0) as seen:
        head.loss(features, ids, mass, scale=1.0).loss.backward()
        head.sync_gradients()
    assert seen.largest <= 8 * (500 + images * _K) * _D * 2
    assert seen.largest < 4 * classes
