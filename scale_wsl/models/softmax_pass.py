"""One pass of softmax cross-entropy over classes that are spread over a group of ranks: losses and gradients at once.

Images are taken in chunks, classes in blocks. A chunk's logits are made block by block, then one exchange of `[n, 3]`
(largest logit, sum of exponentials, target dot) gives each image's loss, and the logits are turned into their gradient
where they stand. Must never hold an `N x V` target, more than two chunks of logits, or another rank's logits.

Where logits stand: the memory of the weight's gradient is idle until the gradient is written, and a block of it (`B*D`
numbers) has room for the block's logits (`n*B`) as long as n <= D. So the first chunk of a fresh gradient takes no
memory of its own, which is why it may be as large as D images. Later chunks, and all that add to an older gradient,
take turns in two buffers. Where one chunk is all, the features' gradient too is made in what is idle of the first
block, which is then written last.

Blocks keep a few MiB of weights in the cache between two uses of them, and are what bf16 products are cast in: no copy
of the whole weight is ever made.

Shapes: N images of the whole group, n in a chunk, D features, c classes held here, B in a block, K target entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from scale_wsl.collectives import (
    Pending,
    all_gather_rows,
    group_rank,
    group_size,
    start_all_gather_rows,
    start_reduce_scatter_rows,
)

__all__ = ["Columns", "Gradients", "accumulation_dtype", "compute_dtype", "gather_targets", "image_chunks", "one_pass"]

_CHUNK_BYTES = 64 << 20  # of fp32 logits: many rows to a matrix product, and small beside the weights
_BLOCK_BYTES = {"cpu": 4 << 20}  # of fp32 weight rows: what a core's share of the cache holds
_BLOCK_BYTES_ELSEWHERE = 128 << 20  # a GPU wants products large enough to fill it
_MOST_BLOCK_ROWS = {"cpu": 1024}


def compute_dtype(features: Tensor) -> torch.dtype:
    """The type of products: autocast's where it is on, else the features'."""
    kind = features.device.type
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return features.dtype


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """The type of softmax, loss and sums: fp32, or float64 for float64 products."""
    return torch.float64 if compute == torch.float64 else torch.float32


def image_chunks(images: int, classes: int, chunk_rows: int = 0, first: int = 0) -> Iterator[slice]:
    """Slices of the N gathered images; a pure function, as every chunk is a collective.

    Args:
        images: N.
        classes: the most that any rank of the group holds.
        chunk_rows: images of a chunk; 0: as many as keep its logits within 64 MiB.
        first: images of the first chunk; 0: as many as of the others.
    """
    step = chunk_rows or max(1, _CHUNK_BYTES // (4 * max(1, classes)))
    start = 0
    while start < images:
        stop = min(start + (first if first and not start else step), images)
        yield slice(start, stop)
        start = stop


def gather_targets(ids: Tensor, mass: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Everybody's targets `[N, K]` in one collective: ids as int32, the mass's bits beside them."""
    if group_size(group) == 1:
        return ids, mass
    packed = torch.cat([ids.to(torch.int32), mass.contiguous().view(torch.int32)], dim=1)
    gathered_ids, bits = all_gather_rows(packed, group).chunk(2, dim=1)
    return gathered_ids.to(torch.int64), bits.contiguous().view(torch.float32)


@dataclass(frozen=True)
class Columns:
    """The classes whose logits this rank computes, and which of them the images have."""

    weight: Tensor  # [c, D]
    bias: Tensor | None  # [c], added to the logits; c may be 0
    places: Tensor  # int64 [N, K], column of each target entry, 0 for those that are not held here
    mass: Tensor  # [N, K], accumulation type, 0 for those that are not held here
    total_mass: Tensor  # [N], accumulation type, over all ranks
    most: int  # columns of the rank that holds most of them: ranks must cut chunks alike
    uniform: Tensor | float  # [c] or one number: target mass that smoothing gives a column, per unit of total mass
    smoothed_bias: Tensor | float = 0.0  # sum over columns of uniform x (bias that is no part of the true logit)


@dataclass
class Gradients:
    """What a pass found."""

    image_loss: Tensor  # [b], accumulation type, as all of these
    target_probability: Tensor | None  # [b]; where no gradient is wanted
    features: Tensor | None = None  # [b, D]
    weight: Tensor | None = None  # [c, D]
    bias: Tensor | None = None  # [c]


