"""The runs that engines are compared on: the real Trainer over made-up batches, and float64 without any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from scale_wsl.checkpoint.layout import Meta
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.engines import ds_config
from scale_wsl.engines.base import EngineConfig, decay_groups, sgd
from scale_wsl.engines.build import build_engine
from scale_wsl.engines.world import World
from scale_wsl.loading.decode import normalize
from scale_wsl.loading.loader import Batch
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.resnext import Bottleneck, initialise
from scale_wsl.training import state
from scale_wsl.training.loop import Counter, Trainer
from scale_wsl.training.preemption import Preemption
from scale_wsl.training.schedule import LearningRate, OptimConfig

BATCH = 16  # images in a global batch, where a test does not say otherwise
LABELS = 11  # uneven over 2 and 4 ranks
RATE = LearningRate(start=0.001, peak=0.01, warm_up=5 * BATCH, total=20 * BATCH, halvings=3)
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
SEED = 3
GROUP_NORM = partial(nn.GroupNorm, 8)


class Trunk(nn.Module):
    """A ResNeXt's stem and two of its blocks, with GroupNorm: small enough for every engine on four ranks.

    GroupNorm, because BatchNorm's statistics are per rank: on another world size it is another network.
    """

    num_features = 256

    def __init__(self, norm: Callable[[int], nn.Module] = GROUP_NORM) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.layer1 = nn.Sequential(
            Bottleneck(64, 64, 256, 2, 8, norm),
            Bottleneck(256, 64, 256, 1, 8, norm),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer1(F.relu(self.bn1(self.conv1(x)))).mean((2, 3))
        return features


def make_trunk(norm: Callable[[int], nn.Module] = GROUP_NORM) -> Trunk:
    """The trunk with its initial weights, its residual branches not at zero, so that they count from the first step."""
    trunk = Trunk(norm)
    initialise(trunk, SEED, zero_init_residual=False)
    return trunk


def global_batch(step: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, ids and mass of a step's global batch; one row has no label, as a corrupt image's."""
    numbers = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (batch, 3, 32, 32), generator=numbers, dtype=torch.uint8)
    ids = torch.full((batch, 3), -1)
    for row in range(batch):
        count = (row + step) % 4
        ids[row, :count] = torch.randperm(LABELS, generator=numbers)[:count]
    counts = (ids >= 0).sum(1, keepdim=True)
    mass = torch.where(ids >= 0, 1 / counts.clamp(min=1), 0.0).float()
    return images, ids, mass


def micro_batches(accumulation: int, batch: int, start: int) -> Iterator[Batch]:
    """This rank's share of every step, dealt as the loader deals it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = batch // accumulation // world
    step = start
    while True:
        images, ids, mass = global_batch(step, batch)
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
) -> Trainer:
    """A trainer on this rank, its engine named as in `ENGINES`."""
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    optim = OptimConfig(clip=clip)
    stage = int(name[-1]) if name.startswith("zero") else None
    config = EngineConfig(name="ddp" if stage is None else "deepspeed", precision=precision)
    deepspeed = ds_config.resolve(
        {"zero_optimization": {"stage": stage or 0, "stage3_param_persistence_threshold": 0}},
        "the test",
        batch=ds_config.BatchSizes(batch // accumulation // world.size, accumulation, world.size),
        optimizer={},
        clip=clip,
        precision=precision,
    )
    settings: dict[str, Any] = {"momentum": optim.momentum, "nesterov": True, "weight_decay": optim.weight_decay}
    trunk = make_trunk(norm)
    head = ShardedHead(LABELS, trunk.num_features, mesh=head_mesh(group_size), seed=SEED)
    counter = Counter()
    if resume:
        opened = Checkpoint.open(resume)
        counter = Counter(opened.meta.step, opened.meta.samples, opened.meta.updates)
        state.load_weights(opened, trunk, head)
    engine = build_engine(config, trunk, sgd(trunk, **settings), world, deepspeed)
    head_optimizer = sgd(head, **settings)
    if resume:
        state.load_momentum(opened, engine, head, head_optimizer)
    return Trainer(
        engine=engine,
        head=head,
        head_optimizer=head_optimizer,
        batches=micro_batches(accumulation, batch, counter.step),
        accumulation=accumulation,
        world=world,
        optim=optim,
        learning_rate=RATE,
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


def take_steps(trainer: Trainer, steps: int) -> list[float]:
    """Train and return each step's loss over the global batch."""
    preemption = Preemption()
    for _ in range(steps):
        trainer.step(preemption)
    losses = torch.stack(trainer.interval.losses).double()
    trainer.interval.losses.clear()
    dist.all_reduce(losses)
    return losses.tolist()


def reference_losses(steps: int, clip: float, batch: int = BATCH) -> list[float]:
    """The same training in float64 in this process: whole batches, a dense head, plain torch.optim.SGD."""
    trunk = make_trunk().double()
    initial = ShardedHead(LABELS, trunk.num_features, mesh=head_mesh(1), seed=SEED)
    head = torch.nn.Linear(trunk.num_features, LABELS).double()
    with torch.no_grad():
        head.weight.copy_(initial.weight)
        head.bias.copy_(initial.bias)
    both = torch.nn.ModuleList([trunk, head])
    optimizer = torch.optim.SGD(decay_groups(both, 1e-4), lr=0.0, momentum=0.9, nesterov=True)
    losses = []
    for step in range(steps):
        images, ids, _ = global_batch(step, batch)
        targets = torch.zeros(batch, LABELS, dtype=torch.float64)
        for row, row_ids in enumerate(ids):
            known = row_ids[row_ids >= 0]
            targets[row, known] = 1 / max(len(known), 1)
        logits = head(trunk(normalize(images, torch.float64)))
        loss = -(targets * F.log_softmax(logits, 1)).sum() / (targets.sum(1) > 0).sum()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(both.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = RATE.at(step * batch)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
