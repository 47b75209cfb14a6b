"""The runs that engines are compared on: the real Trainer over made-up batches, and float64 without any engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from scale_wsl.checkpoint.layout import Meta
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.engines import ds_config
from scale_wsl.engines.build import build_engine
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.ds_zero import Offloading
from scale_wsl.engines.world import World
from scale_wsl.loading.decode import normalize
from scale_wsl.loading.loader import Batch
from scale_wsl.models.head import ShardedHead, head_mesh, initial_rows
from scale_wsl.models.recompute import Stage
from scale_wsl.models.resnext import Bottleneck
from scale_wsl.models.weights import InitialWeights, materialise
from scale_wsl.shards import Source
from scale_wsl.training import state
from scale_wsl.training.loop import Counter, Trainer
from scale_wsl.training.preemption import Preemption
from scale_wsl.training.schedule import LearningRate, OptimConfig

BATCH = 16  # images in a global batch, where a test does not say otherwise
LABELS = 11  # uneven over 2 and 4 ranks
RATE = LearningRate(start=0.001, peak=0.01, warm_up=5 * BATCH, total=20 * BATCH, halvings=3)
ENGINES = ("ddp", "fsdp", "hsdp", "fairscale", "zero0", "zero1", "zero2", "zero3")
SEED = 3
GROUP_NORM = partial(nn.GroupNorm, 8)
WEIGHTS = InitialWeights(SEED, zero_residual=False)


class Trunk(nn.Module):
    """A ResNeXt's stem and two of its blocks, with GroupNorm: small enough for every engine on four ranks.

    GroupNorm, because BatchNorm's statistics are per rank: on another world size it is another network.
    """

    num_features = 256

    def __init__(self, norm: Callable[[int], nn.Module] = GROUP_NORM) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.layer1 = Stage(
            Bottleneck(64, 64, 256, 2, 8, norm),
            Bottleneck(256, 64, 256, 1, 8, norm),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer1(F.relu(self.bn1(self.conv1(x)))).mean((2, 3))
        return features


def describe(norm: Callable[[int], nn.Module] = GROUP_NORM) -> Trunk:
    """The trunk on the meta device."""
    with torch.device("meta"):
        return Trunk(norm)


def make_trunk(norm: Callable[[int], nn.Module] = GROUP_NORM) -> Trunk:
    """The trunk with its initial weights, its residual branches not at zero, so that they count from the first step."""
    trunk = describe(norm)
    materialise(trunk, WEIGHTS, torch.device("cpu"))
    return trunk


def freeze(trunk: Trunk, names: str) -> Trunk:
    """The trunk, whose parameters with names that a pattern is found in are not trained."""
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(not re.search(names, name))
    return trunk


@cache
def mesh_of(group_size: int) -> DeviceMesh | None:
    """One for all trainers of a process: each has threads of its own."""
    return head_mesh(group_size)


class Groups:
    """Process groups on this rank, each of which has threads that poll while it lives."""

    def __init__(self) -> None:
        self._kept: set[ProcessGroup] = set()
        self._engines: set[str] = set()

    def release(self, engine: str) -> None:
        """Destroy what an engine's trainer, which is done, has made (collective).

        But not what came with an engine's first, which its library may keep for all of its engines.
        """
        groups = list(distributed_c10d._world.pg_map)
        if engine not in self._engines:
            self._engines.add(engine)
            self._kept.update(groups)
        for group in groups:
            if group not in self._kept:
                dist.destroy_process_group(group)


def global_batch(
    step: int, batch: int, *, seed: int = 0, side: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, ids and mass of a step's global batch; one row has no label, as a corrupt image's."""
    numbers = torch.Generator().manual_seed(step + 1000 * seed)
    images = torch.randint(0, 256, (batch, 3, side, side), generator=numbers, dtype=torch.uint8)
    ids = torch.full((batch, 3), -1)
    for row in range(batch):
        count = (row + step) % 4
        ids[row, :count] = torch.randperm(LABELS, generator=numbers)[:count]
    counts = (ids >= 0).sum(1, keepdim=True)
    mass = torch.where(ids >= 0, 1 / counts.clamp(min=1), 0.0).float()
    return images, ids, mass


