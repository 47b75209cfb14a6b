"""What a checkpoint is on disk, which ones there are, and how one is published and removed.

    step-00001200/
      meta.json           step, samples, recipe, ...; sizes and hashes of the other files, and of itself
      index.json          where every element of every tensor lies: what our reader goes by
      vocabulary.json     of the head's rows
      tensors/
        __0_0.distcp      the share of rank 0, first file; each rank writes its own
        .metadata         torch.distributed.checkpoint's own index, for torch's tools: we never unpickle it

Tensors carry plain names, and engines differ in nothing that is written here:

    trunk.<torchvision name>            parameters and buffers, fp32
    head.weight, head.bias              [V, D] and [V], rows by global index
    <state>.trunk.<...>, <state>.head.<...>     the optimizer's, such as momentum

A checkpoint is written aside, in a folder whose name begins with a dot, and published by one rename after every file
has reached the disk: a crash at any moment leaves the previous checkpoint whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_wsl.errors import UserError
from scale_wsl.files import sync_folder

__all__ = [
    "FORMAT",
    "INDEX",
    "TENSORS",
    "VOCABULARY",
    "Meta",
    "aside_of",
    "candidates",
    "checkpoints",
    "find",
    "newest",
    "publish",
    "read_meta",
    "remove_leftovers",
    "write_meta",
]

FORMAT = 2
TENSORS, INDEX, VOCABULARY = "tensors", "index.json", "vocabulary.json"
_META = "meta.json"
_MOST = 64 << 20  # bytes of a meta.json; it is read at once
_NAME = re.compile(r"step-(\d{8,20})(\.old)?")  # .old: being replaced by another one of the same step
_LEFTOVER = re.compile(r"\.step-\d{8,20}(\.old)?\.(part|old)")  # being written, being removed
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says beside its tensors: `meta.json`."""

    step: int  # optimizer steps done, those that were skipped as not finite included
    updates: int  # optimizer steps that changed the weights
    samples: int  # the global sample counter: positions of the loader's order that are done
    seed: int  # every random draw is a function of it and of a counter, so there is no generator state
    vocabulary_hash: str
    order: str  # what the loader's order is a function of: with samples, it says which image comes next
    run_id: str  # MLflow's; empty when there is none yet
    engine: str  # who wrote it, for people; any engine reads it
    world_size: int
    recipe: str  # resolved, as YAML
    files: dict[str, int] = field(default_factory=dict)  # size in bytes of every other file, by path
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of those that have no CRC-32 in the index
    format: int = FORMAT


# --- meta.json ---------------------------------------------------------------------------------------------------


def _meta_text(content: dict[str, Any]) -> bytes:
    """A meta.json with its own SHA-256 in it: one text for one content, so that no bit of it can change unnoticed."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=2).encode()


def write_meta(folder: Path, meta: Meta) -> None:
    """Write a checkpoint's `meta.json` and flush it to disk."""
    with open(folder / _META, "wb") as file:
        file.write(_meta_text(dataclasses.asdict(meta)))
        file.flush()
        os.fsync(file.fileno())


def read_meta(checkpoint: Path) -> Meta:
    """A checkpoint's `meta.json`, checked against the files that are there: their sizes, and the hashes it has of them.

    The elements of tensors are not read: see `Checkpoint.verify`.

    Raises:
        UserError: not a checkpoint, of another format version, or with a file missing, cut short or changed.
    """
    try:
        if not (checkpoint / _META).is_file():
            raise FileNotFoundError
        with open(checkpoint / _META, "rb") as file:
            text = file.read(_MOST)
        content = json.loads(text)
        as_saved = isinstance(content, dict) and _meta_text(content) == text
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{checkpoint} is not a whole checkpoint: its meta.json is missing or not readable") from None
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is not int or found != FORMAT:
        raise UserError(
            f"{checkpoint} has checkpoint format {str(found)[:20]}, but this version reads format {FORMAT}: go on with "
            "the version that wrote it, or train anew"
        )
    if not as_saved:
        raise UserError(f"{checkpoint}/meta.json is damaged: its text is not the one that was saved")
    for entry in dataclasses.fields(Meta):
        value = content.get(entry.name)
        if not _is(str(entry.type), value) or (type(value) is int and value < 0 and entry.name != "seed"):
            raise UserError(f"{checkpoint}/meta.json is damaged: {entry.name} is missing or of a wrong type")
    meta = Meta(**{entry.name: content[entry.name] for entry in dataclasses.fields(Meta)})
    _check_files(checkpoint, meta)
    return meta


