"""The hashtag head: a linear classifier whose rows are sharded over a group of ranks, and its softmax cross-entropy.

It stands beside the trunk, outside every engine. Must never gather logits, weights or a dense target: ranks exchange
features, targets and a few numbers per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scale_wsl.collectives import all_gather_rows, all_reduce, exchange_rows, group_size
from scale_wsl.errors import UserError
from scale_wsl.models.head_group import check_group_size
from scale_wsl.models.sampled_softmax import Sampling, sampled_cross_entropy, union_of_rows
from scale_wsl.models.sharded_softmax import Shard, khot_cross_entropy, khot_evaluation, logit_chunks
from scale_wsl.randomness import derived_seed
from scale_wsl.recipe import setting

__all__ = ["INITIAL_BLOCK", "HeadConfig", "HeadOutput", "ShardedHead", "head_mesh", "initial_rows"]

INITIAL_BLOCK = 1024  # rows drawn from one seed
_INITIAL_STD = 0.01  # Goyal et al. 2017, section 5.1, whose recipe the paper follows


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Section `head`: how the classifier's rows are sharded."""

    group_size: int | str = setting(
        0, "ranks that share one copy of the rows, a divisor of the world size; 0: all; auto: the fewest bytes a step"
    )
    chunk_rows: int = setting(
        0,
        "images whose logits are computed at a time; 0: as many as there are features, in the weight gradient's own "
        "memory, and where that is taken as many as fit into 64 MiB",
    )
    bias: bool = setting(True, "whether each hashtag has a bias")
    smoothing: float = setting(0.0, "label smoothing: share of an image's target mass spread over all hashtags")
    sampled: int = setting(
        0, "hashtags sampled per micro-batch for the training loss, beside the images' own; 0: all, no sampling"
    )

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a number is negative, or smoothing is 1 or more.
        """
        if isinstance(self.group_size, str) and self.group_size != "auto":
            raise UserError(f"head.group_size is {self.group_size!r}, but must be a number of ranks, 0 or auto")
        for key in ("group_size", "chunk_rows", "sampled"):
            if getattr(self, key) != "auto" and getattr(self, key) < 0:
                raise UserError(f"head.{key} is {getattr(self, key)}, but must be 0 or more")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"head.smoothing is {self.smoothing}, but must be at least 0 and below 1")


@dataclass(frozen=True)
class HeadOutput:
    """What the head says of this rank's images."""

    loss: Tensor  # the sum over this rank's images, times the scale; ranks add up to the total
    row_loss: Tensor  # [b], detached, not scaled
    target_probability: Tensor | None = None  # [b], of the image's classes together; None in training


