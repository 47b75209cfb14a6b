"""Targets of any weights, and label smoothing, against the formula with its dense target, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scale_wsl.errors import UserError
from scale_wsl.models.head import HeadConfig, ShardedHead, head_mesh
from tests.models.dense import relative_error
from tests.ranks import run_ranks

_B, _K = 7, 4
# Classes and features. 1 and 3 leave ranks without rows, 17 and 1,001 give them unequal numbers; at 5,000 a shard has
# several blocks, and few enough images for all logits to stand in the gradient's memory.
_SIZES = ((1, 6), (3, 6), (17, 6), (1001, 6), (5000, 40))


def _targets(images: int, classes: int) -> tuple[Tensor, Tensor]:
    """Weights between 0 and 2, that sum to anything, ids that repeat, and each fifth row without target."""
    numbers = torch.Generator().manual_seed(classes)
    ids = torch.randint(0, classes, (images, _K), generator=numbers)
    mass = 2 * torch.rand(images, _K, generator=numbers)
    ids[:, 1] = ids[:, 0]
    mass[:, 3] = 0.0  # an id without mass is no target
    ids[::5], mass[::5] = -1, 0.0
    return ids, mass


def _dense(features: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, mass: Tensor, smoothing: float) -> Tensor:
    """Loss of each image `[N]`."""
    target = torch.zeros(len(ids), len(weight), dtype=torch.float64)
    rows = torch.arange(len(ids))[:, None].expand_as(ids)
    target.index_put_((rows, ids.clamp(min=0)), mass.double(), accumulate=True)
    target = (1 - smoothing) * target + smoothing * target.sum(1, keepdim=True) / len(weight)
    return -(target * (features @ weight.t() + bias).log_softmax(1)).sum(1)


def _worst_error(smoothing: float) -> float:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    errors = []
    for classes, D in _SIZES:
        for chunk_rows in (0, 4):
            numbers = torch.Generator().manual_seed(7)
            shapes = [(world * _B, D), (classes, D), (classes,)]
            full = [torch.randn(shape, dtype=torch.float64, generator=numbers).requires_grad_() for shape in shapes]
            ids, mass = _targets(world * _B, classes)
            expected = _dense(*full, ids, mass, smoothing)
            (expected.sum() * 0.37).backward()

            head = ShardedHead(
                classes, D, mesh=head_mesh(), dtype=torch.float64, chunk_rows=chunk_rows, smoothing=smoothing
            )
            held, mine = slice(head.rows.start, head.rows.stop), slice(rank * _B, (rank + 1) * _B)
            with torch.no_grad():
                head.weight.copy_(full[1][held])
                head.bias.copy_(full[2][held])
            features = full[0].detach()[mine].requires_grad_()
            output = head.loss(features, ids[mine], mass[mine], scale=0.37)
            output.loss.backward()
            with torch.no_grad():
                evaluated = head.loss(features, ids[mine], mass[mine])
            no_target = mass[mine].sum(1) == 0
            assert bool(no_target.any()) and bool((features.grad[no_target] == 0).all())  # type: ignore[index]  # noqa: PT018
            assert bool((output.row_loss[no_target] == 0).all())
            errors += [
                relative_error(output.row_loss, expected[mine]),
                relative_error(evaluated.row_loss, _dense(*full, ids, mass, 0.0)[mine]),  # evaluation is not smoothed
                relative_error(features.grad, full[0].grad[mine]),  # type: ignore[arg-type, index]
                relative_error(head.weight.grad, full[1].grad[held]),  # type: ignore[arg-type, index]
                relative_error(head.bias.grad, full[2].grad[held]),  # type: ignore[arg-type, index, union-attr]
            ]
    return max(errors)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("world", [1, 3])
def test_weighted_and_smoothed_targets_equal_dense_ones(world: int, smoothing: float) -> None:
    """Uneven and empty shards, duplicates, rows of any total mass, and rows without: loss and gradient zero."""
    for error in run_ranks(_worst_error, world, smoothing):
        assert error < 1e-12


def test_without_a_process_group() -> None:
    assert _worst_error(0.2) < 1e-12


def test_smoothing_is_a_share() -> None:
    for wrong in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"head\.smoothing is .*, but must be at least 0 and below 1"):
            HeadConfig(smoothing=wrong)


def test_probability_of_the_targets_is_their_sum() -> None:
    head = ShardedHead(17, 6, dtype=torch.float64)
    features = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[4, 16, -1], [2, -1, -1], [-1, -1, -1]])
    with torch.no_grad():
        found = head.loss(features, ids, (ids >= 0).float()).target_probability
        p = (features @ head.weight.t() + head.bias).softmax(1)
    assert found is not None
    torch.testing.assert_close(found, torch.stack([p[0, 4] + p[0, 16], p[1, 2], torch.zeros((), dtype=p.dtype)]))
    assert head.loss(features, ids, (ids >= 0).float()).target_probability is None
