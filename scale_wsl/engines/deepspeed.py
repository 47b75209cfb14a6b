"""The `deepspeed` engine: the trunk under DeepSpeed ZeRO-0, 1, 2 or 3, the hashtag head outside.

DeepSpeed's private hooks are used where it has no public one: the joint norm (`scaled_global_norm` of ZeRO-1/2 and
`_get_norm_groups` of ZeRO-3) and the momentum partitions (`_hp_mapping`, `grad_position`). The package therefore pins
DeepSpeed's minor version, and `tests/engines/` pins what each hook does.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scale_wsl.engines.base import Engine, StepResult, scale_gradient
from scale_wsl.engines.world import World

__all__ = ["DeepSpeedEngine"]


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, told which accelerator there is, quiet below warnings, and building no operator that we do not use."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it announces its choice of accelerator as a warning
    # DeepSpeed 0.19 still calls the collectives by the names that PyTorch 2.14 deprecates.
    warnings.filterwarnings(
        "ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", category=FutureWarning
    )
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # torch.optim.SGD under ZeRO is what tests/engines/test_parity.py tests.
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if world.device.type == "cpu":
        # Its first collective on CPU would compile a shared-memory operator, 40-65 s with ninja and g++. Gloo serves.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


class DeepSpeedEngine(Engine):
    """The trunk in a DeepSpeed engine, configured by a resolved ds_config (see `ds_config.resolve`)."""

    def __init__(self, trunk: nn.Module, optimizer: torch.optim.SGD, world: World, config: dict[str, Any]) -> None:
        deepspeed = _import_deepspeed(world)
        self.trunk = trunk
        self.optimizer = optimizer
        self.gradient_divisor = world.size
        self.device = world.device
        self.stage: int = config["zero_optimization"]["stage"]
        self.names = {parameter: name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=trunk, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._head_square_norm = torch.zeros((), dtype=torch.float64, device=world.device)
        if self.stage in (1, 2):
            self.zero.scaled_global_norm = self._joint_norm(self.zero.scaled_global_norm)
        elif self.stage == 3:
            self.zero._get_norm_groups = self._joint_norm_groups(self.zero._get_norm_groups)

    # --- the joint norm ------------------------------------------------------------------------------------------

    def _joint_norm(self, trunk_norm: Callable[..., Any]) -> Callable[..., Tensor]:
        def joint_norm(*arguments: Any, **keywords: Any) -> Tensor:
            trunk = torch.as_tensor(trunk_norm(*arguments, **keywords), dtype=torch.float64, device=self.device)
            return (trunk.square() + self._head_square_norm).sqrt()

        return joint_norm

    def _joint_norm_groups(self, trunk_norms: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        def joint_norm_groups() -> list[Any]:
            return [*trunk_norms(), self._head_square_norm.sqrt()]

        return joint_norm_groups

    # --- the step ------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The accumulation boundary is told to DeepSpeed, not counted by it: it does not know of skipped steps."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, D]`; see `Engine.forward`. Autocast is DeepSpeed's `torch_autocast`."""
        features: Tensor = self.engine(images)
        training = self.trunk.training and torch.is_grad_enabled()
        return scale_gradient(features, self.gradient_divisor) if training else features

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        # Left to itself, DeepSpeed divides by the accumulation steps, the head's gradient too.
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """See `Engine.step`."""
        if self.stage == 0:
            # The optimizer is plain SGD, and DeepSpeed clips nothing: its config says 0.
            result = self._step_whole(self.engine.step, learning_rate, head_square_norm, max_norm)
            self.engine.zero_grad()
            return result
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._head_square_norm = head_square_norm
        self.zero.clip_grad = max_norm  # not through its config, where it would clip the trunk by the trunk's norm
        self.engine.step()
        if self.zero.overflow:
            return StepResult(math.inf, applied=False)
        return StepResult(float(self.zero._global_grad_norm), applied=True)

    def train(self, mode: bool = True) -> None:
        """Switch the trunk between training and evaluation."""
        self.engine.train(mode)

    # --- logical state -------------------------------------------------------------------------------------------

    def trunk_tensors(self) -> dict[str, Tensor]:
        """See `Engine.trunk_tensors`. Under ZeRO-3 every rank gathers all parameters, one after another."""
        if self.stage < 3:
            return dict(self.trunk.state_dict())
        from deepspeed.utils import safe_get_full_fp32_param

        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trunk.named_parameters():
            if parameter.requires_grad:
                tensors[name] = safe_get_full_fp32_param(parameter)
            else:  # fixed affine parameters of a frozen norm: partitioned, but without an optimizer's master copy
                tensors[name] = self._gathered(parameter)
        return tensors | dict(self.trunk.named_buffers())

    def _gathered(self, parameter: Tensor) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def momentum(self) -> dict[str, Tensor]:
        """See `Engine.momentum`."""
        self._create_momentum()
        buffers: dict[str, Tensor] = {}
        for parameter, name in self.names.items():
            if self.stage == 0:
                buffers[name] = self.optimizer.state[parameter]["momentum_buffer"]
            elif self.stage == 3:
                buffers[name] = self.zero.get_full_hp_param(parameter, "momentum_buffer")
            else:
                whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=self.device)
                for piece, ours in self._partition_of(parameter):
                    whole[piece] = ours
                torch.distributed.all_reduce(whole)
                buffers[name] = whole.view_as(parameter)
        return buffers

    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        """See `Engine.load_momentum`."""
        self._create_momentum()
        for parameter, name in self.names.items():
            whole = momentum[name].to(self.device, torch.float32)
            if self.stage == 0:
                self.optimizer.state[parameter]["momentum_buffer"].copy_(whole)
            elif self.stage == 3:
                # Shards are padded to a common length: the last ranks' go past the parameter's end.
                length, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
                shard = torch.zeros(length, dtype=torch.float32, device=self.device)
                ours = whole.flatten()[rank * length : (rank + 1) * length]
                shard[: ours.numel()] = ours
                self.zero.set_local_hp_param(shard, parameter, "momentum_buffer")
            else:
                for piece, buffer in self._partition_of(parameter):
                    buffer.copy_(whole.flatten()[piece])

    def _create_momentum(self) -> None:
        """Give each (flat) parameter that the optimizer steps a momentum buffer, zeros where it has none yet."""
        if self.stage == 0:
            stepped = list(self.names)
        else:
            stepped = (
                self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat
            )
        for flat in stepped:
            if self.optimizer.state[flat].get("momentum_buffer") is None:
                self.optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat)

    def _partition_of(self, parameter: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """ZeRO-1/2: which elements of a parameter this rank steps, and their momentum (none: another rank's)."""
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is not None:
            flat = self.zero.single_partition_of_fp32_groups[fragment.param_group_index]
            buffer = self.optimizer.state[flat]["momentum_buffer"]
            of_parameter, of_flat = fragment.lp_fragment_address, fragment.hp_fragment_address
            yield (
                slice(of_parameter.start, of_parameter.start + of_parameter.numel),
                buffer.narrow(0, of_flat.start, of_flat.numel),
            )
