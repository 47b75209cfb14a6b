"""k-hot softmax cross-entropy with the vocabulary's rows sharded over a group of ranks: loss and gradient in one pass.

Image rows are taken in chunks: logits of the local vocabulary slice, one exchange of `[rows, 3]` (largest logit, sum of
exponentials, target dot), and from it each row's loss and gradient in place. Must never hold an `N x V` target, more
than two chunks of logits, or another rank's logits.

Shapes: b images on each of the group's g ranks, N = g*b, D features, V classes of which v are held here, K target
entries per image. Everything that is called here is a collective of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from scale_wsl.collectives import (
    Pending,
    all_gather_rows,
    group_rank,
    group_size,
    start_all_gather_rows,
    start_reduce_scatter_rows,
)

__all__ = ["Shard", "khot_cross_entropy", "logit_chunks", "shard_rows"]

_CHUNK_BYTES = 64 << 20  # of fp32 logits: many rows to a matrix product, and small beside the weights
_PIECE_BYTES = 8 << 20  # of a product that waits to be added in fp32


def shard_rows(vocabulary_size: int, ranks: int, rank: int) -> range:
    """Global rows of a rank: ceil(V/g) each, the last ranks fewer or none; torch.chunk and DTensor cut alike."""
    rows = -(-vocabulary_size // ranks)
    return range(min(rank * rows, vocabulary_size), min((rank + 1) * rows, vocabulary_size))


@dataclass(frozen=True)
class Shard:
    """Which vocabulary rows this rank holds, with whom it shares the rest, and how many images make a chunk."""

    vocabulary_size: int
    group: ProcessGroup | None = None
    chunk_rows: int = 0  # 0: as many as keep a chunk's logits within 64 MiB

    @property
    def size(self) -> int:
        """Ranks that share the vocabulary, g."""
        return group_size(self.group)

    @property
    def rows(self) -> range:
        """Global rows held here."""
        return shard_rows(self.vocabulary_size, self.size, group_rank(self.group))

    def chunks(self, images: int) -> Iterator[slice]:
        """Slices of the N gathered images, alike on all ranks of the group: each is a collective."""
        largest = -(-self.vocabulary_size // self.size)
        step = self.chunk_rows or max(1, _CHUNK_BYTES // (4 * largest))
        return (slice(start, min(start + step, images)) for start in range(0, images, step))


def khot_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mass: Tensor, shard: Shard
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of this rank's images against the whole vocabulary.

    Each parameter and feature receives the gradient of the *sum over the group's ranks* of the returned losses, times
    the upstream gradient, which must be the same on all of them. Logits and products are computed in autocast's type
    where it is on, else in the features'; softmax, loss and sums in fp32 (float64 where the features are).

    Args:
        features: `[b, D]`, this rank's; b is at least 1.
        weight: `[v, D]`, this rank's rows; v may be 0.
        bias: `[v]` or None.
        ids: int64 `[b, K]`, global class ids; entries without mass may be anything below V, by convention -1.
        mass: fp32 `[b, K]`, target mass of each entry; an id given twice counts twice.
        shard: the same on all ranks of the group but for the rank.

    Returns:
        The sum over the b images of `sum_k mass * -log p`, and each image's share `[b]` (detached).
    """
    parameters = [features, weight] if bias is None else [features, weight, bias]
    compute = _compute_dtype(features)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters):
        loss, image_loss = _KHotCrossEntropy.apply(features, weight, bias, ids, mass, shard, compute)
    else:
        found = _one_pass(features, weight, bias, ids, mass, shard, compute, (False, False, False))
        image_loss = found.image_loss
        loss = image_loss.sum()
    return loss, image_loss


