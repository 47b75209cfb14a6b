"""k-hot softmax cross-entropy with the vocabulary's rows sharded over a group of ranks: loss and gradient in one pass.

The pass itself is `softmax_pass`'s. Here are the shard, the autograd function, and the logits for evaluation. Must
never hold an `N x V` target, more than two chunks of logits, or another rank's logits.

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

from scale_wsl.collectives import all_gather_rows, group_rank, group_size, start_all_gather_rows
from scale_wsl.models.softmax_pass import (
    Columns,
    Gradients,
    accumulation_dtype,
    compute_dtype,
    gather_targets,
    image_chunks,
    one_pass,
    row_blocks,
)

__all__ = [
    "Shard",
    "khot_cross_entropy",
    "khot_evaluation",
    "logit_chunks",
    "scaled",
    "shard_rows",
]


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

    @property
    def most(self) -> int:
        """Rows of the rank that holds most of them."""
        return -(-self.vocabulary_size // self.size)

    def chunks(self, images: int) -> Iterator[slice]:
        """Slices of the N gathered images, alike on all ranks of the group: each is a collective."""
        return image_chunks(images, self.most, self.chunk_rows)


def khot_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mass: Tensor,
    shard: Shard,
    *,
    smoothing: float = 0.0,
    scale: float | None = None,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of this rank's images against the whole vocabulary.

    The gradient of weight and bias is that of the group's summed loss. Products are computed in the autocast type where
    it is on, else in the features'; softmax, loss and sums in fp32 (float64 where the features are).

    With label smoothing s, an image's target is `(1 - s) * mass + s * (its summed mass) / V` on every class (Szegedy et
    al. 2016, section 7, for any target mass): the uniform part comes out of the row's summed logits, so there is no
    dense target.

    With a `scale` the loss is final: it must reach backward() with a gradient of 1, once. The weight's gradient is then
    made within what `weight.grad` holds already, so that there is never a second one: `weight.grad` is None from here
    to the backward pass, which must follow.

    Args:
        features: `[b, D]`, this rank's; b is at least 1.
        weight: `[v, D]`, this rank's rows; v may be 0.
        bias: `[v]` or None.
        ids: int64 `[b, K]`, global class ids; entries without mass may be anything below V, by convention -1.
        mass: fp32 `[b, K]`, target mass of each entry; an id given twice counts twice.
        shard: the same on all ranks of the group but for the rank.
        smoothing: share s of the target mass that is spread evenly over all V classes.
        scale: factor of the total and of all gradients; None: 1, and any use of the graph.
        memory: `[v, D]` of the accumulation type, whose memory a new weight gradient may take.

    Returns:
        The sum over the b images of `sum_k target * -log p`, and each image's share `[b]` (detached, not scaled).
    """
    compute = compute_dtype(features)
    parameters = [features, weight] if bias is None else [features, weight, bias]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in parameters):
        options = _Options(shard, compute, smoothing)
        image_loss = _pass(features, weight, bias, ids, mass, options, (False, False, False)).image_loss
        return image_loss.sum() * (1.0 if scale is None else scale), image_loss
    older = None
    fits = weight.dtype == accumulation_dtype(compute)
    if scale is not None and fits and weight.is_leaf and weight.requires_grad and weight.grad is not None:
        older, weight.grad = weight.grad, None
    if older is not None or not fits:
        memory = older
    options = _Options(shard, compute, smoothing, scale, memory, older is not None)
    total, image_loss = _KHotCrossEntropy.apply(features, weight, bias, ids, mass, options)
    return total, image_loss


@torch.no_grad()
def khot_evaluation(
    features: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mass: Tensor, shard: Shard
) -> tuple[Tensor, Tensor]:
    """As `khot_cross_entropy`, without smoothing and without gradients.

    Returns:
        Each image's loss, and the probability that its target entries are given together (an id given twice counts
        twice), both `[b]`.
    """
    found = _pass(
        features, weight, bias, ids, mass, _Options(shard, compute_dtype(features), 0.0), (False, False, False)
    )
    assert found.target_probability is not None
    return found.image_loss, found.target_probability