def micro_batches(accumulation: int, batch: int, start: int, **of_batch: int) -> Iterator[Batch]:
    """This rank's share of every step, dealt as the loader deals it; the rest is for `global_batch`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = batch // accumulation // world
    step = start
    while True:
        images, ids, mass = global_batch(step, batch, **of_batch)
        for number in range(accumulation):
            first = (number * world + rank) * micro
            rows = slice(first, first + micro)
            yield Batch(images[rows], ids[rows], mass[rows], torch.arange(first, first + micro))
        step += 1


def make_trainer(
    name: str,
    *,
    accumulation: int,
    clip: float,
    precision: str = "fp32",
    group_size: int = 0,
    batch: int = BATCH,
    norm: Callable[[int], nn.Module] = GROUP_NORM,
    resume: Path | None = None,
    trunk: nn.Module | None = None,
    rate: LearningRate = RATE,
    settings: dict[str, Any] | None = None,
    optim: OptimConfig | None = None,
    ds_content: dict[str, Any] | None = None,
    of_batch: dict[str, int] | None = None,
    scratch: Path = Path(),
) -> Trainer:
    """A trainer on this rank.

    Args:
        name: of the engine: those of the recipe, hsdp for fsdp in two shard groups, zero2 and so on for DeepSpeed,
            with _offload, _nvme (optimizer and parameters) or _parameters (these alone, to the CPU).
        accumulation: micro-batches per step.
        clip: largest gradient norm.
        precision: the recipe's.
        group_size: ranks of a head group.
        batch: images of a global batch.
        norm: of the trunk, where none is given.
        resume: a checkpoint to go on from.
        trunk: on the meta device, with `num_features`.
        rate: learning rates.
        settings: more of `EngineConfig`.
        optim: the recipe's, where it is not plain SGD.
        ds_content: of a user's ds_config, where `name` does not say enough.
        of_batch: seed and side of the images.
        scratch: where zero3_nvme offloads to.
    """
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    optim = dataclasses.replace(optim or OptimConfig(), clip=clip)
    stage = int(name[4]) if name.startswith("zero") else None  # of a file of any name, its own
    config = EngineConfig(
        name={"hsdp": "fsdp"}.get(name, name) if stage is None else "deepspeed",
        precision=precision,
        shard_group=max(1, world.size // 2) if name == "hsdp" else 0,
        **(settings or {}),
    )
    trunk = trunk or describe(norm)
    offload = {"device": "nvme" if name.endswith("nvme") else "cpu", "pin_memory": False}
    deepspeed = ds_config.resolve(
        ds_content
        or {
            "zero_optimization": {
                "stage": stage or 0,
                **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
                **({"offload_optimizer": offload} if "_" in name and name != "zero3_parameters" else {}),
                **({"offload_param": offload} if "zero3_" in name else {}),
            }
        },
        "the test",
        batch=ds_config.BatchSizes(batch // accumulation // world.size, accumulation, world.size),
        optimizer=optim.settings,
        learning_rate=0.0,
        clip=clip,
        precision=precision,
        offloading=Offloading.of(scratch, trunk, world),
    )
    source: Source = WEIGHTS
    features = trunk.num_features
    assert isinstance(features, int)
    head = ShardedHead(LABELS, features, mesh=mesh_of(group_size), seed=SEED)
    counter = Counter()
    if resume:
        opened = Checkpoint.open(resume)
        counter = Counter(opened.meta.step, opened.meta.samples, opened.meta.updates)
        source = state.weights_of(opened, trunk)
        state.load_head(opened, head)
    engine = build_engine(config, trunk, source, optim.settings, world, deepspeed)
    head_optimizer = optim.settings.of_head(head)
    if resume:
        state.load_optimizer_state(opened, engine, head, head_optimizer)
    return Trainer(
        engine=engine,
        head=head,
        head_optimizer=head_optimizer,
        batches=micro_batches(accumulation, batch, counter.step, **(of_batch or {})),
        accumulation=accumulation,
        world=world,
        optim=optim,
        learning_rate=rate,
        max_corrupt=1.0,
        seed=SEED,
        counter=counter,
    )


def save(trainer: Trainer, folder: Path) -> Path:
    """Publish a checkpoint of a trainer."""
    meta = Meta(
        step=trainer.counter.step,
        updates=trainer.counter.updates,
        samples=trainer.counter.samples,
        seed=SEED,
        vocabulary_hash="v",
        order="o",
        run_id="",
        engine="",
        world_size=trainer.world.size,
        recipe="",
    )
    with Saver(folder, keep=2) as saver:
        saver.start(state.shards(trainer.engine, trainer.head, trainer.head_optimizer), meta)
    return folder / f"step-{meta.step:08d}"


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole, by its names; of buffers, rank 0's (collective)."""
    parts, described = [], []
    for name, shard in state.shards(trainer.engine, trainer.head, trainer.head_optimizer):
        part = torch.zeros(shard.shape.numel(), dtype=torch.float64)  # exact for every type there is
        if shard.copy == 0:
            part[shard.start : shard.stop] = shard.local
        parts.append(part)
        described.append((name, shard.shape, shard.local.dtype))
    everything = torch.cat(parts)
    dist.all_reduce(everything)
    pieces = everything.split([len(part) for part in parts])
    return {name: piece.view(shape).to(dtype) for (name, shape, dtype), piece in zip(described, pieces, strict=True)}


