"""Softmax cross-entropy over sampled classes, for vocabularies of a million hashtags and more.

A step touches the classes of its images and a sample of the others: D-wide rows are gathered, multiplied and given
gradients for these only. Must never read or make a `[v, D]` array, and must never depend on how the rows are sharded.

The estimator. Let P be the classes with target mass in the batch (of the head group's images), and let each class c
outside P come into the sample S with probability q_c; all of P is in S. Given the batch, the inclusion probability is
pi_c = 1 for c in P and q_c elsewhere, and

    Z^_i = sum over c in S of exp(z_ic) / pi_c          has the expectation          sum over all c of exp(z_ic) = Z_i

(Horvitz and Thompson 1952). So the loss is a softmax cross-entropy over S with the logits z_ic - log pi_c: the logQ
correction (Jean et al. 2015; Bengio and Senecal 2008), which is zero for P. Without it, log Z^ is too small by about
log(V/|S|) and the images' own classes push too little against the rest. log Z^ itself is biased by Jensen's inequality,
by -Var(Z^)/(2 Z^2) to first order.

How q_c comes about. The V rows are cut into strata of consecutive rows, whatever the sharding, and from a stratum of n
rows m are drawn without replacement, so q_c = m/n exactly. m is the stratum's share of the wanted number, at least 1,
and never random: every rank knows every q. A draw that hits a class of P ("accidental hit") adds nothing, as that class
is in S already, and with pi = 1: its q_c is what it would have been, since the draw does not look at P. Drawing
everything gives q = 1, and the full softmax.

Label smoothing's mass s * total / V on every class is estimated likewise: each class of S carries it 1/pi_c times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from scale_wsl.collectives import all_gather_rows, all_reduce, group_size, start_all_gather_rows
from scale_wsl.models.sharded_softmax import Shard, scaled
from scale_wsl.models.softmax_pass import Columns, accumulation_dtype, compute_dtype, gather_targets, one_pass
from scale_wsl.randomness import generator

__all__ = ["Sampling", "sampled_cross_entropy", "union_of_rows"]

_STRATUM = 1 << 16  # rows: few enough to draw from quickly, many enough for few strata


@dataclass(frozen=True)
class Sampling:
    """Which classes one micro-batch draws: a pure function of these four numbers and of the global row.

    Replicas and micro-batches of a step are told apart by `draw` alone, so that a run resumes exactly on any sharding.
    """

    vocabulary_size: int
    sampled: int  # classes to draw, 1 to V
    seed: int
    draw: int

    @cached_property
    def strata(self) -> int:
        """How many strata there are: each draws at least one row."""
        return max(1, min(self.sampled, -(-self.vocabulary_size // _STRATUM)))

    def stratum(self, number: int) -> tuple[range, int]:
        """Global rows of a stratum, and how many of them are drawn."""
        V, m, count = self.vocabulary_size, self.sampled, self.strata
        return (
            range(number * V // count, (number + 1) * V // count),
            (number + 1) * m // count - number * m // count,
        )

    def most(self, rows: int) -> int:
        """A bound on what is drawn from any `rows` consecutive rows."""
        smallest, most_drawn = self.vocabulary_size // self.strata, -(-self.sampled // self.strata)
        return min(rows, (rows // smallest + 2) * most_drawn)

    def rows(self, held: range) -> tuple[Tensor, Tensor]:
        """The global rows drawn among those held, int64 `[s]`, ascending, and their q, float64 `[s]`."""
        found, probabilities = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)]
        first = held.start * self.strata // self.vocabulary_size
        for number in range(first, self.strata) if held else ():
            rows, drawn = self.stratum(number)
            if rows.start >= held.stop:
                break
            draws = generator("sampled softmax", self.seed, self.draw, number)
            places = torch.from_numpy(draws.choice(len(rows), drawn, replace=False, shuffle=False)).sort().values
            places += rows.start
            places = places[(places >= held.start) & (places < held.stop)]
            found.append(places)
            probabilities.append(torch.full((len(places),), drawn / len(rows), dtype=torch.float64))
        return torch.cat(found), torch.cat(probabilities)


@dataclass(frozen=True)
class _Touched:
    """The classes of S that this rank holds."""

    rows: Tensor  # int64 [s], local, ascending
    offset: Tensor  # [s], -log pi, accumulation type
    places: Tensor  # int64 [N, K], where in `rows` a target entry is, 0 for those that are not held here
    mass: Tensor  # [N, K], 0 for those that are not held here


def _touch(ids: Tensor, mass: Tensor, held: range, sampling: Sampling) -> _Touched:
    drawn, q = (part.to(ids.device) for part in sampling.rows(held))
    own = (ids >= held.start) & (ids < held.stop) & (mass > 0)
    positives: Tensor = torch.unique(ids[own])
    rows: Tensor = torch.unique(torch.cat([drawn, positives]))
    offset = torch.zeros(len(rows), dtype=torch.float64, device=ids.device)
    offset[torch.searchsorted(rows, drawn)] = -q.log()
    offset[torch.searchsorted(rows, positives)] = 0.0  # pi = 1, also where one was drawn as well
    places = torch.searchsorted(rows, torch.where(own, ids, held.start)) if len(rows) else torch.zeros_like(ids)
    return _Touched(rows - held.start, offset.to(mass.dtype), torch.where(own, places, 0), torch.where(own, mass, 0.0))


def sampled_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mass: Tensor,
    shard: Shard,
    sampling: Sampling,
    *,
    smoothing: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `sharded_softmax.khot_cross_entropy`, over the classes that `sampling` draws and those of the batch.

    Gradients of weight and bias are sparse COO tensors over the touched rows of this rank. Which rows those are has to
    be known to the host, so on a GPU it waits for the device.
    """
    options = _Options(shard, sampling, compute_dtype(features), smoothing, scale)
    total, image_loss = _SampledCrossEntropy.apply(features, weight, bias, ids, mass, options)
    return total, image_loss


