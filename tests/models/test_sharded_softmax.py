from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from scale_wsl.models import sharded_softmax
from scale_wsl.models.sharded_softmax import Shard, khot_cross_entropy, shard_rows
from tests.models.dense import dense_loss, random_targets, relative_error


def _problem(images: int, classes: int, features: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(classes)
    shapes = [(images, features), (classes, features), (classes,)]
    return [torch.randn(shape, dtype=dtype, generator=numbers).requires_grad_() for shape in shapes]


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_shards_are_cut_as_torch_cuts_them(classes: int, ranks: int) -> None:
    shards = [shard_rows(classes, ranks, rank) for rank in range(ranks)]
    assert [row for shard in shards for row in shard] == list(range(classes))
    chunks = torch.arange(classes).chunk(ranks)
    assert [len(shard) for shard in shards if shard] == [len(chunk) for chunk in chunks]
    assert all(first.stop == second.start for first, second in pairwise(shards))


@given(st.integers(0, 5000), st.integers(1, 200_000_000), st.integers(0, 100))
def test_chunks_cover_every_image_once(images: int, classes: int, chunk_rows: int) -> None:
    chunks = list(Shard(classes, chunk_rows=chunk_rows).chunks(images))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(images))
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    assert rows <= max(1, chunk_rows or (1 << 26) // (4 * classes))


@pytest.mark.parametrize("classes", [1, 3, 17])
@pytest.mark.parametrize("chunk_rows", [0, 2])
def test_gradcheck(classes: int, chunk_rows: int) -> None:
    ids, mass = random_targets(5, classes, 4, seed=1)
    mass = mass.mul(4).round().div(4)  # exact in binary; rows need not sum to 1
    shard = Shard(classes, chunk_rows=chunk_rows)
    inputs = _problem(5, classes, 3)
    assert torch.autograd.gradcheck(lambda x, w, b: khot_cross_entropy(x, w, b, ids, mass, shard)[0], inputs)
    assert torch.autograd.gradcheck(lambda x, w: khot_cross_entropy(x, w, None, ids, mass, shard)[0], inputs[:2])


def test_large_logits_do_not_overflow() -> None:
    ids, mass = random_targets(4, 9, 3, seed=0)
    features, weight, bias = _problem(4, 9, 3, torch.float32)
    big = (features.detach() * 1e4).requires_grad_()
    loss, _ = khot_cross_entropy(big, weight, bias, ids, mass, Shard(9))
    loss.backward()  # type: ignore[no-untyped-call]
    expected, _ = dense_loss(big.detach().double(), weight.detach().double(), bias.detach().double(), ids, mass)
    assert relative_error(loss, expected) < 1e-5
    assert bool(torch.isfinite(big.grad).all())


def test_only_what_is_trained_gets_a_gradient() -> None:
    ids, mass = random_targets(4, 9, 3, seed=0)
    features, weight, bias = _problem(4, 9, 3)
    khot_cross_entropy(features.detach(), weight, bias.detach(), ids, mass, Shard(9))[0].backward()  # type: ignore
    assert features.grad is None
    assert bias.grad is None
    wanted = weight.grad
    weight.grad = None
    khot_cross_entropy(features, weight, bias, ids, mass, Shard(9))[0].backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, wanted)