def head_mesh(group_size: int = 0, device_type: str = "cpu") -> DeviceMesh | None:
    """The ranks as a `replica x head` mesh, consecutive ranks sharing a head (collective).

    Args:
        group_size: ranks that share one copy of the rows; 0: all ranks.
        device_type: where the head's tensors will be.

    Returns:
        The mesh, or None where torch.distributed is not initialised: one process that holds all rows.

    Raises:
        UserError: `group_size` does not divide the world size.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    check_group_size(group_size, world)
    ranks = group_size or world
    if not dist.is_initialized():
        return None
    return init_device_mesh(device_type, (world // ranks, ranks), mesh_dim_names=("replica", "head"))


def initial_rows(seed: int, rows: range, num_features: int) -> Tensor:
    """Initial weights `[len(rows), num_features]` of these global rows, fp32 on the CPU.

    A pure function of the seed and the row's number: drawn in blocks of 1,024 rows with a seed each, so that every
    sharding starts from the same head.
    """
    weight = torch.empty(len(rows), num_features)
    for block in range(rows.start // INITIAL_BLOCK, -(-rows.stop // INITIAL_BLOCK)) if rows else ():
        numbers = torch.Generator().manual_seed(derived_seed("init", seed, "head.weight", block))
        drawn = torch.empty(INITIAL_BLOCK, num_features).normal_(0.0, _INITIAL_STD, generator=numbers)
        first, last = max(rows.start, block * INITIAL_BLOCK), min(rows.stop, (block + 1) * INITIAL_BLOCK)
        weight[first - rows.start : last - rows.start] = drawn[
            first - block * INITIAL_BLOCK : last - block * INITIAL_BLOCK
        ]
    return weight


class ShardedHead(nn.Module):
    """Rows `[start, stop)` of a `V x D` classifier, ceil(V/g) of them on each of a head group's g ranks.

    The last ranks may hold fewer rows or none. All methods that compute are collectives of the head group: every rank
    of it calls them with the same number of images b and target entries K, and with gradients enabled or not alike.

    The gradient contract: with the same upstream gradient on all ranks of a group (1/L, say), rows and features receive
    the gradient of the sum of the group's losses - no reduction is left to do inside the group. `sync_gradients` then
    adds up the replicas'.

    With `sampled`, the training loss is over the classes of the group's images and that many others, drawn anew in
    every call (`sampled_softmax`), and gradients of weight and bias are sparse: they hold the rows that were touched.
    The loss of an evaluation, without gradients, is always over all classes.

    Args:
        vocabulary_size: classes, V.
        num_features: D.
        mesh: from `head_mesh`; None: this process holds all rows.
        seed: of the initial weights, which are the same for every sharding.
        dtype: of the parameters.
        bias: whether each class has a bias, which starts at 0.
        chunk_rows: images whose logits are computed at a time; 0: D of them in the memory of a fresh weight gradient,
            else as many as fit into 64 MiB.
        smoothing: share of an image's target mass that is spread evenly over all classes.
        sampled: classes drawn for the training loss, of all V; 0: the loss is over all classes.

    Attributes:
        weight: `[v, D]`, this rank's rows.
        bias: `[v]`, or None.
        rows: their global numbers.
        spare: memory `[v, D]` that the next weight gradient will take; None: new memory.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_features: int,
        *,
        mesh: DeviceMesh | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        chunk_rows: int = 0,
        smoothing: float = 0.0,
        sampled: int = 0,
    ) -> None:
        super().__init__()
        if vocabulary_size < 1 or num_features < 1:
            raise ValueError(f"a head needs at least one class and one feature, not {vocabulary_size}, {num_features}")
        if mesh is None and group_size() > 1:
            raise ValueError("a head on several ranks needs a mesh (head_mesh)")
        self.vocabulary_size = vocabulary_size
        self.num_features = num_features
        self.mesh = mesh
        self.replicas = None if mesh is None else mesh.get_group("replica")
        self.shard = Shard(vocabulary_size, None if mesh is None else mesh.get_group("head"), chunk_rows)
        self.rows = self.shard.rows
        self.smoothing = smoothing
        self.sampled = min(sampled, vocabulary_size)
        self.seed = seed
        self.weight = nn.Parameter(initial_rows(seed, self.rows, num_features).to(dtype))
        self.bias = nn.Parameter(torch.zeros(len(self.rows), dtype=dtype)) if bias else None
        self._shapes_agree = False
        self.spare: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Ranks that share the rows, g."""
        return self.shard.size

    @property
    def replica_count(self) -> int:
        """Ranks that hold the same rows as this one, itself included."""
        return group_size(self.replicas)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"classes={self.vocabulary_size}, features={self.num_features}, rows={self.rows.start}:{self.rows.stop}"

    # --- training ------------------------------------------------------------------------------------------------

    def loss(
        self, features: Tensor, ids: Tensor, mass: Tensor, *, scale: float | None = None, draw: int = 0
    ) -> HeadOutput:
        """The k-hot softmax cross-entropy of this rank's images, summed: the caller divides by what it is a mean over.

        An image without targets (all mass 0) has neither loss nor gradient.

        Training loops pass the whole factor (1/L) as `scale`. The loss is then final: nothing may be done to it but
        `backward()` with a gradient of 1, once, before anything else reads or writes `weight.grad`. In return the
        weight has one gradient in memory, never two.

        Args:
            features: `[b, D]`.
            ids: int64 `[b, K]`, global class ids, -1 where there is none.
            mass: fp32 `[b, K]`, the target mass of each id, 0 where there is none; 1/k each in the paper.
            scale: factor of the loss and of its gradients; None: 1, for a loss that is free to be used in any way.
            draw: number of this micro-batch among all of the run: which classes a sampled loss draws. The same on all
                ranks.

        Raises:
            ValueError: shapes or types that do not fit, or shapes that differ between the ranks of the group, or ids of
                V and above. Ranks are compared in every call on a CPU; elsewhere, where looking waits for the device,
                in the first call only, and ids are trusted.
        """
        self._check(features, ids, mass)
        trained = [parameter for parameter in (features, *self.parameters()) if parameter.requires_grad]
        if not torch.is_grad_enabled() or not trained:
            row_loss, probability = khot_evaluation(features, self.weight, self.bias, ids, mass, self.shard)
            return HeadOutput(row_loss.sum() * (1.0 if scale is None else scale), row_loss, probability)
        if self.sampled:
            sampling = Sampling(self.vocabulary_size, self.sampled, self.seed, draw)
            loss, row_loss = sampled_cross_entropy(
                features,
                self.weight,
                self.bias,
                ids,
                mass,
                self.shard,
                sampling,
                smoothing=self.smoothing,
                scale=1.0 if scale is None else scale,
            )
            return HeadOutput(loss, row_loss)
        memory, self.spare = self.spare, None
        if memory is not None and memory.device != self.weight.device:
            memory = None
        loss, row_loss = khot_cross_entropy(
            features,
            self.weight,
            self.bias,
            ids,
            mass,
            self.shard,
            smoothing=self.smoothing,
            scale=scale,
            memory=memory,
        )
        return HeadOutput(loss, row_loss)

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Add up the gradients of the ranks that hold the same rows; once, after a step's last micro-batch.

        Sparse gradients are added up over micro-batches too, and hold the union of the replicas' rows.
        """
        for parameter in self.parameters():
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = union_of_rows(parameter.grad, self.replicas)
            else:
                all_reduce(parameter.grad, self.replicas)

    def gradients(self) -> list[Tensor]:
        """The gradients' numbers, after `sync_gradients`, sharing memory with them: for norms, and to scale in place.

        Of a sparse gradient, the values of the rows that it holds; all others are zero.
        """
        found = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return [gradient.values() if gradient.is_sparse else gradient for gradient in found]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, keeping the memory of the weight's for the next one.

        New memory costs about as much time as a matrix product on a CPU, where the system clears every page of it. Who
        still holds the old gradient must have copied it: the next one is written over it.
        """
        gradient = self.weight.grad
        if set_to_none and gradient is not None and not gradient.is_sparse:
            self.spare = gradient
        super().zero_grad(set_to_none)

    def _check(self, features: Tensor, ids: Tensor, mass: Tensor) -> None:
        b, K = ids.shape
        if b < 1 or features.shape != (b, self.num_features) or mass.shape != (b, K):
            raise ValueError(
                f"features {list(features.shape)}, ids {list(ids.shape)} and mass {list(mass.shape)} do not fit a head "
                f"of {self.num_features} features"
            )
        if ids.dtype != torch.int64 or mass.dtype != torch.float32:
            raise ValueError(f"ids must be int64 and mass float32, not {ids.dtype} and {mass.dtype}")
        on_cpu = features.device.type == "cpu"
        if on_cpu and ids.numel() and int(ids.max()) >= self.vocabulary_size:
            raise ValueError(f"class {int(ids.max())} is beyond the {self.vocabulary_size} of this head")
        if self.group_size > 1 and (on_cpu or not self._shapes_agree):
            shapes = all_gather_rows(torch.tensor([[b, K]], device=features.device), self.shard.group)
            if not torch.equal(shapes, shapes[:1].expand_as(shapes)):
                raise ValueError(f"ranks of one head group have batches of different shapes [b, K]: {shapes.tolist()}")
            self._shapes_agree = True

    # --- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def top_k(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The most probable classes of this rank's images; logits stay where they are.

        Args:
            features: `[b, D]`.
            k: how many; all V where there are fewer.

        Returns:
            Log-probabilities in descending order, and int64 global ids, each `[b, min(k, V)]`.
        """
        k, local_k = min(k, self.vocabulary_size), min(k, len(self.rows))
        pieces = []
        for _, logits, normaliser in logit_chunks(features, self.weight, self.bias, self.shard):
            values, places = logits.topk(local_k)
            found = torch.stack([values - normaliser[:, None], places + self.rows.start], dim=2)
            pieces.append(F.pad(found.double(), (0, 0, 0, k - local_k), value=-torch.inf))
        # Ids below 2^53 are exact in float64, so log-probabilities and ids travel together, each rank's to that rank.
        candidates = exchange_rows(torch.cat(pieces), self.shard.group)
        candidates = candidates.view(self.group_size, -1, k, 2)
        values, ids = candidates.transpose(0, 1).flatten(1, 2).unbind(2)  # [b, g*k] each
        best, places = values.topk(k)
        return best.to(normaliser.dtype), ids.gather(1, places).long()

    @torch.no_grad()
    def local_log_probabilities(self, features: Tensor) -> Tensor:
        """Log-probabilities `[g*b, v]` of the group's images, in rank order, for the classes that this rank holds."""
        chunks = logit_chunks(features, self.weight, self.bias, self.shard)
        return torch.cat([logits.sub_(normaliser[:, None]) for _, logits, normaliser in chunks])