def take_steps(trainer: Trainer, steps: int) -> list[float]:
    """Train and return each step's loss over the global batch."""
    preemption = Preemption()
    for _ in range(steps):
        trainer.step(preemption)
    losses = torch.stack(trainer.interval.losses).double()
    trainer.interval.losses.clear()
    dist.all_reduce(losses)
    return losses.tolist()


def constant(rate: float) -> LearningRate:
    """A learning rate that stays."""
    return LearningRate(start=rate, peak=rate, warm_up=0, total=10**9, halvings=0)


def dense_head(num_features: int) -> nn.Linear:
    """The head's initial rows as one float64 layer."""
    head = nn.Linear(num_features, LABELS).double()
    with torch.no_grad():
        head.weight.copy_(initial_rows(SEED, range(LABELS), num_features))
        head.bias.zero_()
    return head


def dense_optimizer(trunk: nn.Module, head: nn.Module) -> torch.optim.SGD:
    """Plain SGD over both, biases and norms without decay."""
    trained = [p for p in (*trunk.parameters(), *head.parameters()) if p.requires_grad]
    kernels = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 1e-4}
    rest = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.SGD([kernels, rest], lr=0.0, momentum=0.9, nesterov=True)


def dense_targets(ids: torch.Tensor) -> torch.Tensor:
    """The N x V targets."""
    targets = torch.zeros(len(ids), LABELS, dtype=torch.float64)
    for row, row_ids in enumerate(ids):
        known = row_ids[row_ids >= 0]
        targets[row, known] = 1 / max(len(known), 1)
    return targets


def reference_losses(
    steps: int, clip: float, batch: int = BATCH, adam: str = "", frozen: str = "-", norm_parts: int = 0
) -> list[float]:
    """The same training in float64 in this process: whole batches, a dense head, plain torch.optim.SGD.

    `adam`: torch's Adam or AdamW instead, with weight decay 0.05 and a constant learning rate.
    `frozen`: which of the trunk's parameters are not trained.
    `norm_parts`: BatchNorm instead of GroupNorm, by the statistics of each of so many parts of the batch.
    """
    trunk = freeze(make_trunk(nn.BatchNorm2d if norm_parts else GROUP_NORM), frozen).double()
    head = dense_head(trunk.num_features)
    optimizer: torch.optim.Optimizer = dense_optimizer(trunk, head)
    if adam:
        groups = [{**group, "weight_decay": 0.05 * (group["weight_decay"] > 0)} for group in optimizer.param_groups]
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
        optimizer = (torch.optim.AdamW if adam == "adamw" else torch.optim.Adam)(groups)
    losses = []
    for step in range(steps):
        images, ids, _ = global_batch(step, batch)
        targets = dense_targets(ids)
        parts = normalize(images, torch.float64).chunk(norm_parts or 1)
        logits = head(torch.cat([trunk(part) for part in parts]))
        loss = -(targets * F.log_softmax(logits, 1)).sum() / (targets.sum(1) > 0).sum()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([*trunk.parameters(), *head.parameters()], clip)
        for group in optimizer.param_groups:
            group["lr"] = 0.001 if adam else RATE.at(step * batch)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