@dataclass(frozen=True)
class _Options:
    shard: Shard
    sampling: Sampling
    compute: torch.dtype
    smoothing: float
    scale: float


class _SampledCrossEntropy(torch.autograd.Function):
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
        shard, accumulation = options.shard, accumulation_dtype(options.compute)
        gathered = start_all_gather_rows(features.to(options.compute), shard.group)
        ids, mass = gather_targets(ids, mass, shard.group)
        mass = mass.to(accumulation)
        touched = _touch(ids, mass, shard.rows, options.sampling)
        offset = touched.offset
        uniform = offset.exp() / shard.vocabulary_size
        columns = Columns(
            weight=weight[touched.rows],
            bias=offset if bias is None else bias[touched.rows] + offset,
            places=touched.places,
            mass=touched.mass,
            total_mass=mass.sum(1),
            most=min(shard.most, options.sampling.most(shard.most) + ids.numel()),
            uniform=uniform,
            smoothed_bias=uniform @ offset,
        )
        found = one_pass(
            gathered.wait(),
            columns,
            shard.group,
            needed=ctx.needs_input_grad[:3],
            smoothing=options.smoothing,
            scale=options.scale,
            chunk_rows=shard.chunk_rows,
        )
        ctx.save_for_backward(touched.rows, found.features, found.weight, found.bias)
        ctx.dtypes = (features.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.shapes = (weight.shape, weight.shape[:1])
        ctx.mark_non_differentiable(found.image_loss)
        return found.image_loss.sum() * options.scale, found.image_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        rows, *gradients = ctx.saved_tensors
        of_features, *of_rows = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(scaled(tuple(gradients), upstream), ctx.dtypes, strict=True)
        )
        sparse = [
            None
            if values is None
            else torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)
            for values, shape in zip(of_rows, ctx.shapes, strict=True)
        ]
        return (of_features, *sparse, None, None, None)


def union_of_rows(gradient: Tensor, group: ProcessGroup | None) -> Tensor:
    """A sparse gradient of rows, added up over micro-batches and over the group: it holds every rank's rows.

    Costs an all-gather of row numbers and an all-reduce of the union's rows. Replicas draw the same classes, so that
    the union is these and everybody's positives.
    """
    gradient = gradient.coalesce()
    if group_size(group) == 1:
        return gradient
    rows = gradient.indices()[0]
    counts = all_gather_rows(rows.new_tensor([len(rows)]), group)
    padded = rows.new_full((int(counts.max()),), -1)
    padded[: len(rows)] = rows
    union: Tensor = torch.unique(all_gather_rows(padded, group))
    union = union[union >= 0]
    values = gradient.values()
    together = values.new_zeros(len(union), *values.shape[1:])
    together[torch.searchsorted(union, rows)] = values
    all_reduce(together, group)
    return torch.sparse_coo_tensor(union[None], together, gradient.shape, is_coalesced=True, check_invariants=False)