def test_backward_again_on_a_kept_graph_gives_the_same() -> None:
    ids, mass = random_targets(6, 11, 3, seed=0)
    inputs = _problem(6, 11, 4)
    loss, _ = khot_cross_entropy(*inputs, ids, mass, Shard(11))
    once = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    twice = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    last = torch.autograd.grad(loss * 3, inputs)
    for first, second, third in zip(once, twice, last, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_gradients_may_be_scaled_in_place_only_where_the_graph_is_not_kept() -> None:
    """Guards the private question that `_graph_is_kept` asks of PyTorch: it must still exist, and still answer."""
    answers = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            answers.append(sharded_softmax._graph_is_kept())
            return gradient

    y = Ask.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert answers == [True, False]


def test_where_pytorch_does_not_say_the_graph_counts_as_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    assert sharded_softmax._graph_is_kept()


def test_the_loss_of_one_image_is_detached_and_adds_up() -> None:
    ids, mass = random_targets(6, 11, 3, seed=0)
    inputs = _problem(6, 11, 4)
    loss, image_loss = khot_cross_entropy(*inputs, ids, mass, Shard(11))
    assert not image_loss.requires_grad
    assert torch.equal(image_loss.sum(), loss)
    torch.testing.assert_close(image_loss, dense_loss(*inputs, ids, mass)[1].detach())


# --- precision ---------------------------------------------------------------------------------------------------


def test_near_the_optimum_bf16_keeps_the_gradient_that_a_bf16_subtraction_loses() -> None:
    """p = 1/k within 3e-4: the difference is below what bf16 can tell apart, and the gradient is that difference."""
    k, differences = 4, torch.tensor([3e-4, -2e-4, 1e-4, -2e-4])
    bias = (1 / k + differences).double().log().float().requires_grad_()
    features = torch.zeros(1, 8, dtype=torch.bfloat16)  # so that the logits are the bias
    weight = torch.randn(k, 8)
    loss, _ = khot_cross_entropy(features, weight, bias, torch.arange(k)[None], torch.full((1, k), 1 / k), Shard(k))
    loss.backward()  # type: ignore[no-untyped-call]
    late = (1 / k + differences).bfloat16() - torch.tensor(1 / k).bfloat16()
    error = (bias.grad - differences).abs().max()
    assert error < 1e-6
    assert error < 0.01 * (late.float() - differences).abs().max()


def test_bf16_is_within_its_rounding_of_float64() -> None:
    images, classes = 64, 301
    ids, mass = random_targets(images, classes, 5, seed=2)
    exact = _problem(images, classes, 32)
    dense_loss(*exact, ids, mass)[0].backward()  # type: ignore[no-untyped-call]
    rounded = [tensor.detach().float().requires_grad_() for tensor in exact]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = khot_cross_entropy(*rounded, ids, mass, Shard(classes, chunk_rows=16))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == torch.float32
        # 2^-9 is half a unit in bf16's last place; logits of this size (|z| < 25) are off by up to 0.06
        assert (ours.grad - theirs.grad).norm() < 0.03 * theirs.grad.norm()


def test_sums_over_chunks_are_taken_in_fp32() -> None:
    """256 chunks, each adding 1 and then nothing but small numbers, which bf16 sums would lose."""
    images = 257
    features = torch.full((images, 1), 2.0**-7, dtype=torch.bfloat16)
    features[0] = 2.0
    weight = torch.zeros(2, 1, requires_grad=True)
    ids, mass = torch.zeros(images, 1, dtype=torch.int64), torch.ones(images, 1)
    loss, _ = khot_cross_entropy(features, weight, None, ids, mass, Shard(2, chunk_rows=1))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, torch.tensor([[-2.0], [2.0]]))  # (2 + 256/128) / 2


# --- memory ------------------------------------------------------------------------------------------------------


class _Allocations(TorchDispatchMode):
    """The largest tensor made, and the most storages of one size that were alive at once."""

    def __init__(self, watched: int) -> None:
        super().__init__()
        self.largest = self.most = 0
        self._watched, self._alive = watched, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:  # a sparse one's parts were made before
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                if storage.nbytes() == self._watched:
                    reference = StorageWeakRef(storage)
                    self._alive[reference.cdata] = reference
        self._alive = {key: one for key, one in self._alive.items() if not one.expired()}
        self.most = max(self.most, len(self._alive))
        return made


@pytest.mark.parametrize("gradient", [True, False])
def test_no_more_than_two_chunks_of_logits_and_nothing_dense(gradient: bool) -> None:
    images, classes, width, chunk = 64, 5003, 6, 4
    ids, mass = random_targets(images, classes, 5, seed=3)
    inputs = [tensor.requires_grad_(gradient) for tensor in _problem(images, classes, width, torch.float32)]
    with _Allocations(4 * chunk * classes) as seen:
        loss, _ = khot_cross_entropy(*inputs, ids, mass, Shard(classes, chunk_rows=chunk))
        if gradient:
            loss.backward()  # type: ignore[no-untyped-call]
    assert seen.most == 2
    assert seen.largest == 4 * classes * width < 4 * classes * images  # the weight, and its gradient


class _Products(TorchDispatchMode):
    """How many matrix products were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("needed", "products"), [((0, 0, 0), 1), ((1, 0, 0), 2), ((0, 1, 0), 2), ((1, 1, 1), 3)])
def test_no_gradient_is_computed_that_nobody_wants(needed: tuple[int, int, int], products: int) -> None:
    ids, mass = random_targets(6, 11, 3, seed=0)
    inputs = [tensor.requires_grad_(bool(flag)) for tensor, flag in zip(_problem(6, 11, 8), needed, strict=True)]
    with _Products() as seen:
        loss, _ = khot_cross_entropy(*inputs, ids, mass, Shard(11))
    assert seen.count == products
    assert (loss.grad_fn is not None) == any(needed)
    torch.testing.assert_close(loss.detach(), dense_loss(*inputs, ids, mass)[0].detach())
