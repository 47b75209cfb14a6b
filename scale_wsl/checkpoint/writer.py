"""Writes a checkpoint aside and publishes it by one rename, after every file has reached the disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from scale_wsl.checkpoint.layout import LEFTOVER, Meta, checkpoints, remove
from scale_wsl.files import sync_folder

__all__ = ["save"]


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
            if LEFTOVER.fullmatch(path.name):  # of a run that died while saving
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
                remove(replaced)
            os.rename(final, replaced)
        os.rename(aside, final)
        sync_folder(folder)
        if replaced.exists():
            remove(replaced)
        for old in checkpoints(folder, up_to=meta.step)[keep:]:
            remove(old)
    dist.barrier()
    return final
