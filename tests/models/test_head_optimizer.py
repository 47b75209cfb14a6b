from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scale_wsl.engines.base import square_norm
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.errors import UserError
from scale_wsl.models import head_optimizer as module
from scale_wsl.models.head import HeadConfig, ShardedHead, head_mesh
from scale_wsl.models.head_optimizer import HeadSGD, check_optimizer, update_rows
from tests.models.dense import random_targets
from tests.ranks import run_ranks

_D = 5
_SETTINGS: list[dict[str, Any]] = [
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
    {"momentum": 0.0, "nesterov": False, "weight_decay": 1e-2},
]


def _batch(classes: int, seed: int, images: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    features = torch.randn(images, _D, generator=torch.Generator().manual_seed(seed))
    return (features, *random_targets(images, classes, 3, seed=seed))


@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("sampled", [0, 23])
def test_where_every_row_is_touched_it_is_torchs_sgd(settings: dict[str, Any], sampled: int) -> None:
    ours, theirs = (ShardedHead(23, _D, seed=1, sampled=size, dtype=torch.float64) for size in (sampled, 0))
    optimizer, reference = HeadSGD(ours, lr=0.1, **settings), OptimizerSettings(**settings).of_module(theirs)
    for group in reference.param_groups:
        group["lr"] = 0.1
    for step in range(4):
        features, ids, mass = _batch(23, step)
        for head, one in ((ours, optimizer), (theirs, reference)):
            head.loss(features.double(), ids, mass, scale=0.5, draw=step).loss.backward()
            head.sync_gradients()
            one.step()
            one.zero_grad()
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        torch.testing.assert_close(parameter, other, rtol=1e-12, atol=1e-14)
        if settings["momentum"]:
            buffers = optimizer.state[parameter]["momentum_buffer"], reference.state[other]["momentum_buffer"]
            torch.testing.assert_close(*buffers, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", _SETTINGS)
def test_rows_that_a_step_does_not_touch_keep_every_bit(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 3)  # so that the rows of a step are taken in several goes
    head = ShardedHead(500, _D, seed=1, sampled=10)
    optimizer = HeadSGD(head, lr=0.1, **settings)
    for step in range(6):
        before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
        momenta = {
            name: optimizer.state[parameter]["momentum_buffer"].clone()
            for name, parameter in head.named_parameters()
            if "momentum_buffer" in optimizer.state[parameter]
        }
        for micro_batch in range(2):
            head.loss(*_batch(500, step), scale=0.5, draw=2 * step + micro_batch).loss.backward()
        head.sync_gradients()
        assert head.weight.grad is not None
        touched = torch.zeros(500, dtype=torch.bool)
        touched[head.weight.grad.indices()[0]] = True
        assert 10 < int(touched.sum()) <= 2 * (10 + 12)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in head.named_parameters():
            assert torch.equal(parameter[~touched], before[name][~touched]), name
            assert parameter.grad is None
            if step and settings["momentum"]:
                buffer = optimizer.state[parameter]["momentum_buffer"]
                assert torch.equal(buffer[~touched], momenta[name][~touched]), name
        assert bool((head.weight[touched] != before["weight"][touched]).any(1).all())


def test_momentum_decays_only_when_its_row_is_touched() -> None:
    weight, buffer = torch.zeros(3, 1), torch.zeros(3, 1)
    settings = {"lr": 1.0, "momentum": 0.5, "nesterov": False, "weight_decay": 0.0}
    for rows in ([0, 1], [1], [1], [0, 1]):
        update_rows(weight, buffer, torch.tensor(rows), torch.ones(len(rows), 1), **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(buffer[:, 0], torch.tensor([1.5, 1.875, 0.0]))
    torch.testing.assert_close(weight[:, 0], torch.tensor([-2.5, -6.125, 0.0]))


def test_gradients_share_memory_with_what_is_stepped() -> None:
    """Norm and clipping go through `gradients`; a sparse gradient's norm is that of the dense one."""
    for sampled in (0, 6):
        head = ShardedHead(40, _D, sampled=sampled)
        head.loss(*_batch(40, 0), scale=1.0, draw=0).loss.backward()
        head.loss(*_batch(40, 1), scale=1.0, draw=1).loss.backward()
        head.sync_gradients()
        assert head.bias is not None
        before = [one.grad.to_dense().clone() for one in (head.weight, head.bias) if one.grad is not None]
        expected = sum(float(one.double().square().sum()) for one in before)
        assert float(square_norm(head.gradients(), torch.device("cpu"))) == pytest.approx(expected, rel=1e-6)
        torch._foreach_mul_(head.gradients(), 0.5)
        for parameter, gradient in zip((head.weight, head.bias), before, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.to_dense(), gradient * 0.5)


def _replicas(classes: int) -> tuple[Any, Any, int]:
    """The synchronised gradient of two replicas, what it should be, and how many rows it holds."""
    rank = dist.get_rank()
    head = ShardedHead(classes, _D, mesh=head_mesh(1), sampled=min(classes, 12))
    features, ids, mass = _batch(classes, 10 + rank)
    head.loss(features, ids, mass, scale=1.0, draw=4).loss.backward()
    assert head.weight.grad is not None
    both: list[Any] = [None, None]
    dist.all_gather_object(both, head.weight.grad.to_dense().numpy())
    head.sync_gradients()
    assert head.bias is not None
    assert torch.equal(head.weight.grad.indices(), head.bias.grad.indices())  # type: ignore[union-attr]
    found, expected = head.weight.grad.to_dense(), both[0] + both[1]
    return found.numpy(), expected, head.weight.grad.indices().shape[1]


@pytest.mark.parametrize("classes", [3, 300])
def test_replicas_add_up_the_union_of_their_rows(classes: int) -> None:
    (first, expected, rows), (second, _, same) = run_ranks(_replicas, 2, classes)
    np.testing.assert_allclose(first, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(first, second)
    assert rows == same <= min(classes, 12 + 2 * 12)


def test_sampling_wants_sgd() -> None:
    head = ShardedHead(40, _D, sampled=6)
    check_optimizer(6, "sgd")
    check_optimizer(0, "adam")
    with pytest.raises(UserError, match=r"head\.sampled is 6, but optim\.name is adam: .* by SGD only"):
        check_optimizer(6, "adam")
    with pytest.raises(UserError, match=r"head\.sampled is -1, but must be 0 or more"):
        HeadConfig(sampled=-1)
    with pytest.raises(ValueError, match="no closure"):
        HeadSGD(head, momentum=0.0, nesterov=False, weight_decay=0.0).step(lambda: None)  # type: ignore[arg-type]
