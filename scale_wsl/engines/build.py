"""Makes the engine that a recipe names around a trunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scale_wsl.engines.base import Engine, EngineConfig
from scale_wsl.engines.ddp import DDPEngine
from scale_wsl.engines.world import World

__all__ = ["build_engine"]


def build_engine(
    config: EngineConfig, trunk: nn.Module, optimizer: torch.optim.SGD, world: World, deepspeed: dict[str, Any] | None
) -> Engine:
    """The engine of `config` (collective); `deepspeed` is the resolved ds_config, needed by that engine only."""
    trunk.to(world.device)
    if config.name == "ddp":
        return DDPEngine(trunk, optimizer, world, config.precision)
    from scale_wsl.engines.deepspeed import DeepSpeedEngine  # imports DeepSpeed, which takes a second

    assert deepspeed is not None
    return DeepSpeedEngine(trunk, optimizer, world, deepspeed)