@dataclass(frozen=True)
class _Options:
    shard: Shard
    compute: torch.dtype
    smoothing: float
    scale: float | None = None
    memory: Tensor | None = None
    add: bool = False  # to what `memory` holds


def _pass(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mass: Tensor,
    options: _Options,
    needed: tuple[bool, bool, bool],
) -> Gradients:
    shard, held = options.shard, options.shard.rows
    gathered = start_all_gather_rows(features.to(options.compute), shard.group)
    ids, mass = gather_targets(ids, mass, shard.group)
    mass = mass.to(accumulation_dtype(options.compute))
    here = (ids >= held.start) & (ids < held.stop)
    columns = Columns(
        weight=weight,
        bias=bias,
        places=torch.where(here, ids - held.start, 0),
        mass=torch.where(here, mass, 0.0),
        total_mass=mass.sum(1),
        most=shard.most,
        uniform=1 / shard.vocabulary_size,
    )
    return one_pass(
        gathered.wait(),
        columns,
        shard.group,
        needed=needed,
        smoothing=options.smoothing,
        scale=1.0 if options.scale is None else options.scale,
        chunk_rows=shard.chunk_rows,
        gradient=options.memory,
        add=options.add,
    )


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
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        found = _pass(features, weight, bias, ids, mass, options, ctx.needs_input_grad[:3])
        ctx.save_for_backward(found.features, found.weight, found.bias)
        ctx.dtypes = (features.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.is_final = options.scale is not None
        ctx.mark_non_differentiable(found.image_loss)
        return found.image_loss.sum() * (1.0 if options.scale is None else options.scale), found.image_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if ctx.is_final:
            _check_upstream(upstream)
            gradients: list[Tensor | None] = list(ctx.saved_tensors)
        else:
            gradients = scaled(ctx.saved_tensors, upstream)
        fitting = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*fitting, None, None, None)


def scaled(gradients: tuple[Tensor | None, ...], upstream: Tensor) -> list[Tensor | None]:
    """Gradients times the upstream gradient; for use in a backward pass.

    The graph's last use may scale in place, which saves a second `[v, D]`; a graph that is kept must stay as it is.
    """
    multiply = torch.mul if _graph_is_kept() else Tensor.mul_
    return [None if gradient is None else multiply(gradient, upstream) for gradient in gradients]


def _check_upstream(upstream: Tensor) -> None:
    """Refuse what a final loss cannot be multiplied by any more.

    Raises:
        RuntimeError: the gradient that reaches the loss is not 1, or the graph is to be used again. On a GPU, where
            looking waits for the device, the first is the device's own assertion, and ends the process.
    """
    if hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph") and _graph_is_kept():
        raise RuntimeError("a loss that was given its scale can be differentiated once only: do not retain its graph")
    if upstream.device.type != "cpu":
        torch._assert_async(upstream == 1)
    elif float(upstream) != 1:
        raise RuntimeError(
            f"a loss that was given its scale must be the end of its graph, but a gradient of {float(upstream)} came "
            "back to it: pass the whole factor as `scale`"
        )


def _graph_is_kept() -> bool:
    """Whether this backward pass is to retain its graph; yes where PyTorch does not say (it is private)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


@torch.no_grad()
def logit_chunks(
    features: Tensor, weight: Tensor, bias: Tensor | None, shard: Shard
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For evaluation: chunk by chunk over the N gathered images, the local logits and their common normaliser.

    Yields:
        The slice of images, logits `[n, v]`, and log of the sum of exponentials over the whole vocabulary `[n]`.
    """
    compute = compute_dtype(features)
    gathered = start_all_gather_rows(features.to(compute), shard.group)
    X = gathered.wait()
    blocks = row_blocks(weight)
    for images in shard.chunks(X.shape[0]):
        logits = X.new_empty((images.stop - images.start, len(weight)), dtype=accumulation_dtype(compute))
        for block in blocks:
            logits[:, block] = X[images] @ weight[block].to(compute).t()
        if bias is not None:
            logits.add_(bias)
        local = logits.logsumexp(1)  # -inf where no row is held here
        normaliser = all_gather_rows(local, shard.group).view(shard.size, -1).logsumexp(0)
        yield images, logits, normaliser