def _is(kind: str, value: Any) -> bool:
    """Whether a value is of one of the types of `Meta`'s fields."""
    if kind.startswith("dict"):
        of = "int" if kind == "dict[str, int]" else "str"
        return type(value) is dict and all(_is(of, each) for each in value.values())
    return type(value) is (str if kind == "str" else int)


def _check_files(checkpoint: Path, meta: Meta) -> None:
    allowed = re.compile(rf"{TENSORS}/[^/]+|{INDEX}|{VOCABULARY}")
    for name, size in meta.files.items():
        path = checkpoint / name
        try:
            whole = allowed.fullmatch(name) and path.is_file() and path.stat().st_size == size
        except (OSError, ValueError):  # such as a name that is too long, or a folder that may not be entered
            whole = False
        if not whole:
            raise UserError(f"{checkpoint} is not whole: {name[:80]!r} is missing or does not have its {size} bytes")
    if INDEX not in meta.hashes:
        raise UserError(f"{checkpoint}/meta.json is damaged: it has no hash of {INDEX}")
    for name, digest in meta.hashes.items():
        if name not in meta.files:
            raise UserError(f"{checkpoint}/meta.json is damaged: it does not list {name[:80]!r} among the files")
        try:
            with open(checkpoint / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {checkpoint / name}: {error.strerror}") from None
        if found != digest:
            raise UserError(f"{checkpoint} is damaged: {name} is not as it was saved")


# --- finding -----------------------------------------------------------------------------------------------------


def checkpoints(folder: Path, *, up_to: float = math.inf) -> list[Path]:
    """Published checkpoints of no later step than `up_to`, the newest first.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot look for checkpoints in {folder}: {reason}") from None
    found = [(int(m[1]), m[2] is None, path) for path in paths if (m := _NAME.fullmatch(path.name))]
    return [path for step, _, path in sorted(found, reverse=True) if step <= up_to]


def newest(folder: Path, besides: frozenset[Path] = frozenset()) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named in a warning and passed over.

    Args:
        folder: the run's checkpoint folder.
        besides: checkpoints that are known to be damaged, and are passed over without a word.

    Raises:
        UserError: the folder cannot be read.
    """
    for candidate in checkpoints(folder):
        if candidate in besides:
            continue
        try:
            read_meta(candidate)
        except UserError as error:
            _log.warning("passing over a damaged checkpoint: %s", error)
        else:
            return candidate
    return None


def candidates(path: Path) -> list[Path]:
    """The checkpoints that a path names: itself, or all published ones of a run's folder or of its `checkpoints/`.

    Raises:
        UserError: there is none.
    """
    try:
        if (path / _META).is_file() or _NAME.fullmatch(path.name) or not path.is_dir():
            return [path]
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    except OSError as error:
        raise UserError(f"cannot look for a checkpoint in {path}: {error.strerror}") from None
    found = checkpoints(folder)
    if not found:
        raise UserError(f"there is no checkpoint in {folder}: name a step's folder, or the folder of a run")
    return found


def find(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest whole one of a run's folder or of its `checkpoints/`.

    Raises:
        UserError: there is none.
    """
    found = candidates(path)
    if found == [path]:
        read_meta(path)
        return path
    whole = newest(found[0].parent)
    if whole is None:
        raise UserError(f"no checkpoint in {found[0].parent} is whole")
    return whole


# --- publishing --------------------------------------------------------------------------------------------------


def aside_of(final: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return final.with_name(f".{final.name}.part")


def remove_leftovers(folder: Path) -> None:
    """Remove what runs that died while saving have left behind."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def publish(final: Path, meta: Meta, *, keep: int) -> None:
    """Give a checkpoint that lies complete and flushed in `aside_of(final)` its name, and keep only the newest ones.

    Of the checkpoints up to this step the newest `keep` stay. Later steps are left alone: only damaged ones can be
    there, and until the run has passed them they must not cost a whole one its place.
    """
    replaced = final.with_name(final.name + ".old")
    if final.exists():  # the same step saved again, by a run that was resumed from an older checkpoint
        if replaced.exists():
            _remove(replaced)
        os.rename(final, replaced)
    os.rename(aside_of(final), final)
    sync_folder(final.parent)
    if replaced.exists():
        _remove(replaced)
    for old in checkpoints(final.parent, up_to=meta.step)[keep:]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint away by a rename first, so that a crash never leaves half of it under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
