"""Writes safetensors files a block at a time, so that the memory needed does not grow with the tensors.

The `safetensors` package writes what it is given whole. The format is simple: eight bytes with the header's length, a
JSON header with each tensor's type, shape and place, then the elements (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from scale_wsl.checkpoint.stream import DTYPES, raw_bytes

__all__ = ["Entry", "write_safetensors"]


class Values(Protocol):
    """Gives a tensor's elements in order, as 1-D tensors on the CPU of any length."""

    def __call__(self) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Values

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].dtype.itemsize


def write_safetensors(path: Path, entries: Iterable[Entry]) -> Iterator[int]:
    """Write a file; yields the bytes of each block once it is written.

    Raises:
        OSError: the disk is full, for one.
    """
    # The widest elements first, so that every tensor is aligned to its own.
    ordered = sorted(entries, key=lambda entry: (-DTYPES[entry.dtype].dtype.itemsize, entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype].safetensors,
            "shape": entry.shape,
            "data_offsets": [place, place + entry.nbytes],
        }
        place += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            written = 0
            for block in entry.values():
                raw = raw_bytes(block)
                file.write(raw)
                written += raw.nbytes
                yield raw.nbytes
            if written != entry.nbytes:
                raise ValueError(f"{entry.name} has {written} bytes, not {entry.nbytes}")