@dataclass
class _Logits:
    """A chunk's logits, block after block, each `[n, B]` and contiguous; later their gradient."""

    flat: Tensor  # 1-D
    images: slice
    blocks: list[slice]
    stride: int  # elements from one block's start to the next one's
    in_gradient: bool

    @property
    def rows(self) -> int:
        """Images of the chunk, n."""
        n: int = self.images.stop - self.images.start
        return n

    def block(self, number: int) -> Tensor:
        """`[n, B]` of a block."""
        width = self.blocks[number].stop - self.blocks[number].start
        return self.flat[number * self.stride :][: self.rows * width].view(self.rows, width)

    def elements(self, columns: Tensor) -> Tensor:
        """Places in `flat` of the columns `[n, K]` of each row."""
        height = self.blocks[0].stop
        number = columns // height
        width = torch.where(number == len(self.blocks) - 1, self.blocks[-1].stop - self.blocks[-1].start, height)
        row = torch.arange(self.rows, device=columns.device)[:, None]
        places: Tensor = number * self.stride + row * width + (columns - number * height)
        return places


@dataclass
class _Chunk:
    """Images whose exchange is under way."""

    logits: _Logits
    elements: Tensor | None  # [n, K], where the target entries' logits are; None: no column is held here
    exchange: Pending  # [g*n, 3 or 4]


