"""The user's own DeepSpeed file: found, checked against the recipe, and its "auto" values filled in.

A value that the recipe sets too may be "auto" or the same; anything else is an error, because two answers to one
question would make one of them a lie. A key that this engine does not hand on is an error as well, at every depth,
unless its value leaves that feature of DeepSpeed off. Whatever JSON the file holds, the answer is a config or one
`UserError`.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_wsl.engines.ds_zero import Offloading, aio, zero
from scale_wsl.engines.json_file import (
    BOOLEAN,
    FACTOR,
    NATURAL,
    POSITIVE,
    TEXT,
    TEXTS,
    JsonFile,
    is_number,
    name_for_message,
    shown,
    whole,
)
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.errors import UserError

__all__ = ["BatchSizes", "find", "read", "resolve"]

_LARGEST_FILE = 1 << 20  # bytes
_SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"


# Handed on to DeepSpeed as they stand: they change how it works and what it prints, not what is computed.
_REPORTING = {
    **dict.fromkeys(("dump_state", "memory_breakdown", "wall_clock_breakdown"), BOOLEAN),
    "steps_per_print": POSITIVE,
}
_REPORTING_BLOCKS = {
    "comms_logger": {**dict.fromkeys(("debug", "enabled", "prof_all", "verbose"), BOOLEAN), "prof_ops": TEXTS},
    "flops_profiler": {
        **dict.fromkeys(("detailed", "enabled"), BOOLEAN),
        "module_depth": whole(-1),
        "output_file": TEXT,
        "profile_step": NATURAL,
        "recompute_fwd_factor": FACTOR,
        "top_modules": POSITIVE,
    },
}
# Key, or how it begins: the one value that may stand there (beside null, {} and "auto"), and why no other may.
_FIXED = {
    "zero_allow_untested_optimizer": (True, "the recipe's torch.optim.SGD needs it"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is the recipe's torch.optim.SGD"),
}
# Blocks that stay out: for good, or unless their `enabled` is true.
_SWITCHED = {
    "bf16": "it casts BatchNorm to bf16, which DeepSpeed 0.19 cannot run and whose statistics are wrong; "
    "set engine.precision=bf16, which uses torch_autocast",
    "fp16": "only fp32 and bf16 are supported; set engine.precision",
    "amp": "only fp32 and bf16 are supported; set engine.precision",
}
_REFUSED = {
    "scheduler": "the learning rate comes from the recipe's schedule section",
    "activation_checkpointing": "what is recomputed comes from the recipe's engine.checkpointing",
}
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_FROM_RECIPE = (*_SIZES, "optimizer", "torch_autocast", "zero_optimization")


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
                raise UserError(f"{path} gives {name_for_message(key)} twice")
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
        raise UserError(f"the ds_config {path} must be a JSON object, not {shown(content)}")
    return content


def resolve(
    content: dict[str, Any],
    origin: str,
    *,
    batch: BatchSizes,
    optimizer: OptimizerSettings,
    learning_rate: float,
    clip: float,
    precision: str,
    offloading: Offloading,
) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` gets: "auto" filled from the recipe, contradictions refused.

    A tuning value that is null or "auto" is left to DeepSpeed's default.

    Args:
        content: the user's file, as `read` returns it.
        origin: its name, for messages.
        batch: from the recipe's `batch` section and the world.
        optimizer: of the recipe.
        learning_rate: the recipe's peak, scaled with the batch.
        clip: `optim.clip` of the recipe; the engine clips jointly with the head, so DeepSpeed is told 0.
        precision: `engine.precision` of the recipe.
        offloading: of the run.

    Raises:
        UserError: an unknown or refused key, a value of the wrong type, or one that contradicts the recipe.
    """
    file = JsonFile(origin)
    taken = (*_FROM_RECIPE, *_REPORTING, *_REPORTING_BLOCKS, *_FIXED, "aio")
    file.only_keys("", content, taken, besides=(*_SWITCHED, *_REFUSED))
    for key, reason in _SWITCHED.items():
        block = file.block(content, key)
        if file.value(f"{key}.enabled", block.get("enabled"), BOOLEAN):
            raise UserError(f"{origin} sets {key}.enabled to true: {reason}")
    for key, reason in _REFUSED.items():
        if file.block(content, key):
            raise UserError(f"{origin} sets {key}: {reason}")
    for key, (ours, reason) in _FIXED.items():
        file.fixed(key, content.get(key), ours, reason)

    micro, accumulation, total = batch.micro, batch.accumulation, batch.total
    product = f"batch.micro x batch.accumulation x ranks = {micro} x {accumulation} x {batch.world} = {total}"
    facts = (product, f"batch.micro is {micro}", f"batch.accumulation is {accumulation}", f"optim.clip is {clip}")
    for key, number, fact in zip(_SIZES, (total, micro, accumulation, clip), facts, strict=True):
        file.agrees(key, content.get(key, "auto"), number, fact)
    stage = zero(file, file.block(content, "zero_optimization"), offloading)
    _check_optimizer(file, file.block(content, "optimizer"), optimizer, learning_rate, partitioned=stage["stage"] > 0)
    _check_autocast(file, file.block(content, "torch_autocast"), precision)

    resolved = file.tuning("", content, _REPORTING)
    for key, kinds in _REPORTING_BLOCKS.items():
        if block := file.block(content, key):
            file.only_keys(f"{key}.", block, kinds)
            resolved[key] = file.tuning(f"{key}.", block, kinds)
    if found := aio(file, content, stage):
        resolved["aio"] = found
    resolved.setdefault("steps_per_print", 1_000_000_000)  # the trainer prints its own lines
    resolved |= {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0; the engine clips once, by the norm over trunk and head
        "zero_optimization": stage,
        **{key: ours for key, (ours, _) in _FIXED.items()},
    }
    if precision == "bf16":
        # No module listed: gradients are reduced in fp32, as in every other engine.
        resolved["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return resolved


def _check_optimizer(
    file: JsonFile, block: dict[str, Any], ours: OptimizerSettings, learning_rate: float, *, partitioned: bool
) -> None:
    """DeepSpeed ignores this block where it is passed an optimizer, so it must say what the recipe says."""
    file.only_keys("optimizer.", block, ("type", "params"))
    kind = block.get("type", "auto")
    name = kind.lower() if isinstance(kind, str) else ""
    if name in ("lamb", "onebitlamb"):
        raise UserError(
            f"{file.origin} sets optimizer.type to {shown(kind)}, but LAMB scales each layer's step by the norms of "
            "the whole layer, "
            + (
                "and under ZeRO a rank holds pieces of layers: it would be another optimizer on every number of ranks"
                if partitioned
                else "which this toolkit offers with no engine"
            )
            + "; use SGD, Adam or AdamW"
        )
    parameters = file.block(block, "params", "optimizer.")
    decoupled = parameters.get("adam_w_mode", True)
    if name == "adam" and (ours.name == "adamw" if decoupled in (None, "auto") else decoupled is not False):
        name = "adamw"  # as DeepSpeed understands it
    if name not in (ours.name, "auto"):
        hint = ' (DeepSpeed means AdamW by "Adam", unless adam_w_mode is false)' if str(kind).lower() == "adam" else ""
        raise UserError(
            f"{file.origin} sets optimizer.type to {shown(kind)}, but optim.name is {ours.name}{hint}: "
            f'make them agree, or write "auto" in {file.origin}'
        )
    ours_by_key: dict[str, tuple[Any, str]] = {
        "lr": (learning_rate, f"optim.lr x batch / 256 = {learning_rate:.6g}"),
        "weight_decay": (ours.weight_decay, f"optim.weight_decay is {ours.weight_decay}"),
    }
    if ours.name == "sgd":
        for key in ("momentum", "nesterov"):
            ours_by_key[key] = (getattr(ours, key), f"optim.{key} is {shown(getattr(ours, key))}")
    else:
        betas = [ours.beta1, ours.beta2]
        ours_by_key["betas"] = (betas, f"optim.beta1 and optim.beta2 are {betas}")
        ours_by_key["eps"] = (ours.eps, f"optim.eps is {ours.eps}")
        ours_by_key["adam_w_mode"] = (ours.name == "adamw", f"optim.name is {ours.name}")
        # How DeepSpeed builds Adam; the trainer's is torch's own, which computes the same.
        ours_by_key["torch_adam"] = (True, "the optimizer is torch's own")
        ours_by_key["bias_correction"] = (True, "torch's Adam always corrects its bias")
    file.only_keys("optimizer.params.", parameters, ours_by_key)
    for key, theirs in parameters.items():
        value, fact = ours_by_key[key]
        # The learning rate is a product, with more digits than anyone writes.
        near = key == "lr" and is_number(theirs) and abs(theirs) < sys.maxsize
        if not (near and math.isclose(theirs, value, rel_tol=1e-6)):
            file.agrees(f"optimizer.params.{key}", theirs, value, fact)


def _check_autocast(file: JsonFile, block: dict[str, Any], precision: str) -> None:
    """Autocast follows engine.precision; where it is off, its dtype has no effect."""
    file.only_keys("torch_autocast.", block, ("enabled", "dtype", "lower_precision_safe_modules"))
    fact = f"engine.precision is {precision}"
    file.agrees("torch_autocast.enabled", block.get("enabled", "auto"), precision == "bf16", fact)
    dtype = file.value("torch_autocast.dtype", block.get("dtype"), TEXT)
    if precision == "bf16" and dtype not in ("bf16", "torch.bfloat16", None):
        file.agrees("torch_autocast.dtype", dtype, "bfloat16", fact)
    modules = block.get("lower_precision_safe_modules")
    if modules not in (None, "auto", []):
        raise UserError(
            f"{file.origin} sets torch_autocast.lower_precision_safe_modules to {shown(modules)}, but it must be [] "
            'or "auto": the gradients of the modules in it would be reduced in bf16, and every engine reduces in fp32'
        )
