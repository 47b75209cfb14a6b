"""The user's own DeepSpeed file: found, checked against the recipe, and its "auto" values filled in.

A value that the recipe sets too may be "auto" or the same; anything else is an error, because two answers to one
question would make one of them a lie. A key that this engine does not hand on is an error as well: DeepSpeed itself
ignores unknown keys without a word.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_wsl.errors import UserError

__all__ = ["BatchSizes", "find", "read", "resolve"]

_LARGEST_FILE = 1 << 20  # bytes
_SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"

# Handed on to DeepSpeed as they stand: they change how it works, not what is computed.
_PASSED_ON = (
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
_FROM_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "torch_autocast",
    "zero_optimization",
)
_REFUSED = {
    "bf16": "it casts BatchNorm to bf16, which DeepSpeed 0.19 cannot run and whose statistics are wrong; "
    "set engine.precision=bf16, which uses torch_autocast",
    "fp16": "only fp32 and bf16 are supported; set engine.precision",
    "amp": "only fp32 and bf16 are supported; set engine.precision",
    "scheduler": "the learning rate comes from the recipe's schedule section",
    "activation_checkpointing": "activation checkpointing is not supported yet",
}
# Offloading is refused until it is tested here; everything else below zero_optimization is DeepSpeed's own tuning.
_ZERO_REFUSED = ("offload_param", "offload_optimizer", "zero_quantized_weights", "zero_quantized_gradients")


@dataclass(frozen=True)
class BatchSizes:
    """Images per micro-batch and rank, micro-batches per step, and ranks."""

    micro: int
    accumulation: int
    world: int

    @property
    def total(self) -> int:
        """Images in a global batch."""
        return self.micro * self.accumulation * self.world


def find(name: str) -> Path:
    """The file of that name: as given (the working folder first), then in the shipped `ds_configs/`.

    Raises:
        UserError: there is no such file; the message lists those that are shipped.
    """
    for candidate in (Path(name), _SHIPPED / name):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.name for path in _SHIPPED.glob("*.json"))) or "none"
    raise UserError(
        f"there is no ds_config {name}, neither in the working folder nor in ds_configs/ (which has {shipped})"
    )


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, refusing a key given twice.

    Raises:
        UserError: not readable, not JSON, or not an object.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise UserError(f"{path} gives {key} twice")
            content[key] = value
        return content

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} is larger than 1 MiB, which no ds_config is")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise UserError(f"cannot read the ds_config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the ds_config {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"the ds_config {path} must be a JSON object, not a {type(content).__name__}")
    return content


def resolve(
    content: dict[str, Any],
    origin: str,
    *,
    batch: BatchSizes,
    optimizer: dict[str, Any],
    clip: float,
    precision: str,
) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` gets: "auto" filled from the recipe, contradictions refused.

    Args:
        content: the user's file, as `read` returns it.
        origin: its name, for messages.
        batch: from the recipe's `batch` section and the world.
        optimizer: `lr` (the peak), `momentum`, `nesterov`, `weight_decay` of the recipe.
        clip: `optim.clip` of the recipe; the engine clips jointly with the head, so DeepSpeed is told 0.
        precision: `engine.precision` of the recipe.

    Raises:
        UserError: an unknown or refused key, or a value that contradicts the recipe.
    """
    for key in content:
        if key in _REFUSED and content[key] not in (None, {}, {"enabled": False}):
            raise UserError(f"{origin} sets {key}: {_REFUSED[key]}")
        if key not in (*_PASSED_ON, *_FROM_RECIPE, *_REFUSED):
            close = difflib.get_close_matches(key, (*_PASSED_ON, *_FROM_RECIPE), n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted((*_PASSED_ON, *_FROM_RECIPE)))}"
            )
            raise UserError(f"{origin} sets {key}, which this engine does not use; {hint}")

    def same(key: str, theirs: Any, ours: Any, source: str) -> None:
        if theirs == "auto":
            return
        both_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (theirs, ours))
        if (float(theirs) != float(ours)) if both_numbers else (theirs != ours or type(theirs) is not type(ours)):
            raise UserError(
                f"{origin} sets {key} to {json.dumps(theirs)}, but {source} is {json.dumps(ours)}: "
                f'make them equal, or write "auto" in {origin}'
            )

    micro, accumulation = batch.micro, batch.accumulation
    same("train_micro_batch_size_per_gpu", content.get("train_micro_batch_size_per_gpu", "auto"), micro, "batch.micro")
    same(
        "gradient_accumulation_steps",
        content.get("gradient_accumulation_steps", "auto"),
        accumulation,
        "batch.accumulation",
    )
    same(
        "train_batch_size",
        content.get("train_batch_size", "auto"),
        batch.total,
        f"batch.micro x batch.accumulation x ranks = {micro} x {accumulation} x {batch.world}, which",
    )
    same("gradient_clipping", content.get("gradient_clipping", "auto"), clip, "optim.clip")
    _check_optimizer(content.get("optimizer", {}), origin, optimizer, same)
    autocast = content.get("torch_autocast", {})
    _object(autocast, "torch_autocast", origin)
    same("torch_autocast.enabled", autocast.get("enabled", "auto"), precision == "bf16", "engine.precision=bf16")
    if precision == "bf16":
        same("torch_autocast.dtype", autocast.get("dtype", "auto"), "bfloat16", "the type of engine.precision")
    zero = content.get("zero_optimization", {"stage": 0})
    _object(zero, "zero_optimization", origin)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(
            f"{origin} sets zero_optimization.stage to {json.dumps(stage)}, but ZeRO has stages 0, 1, 2 and 3"
        )
    for key in _ZERO_REFUSED:
        if zero.get(key) not in (None, False, {}, {"device": "none"}):
            raise UserError(f"{origin} sets zero_optimization.{key}, which is not supported yet: take it out")

    resolved = {key: content[key] for key in _PASSED_ON if key in content}
    resolved.setdefault("steps_per_print", 1_000_000_000)  # the trainer prints its own lines
    resolved |= {
        "train_batch_size": batch.total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0; the engine clips once, by the norm over trunk and head
        "zero_optimization": {**zero, "stage": stage},
        "zero_allow_untested_optimizer": True,  # torch.optim.SGD
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        # No module listed: gradients are reduced in fp32, as in every other engine.
        resolved["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return resolved


def _object(value: Any, key: str, origin: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{origin} sets {key} to {json.dumps(value)}, but it must be a JSON object")


def _check_optimizer(block: Any, origin: str, ours: dict[str, Any], same: Any) -> None:
    """DeepSpeed ignores this block where it is passed an optimizer, so it must say what the recipe says."""
    _object(block, "optimizer", origin)
    if not block:
        return
    kind = block.get("type", "SGD")
    if not isinstance(kind, str) or kind.lower() not in ("sgd", "auto"):
        raise UserError(f"{origin} sets optimizer.type to {json.dumps(kind)}, but the recipe's optimizer is SGD")
    parameters = block.get("params", {})
    _object(parameters, "optimizer.params", origin)
    for key, value in parameters.items():
        if key not in ours:
            raise UserError(
                f"{origin} sets optimizer.params.{key}, which the recipe does not have; it has {', '.join(ours)}"
            )
        same(f"optimizer.params.{key}", value, ours[key], f"the recipe's ({'peak ' if key == 'lr' else ''}{key})")
