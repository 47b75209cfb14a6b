"""The `fairscale` engine: fairscale's FullyShardedDataParallel around each block, or recomputed stage. Legacy.

For those who compare with, or go on from, runs of its time; `fsdp` does the same, faster, and is maintained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scale_wsl.collectives import all_reduce
from scale_wsl.engines.base import Engine, StepResult, square_norm
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World
from scale_wsl.errors import UserError
from scale_wsl.models.recompute import residual_blocks, stages
from scale_wsl.models.weights import materialise
from scale_wsl.shards import FlatShard, Source

__all__ = ["FairscaleEngine", "require_fairscale"]


def require_fairscale(device: torch.device) -> Any:
    """fairscale's FSDP class, made to run on a CPU where the trunk is there.

    Raises:
        UserError: fairscale is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports what torch deprecates
            from fairscale.nn.data_parallel import FullyShardedDataParallel
    except ImportError:
        raise UserError(
            "engine.name=fairscale needs the package fairscale: pip install 'scale-wsl[fairscale]', or set "
            "engine.name=fsdp, torch's own successor to it"
        ) from None
    # What it calls is deprecated since its last release.
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", category=UserWarning)
    warnings.filterwarnings("ignore", r".*_(all_gather|reduce_scatter)_base` is (a private|deprecated)")
    if device.type == "cpu":
        from scale_wsl.engines import fairscale_cpu

        fairscale_cpu.install()
    return FullyShardedDataParallel


class FairscaleEngine(Engine):
    """fairscale's FSDP around each residual block (recomputed stage) and around what is left of the trunk."""

    def __init__(
        self, trunk: nn.Module, source: Source, settings: OptimizerSettings, world: World, config: EngineConfig
    ) -> None:
        # Its own mixed precision casts to half even where bfloat16 is asked for (0.4.13): autocast it is.
        super().__init__(trunk, settings, world, precision=config.precision, channels_last=config.channels_last)
        sharded = require_fairscale(world.device)
        self.gradient_divisor = world.size
        decayed = {name: len(shape) > 1 for name, shape in self.shapes.items()}
        keywords: dict[str, Any] = {
            "reshard_after_forward": config.reshard_after_forward,
            "flatten_parameters": False,  # a flat parameter knows no decay groups
            "compute_device": world.device,
            "bucket_cap_mb": 0 if world.device.type == "cpu" else 25,  # its buckets need CUDA events
        }
        # Its wrapper cannot run again in a backward pass, so it goes around what is recomputed, not into it: with whole
        # stages recomputed, a whole stage is gathered. One unit at a time, so that no rank ever holds more than that.
        for name, unit in list(stages(trunk) if config.recomputation.stages else residual_blocks(trunk)):
            materialise(unit, source, world.device, f"{name}.")
            parent, _, local = name.rpartition(".")
            setattr(trunk.get_submodule(parent), local, sharded(unit, **keywords))
        _materialise_rest(trunk, source, world.device)
        self.wrapped = sharded(trunk, **keywords)
        self.parameters = {plain_name(name): parameter for name, parameter in trunk.named_parameters()}
        self.optimizer = settings.build(
            settings.groups((parameter, decayed.get(name, False)) for name, parameter in self.parameters.items())
        )

    # --- the step ------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Every micro-batch's gradients are scattered at once and added up in shards."""
        yield

    def _features(self, images: Tensor, *, training: bool) -> Tensor:
        features: Tensor = self.wrapped(images)
        return features

    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """See `Engine.step`."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        square = all_reduce(square_norm(gradients, self.device)) + head_square_norm  # padding adds zeros
        result = self._step_if_finite(square, [gradients], self.optimizer.step, learning_rate, max_norm)
        self.optimizer.zero_grad()
        return result

    def train(self, mode: bool = True) -> None:
        """Switch the trunk between training and evaluation."""
        self.wrapped.train(mode)

    # --- logical state -------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.weights`."""
        for name, parameter in self.parameters.items():
            # After an evaluation the root's parameters are whole ones, beside their shards.
            yield name, self._shard(parameter, getattr(parameter, "_fp32_shard", parameter))
        for name, shard in self._buffers():
            yield plain_name(name), shard

    def optimizer_state(self, *, write: bool = False) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.optimizer_state`."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                for key, state in self.settings.states.items():
                    tensor = self.settings.state_tensor(self.optimizer, parameter, key)
                    yield f"{state}.{name}", self._shard(parameter, tensor)

    def _shard(self, parameter: Any, local: Tensor) -> FlatShard:
        """Shards are padded to a common length: the last ranks' go past the parameter's end."""
        flat, shape = local.detach().view(-1), parameter._orig_size
        if not parameter._is_sharded:
            return FlatShard(flat, shape, lasting=True)
        start = min(self.world.rank * flat.numel(), shape.numel())
        stop = min(start + flat.numel(), shape.numel())
        return FlatShard(flat[: stop - start], shape, start, lasting=True)


def _materialise_rest(trunk: nn.Module, source: Source, device: torch.device) -> None:
    """Memory and values for the tensors that are still on the meta device."""
    for name, module in trunk.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if any(tensor.is_meta for _, tensor in own):
            materialise(module, source, device, f"{name}." if name else "")


def plain_name(name: str) -> str:
    """A parameter's name without what fairscale's wrappers put in."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_fpw_module.", "")
