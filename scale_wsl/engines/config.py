"""Section `engine` of a recipe: which engine shards the trunk, and how. Refuses what the chosen engine would ignore."""

from __future__ import annotations

from dataclasses import dataclass

from scale_wsl.errors import UserError
from scale_wsl.models.recompute import Recomputation
from scale_wsl.recipe import setting

__all__ = ["EngineConfig"]

# Settings that only some engines use: key, its value when unset, the engines.
_ONLY = (
    ("ds_config", "", ("deepspeed",)),
    ("shard_group", 0, ("fsdp",)),
    ("reshard_after_forward", True, ("fsdp", "fairscale")),
    ("offload", "none", ("fsdp",)),
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Section `engine`: how the trunk is sharded and in which precision it computes."""

    name: str = setting(
        "ddp",
        "how the trunk is sharded over the ranks: not at all; torch's FSDP2; fairscale's FSDP (legacy); DeepSpeed ZeRO",
        choices=("ddp", "fsdp", "fairscale", "deepspeed"),
    )
    ds_config: str = setting(
        "", "DeepSpeed's JSON file, in the working folder or in ds_configs/; --ds_config FILE also sets engine.name"
    )
    precision: str = setting(
        "fp32", "compute type of the trunk; weights, BatchNorm and reductions stay fp32", choices=("fp32", "bf16")
    )
    checkpointing: str = setting(
        "none", "activations to compute again in the backward pass: none, blocks, 'every 2 blocks' (3, 4, ...), stages"
    )
    channels_last: bool = setting(False, "give images, and with them activations, the channels-last memory layout")
    batchnorm: str = setting(
        "mean",
        "how the ranks' BatchNorm statistics become one before evaluation and saving: their mean, or pooled variances",
        choices=("mean", "pooled"),
    )
    batchnorm_group: int = setting(
        1, "consecutive ranks that share BatchNorm statistics in training; 1: none (the paper); 0: all"
    )
    shard_group: int = setting(
        0, "fsdp: consecutive ranks that share one copy of the trunk, which others replicate (HSDP); 0: all ranks"
    )
    reshard_after_forward: bool = setting(
        True, "fsdp, fairscale: free a block's gathered weights after the forward pass and gather them again"
    )
    offload: str = setting(
        "none", "fsdp: where sharded weights, gradients and optimizer state are kept", choices=("none", "cpu")
    )

    def __post_init__(self) -> None:
        """Check what one key cannot know of another.

        Raises:
            UserError: a number out of range, or a setting that the chosen engine would ignore.
        """
        for key in ("batchnorm_group", "shard_group"):
            if getattr(self, key) < 0:
                raise UserError(f"engine.{key} is {getattr(self, key)}, but must be 0 or more")
        _ = self.recomputation
        for key, unset, engines in _ONLY:
            if getattr(self, key) != unset and self.name not in engines:
                raise UserError(
                    f"engine.{key} is set, but engine.name is {self.name}: set engine.name={engines[0]}, "
                    f"or take engine.{key} out"
                )

    @property
    def recomputation(self) -> Recomputation:
        """Which parts of the trunk are recomputed."""
        return Recomputation.parse(self.checkpointing, "engine.checkpointing")

    def check_norm(self, norm: str) -> None:
        """Make sure that there is BatchNorm to train, where something is said of its statistics.

        Raises:
            UserError: there is none.
        """
        for key, unset in (("batchnorm", "mean"), ("batchnorm_group", 1)):
            if norm != "batch" and getattr(self, key) != unset:
                raise UserError(
                    f"engine.{key} is set, but model.norm is {norm}, whose statistics no rank gathers: take it out, "
                    "or set model.norm=batch"
                )

    def check_groups(self, world_size: int) -> None:
        """Make sure that the groups divide the ranks.

        Raises:
            UserError: one does not.
        """
        for key in ("batchnorm_group", "shard_group"):
            size = getattr(self, key)
            if size and world_size % size:
                raise UserError(f"engine.{key} is {size}, but must divide the {world_size} ranks of this run")
