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
from dataclasses import dataclass

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

__all__ = [
    "Columns",
    "Gradients",
    "accumulation_dtype",
    "compute_dtype",
    "gather_targets",
    "image_chunks",
    "one_pass",
    "row_blocks",
]

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


def _multiply(into: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """`into (+)= a @ b`; products of a smaller type are rounded once each and added in `into`'s."""
    if a.dtype == into.dtype:
        torch.addmm(into, a, b, beta=1 if add else 0, out=into)  # beta=0 ignores what is there
    elif add:
        into.add_(a @ b)
    else:
        into.copy_(a @ b)


def row_blocks(weight: Tensor) -> list[slice]:
    """The blocks of rows of a weight `[c, D]`, all but the last of one height."""
    most = _BLOCK_BYTES.get(weight.device.type, _BLOCK_BYTES_ELSEWHERE) // (4 * weight.shape[1])
    height = max(1, min(most, _MOST_BLOCK_ROWS.get(weight.device.type, most)))
    return [slice(first, min(first + height, len(weight))) for first in range(0, len(weight), height)]


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
    return _Pass(X, columns, group, needed, smoothing, scale, chunk_rows, gradient, add).run()


class _Pass:
    """The state of one pass: results as they grow, and the memory that chunks share."""

    def __init__(
        self,
        X: Tensor,
        columns: Columns,
        group: ProcessGroup | None,
        needed: tuple[bool, bool, bool],
        smoothing: float,
        scale: float,
        chunk_rows: int,
        gradient: Tensor | None,
        add: bool,
    ) -> None:
        self.X, self.columns, self.group = X, columns, group
        self.smoothing, self.scale, self.add = smoothing, scale, add
        self.accumulation = accumulation_dtype(X.dtype)
        (N, D), c = X.shape, len(columns.weight)
        self.blocks = row_blocks(columns.weight)
        self.height = height = self.blocks[0].stop if self.blocks else 0  # of all but the last
        self.differentiates = any(needed)

        def new(*shape: int) -> Tensor:
            return X.new_empty(shape, dtype=self.accumulation)

        self.image_loss = new(N)
        self.target_probability = None if self.differentiates else new(N)
        self.dW = (new(c, D) if gradient is None else gradient) if needed[1] else None
        self.db = new(c).zero_() if needed[2] else None
        # How many images' logits stand in the gradient's memory, and what of its first block they leave idle.
        self.in_gradient = min(N, D, chunk_rows or N) if self.dW is not None and not add else 0
        self.chunks = list(image_chunks(N, columns.most, chunk_rows, self.in_gradient))
        largest = max(chunk.stop - chunk.start for chunk in self.chunks)
        idle = new(0)
        if self.dW is not None and self.in_gradient == N and c >= height:
            idle = self.dW.view(-1)[N * height : height * D]
        self.dX_is_lodging = needed[0] and idle.numel() >= N * D > 0
        self.dX = (idle[: N * D].view(N, D) if self.dX_is_lodging else new(N, D)) if needed[0] else None
        self.own_dX: Tensor | None = None
        self.scattered: Pending | None = None
        self.scratch = new(largest * min(height, c))
        self.free: list[Tensor] = []  # memory of chunks that are done, for those to come

    def run(self) -> Gradients:
        """Every chunk's logits and, while the next chunk's exchange is on its way, its losses and gradients."""
        waiting: _Chunk | None = None
        for images in self.chunks:
            chunk = self.start(images)
            if waiting is not None:
                self.finish(waiting)
            waiting = chunk
        if waiting is not None:
            self.finish(waiting)
        if self.own_dX is None and self.scattered is not None:
            self.own_dX = self.scattered.wait()
        b = len(self.X) // group_size(self.group)
        own = slice(group_rank(self.group) * b, (group_rank(self.group) + 1) * b)
        probability = self.target_probability
        return Gradients(
            self.image_loss[own].clone(),
            None if probability is None else probability[own].clone(),
            self.own_dX,
            self.dW,
            self.db,
        )

    # --- logits --------------------------------------------------------------------------------------------------

    def _place(self, images: slice) -> _Logits:
        """Where a chunk's logits are to stand."""
        n, c = images.stop - images.start, len(self.columns.weight)
        if self.dW is not None and self.in_gradient and images.start == 0:
            return _Logits(self.dW.view(-1), images, self.blocks, self.height * self.X.shape[1], in_gradient=True)
        if self.free and self.free[-1].numel() >= n * c:
            flat = self.free.pop()
        else:
            self.free.clear()
            flat = self.X.new_empty(n * c, dtype=self.accumulation)
        return _Logits(flat, images, self.blocks, self.height * n, in_gradient=False)

    def start(self, images: slice) -> _Chunk:
        """Compute a chunk's logits and begin to exchange what ranks must know of each other's."""
        columns, smoothing = self.columns, self.smoothing
        logits, total_mass = self._place(images), columns.total_mass[images]
        maxima = total_mass.new_full((max(1, len(self.blocks)), logits.rows), -torch.inf)
        sums, target = torch.zeros_like(maxima), torch.zeros_like(total_mass)
        for number, block in enumerate(self.blocks):
            z = logits.block(number)
            _multiply(z, self.X[images], columns.weight[block].to(self.X.dtype).t(), add=False)
            if columns.bias is not None:
                z.add_(columns.bias[block])
            torch.amax(z, 1, out=maxima[number])
            apart = torch.sub(z, maxima[number][:, None], out=self._scratch(z)).exp_()
            torch.sum(apart, 1, out=sums[number])
            if smoothing:
                uniform = columns.uniform
                target += z @ uniform[block] if isinstance(uniform, Tensor) else z.sum(1).mul_(uniform)
        maximum = maxima.amax(0)
        total = (sums.mul_((maxima - maximum).exp_()) if self.blocks else sums).sum(0)
        if smoothing:
            target = (target - columns.smoothed_bias).mul_(smoothing * total_mass)
        elements, probability = None, torch.zeros_like(total)
        if self.blocks:
            mass, elements = columns.mass[images], logits.elements(columns.places[images])
            z = logits.flat[elements]
            target.add_((z * mass).sum(1), alpha=1 - smoothing)
            probability = torch.where(mass > 0, (z - maximum[:, None]).exp_(), 0.0).sum(1)
        packed = [maximum, total, target] if self.differentiates else [maximum, total, target, probability]
        return _Chunk(logits, elements, start_all_gather_rows(torch.stack(packed, dim=1), self.group))

    def _scratch(self, like: Tensor) -> Tensor:
        return self.scratch[: like.numel()].view_as(like)

    # --- losses and gradients ------------------------------------------------------------------------------------

    def finish(self, chunk: _Chunk) -> None:
        """A chunk's losses and, where they are wanted, gradients."""
        logits, images = chunk.logits, chunk.logits.images
        exchanged = chunk.exchange.wait().view(group_size(self.group), logits.rows, -1).unbind(2)
        maxima, sums, targets = exchanged[:3]
        highest = maxima.amax(0)
        shares = (maxima - highest).exp_()
        total = (sums * shares).sum(0)
        normaliser = highest + total.log()
        self.image_loss[images] = self.columns.total_mass[images] * normaliser - targets.sum(0)
        if self.target_probability is not None:
            self.target_probability[images] = (exchanged[3] * shares).sum(0) / total
        if self.differentiates:
            self._differentiate(chunk, normaliser)
            self._features_gradient(logits)
            self._weight_gradient(logits)
        if not logits.in_gradient:
            self.free.append(logits.flat)

    def _differentiate(self, chunk: _Chunk, normaliser: Tensor) -> None:
        """Turn logits into d loss / d logit = total mass * p - target mass, times `scale`.

        Subtracted in the accumulation type: in bf16 the difference of two nearly equal numbers would be zero.
        """
        columns, images = self.columns, chunk.logits.images
        total = columns.total_mass[images] * self.scale
        for number, block in enumerate(self.blocks):
            z = chunk.logits.block(number).sub_(normaliser[:, None]).exp_().mul_(total[:, None])
            if self.smoothing:
                uniform = columns.uniform
                spread = uniform[block] if isinstance(uniform, Tensor) else uniform
                z.sub_((self.smoothing * total)[:, None] * spread)
        if chunk.elements is not None:  # index_put_ adds duplicates up, and is deterministic
            minus = columns.mass[images] * (-(1 - self.smoothing) * self.scale)
            chunk.logits.flat.index_put_((chunk.elements,), minus, accumulate=True)
        if self.db is not None:
            for number, block in enumerate(self.blocks):
                self.db[block] += chunk.logits.block(number).sum(0)

    def _features_gradient(self, logits: _Logits) -> None:
        if self.dX is None:
            return
        images, compute = logits.images, self.X.dtype
        if not self.blocks:
            self.dX[images] = 0.0
        for number, block in enumerate(self.blocks):
            operand, W = logits.block(number).to(compute), self.columns.weight[block].to(compute)
            _multiply(self.dX[images], operand, W, add=number > 0)
        if images.stop == len(self.X):  # on its way during the last products
            self.scattered = start_reduce_scatter_rows(self.dX, self.group, overwrite=True)

    def _weight_gradient(self, logits: _Logits) -> None:
        if self.dW is None:
            return
        images = logits.images
        for number, block in [*enumerate(self.blocks)][::-1]:
            if number == 0 and self.dX_is_lodging and self.scattered is not None:
                self.own_dX = self.scattered.wait().clone()  # out of the way of the first block's gradient
            z = logits.block(number)
            if logits.in_gradient:  # about to be overwritten
                z = self._scratch(z).copy_(z)
            _multiply(self.dW[block], z.to(self.X.dtype).t(), self.X[images], add=self.add or images.start > 0)
