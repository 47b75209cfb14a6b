"""The logical checkpoint: one format, written and read by every engine at any world size and any head group.

A checkpoint is a folder `step-00001200/` of safetensors files, written by torch.distributed.checkpoint (each rank its
share), and `meta.json`. Tensors carry plain names:

    trunk.<torchvision name>            parameters and buffers, whole, fp32
    head.weight, head.bias              [V, D] and [V], rows by global index
    momentum.trunk.<...>, momentum.head.<...>

Nothing in it is pickled. It is written aside and published by one rename, after every file has reached the disk; a
crash at any moment leaves the previous checkpoint whole. This module must never import an engine.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from scale_wsl.errors import UserError

__all__ = ["FORMAT", "LEFTOVER", "Meta", "checkpoints", "newest", "read_meta", "remove"]

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})(\.old)?")  # .old: being replaced by another one of the same step
LEFTOVER = re.compile(r"\.step-\d{8,}(\.old)?\.(part|old)")  # being written, being removed
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says beside its tensors: `meta.json`."""

    step: int  # optimizer steps done
    samples: int  # the global sample counter: positions of the loader's order that are done
    seed: int  # every random draw is a function of it and of a counter, so there is no generator state
    vocabulary_hash: str
    order: str  # what the loader's order is a function of: with samples, it says which image comes next
    run_id: str  # MLflow's; empty when there is none yet
    engine: str  # who wrote it, for people; any engine reads it
    world_size: int
    recipe: str  # resolved, as YAML
    files: dict[str, int] = dataclasses.field(default_factory=dict)  # size in bytes of every tensor file
    format: int = FORMAT


def checkpoints(folder: Path, *, up_to: float = math.inf) -> list[Path]:
    """Published checkpoints of no later step than `up_to`, the newest first."""
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot look for checkpoints in {folder}: {reason}") from None
    found = [(int(m[1]), m[2] is None, path) for path in paths if (m := _NAME.fullmatch(path.name))]
    return [path for step, _, path in sorted(found, reverse=True) if step <= up_to]


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named in a warning and passed over.

    Raises:
        UserError: the folder cannot be read.
    """
    for candidate in checkpoints(folder):
        try:
            read_meta(candidate)
        except UserError as error:
            _log.warning("passing over a damaged checkpoint: %s", error)
        else:
            return candidate
    return None


def read_meta(checkpoint: Path) -> Meta:
    """A checkpoint's `meta.json`, checked against the files that are there.

    Raises:
        UserError: not a checkpoint, of another format version, or with a file missing or cut short.
    """
    try:
        content = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{checkpoint} is not a whole checkpoint: its meta.json is missing or not readable") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{checkpoint} has checkpoint format {found}, but this version reads format {FORMAT}")
    kinds = {"int": int, "str": str, "dict[str, int]": dict}
    for field in dataclasses.fields(Meta):
        if not isinstance(content.get(field.name), kinds[str(field.type)]):
            raise UserError(f"{checkpoint}/meta.json is damaged: {field.name} is missing or of a wrong type")
    meta = Meta(**{field.name: content[field.name] for field in dataclasses.fields(Meta)})
    for name, size in meta.files.items():
        path = checkpoint / "tensors" / name
        try:
            whole = path.is_file() and path.stat().st_size == size
        except (OSError, ValueError):  # such as a name that is too long, or a folder that may not be entered
            whole = False
        if not whole:
            raise UserError(f"{checkpoint} is not whole: tensors/{name} is missing or does not have its {size} bytes")
    return meta


def remove(checkpoint: Path) -> None:
    """Take a checkpoint away by a rename first, so that a crash never leaves half of it under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
