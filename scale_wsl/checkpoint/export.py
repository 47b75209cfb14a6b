"""Turns a checkpoint into files that others load: torchvision's network, the head, and what its rows mean.

Only weights go out; the optimizer's state stays in the checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from scale_wsl.checkpoint.layout import VOCABULARY
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.safetensors import Entry, write_safetensors
from scale_wsl.errors import UserError
from scale_wsl.files import published_folder
from scale_wsl.models.resnext import ModelConfig

__all__ = ["FORMATS", "export", "exported_bytes"]

FORMATS = ("safetensors", "torch", "deepspeed")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BLOCK = 4 << 20  # elements that are in memory at a time


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    form: str = "safetensors",
    head: bool = True,
    mean: Sequence[float],
    std: Sequence[float],
    progress: Callable[[int], object] = lambda _: None,
) -> list[Path]:
    """Write the network of a checkpoint to a new folder, published by one rename.

        model.safetensors   trunk under torchvision's names, the head as its `fc`: loads strictly into
                            `torchvision.models.ResNet(Bottleneck, layers, num_classes, groups=, width_per_group=)`
        pytorch_model.bin   the same by `torch.save`, instead (form "torch"); needs memory for the whole network
        latest, step-.../   the same as one rank's checkpoint of DeepSpeed ZeRO-2, instead (form "deepspeed"), for
                            `zero_to_fp32.py`; needs memory for the whole network
        head.safetensors    the head alone: `weight` [V, D], and `bias` [V] where it has one
        vocabulary.json     the hashtags of its rows
        config.json         how to build the network, and how its images were normalised
        recipe.yaml         how it was trained

    Args:
        checkpoint: whose elements are compared with their checksums first, those that are exported.
        out: the folder, which must not be there yet.
        form: one of `FORMATS`.
        head: False: the trunk alone, without `fc`, head and vocabulary.
        mean: of the images that the network was trained on, by channel, RGB in [0, 1].
        std: their standard deviation.
        progress: told how many more bytes are done.

    Returns:
        The files.

    Raises:
        UserError: the folder is there already or cannot be written, the checkpoint has no head or no such network, or
            it is damaged.
    """
    network = _network(checkpoint, head)
    config = _config(checkpoint, head) | {"mean": list(mean), "std": list(std)}
    try:
        if out.exists():
            raise UserError(f"{out} is there already: choose another folder, or remove it")
        checkpoint.verify(only=_exported(checkpoint, head), progress=progress)
        with published_folder(out) as folder:
            if form == "torch":
                _torch_save({entry.name: _whole(entry, progress) for entry in network}, folder / "pytorch_model.bin")
            elif form == "deepspeed":
                _save_for_deepspeed({entry.name: _whole(entry, progress) for entry in network}, folder, checkpoint)
            else:
                for nbytes in write_safetensors(folder / "model.safetensors", network):
                    progress(nbytes)
            if head:
                for nbytes in write_safetensors(folder / "head.safetensors", _head(checkpoint)):
                    progress(nbytes)
                if checkpoint.vocabulary is not None:
                    (folder / VOCABULARY).write_bytes(checkpoint.vocabulary.read_bytes())
            (folder / "recipe.yaml").write_text(checkpoint.meta.recipe, encoding="utf-8")
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    return sorted(path for path in out.rglob("*") if path.is_file())


def exported_bytes(checkpoint: Checkpoint, head: bool) -> int:
    """Bytes of tensors that `export` checks and writes."""
    entries = _network(checkpoint, head) + (_head(checkpoint) if head else [])
    checked = sum(checkpoint.tensors[name].nbytes for name in _exported(checkpoint, head))
    return checked + sum(entry.nbytes for entry in entries)


def _exported(checkpoint: Checkpoint, head: bool) -> list[str]:
    prefixes = ("trunk.", "head.") if head else ("trunk.",)
    return [name for name in checkpoint.tensors if name.startswith(prefixes)]


def _network(checkpoint: Checkpoint, head: bool) -> list[Entry]:
    entries = [
        _entry(checkpoint, name, name.removeprefix("trunk."))
        for name in checkpoint.tensors
        if name.startswith("trunk.")
    ]
    if not entries:
        raise UserError(f"{checkpoint.path} has no trunk to export")
    if head:
        entries += [_entry(checkpoint, f"head.{entry.name}", f"fc.{entry.name}") for entry in _head(checkpoint)]
        if "head.bias" not in checkpoint.tensors:
            weight = checkpoint.tensors["head.weight"]  # torchvision's fc has a bias: none is one of zeros
            zeros = torch.zeros(weight.shape[0], dtype=getattr(torch, weight.dtype))
            entries.append(Entry("fc.bias", weight.dtype, (weight.shape[0],), lambda: [zeros]))
    return entries


def _head(checkpoint: Checkpoint) -> list[Entry]:
    if "head.weight" not in checkpoint.tensors:
        raise UserError(f"{checkpoint.path} has no head: export it without one (--without-head)")
    return [
        _entry(checkpoint, name, name.removeprefix("head."))
        for name in ("head.weight", "head.bias")
        if name in checkpoint.tensors
    ]


def _entry(checkpoint: Checkpoint, stored_name: str, name: str) -> Entry:
    stored = checkpoint.tensors[stored_name]
    count = math.prod(stored.shape)

    def values() -> Iterator[Tensor]:
        for start in range(0, count, _BLOCK):
            yield checkpoint.read(stored_name, stored.shape, start, min(start + _BLOCK, count))

    return Entry(name, stored.dtype, stored.shape, values)


def _whole(entry: Entry, progress: Callable[[int], object]) -> Tensor:
    tensor = torch.empty(math.prod(entry.shape), dtype=getattr(torch, entry.dtype))
    place = 0
    for block in entry.values():
        tensor[place : place + block.numel()] = block
        place += block.numel()
        progress(block.nbytes)
    return tensor.view(entry.shape)


def _torch_save(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, but a disk that is full is an OSError."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"{path.name}: {str(error).splitlines()[0]}") from error


def _save_for_deepspeed(tensors: dict[str, Tensor], folder: Path, checkpoint: Checkpoint) -> None:
    """What `deepspeed.utils.zero_to_fp32` (0.19) reads: one partition, each parameter a group of its own."""
    tag = f"step-{checkpoint.meta.step:08d}"
    buffers = {name for name in tensors if name.rpartition(".")[2] in _STATISTICS}
    parameters = [name for name in tensors if name not in buffers]
    (folder / tag).mkdir()
    (folder / "latest").write_text(tag, encoding="utf-8")
    model = {
        "module": {name: tensors[name] for name in sorted(buffers)},
        "buffer_names": sorted(buffers),
        "param_shapes": [{name: tensors[name].shape} for name in parameters],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "ds_version": "0.19",
    }
    partition = {
        "zero_stage": 2,
        "partition_count": 1,
        "single_partition_of_fp32_groups": [tensors[name].view(-1) for name in parameters],
    }
    _torch_save(model, folder / tag / "mp_rank_00_model_states.pt")
    _torch_save(
        {"optimizer_state_dict": partition, "ds_version": "0.19"},
        folder / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )


def _config(checkpoint: Checkpoint, head: bool) -> dict[str, Any]:
    """How to build the network, by torchvision's names of the arguments."""
    try:
        model = ModelConfig(**yaml.safe_load(checkpoint.meta.recipe)["model"])
    except (yaml.YAMLError, KeyError, TypeError, RecursionError):
        raise UserError(f"the recipe text in {checkpoint.path}/meta.json does not say which network it is of") from None
    layers = [0, 0, 0, 0]
    for name in checkpoint.tensors:
        if match := re.match(r"trunk\.layer([1-4])\.(\d{1,4})\.", name):
            stage = int(match[1]) - 1
            layers[stage] = max(layers[stage], int(match[2]) + 1)
    norms = {"batch": "BatchNorm2d", "frozen": "BatchNorm2d", "group": f"GroupNorm({model.norm_groups})"}
    config = {
        "architecture": model.name,
        "block": "Bottleneck",
        "layers": layers,
        "groups": model.groups,
        "width_per_group": model.width,
        "norm": norms[model.norm],
        "step": checkpoint.meta.step,
        "images": checkpoint.meta.samples,
        "vocabulary_hash": checkpoint.meta.vocabulary_hash,
    }
    return config | ({"num_classes": checkpoint.tensors["head.weight"].shape[0]} if head else {})
