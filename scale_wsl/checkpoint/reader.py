"""Reads a checkpoint's tensors, for any engine, world size and head group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from scale_wsl.errors import UserError

__all__ = ["load_tensors", "shapes"]


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
