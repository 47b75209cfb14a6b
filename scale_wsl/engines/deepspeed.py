"""The `deepspeed` engine: the trunk under DeepSpeed ZeRO-0, 1, 2 or 3, the hashtag head outside.

DeepSpeed's private hooks are used where it has no public one: the joint norm (`scaled_global_norm` of ZeRO-1/2 and
`_get_norm_groups` of ZeRO-3), construction by shards (`_convert_to_deepspeed_param`), gradients while the optimizer's
state is on disk (`ds_disk`), and the partitions of weights and optimizer state (`_hp_mapping`, `ds_tensor`,
`grad_position`). The package therefore pins DeepSpeed's minor version, and `tests/engines/` pins what each hook does.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scale_wsl.engines.base import Engine, StepResult, square_norm
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.ds_disk import keep_gradients, require_room
from scale_wsl.engines.ds_zero import disk_folders
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World, agree
from scale_wsl.errors import UserError
from scale_wsl.models.head_group import ranks_per_node
from scale_wsl.models.weights import materialise
from scale_wsl.shards import FlatShard, Source

__all__ = ["DeepSpeedEngine"]


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, told which accelerator there is, quiet below warnings, and building no operator that we do not use."""
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))  # it insists on a launcher, which one process needs not
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it announces its choice of accelerator as a warning
    # DeepSpeed 0.19 still calls the collectives by the names that PyTorch 2.14 deprecates.
    warnings.filterwarnings(
        "ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", category=FutureWarning
    )
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # torch.optim under ZeRO is what tests/engines/test_parity.py tests.
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if world.device.type == "cpu":
        # Its first collective on CPU would compile a shared-memory operator, 40-65 s with ninja and g++. Gloo serves.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def _require_disk_io() -> None:
    """Load the operator by which DeepSpeed reads and writes what is offloaded to disk; it is compiled at first use.

    Raises:
        UserError: the library libaio or a compiler is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    needs = (
        'offloading to "nvme" needs the library libaio with its headers (Debian, Ubuntu: apt-get install libaio-dev), '
        "g++ and ninja (pip install 'scale-wsl[build-ops]')"
    )
    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise UserError(f'{needs}: libaio was not found; install it, or offload to "cpu"')
    try:
        builder.load(verbose=False)
    except (OSError, RuntimeError, ImportError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"{needs}, but DeepSpeed's operator could not be built: {last}") from None


class DeepSpeedEngine(Engine):
    """The trunk in a DeepSpeed engine, configured by a resolved ds_config (see `ds_config.resolve`)."""

    def __init__(
        self,
        trunk: nn.Module,
        source: Source,
        settings: OptimizerSettings,
        world: World,
        config: EngineConfig,
        ds_config: dict[str, Any],
    ) -> None:
        # Autocast is DeepSpeed's own torch_autocast: two of them would be one too many.
        super().__init__(trunk, settings, world, precision="fp32", channels_last=config.channels_last)
        deepspeed = _import_deepspeed(world)
        zero_block = ds_config["zero_optimization"]
        if disk_folders(zero_block):
            _require_disk_io()
            held = sum(-(-parameter.numel() // world.size) for parameter in trunk.parameters())
            with agree(world):
                require_room(zero_block, held, len(settings.states), ranks_per_node() or world.size)
        self.gradient_divisor = world.size
        self.stage: int = zero_block["stage"]
        if self.stage == 3:
            self._partition(deepspeed, source, ds_config)
        else:
            materialise(trunk, source, world.device)
        self.parameters = {name: p for name, p in trunk.named_parameters() if p.requires_grad}
        self.optimizer = settings.build(
            settings.groups((parameter, len(self.shapes[name]) > 1) for name, parameter in self.parameters.items())
        )
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=trunk, optimizer=self.optimizer, config=ds_config, dist_init_required=False
        )
        self._step_weights_in_place()
        self._head_square_norm = torch.zeros((), dtype=torch.float64, device=world.device)
        if self.stage in (1, 2):
            self.zero.scaled_global_norm = self._joint_norm(self.zero.scaled_global_norm)
        elif self.stage == 3:
            self.zero._get_norm_groups = self._joint_norm_groups(self.zero._get_norm_groups)
            # It would look for what is not finite in a copy of all gradients; the norm, which it looks at next, tells.
            self.zero.has_overflow = lambda partition_gradients=True: False
            if self.zero.swap_optimizer:
                with agree(world):
                    keep_gradients(self.zero, Path(zero_block["offload_optimizer"]["nvme_path"]), world.rank)

    @torch.no_grad()
    def _partition(self, deepspeed: Any, source: Source, ds_config: dict[str, Any]) -> None:
        """ZeRO-3: shard the trunk one parameter at a time, reading only what this rank keeps.

        `zero.Init` as shipped broadcasts every parameter from rank 0, which would have to draw them all. Memory for one
        whole parameter is asked for and given back untouched but for this rank's range.
        """
        init = deepspeed.zero.Init(config_dict_or_path=ds_config)
        for module_name, module in self.trunk.named_modules():
            for local, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                name = f"{module_name}.{local}" if module_name else local
                whole = torch.empty_like(tensor, device=self.device)
                shard = FlatShard.whole(whole)
                if isinstance(tensor, nn.Parameter):
                    parameter = nn.Parameter(whole, tensor.requires_grad)
                    setattr(module, local, parameter)
                    init._convert_to_deepspeed_param(parameter)
                    size = -(-whole.numel() // self.world.size)
                    start = min(self.world.rank * size, whole.numel())
                    shard = FlatShard(shard.local[start : start + size], whole.shape, start)
                    shard.fill(name, source)
                    parameter.partition()  # type: ignore[attr-defined]
                else:
                    shard.fill(name, source)
                    setattr(module, local, whole)

    @torch.no_grad()
    def _step_weights_in_place(self) -> None:
        """Let the optimizer step this rank's part of the weights itself, which is in fp32, unless it is offloaded.

        DeepSpeed 0.19 makes a second copy of them, which it copies back after every step: always under ZeRO-1/2, and
        under ZeRO-3 unless they are on its device, which it asks of a device's name and never finds true.
        """
        own: list[Tensor | None] = []
        stepped: list[Tensor] = []
        if self.stage == 3 and not self.zero.offload_optimizer:
            own, stepped = self.zero.fp16_partitioned_groups_flat, self.zero.fp32_partitioned_groups_flat
        elif self.stage in (1, 2) and not self.zero.cpu_offload:
            own = [partitions[self.world.rank] for partitions in self.zero.parallel_partitioned_bit16_groups]
            stepped = self.zero.single_partition_of_fp32_groups
        for weights, copy in zip(own, stepped, strict=True):
            if weights is not None and all(
                getattr(weights, kind) == getattr(copy, kind) for kind in ("dtype", "shape", "device")
            ):  # with parameters alone offloaded, these are on the CPU, and what is stepped is not
                copy.data = weights.data
        if self.stage in (1, 2) and not self.zero.cpu_offload:
            self.zero._link_all_hp_params()  # else each parameter's mapping keeps the copy alive

    # --- the joint norm ------------------------------------------------------------------------------------------

    def _joint_norm(self, trunk_norm: Callable[..., Any]) -> Callable[..., Tensor]:
        def joint_norm(*arguments: Any, **keywords: Any) -> Tensor:
            # On its own device: with offloading DeepSpeed computes it, and multiplies gradients by it, on the CPU.
            trunk = torch.as_tensor(trunk_norm(*arguments, **keywords)).double()
            return (trunk.square() + self._head_square_norm.to(trunk.device)).sqrt()

        return joint_norm

    def _joint_norm_groups(self, trunk_norms: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        def joint_norm_groups() -> list[Any]:
            norms = trunk_norms()
            head = self._head_square_norm.sqrt()
            return [*norms, head.to(norms[0].device) if norms and isinstance(norms[0], Tensor) else head]

        return joint_norm_groups

    # --- the step ------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The accumulation boundary is told to DeepSpeed, not counted by it: it does not know of skipped steps."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def _features(self, images: Tensor, *, training: bool) -> Tensor:
        features: Tensor = self.engine(images)
        return features

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        # Left to itself, DeepSpeed divides by the accumulation steps, the head's gradient too.
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """See `Engine.step`."""
        if self.stage == 0:
            # The optimizer is torch's own, and DeepSpeed clips nothing: its config says 0.
            gradients = self._whole_gradients()
            square = square_norm(gradients, self.device) + head_square_norm
            result = self._step_if_finite(square, [gradients], self.engine.step, learning_rate, max_norm)
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

    def weights(self) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.weights`. Under ZeRO-3, what is on a disk is read one parameter at a time."""
        if self.stage < 3:
            yield from self._whole_weights()
            return
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

        for name, parameter in self.trunk.named_parameters():
            away = parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
            if away:
                parameter.nvme_swapper.swap_in([parameter], async_op=False)  # type: ignore[attr-defined]
            yield name, self._partition_of(parameter, parameter.ds_tensor, lasting=not away)  # type: ignore[attr-defined]
            if away:
                parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])  # type: ignore[attr-defined]
        yield from self._buffers()

    def optimizer_state(self, *, write: bool = False) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.optimizer_state`."""
        if self.stage == 0:
            yield from self._whole_state()
            return
        if self.stage == 3:
            yield from self._state_of_zero3(write)
            return
        for name, parameter in self.parameters.items():
            for key, state in self.settings.states.items():
                yield f"{state}.{name}", self._stepped_by_zero2(parameter, self.shapes[name], key)

    def _partition_of(self, parameter: Any, flat: Tensor, *, lasting: bool) -> FlatShard:
        """ZeRO-3: partitions are padded to a common length, and the last ranks' go past the parameter's end."""
        start = min(self.world.rank * flat.numel(), parameter.ds_numel)
        stop = min(start + flat.numel(), parameter.ds_numel)
        return FlatShard(flat.detach()[: stop - start], parameter.ds_shape, start, lasting=lasting)

    def _state_of_zero3(self, write: bool) -> Iterator[tuple[str, FlatShard]]:
        """This rank's partitions, one sub-group of parameters after another: what is on disk is read once, whole."""
        zero, keys = self.zero, self.settings.states
        groups: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(zero.grad_position[zero.get_param_id(parameter)][0], []).append(name)
        for group, names in groups.items() if keys else ():
            on_disk = zero._swappable_optimizer_subgroup(group)
            if on_disk:
                zero._optimizer_states_and_gradient_swap_in(group)
            flat = zero.fp32_partitioned_groups_flat[group]
            new = any(self.optimizer.state[flat].get(key) is None for key in keys)
            buffers = {state: self.settings.state_tensor(self.optimizer, flat, key) for key, state in keys.items()}
            for name in names:
                parameter = self.parameters[name]
                _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                for state, buffer in buffers.items():
                    shard = self._partition_of(parameter, buffer.narrow(0, offset, length), lasting=not on_disk)
                    yield f"{state}.{name}", shard
            if on_disk and (write or new):
                zero._optimizer_states_and_gradient_swap_out(group)
            elif on_disk:
                zero._release_swap_buffers(group)

    def _stepped_by_zero2(self, parameter: Any, shape: torch.Size, key: str) -> FlatShard:
        """ZeRO-1/2: the elements of a parameter that this rank steps, of which there may be none."""
        fragment = parameter._hp_mapping
        if fragment is None:
            return FlatShard(torch.empty(0, device=self.device), shape)
        flat = self.zero.single_partition_of_fp32_groups[fragment.param_group_index]
        buffer = self.settings.state_tensor(self.optimizer, flat, key)
        of_parameter, of_flat = fragment.lp_fragment_address, fragment.hp_fragment_address
        return FlatShard(buffer.narrow(0, of_flat.start, of_flat.numel), shape, of_parameter.start, lasting=True)
