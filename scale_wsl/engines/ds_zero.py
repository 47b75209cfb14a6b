"""The `zero_optimization` block of a ds_config and what belongs to it: partitions, offloading, disk I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scale_wsl.engines.json_file import BOOLEAN, EVEN, NATURAL, POSITIVE, TEXT, JsonFile, shown
from scale_wsl.engines.world import World
from scale_wsl.errors import UserError

__all__ = ["Offloading", "aio", "disk_folders", "zero"]


@dataclass(frozen=True)
class Offloading:
    """What the run says of offloading, where the file leaves it open.

    Attributes:
        folder: of this run, for what goes to disk.
        run: a name that no other run has, for a folder of its own below one that the file names.
        largest: elements that a rank holds of the trunk's largest parameter.
        pin_memory: whether there is a GPU that reads page-locked memory faster.
    """

    folder: Path
    run: str
    largest: int
    pin_memory: bool

    @classmethod
    def of(cls, folder: Path, trunk: nn.Module, world: World) -> Offloading:
        """Of the run in a folder, which trains this trunk (on any device, the meta device too)."""
        largest = max(parameter.numel() for parameter in trunk.parameters())
        digest = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()
        run = f"scale_wsl-{digest[:16]}"
        return cls(folder, run, -(-largest // world.size), pin_memory=world.device.type == "cuda")


_ZERO_TUNING = {
    "allgather_bucket_size": EVEN,
    "contiguous_gradients": BOOLEAN,
    "overlap_comm": BOOLEAN,
    "reduce_bucket_size": POSITIVE,
    "reduce_scatter": BOOLEAN,
    "stage3_max_live_parameters": NATURAL,
    "stage3_max_reuse_distance": NATURAL,
    "stage3_model_persistence_threshold": NATURAL,
    "stage3_param_persistence_threshold": NATURAL,
    "stage3_prefetch_bucket_size": NATURAL,
    "sub_group_size": POSITIVE,
    "use_multi_rank_bucket_allreduce": BOOLEAN,
}

# By the stage that a file sets, what of the above does nothing in it: a plain all-reduce at 0, no gathering below 3.
_BELOW_STAGE_3 = {"allgather_bucket_size", "use_multi_rank_bucket_allreduce"}
_OF_STAGE_3 = {key for key in _ZERO_TUNING if key.startswith("stage3_")} | {"sub_group_size"}
_IDLE = {0: set(_ZERO_TUNING), 1: _OF_STAGE_3, 2: _OF_STAGE_3, 3: _BELOW_STAGE_3}

# Key, or how it begins: the one value that may stand there (beside null, {} and "auto"), and why no other may.
_ZERO_FIXED = {
    "allgather_partitions": (True, "DeepSpeed 0.19 gathers them so whatever it says"),
    "compute_grad_norm": (True, "without the norm a gradient that is not finite would be applied"),
    "cpu_offload": (False, 'DeepSpeed has replaced it by offload_optimizer {"device": "cpu"}'),
    "mics_": (False, "partitioning within groups of ranks is not supported yet"),
    "parameter_alignment": (False, "it is not tested with this engine"),
    # DeepSpeed 0.19 reorders the flat buffer, but not the addresses by which momentum is read from it.
    "round_robin_gradients": (False, "DeepSpeed 0.19 then misplaces momentum in checkpoints"),
    "stage3_gather_16bit_weights_on_model_save": (
        False,
        "DeepSpeed's own saving is never used (scale-wsl checkpoint export writes whole weights)",
    ),
    "zenflow": (False, "ZenFlow steps by stale gradients, which the recipe does not"),
    "zero_hpz_partition_size": (1, "partitioning within groups of ranks is not supported yet"),
    "zero_quantized_": (False, "the results would not be those of the recipe"),
}

# By block: the stages in which it does something, and what it may set.
_OFFLOAD = {
    "offload_optimizer": (
        (1, 2, 3),
        {
            "device": TEXT,
            "nvme_path": TEXT,
            "buffer_count": POSITIVE,
            "pin_memory": BOOLEAN,
        },
    ),
    "offload_param": (
        (3,),
        {
            "device": TEXT,
            "nvme_path": TEXT,
            "buffer_count": POSITIVE,
            "buffer_size": POSITIVE,
            "max_in_cpu": NATURAL,
            "pin_memory": BOOLEAN,
        },
    ),
}
_OFFLOAD_FIXED = {
    "fast_init": (False, "it skips the disk's first copy of the weights"),
    "ratio": (1.0, "the rest would be stepped by another optimizer than the recipe's"),
    "pipeline_read": (False, "it is not tested with this engine"),
    "pipeline_write": (False, "it is not tested with this engine"),
    "super_offload": (False, "it needs DeepSpeed's own Adam"),
}
_DEVICES = ("none", "cpu", "nvme")
_OF_BOTH = ("device", "pin_memory")  # of _OFFLOAD's keys; the others concern the disk alone
_AIO = {
    "block_size": POSITIVE,
    "queue_depth": POSITIVE,
    "intra_op_parallelism": POSITIVE,
    "single_submit": BOOLEAN,
    "overlap_events": BOOLEAN,
}


def zero(file: JsonFile, block: dict[str, Any], run: Offloading) -> dict[str, Any]:
    """The `zero_optimization` block to hand on: stage, tuning, and what is offloaded."""
    stage = block.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= 3:
        raise UserError(
            f"{file.origin} sets zero_optimization.stage to {shown(stage)}, but ZeRO has stages 0, 1, 2 and 3"
        )
    fixed = {key: _ZERO_FIXED[start] for key in block for start in _ZERO_FIXED if key.startswith(start)}
    file.only_keys("zero_optimization.", block, ("stage", *_ZERO_TUNING, *_OFFLOAD), besides=fixed)
    for key, (ours, reason) in fixed.items():
        file.fixed(f"zero_optimization.{key}", block[key], ours, reason)
    offload = {key: _offload(file, block, key, stage, run) for key in _OFFLOAD}
    tuning = file.tuning("zero_optimization.", block, _ZERO_TUNING)
    for key in tuning:
        if key in _IDLE[stage]:
            raise UserError(f"{file.origin} sets zero_optimization.{key}, which does nothing in ZeRO-{stage}")
    return {
        "stage": stage,
        **tuning,
        **{key: found for key, found in offload.items() if found},
    }


def _offload(file: JsonFile, zero_block: dict[str, Any], key: str, stage: int, run: Offloading) -> dict[str, Any]:
    """One of the two offload blocks; {} where it leaves everything on the device."""
    stages, kinds = _OFFLOAD[key]
    prefix = f"zero_optimization.{key}."
    block = file.block(zero_block, key, "zero_optimization.")
    file.only_keys(prefix, block, kinds, besides=_OFFLOAD_FIXED)
    for name, (ours, reason) in _OFFLOAD_FIXED.items():
        file.fixed(prefix + name, block.get(name), ours, reason)
    found = file.tuning(prefix, block, kinds)
    device = found.get("device", "none")
    if device not in _DEVICES:
        raise UserError(f"{file.origin} sets {prefix}device to {shown(device)}, but must be none, cpu or nvme")
    if device == "none":
        return {}
    if stage not in stages:
        raise UserError(
            f"{file.origin} sets {prefix}device to {shown(device)}, but ZeRO-{stage} does not partition what it "
            f"would move: it needs zero_optimization.stage {' or '.join(map(str, stages))}"
        )
    found.setdefault("pin_memory", run.pin_memory)
    if device == "cpu":
        for name in found:
            if name not in _OF_BOTH:
                raise UserError(f'{file.origin} sets {prefix}{name}, which does nothing where the device is "cpu"')
        return found
    if stage < 3:
        raise UserError(
            f'{file.origin} sets {prefix}device to "nvme", but only ZeRO-3 offloads to disk: set '
            'zero_optimization.stage to 3, or the device to "cpu"'
        )
    named = found.get("nvme_path")
    if named == "":
        raise UserError(f'{file.origin} sets {prefix}nvme_path to "", but it must be a folder on a local disk')
    found["nvme_path"] = str(run.folder if named is None else Path(named) / run.run)
    if "buffer_size" in kinds and found.setdefault("buffer_size", run.largest) < run.largest:
        raise UserError(
            f"{file.origin} sets {prefix}buffer_size to {found['buffer_size']}, but a rank's part of this network's "
            f'largest kernel has {run.largest} elements: set that, or "auto"'
        )
    return found


def aio(file: JsonFile, content: dict[str, Any], zero_block: dict[str, Any]) -> dict[str, Any]:
    """The `aio` block: how DeepSpeed reads and writes what the resolved `zero_optimization` offloads to disk."""
    block = file.block(content, "aio")
    file.only_keys("aio.", block, _AIO)
    found = file.tuning("aio.", block, _AIO)
    if found and not disk_folders(zero_block):
        raise UserError(f'{file.origin} sets aio, which does nothing where no device is "nvme"')
    return found


def disk_folders(zero_block: dict[str, Any]) -> set[Path]:
    """The folders, of this run alone, to which a resolved `zero_optimization` offloads."""
    blocks = (zero_block.get(key, {}) for key in _OFFLOAD)
    return {Path(block["nvme_path"]) for block in blocks if block.get("device") == "nvme"}
