"""Makes the engine that a recipe names around a trunk on the meta device."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from scale_wsl.engines.base import Engine
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.ddp import DDPEngine
from scale_wsl.engines.fsdp import FSDPEngine
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World
from scale_wsl.models.norms import synchronise_batchnorm
from scale_wsl.models.recompute import recompute
from scale_wsl.shards import Source

__all__ = ["build_engine"]


def build_engine(
    config: EngineConfig,
    trunk: nn.Module,
    source: Source,
    settings: OptimizerSettings,
    world: World,
    deepspeed: dict[str, Any] | None = None,
) -> Engine:
    """The engine of `config` around a trunk (collective).

    Args:
        config: the recipe's section.
        trunk: on the meta device.
        source: of the trunk's weights and buffers, under plain names.
        settings: of its optimizer.
        world: the ranks.
        deepspeed: the resolved ds_config, needed by that engine only.
    """
    recompute(trunk, config.recomputation)
    if config.batchnorm_group != 1:
        synchronise_batchnorm(trunk, _consecutive(config.batchnorm_group or world.size, world))
    if config.name == "ddp":
        return DDPEngine(trunk, source, settings, world, config)
    if config.name == "fsdp":
        return FSDPEngine(trunk, source, settings, world, config)
    if config.name == "fairscale":
        from scale_wsl.engines.fairscale import FairscaleEngine  # an optional package

        return FairscaleEngine(trunk, source, settings, world, config)
    from scale_wsl.engines.deepspeed import DeepSpeedEngine  # imports DeepSpeed, which takes a second

    assert deepspeed is not None
    return DeepSpeedEngine(trunk, source, settings, world, config, deepspeed)


def _consecutive(size: int, world: World) -> ProcessGroup | None:
    """A process group of this rank and its neighbours, for BatchNorm alone (collective).

    Its own even where it spans all ranks: its collectives run in the middle of backward passes, beside the engine's.
    """
    mine = None
    for first in range(0, world.size, size):
        group = dist.new_group(list(range(first, first + size)))
        if first <= world.rank < first + size:
            assert isinstance(group, ProcessGroup)  # not the mark of a group that one is no member of
            mine = group
    return mine
