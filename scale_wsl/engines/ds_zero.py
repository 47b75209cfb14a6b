"""The `zero_optimization` block of a ds_config and what belongs to it: partitions, offloading, disk I/O."""

from __future__ import annotations

from typing import Any

from scale_wsl.engines.json_file import BOOLEAN, EVEN, NATURAL, POSITIVE, TEXT, JsonFile, shown
from scale_wsl.errors import UserError

__all__ = ["aio", "uses_disk", "zero"]

_ZERO_TUNING = {
    "allgather_bucket_size": EVEN,
    "allgather_partitions": BOOLEAN,
    "contiguous_gradients": BOOLEAN,
    "overlap_comm": BOOLEAN,
    "reduce_bucket_size": POSITIVE,
    "reduce_scatter": BOOLEAN,
    "stage3_gather_16bit_weights_on_model_save": BOOLEAN,  # of DeepSpeed's own saving, which is never called
    "stage3_max_live_parameters": NATURAL,
    "stage3_max_reuse_distance": NATURAL,
    "stage3_model_persistence_threshold": NATURAL,
    "stage3_param_persistence_threshold": NATURAL,
    "stage3_prefetch_bucket_size": NATURAL,
    "sub_group_size": POSITIVE,
    "use_multi_rank_bucket_allreduce": BOOLEAN,
}

# Key, or how it begins: the one value that may stand there (beside null, {} and "auto"), and why no other may.
_ZERO_FIXED = {
    "compute_grad_norm": (True, "without the norm a gradient that is not finite would be applied"),
    "cpu_offload": (False, 'DeepSpeed has replaced it by offload_optimizer {"device": "cpu"}'),
    "mics_": (False, "partitioning within groups of ranks is not supported yet"),
    "parameter_alignment": (False, "it is not tested with this engine"),
    # DeepSpeed 0.19 reorders the flat buffer, but not the addresses by which momentum is read from it.
    "round_robin_gradients": (False, "DeepSpeed 0.19 then misplaces momentum in checkpoints"),
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
            "pipeline_read": BOOLEAN,
            "pipeline_write": BOOLEAN,
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
    "super_offload": (False, "it needs DeepSpeed's own Adam"),
}
_DEVICES = ("none", "cpu", "nvme")
_AIO = {
    "block_size": POSITIVE,
    "queue_depth": POSITIVE,
    "intra_op_parallelism": POSITIVE,
    "single_submit": BOOLEAN,
    "overlap_events": BOOLEAN,
}


def zero(file: JsonFile, block: dict[str, Any], scratch: str) -> dict[str, Any]:
    """The `zero_optimization` block to hand on: stage, tuning, and what is offloaded (to `scratch`, if to disk)."""
    stage = block.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= 3:
        raise UserError(
            f"{file.origin} sets zero_optimization.stage to {shown(stage)}, but ZeRO has stages 0, 1, 2 and 3"
        )
    fixed = {key: _ZERO_FIXED[start] for key in block for start in _ZERO_FIXED if key.startswith(start)}
    file.only_keys("zero_optimization.", block, ("stage", *_ZERO_TUNING, *_OFFLOAD), besides=fixed)
    for key, (ours, reason) in fixed.items():
        file.fixed(f"zero_optimization.{key}", block[key], ours, reason)
    offload = {key: _offload(file, block, key, stage, scratch) for key in _OFFLOAD}
    return {
        "stage": stage,
        **file.tuning("zero_optimization.", block, _ZERO_TUNING),
        **{key: found for key, found in offload.items() if found},
    }


def _offload(file: JsonFile, zero_block: dict[str, Any], key: str, stage: int, scratch: str) -> dict[str, Any]:
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
    if device == "nvme" and stage < 3:
        raise UserError(
            f'{file.origin} sets {prefix}device to "nvme", but only ZeRO-3 offloads to disk: set '
            'zero_optimization.stage to 3, or the device to "cpu"'
        )
    if device == "nvme" and not found.setdefault("nvme_path", scratch):
        raise UserError(f'{file.origin} sets {prefix}nvme_path to "", but it must be a folder on a local disk')
    return found


def aio(file: JsonFile, content: dict[str, Any]) -> dict[str, Any]:
    """The `aio` block: how DeepSpeed reads and writes what is offloaded to disk."""
    block = file.block(content, "aio")
    file.only_keys("aio.", block, _AIO)
    return file.tuning("aio.", block, _AIO)


def uses_disk(config: dict[str, Any]) -> bool:
    """Whether a resolved ds_config offloads anything to disk."""
    zero_block = config["zero_optimization"]
    return any(zero_block.get(key, {}).get("device") == "nvme" for key in _OFFLOAD)
