"""The `fsdp` engine: torch's FSDP2, one unit for each residual block, rows of every kernel sharded over the ranks.

With `engine.shard_group` it is HSDP: consecutive ranks share one copy of the trunk, and groups of them replicate it.
Normalisation parameters are 0.04 to 0.3 % of a trunk, so every rank keeps them whole: fewer collectives, and they stay
fp32 without a policy of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from scale_wsl.collectives import all_reduce
from scale_wsl.engines.base import Engine, StepResult, square_norm
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World
from scale_wsl.models.recompute import residual_blocks
from scale_wsl.shards import FlatShard, Source

__all__ = ["FSDPEngine"]


class FSDPEngine(Engine):
    """FSDP2 around each residual block and around what is left of the trunk."""

    gradient_divisor = 1  # gradients are added up over the ranks, not averaged

    def __init__(
        self, trunk: nn.Module, source: Source, settings: OptimizerSettings, world: World, config: EngineConfig
    ) -> None:
        super().__init__(trunk, settings, world, precision=config.precision, channels_last=config.channels_last)
        ranks = config.shard_group or world.size
        self.replicas = world.size // ranks
        mesh = _mesh(world, ranks)
        offloaded = config.offload == "cpu"
        self.kept = {name for name, p in trunk.named_parameters() if p.ndim <= 1}
        ignored = {p for name, p in trunk.named_parameters() if name in self.kept}
        policy = MixedPrecisionPolicy(
            # Autocast would cast to bf16 what was gathered in fp32: the same numbers, at twice the traffic.
            param_dtype=torch.bfloat16 if self.autocast else None,
            reduce_dtype=torch.float32 if self.autocast else None,
            cast_forward_inputs=False,
        )
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offloaded else OffloadPolicy()
        for module in (*(block for _, block in residual_blocks(trunk)), trunk):
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=config.reshard_after_forward,
                mp_policy=policy,
                offload_policy=offload,
                ignored_params=ignored,
            )
        assert isinstance(trunk, FSDPModule)
        for module in trunk.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        self._materialise(source, torch.device("cpu") if offloaded else world.device)
        # The optimizer steps the shards as the plain tensors that they are: for a DTensor torch has no fused kernel,
        # and dispatches every operation on each one in Python.
        self.stepped = {
            name: nn.Parameter(_local(parameter), parameter.requires_grad)
            for name, parameter in trunk.named_parameters()
        }
        self.optimizer = settings.build(
            settings.groups((parameter, parameter.ndim > 1) for parameter in self.stepped.values())
        )

    @torch.no_grad()
    def _materialise(self, source: Source, home: torch.device) -> None:
        """Memory and values for what this rank holds: shards at `home`, what is kept whole on the device."""
        trunk = self.trunk
        trunk.to_empty(device=home)
        if home != self.device:
            for module in trunk.modules():
                for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    if not isinstance(tensor, DTensor):
                        moved = torch.empty_like(tensor, device=self.device)
                        if isinstance(tensor, nn.Parameter):
                            moved = nn.Parameter(moved, tensor.requires_grad)
                        setattr(module, name, moved)
        for name, shard in self.weights():
            shard.fill(name, source)

    # --- the step ------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Every micro-batch's gradients are scattered at once, so none is ever held whole; replicas add up at last."""
        assert isinstance(self.trunk, FSDPModule)
        self.trunk.set_requires_all_reduce(last)
        self.trunk.set_is_last_backward(last)
        yield

    def _features(self, images: Tensor, *, training: bool) -> Tensor:
        features: Tensor = self.trunk(images)
        if not training:
            # Without a backward pass after it, what was not resharded would stay gathered, under plain parameters:
            # the root always, the blocks where they are to be kept until then.
            for module in self.trunk.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return features

    def step(self, learning_rate: float, head_square_norm: Tensor, max_norm: float) -> StepResult:
        """See `Engine.step`."""
        sharded, kept = self._gradients()
        if kept:
            flat = all_reduce(torch.cat([gradient.view(-1) for gradient in kept]))
            for gradient, total in zip(kept, torch.split(flat, [gradient.numel() for gradient in kept]), strict=True):
                gradient.view(-1).copy_(total)
        square = square_norm(sharded, sharded[0].device if sharded else self.device).to(self.device)
        # Over all ranks, replicas too, so that every rank sees the same number.
        square = all_reduce(square) / self.replicas + square_norm(kept, self.device) + head_square_norm
        # Two lists: with offloading they are on two devices.
        result = self._step_if_finite(square, (sharded, kept), self.optimizer.step, learning_rate, max_norm)
        self.optimizer.zero_grad()
        self.trunk.zero_grad()
        return result

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of this rank's shards, and of what every rank keeps whole; the optimizer is given both."""
        sharded: list[Tensor] = []
        kept: list[Tensor] = []
        for name, parameter in self.trunk.named_parameters():
            if parameter.grad is not None:
                stepped, gradient = self.stepped[name], _local(parameter.grad)
                stepped.data = _local(parameter)  # FSDP2 moves uneven shards before the first pass
                stepped.grad = gradient
                (sharded if isinstance(parameter, DTensor) else kept).append(gradient)
        return sharded, kept

    # --- logical state -------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.weights`."""
        for name, parameter in self.trunk.named_parameters():
            yield name, self._shard(parameter, _local(parameter))
        yield from self._buffers()

    def optimizer_state(self, *, write: bool = False) -> Iterator[tuple[str, FlatShard]]:
        """See `Engine.optimizer_state`."""
        for name, parameter in self.trunk.named_parameters():
            if parameter.requires_grad:
                for key, state in self.settings.states.items():
                    tensor = self.settings.state_tensor(self.optimizer, self.stepped[name], key)
                    yield f"{state}.{name}", self._shard(parameter, tensor)

    def _shard(self, parameter: Tensor, local: Tensor) -> FlatShard:
        """What this rank holds of a parameter, or of its state: rows, which are a range of its elements."""
        if not isinstance(parameter, DTensor):
            assert parameter.ndim <= 1, "a sharded parameter is gathered"
            return self._copied(local)
        mesh = parameter.device_mesh
        ranks, rank = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
        rows = -(-parameter.shape[0] // ranks)  # as torch.chunk cuts
        start = min(rank * rows, parameter.shape[0]) * parameter.shape[1:].numel()
        replica = self.world.rank // ranks
        return FlatShard(local.view(-1), parameter.shape, start, self.replicas, replica, lasting=True)


def _local(tensor: Tensor) -> Tensor:
    """A rank's own rows, sharing their memory; a tensor that is not sharded is its own."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _mesh(world: World, ranks: int) -> DeviceMesh:
    """All ranks in a row, or groups of consecutive `ranks` as replicas of each other."""
    if ranks == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // ranks, ranks), mesh_dim_names=("replica", "shard"))
