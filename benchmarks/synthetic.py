"""A training step on random images, with the trainer's own code: what the benchmarks of engines share."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from scale_wsl.engines import ds_config
from scale_wsl.engines.build import build_engine
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.ds_zero import Offloading
from scale_wsl.engines.world import World
from scale_wsl.loading.loader import Batch
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.resnext import ModelConfig, describe_trunk
from scale_wsl.models.weights import initial_weights
from scale_wsl.training.loop import Counter, Trainer
from scale_wsl.training.schedule import LearningRate, OptimConfig

__all__ = ["LABELS", "OPTIM", "random_batch", "random_trainer", "resolved"]

LABELS = 1500
OPTIM = OptimConfig()


def resolved(
    content: dict[str, Any], model: ModelConfig, micro: int, world: World, scratch: str = ""
) -> dict[str, Any]:
    """A ds_config as the trainer resolves it; `scratch` is for what goes to disk."""
    return ds_config.resolve(
        content,
        "the benchmark",
        batch=ds_config.BatchSizes(micro, 1, world.size),
        optimizer=OPTIM.settings,
        learning_rate=0.0,
        clip=0.0,
        precision="fp32",
        offloading=Offloading.of(Path(scratch), describe_trunk(model), world),
    )


def random_batch(micro: int, side: int, world: World) -> Batch:
    """This rank's images of noise, with three labels each."""
    numbers = torch.Generator().manual_seed(world.rank)
    images = torch.randint(0, 256, (micro, 3, side, side), generator=numbers, dtype=torch.uint8)
    ids = torch.randint(0, LABELS, (micro, 3), generator=numbers)
    return Batch(images, ids, torch.full(ids.shape, 1 / 3), torch.arange(micro))


def random_trainer(
    config: EngineConfig, model: ModelConfig, batch: Batch, rate: float, world: World, deepspeed: dict[str, Any] | None
) -> Trainer:
    """A trainer that sees one batch again and again."""
    trunk = describe_trunk(model)
    head = ShardedHead(LABELS, trunk.num_features, mesh=head_mesh())
    return Trainer(
        engine=build_engine(config, trunk, initial_weights(model, 0), OPTIM.settings, world, deepspeed),
        head=head,
        head_optimizer=OPTIM.settings.of_head(head),
        batches=itertools.repeat(batch),
        accumulation=1,
        world=world,
        optim=OPTIM,
        learning_rate=LearningRate(rate, rate, 0, 10**9, 0),
        max_corrupt=0.0,
        seed=0,
        counter=Counter(),
    )
