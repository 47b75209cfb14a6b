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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from scale_wsl.errors import UserError
from scale_wsl.files import sync_folder
from scale_wsl.recipe import setting
from scale_wsl.training.schedule import Duration

__all__ = ["CheckpointConfig", "Meta", "load_tensors", "newest", "read_meta", "resume_from", "save", "shapes"]

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})(\.old)?")  # .old: being replaced by another one of the same step
_LEFTOVER = re.compile(r"\.step-\d{8,}(\.old)?\.(part|old)")  # being written, being removed
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Section `checkpoint`: how often to save, how many to keep, and where to resume from."""

    every: str = setting(
        "1 epoch",
        "how often to save ('500 steps', '1 epoch', '1e6 images', '5 %'); the end and a preemption are always saved",
    )
    keep: int = setting(2, "how many checkpoints to keep, the newest")
    resume: str = setting(
        "",
        "'auto': from the newest whole checkpoint of run.folder, if any; or a checkpoint's folder; --resume sets it",
    )

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"checkpoint.keep is {self.keep}, but must be 1 or more")
        Duration.parse(self.every, "checkpoint.every")


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


# --- saving ------------------------------------------------------------------------------------------------------


def save(folder: Path, tensors: dict[str, Any], meta: Meta, *, keep: int) -> Path:
    """Write `folder/step-<step>/` (collective), and of the checkpoints up to this step keep only the newest `keep`.

    Later steps are left alone: only damaged ones can be there (see `resume_from`), and until the run has passed them
    they must not cost a whole one its place.

    Args:
        folder: the run's checkpoint folder, seen by all ranks.
        tensors: nested dict of tensors; sharded ones as DTensors, whole ones equal on every rank.
        meta: without `files`, which is filled in here.
        keep: see `CheckpointConfig`.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{meta.step:08d}"
    aside = folder / f".{final.name}.part"
    main = dist.get_rank() == 0
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):  # of a run that died while saving
                shutil.rmtree(path, ignore_errors=True)
        (aside / "tensors").mkdir(parents=True)
    dist.barrier()
    with torch.no_grad():
        writer = HuggingFaceStorageWriter(str(aside / "tensors"), save_distributed=True)
        dcp_save(tensors, storage_writer=writer)
    dist.barrier()
    if main:
        files = {path.name: path.stat().st_size for path in sorted((aside / "tensors").iterdir())}
        with open(aside / "meta.json", "w", encoding="utf-8") as handle:
            json.dump(dataclasses.asdict(dataclasses.replace(meta, files=files)), handle, indent=2)
            handle.flush()
            os.fsync(handle.fileno())
        sync_folder(aside / "tensors")
        sync_folder(aside)
        replaced = final.with_name(final.name + ".old")
        if final.exists():  # the same step saved again, by a run that was resumed from an older checkpoint
            if replaced.exists():
                _remove(replaced)
            os.rename(final, replaced)
        os.rename(aside, final)
        sync_folder(folder)
        if replaced.exists():
            _remove(replaced)
        for old in _checkpoints(folder, up_to=meta.step)[keep:]:
            _remove(old)
    dist.barrier()
    return final


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint away by a rename first, so that a crash never leaves half of it under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# --- finding -----------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path, *, up_to: float = math.inf) -> list[Path]:
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
    for candidate in _checkpoints(folder):
        try:
            read_meta(candidate)
        except UserError as error:
            _log.warning("passing over a damaged checkpoint: %s", error)
        else:
            return candidate
    return None


def resume_from(config: CheckpointConfig, folder: Path) -> Path | None:
    """The checkpoint that this run goes on from; None to start afresh.

    A run never goes on from elsewhere, or from an older step, beside the checkpoints in its own folder: the newest of
    those would later be taken for its own.

    Raises:
        UserError: the run folder has checkpoints but the recipe does not say what to do, or names another one than the
            newest of them; or the named one is not whole.
    """
    if config.resume == "auto":
        return newest(folder)
    if config.resume:
        named = Path(config.resume)
        read_meta(named)
        if _checkpoints(folder):
            last = newest(folder)
            if last is None or last.resolve() != named.resolve():
                raise UserError(
                    f"cannot go on from {named}, because {folder} has other checkpoints: choose another run.folder, "
                    "pass --resume auto to go on from the newest, or remove them"
                )
        return named
    if _checkpoints(folder):
        raise UserError(
            f"{folder} has checkpoints of an earlier run: pass --resume auto to go on from the newest, "
            "or choose another run.folder"
        )
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


# --- loading -----------------------------------------------------------------------------------------------------


def shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, whole, by name."""
    stored = HuggingFaceStorageReader(str(checkpoint / "tensors")).read_metadata().state_dict_metadata
    return {name: tuple(getattr(tensor, "size", ())) for name, tensor in stored.items()}


def load_tensors(checkpoint: Path, into: dict[str, Any]) -> None:
    """Fill the tensors of `into` (nested dict; DTensors read only their rows) in place (collective).

    Raises:
        UserError: another network's checkpoint, on every rank alike: a tensor is missing or has another shape there, or
            there is one more under a prefix (`trunk.`, `momentum.head.`) that is loaded.
    """
    stored, wanted = shapes(checkpoint), _flat(into)
    for name, tensor in wanted.items():
        if name not in stored:
            raise UserError(f"{checkpoint} has no {name}: {_hint(name)}")
        if stored[name] != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint} has {name} of shape {list(stored[name])}, but this recipe's is {list(tensor.shape)}: "
                + _hint(name)
            )
    prefixes = {_prefix(name) for name in wanted}
    for name in stored:
        if _prefix(name) in prefixes and name not in wanted:
            raise UserError(f"{checkpoint} has {name}, which this recipe's network has not: {_hint(name)}")
    with torch.no_grad():
        dcp_load(into, storage_reader=HuggingFaceStorageReader(str(checkpoint / "tensors")))


def _prefix(name: str) -> str:
    """`trunk` of `trunk.conv1.weight`, `momentum.trunk` of `momentum.trunk.conv1.weight`."""
    return ".".join(name.split(".")[: 2 if name.startswith("momentum.") else 1])


def _hint(name: str) -> str:
    section = "head" if name.endswith("head.bias") else "model"
    return f"it is another network's; set the {section} section as in the recipe text of the checkpoint's meta.json"


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