@torch.no_grad()
def logit_chunks(
    features: Tensor, weight: Tensor, bias: Tensor | None, shard: Shard
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For evaluation: chunk by chunk over the N gathered images, the local logits and their common normaliser.

    Yields:
        The slice of images, logits `[n, v]`, and log of the sum of exponentials over the whole vocabulary `[n]`.
    """
    compute = _compute_dtype(features)
    gathered = start_all_gather_rows(features.to(compute), shard.group)
    W = weight.to(compute)
    X = gathered.wait()
    for images in shard.chunks(X.shape[0]):
        logits = _logits(X[images], W, bias)
        local = logits.logsumexp(1)  # -inf where no row is held here
        normaliser = all_gather_rows(local, shard.group).view(shard.size, -1).logsumexp(0)
        yield images, logits, normaliser


# --- the pass ----------------------------------------------------------------------------------------------------


def _compute_dtype(features: Tensor) -> torch.dtype:
    kind = features.device.type
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return features.dtype


def _logits(X: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """Logits `[n, v]` of `[n, D]` and `[v, D]`, in the accumulation type; the product is in its operands'."""
    logits = torch.mm(X, W.t()).to(_accumulation_dtype(X.dtype))
    return logits if bias is None else logits.add_(bias)


def _accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.float64 if compute == torch.float64 else torch.float32


def _gather_targets(ids: Tensor, mass: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Everybody's targets `[N, K]` in one collective: ids as int32, the mass's bits beside them."""
    if group_size(group) == 1:
        return ids, mass
    packed = torch.cat([ids.to(torch.int32), mass.contiguous().view(torch.int32)], dim=1)
    gathered_ids, bits = all_gather_rows(packed, group).chunk(2, dim=1)
    return gathered_ids.to(torch.int64), bits.contiguous().view(torch.float32)


def _accumulate(into: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """`into (+)= a @ b`; a product of a smaller type is added piece by piece, as there is no room for all of it."""
    if a.dtype == into.dtype:
        torch.addmm(into, a, b, beta=0 if first else 1, out=into)  # beta=0 ignores what is there
        return
    rows = max(1, _PIECE_BYTES // (a.element_size() * b.shape[1]))
    for piece, part in zip(torch.split(into, rows), torch.split(a, rows), strict=True):
        if first:
            piece.copy_(part @ b)
        else:
            piece.add_(part @ b)


@dataclass
class _Chunk:
    """Images whose exchange is under way."""

    images: slice
    exponentials: Tensor  # [n, v], exp(logit - maximum)
    maximum: Tensor  # [n], the largest local logit
    target_ids: Tensor  # [n, K], local row of each target entry, 0 for those that are not held here
    target_mass: Tensor  # [n, K], 0 for those that are not held here
    exchange: Pending  # [g*n, 3]


@dataclass
class _Result:
    image_loss: Tensor  # [b], accumulation type, as the gradients
    feature_gradient: Tensor | None  # [b, D]
    weight_gradient: Tensor | None  # [v, D]
    bias_gradient: Tensor | None  # [v]


def _one_pass(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mass: Tensor,
    shard: Shard,
    compute: torch.dtype,
    needed: tuple[bool, bool, bool],
) -> _Result:
    """Losses of this rank's images, and the `needed` gradients (features, weight, bias) of the group's summed loss."""
    group, held = shard.group, shard.rows
    gathered = start_all_gather_rows(features.to(compute), group)
    ids, mass = _gather_targets(ids, mass, group)
    W = weight.to(compute)
    X = gathered.wait()
    (N, D), v = X.shape, len(held)
    accumulation = _accumulation_dtype(compute)
    mass = mass.to(accumulation)
    total_mass = mass.sum(1)
    image_loss = X.new_empty(N, dtype=accumulation)
    dX = X.new_empty(N, D, dtype=accumulation) if needed[0] else None
    dW = X.new_empty(v, D, dtype=accumulation) if needed[1] else None
    db = X.new_zeros(v, dtype=accumulation) if needed[2] else None
    scattered: Pending | None = None

    def start(images: slice) -> _Chunk:
        logits = _logits(X[images], W, bias)
        here = (ids[images] >= held.start) & (ids[images] < held.stop)
        target_ids = torch.where(here, ids[images] - held.start, 0)
        target_mass = torch.where(here, mass[images], 0.0)
        if v > 0:
            maximum = logits.amax(1)
            target = (logits.gather(1, target_ids) * target_mass).sum(1)
        else:
            maximum, target = logits.new_full((len(logits),), -torch.inf), logits.new_zeros(len(logits))
        exponentials = logits.sub_(maximum[:, None]).exp_()
        packed = torch.stack([maximum, exponentials.sum(1), target], dim=1)
        exchange = start_all_gather_rows(packed, group)
        return _Chunk(images, exponentials, maximum, target_ids, target_mass, exchange)

    def finish(chunk: _Chunk) -> None:
        nonlocal scattered
        images = chunk.images
        maxima, sums, targets = chunk.exchange.wait().view(shard.size, -1, 3).unbind(2)
        largest = maxima.amax(0)
        normaliser = largest + (sums * (maxima - largest).exp()).sum(0).log()
        image_loss[images] = total_mass[images] * normaliser - targets.sum(0)
        if not any(needed):
            return
        # d loss / d logit = total mass * p - target mass, subtracted in the accumulation type: in bf16 the difference
        # of two nearly equal numbers would be zero. index_put_ adds duplicates up, and is deterministic.
        logit_gradient = chunk.exponentials
        logit_gradient.mul_((total_mass[images] * (chunk.maximum - normaliser).exp())[:, None])
        if v > 0:
            rows = torch.arange(len(logit_gradient), device=X.device)[:, None].expand_as(chunk.target_ids)
            logit_gradient.index_put_((rows, chunk.target_ids), -chunk.target_mass, accumulate=True)
        if db is not None:
            db.add_(logit_gradient.sum(0))
        operand = logit_gradient.to(compute)
        if dX is not None:
            _accumulate(dX[images], operand, W, first=True)
            if images.stop == N:
                scattered = start_reduce_scatter_rows(dX, group)  # on its way during the last product
        if dW is not None:
            _accumulate(dW, operand.t(), X[images], first=images.start == 0)

    waiting: _Chunk | None = None
    for images in shard.chunks(N):
        chunk = start(images)
        if waiting is not None:
            finish(waiting)  # while the exchange of `chunk` is on its way
        waiting = chunk
    if waiting is not None:
        finish(waiting)

    b = features.shape[0]
    own = image_loss[group_rank(group) * b :][:b].clone()
    return _Result(own, dX if scattered is None else scattered.wait(), dW, db)


class _KHotCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies them by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mass: Tensor,
        shard: Shard,
        compute: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        found = _one_pass(features, weight, bias, ids, mass, shard, compute, ctx.needs_input_grad[:3])
        ctx.save_for_backward(found.feature_gradient, found.weight_gradient, found.bias_gradient)
        ctx.dtypes = (features.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.mark_non_differentiable(found.image_loss)
        return found.image_loss.sum(), found.image_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # The graph's last use may scale in place, which saves a second [v, D]; a graph that is kept must stay as it is.
        multiply = torch.mul if _graph_is_kept() else Tensor.mul_
        gradients = [
            None if gradient is None else multiply(gradient, upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None)


def _graph_is_kept() -> bool:
    """Whether this backward pass is to retain its graph; yes where PyTorch does not say (it is private)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