@dataclass
class _Buffers:
    """Memory of chunks that are done, for those to come."""

    free: list[Tensor] = field(default_factory=list)

    def take(self, like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        if self.free and self.free[-1].numel() >= size:
            return self.free.pop()[:size]
        self.free.clear()
        return like.new_empty(size, dtype=dtype)


def _multiply(into: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """`into (+)= a @ b`; products of a smaller type are rounded once each and added in `into`'s."""
    if a.dtype == into.dtype:
        torch.addmm(into, a, b, beta=1 if add else 0, out=into)  # beta=0 ignores what is there
    elif add:
        into.add_(a @ b)
    else:
        into.copy_(a @ b)


def _block_rows(features: int, kind: str) -> int:
    rows = _BLOCK_BYTES.get(kind, _BLOCK_BYTES_ELSEWHERE) // (4 * features)
    return max(1, min(rows, _MOST_BLOCK_ROWS.get(kind, rows)))


def one_pass(
    X: Tensor,
    columns: Columns,
    group: ProcessGroup | None,
    *,
    needed: tuple[bool, bool, bool],
    smoothing: float = 0.0,
    scale: float = 1.0,
    chunk_rows: int = 0,
    gradient: Tensor | None = None,
    add: bool = False,
) -> Gradients:
    """Losses of this rank's images, and the `needed` gradients (features, weight, bias) of the group's summed loss.

    Args:
        X: features of the whole group, `[N, D]`, in the type of products.
        columns: this rank's classes.
        group: the ranks among which the classes are spread.
        needed: which gradients.
        smoothing: the share of the target mass that is spread evenly over all classes.
        scale: of the gradients; losses of images are not scaled.
        chunk_rows: see `image_chunks`.
        gradient: memory `[c, D]` of the accumulation type for the weight's gradient; None: new.
        add: whether the weight's gradient is added to what `gradient` holds.
    """
    compute, W, bias = X.dtype, columns.weight, columns.bias
    accumulation = accumulation_dtype(compute)
    (N, D), c, kind = X.shape, len(W), X.device.type
    height = _block_rows(D, kind)
    blocks = [slice(start, min(start + height, c)) for start in range(0, c, height)]
    wants_any = any(needed)
    image_loss = X.new_empty(N, dtype=accumulation)
    target_probability = None if wants_any else X.new_empty(N, dtype=accumulation)
    if needed[1] and gradient is None:
        gradient = X.new_empty(c, D, dtype=accumulation)
    dW = gradient if needed[1] else None
    db = X.new_zeros(c, dtype=accumulation) if needed[2] else None
    in_gradient = min(N, D, chunk_rows or N) if dW is not None and not add else 0
    chunks = list(image_chunks(N, columns.most, chunk_rows, in_gradient))
    largest = max(chunk.stop - chunk.start for chunk in chunks)
    idle = dW.view(-1)[largest * height : height * D] if dW is not None and len(chunks) == 1 and in_gradient else None
    dX = None
    if needed[0] and idle is not None and c >= height and idle.numel() >= N * D:
        dX = idle[: N * D].view(N, D)
    elif needed[0]:
        dX, idle = X.new_empty(N, D, dtype=accumulation), None
    scratch = X.new_empty(largest * min(height, c), dtype=accumulation)
    buffers = _Buffers()
    scattered: Pending | None = None
    own_dX: Tensor | None = None

    def start(images: slice) -> _Chunk:
        n = images.stop - images.start
        if dW is not None and in_gradient and images.start == 0:
            logits = _Logits(dW.view(-1), images, blocks, height * D, True)
        else:
            logits = _Logits(buffers.take(X, n * c, accumulation), images, blocks, height * n, False)
        maxima = X.new_full((max(1, len(blocks)), n), -torch.inf, dtype=accumulation)
        sums, target = torch.zeros_like(maxima), X.new_zeros(n, dtype=accumulation)
        for number, block in enumerate(blocks):
            z = logits.block(number)
            _multiply(z, X[images], W[block].to(compute).t(), add=False)
            if bias is not None:
                z.add_(bias[block])
            torch.amax(z, 1, out=maxima[number])
            apart = torch.sub(z, maxima[number][:, None], out=scratch[: z.numel()].view_as(z)).exp_()
            torch.sum(apart, 1, out=sums[number])
            if smoothing:
                uniform = columns.uniform
                target += z @ uniform[block] if isinstance(uniform, Tensor) else z.sum(1).mul_(uniform)
        maximum = maxima.amax(0)
        total = sums.mul_((maxima - maximum).exp_()).sum(0) if blocks else sums[0]
        if smoothing:
            target = (target - columns.smoothed_bias).mul_(smoothing * columns.total_mass[images])
        elements = logits.elements(columns.places[images]) if blocks else None
        packed = [maximum, total, target]
        if elements is not None:
            z = logits.flat[elements]
            packed[2] = target.add_((z * columns.mass[images]).sum(1), alpha=1 - smoothing)
            if not wants_any:
                there = columns.mass[images] > 0
                packed.append(torch.where(there, (z - maximum[:, None]).exp_(), 0.0).sum(1))
        elif not wants_any:
            packed.append(total)
        return _Chunk(logits, elements, start_all_gather_rows(torch.stack(packed, dim=1), group))

    def finish(chunk: _Chunk) -> None:
        nonlocal scattered, own_dX
        logits, images = chunk.logits, chunk.logits.images
        exchanged = chunk.exchange.wait().view(group_size(group), logits.rows, -1).unbind(2)
        maxima, sums, targets = exchanged[:3]
        highest = maxima.amax(0)
        shares = (maxima - highest).exp_()
        total = (sums * shares).sum(0)
        normaliser = highest + total.log()
        image_loss[images] = columns.total_mass[images] * normaliser - targets.sum(0)
        if target_probability is not None:
            target_probability[images] = (exchanged[3] * shares).sum(0) / total
        if wants_any:
            _differentiate(chunk, normaliser)
            if dX is not None:
                for number, block in enumerate(blocks):
                    operand = logits.block(number).to(compute)
                    _multiply(dX[images], operand, W[block].to(compute), add=number > 0)
                if not blocks:
                    dX[images] = 0.0
                if images.stop == N:
                    # on its way during the last products
                    scattered = start_reduce_scatter_rows(dX, group, overwrite=True)
            if dW is not None:
                for number, block in [*enumerate(blocks)][::-1]:
                    if number == 0 and idle is not None and scattered is not None:
                        own_dX = scattered.wait().clone()  # out of the way of the first block's gradient
                    z = logits.block(number)
                    if logits.in_gradient:  # about to be overwritten
                        z = scratch[: z.numel()].view_as(z).copy_(z)
                    _multiply(dW[block], z.to(compute).t(), X[images], add=add or images.start > 0)
        if not logits.in_gradient:
            buffers.free.append(logits.flat)

    def _differentiate(chunk: _Chunk, normaliser: Tensor) -> None:
        """Turn logits into d loss / d logit = total mass * p - target mass, times `scale`.

        Subtracted in the accumulation type: in bf16 the difference of two nearly equal numbers would be zero.
        """
        images = chunk.logits.images
        total = columns.total_mass[images] * scale
        for number, block in enumerate(blocks):
            z = chunk.logits.block(number).sub_(normaliser[:, None]).exp_().mul_(total[:, None])
            if smoothing:
                uniform = columns.uniform
                spread = uniform[block] if isinstance(uniform, Tensor) else uniform
                z.sub_((smoothing * total)[:, None] * spread)
        if chunk.elements is not None:  # index_put_ adds duplicates up, and is deterministic
            minus = columns.mass[images] * (-(1 - smoothing) * scale)
            chunk.logits.flat.index_put_((chunk.elements,), minus, accumulate=True)
        if db is not None:
            for number, block in enumerate(blocks):
                db[block] += chunk.logits.block(number).sum(0)

    waiting: _Chunk | None = None
    for images in chunks:
        chunk = start(images)
        if waiting is not None:
            finish(waiting)  # while the exchange of `chunk` is on its way
        waiting = chunk
    if waiting is not None:
        finish(waiting)

    if own_dX is None and scattered is not None:
        own_dX = scattered.wait()
    b = N // group_size(group)
    own = slice(group_rank(group) * b, (group_rank(group) + 1) * b)
    return Gradients(
        image_loss[own].clone(),
        None if target_probability is None else target_probability[own].clone(),
        own_dX,
        dW,
        db,
    )
