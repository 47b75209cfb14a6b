"""A loss that is given its scale: the same gradients, made where the last ones were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scale_wsl.models.head import ShardedHead
from tests.models.dense import random_targets

_D, _V = 6, 2500  # three blocks of classes


def _head(chunk_rows: int = 0, dtype: torch.dtype = torch.float64) -> ShardedHead:
    return ShardedHead(_V, _D, dtype=dtype, chunk_rows=chunk_rows)


def _batch(number: int, images: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    features = torch.randn(images, _D, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    return (features.requires_grad_(), *random_targets(images, _V, 3, seed=number))


@pytest.mark.parametrize("chunk_rows", [0, 1, 4])
@pytest.mark.parametrize("images", [2, 6, 9])  # fewer than features, as many, and more: then chunks follow the first
def test_gradients_add_up_as_autograd_adds_them(chunk_rows: int, images: int) -> None:
    free, final = _head(chunk_rows), _head(chunk_rows)
    for number in range(3):
        features, ids, mass = _batch(number, images)
        (free.loss(features, ids, mass).loss * 0.3).backward()
        wanted, features.grad = features.grad, None
        output = final.loss(features, ids, mass, scale=0.3)
        output.loss.backward()
        torch.testing.assert_close(features.grad, wanted, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(output.row_loss.sum() * 0.3, output.loss.detach())
    for name, parameter in final.named_parameters():
        torch.testing.assert_close(parameter.grad, free.get_parameter(name).grad, rtol=1e-12, atol=1e-14)


def test_there_is_one_gradient_and_it_stays_where_it_is() -> None:
    head = _head()
    places = set()
    for step in range(3):
        for micro_batch in range(2):
            head.loss(*_batch(2 * step + micro_batch), scale=1.0).loss.backward()
            assert head.weight.grad is not None
            places.add(head.weight.grad.data_ptr())
        head.zero_grad()
        assert head.weight.grad is None
    assert len(places) == 1


def test_what_is_left_in_the_old_gradient_does_not_matter() -> None:
    """It is NaN after a step that was skipped."""
    fresh, used = _head(), _head()
    used.weight.grad = torch.full_like(used.weight, torch.nan)
    used.zero_grad()
    for head in (fresh, used):
        head.loss(*_batch(0), scale=1.0).loss.backward()
    assert fresh.weight.grad is not None
    assert torch.equal(fresh.weight.grad, used.weight.grad)  # type: ignore[arg-type]


def test_zeroing_in_place_keeps_the_gradient() -> None:
    head = _head()
    head.loss(*_batch(0)).loss.backward()
    head.zero_grad(set_to_none=False)
    assert head.weight.grad is not None
    assert bool((head.weight.grad == 0).all())


def test_a_parameter_of_another_type_gets_a_gradient_of_its_type() -> None:
    exact, head = _head(dtype=torch.float32), _head(dtype=torch.bfloat16)
    with torch.no_grad():
        exact.weight.copy_(head.weight)
    for number in range(2):
        features, ids, mass = _batch(number)
        for one in (exact, head):
            one.loss(features.detach().float(), ids, mass, scale=1.0).loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(head.weight.grad.float(), exact.weight.grad, rtol=0.02, atol=0.02)


def test_a_final_loss_must_be_the_end_of_its_graph() -> None:
    head = _head()
    with pytest.raises(RuntimeError, match=r"a gradient of 2.0 came back to it: pass the whole factor as `scale`"):
        (head.loss(*_batch(0), scale=1.0).loss * 2).backward()
    with pytest.raises(RuntimeError, match="do not retain its graph"):
        head.loss(*_batch(0), scale=1.0).loss.backward(retain_graph=True)
