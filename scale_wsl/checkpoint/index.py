"""`index.json`: where every element of every tensor of a checkpoint lies, as plain ranges of bytes with their CRC-32.

It is what our reader goes by; torch's own tools go by `.metadata` instead, which says the same of the same bytes. What
an index says is hostile until `parse` has let it through: names of files, places, sizes and shapes are all checked, so
that reading can neither leave the checkpoint's folder, nor its files, nor run out of memory over what is not there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from scale_wsl.checkpoint.pieces import boxes
from scale_wsl.checkpoint.stream import DTYPES, Stream
from scale_wsl.errors import UserError

__all__ = ["Chunk", "Report", "StoredTensor", "Written", "dump", "merge", "parse", "prefix_of", "torch_metadata"]

FILE_NAME = re.compile(r"__\d{1,9}_\d{1,3}\.distcp")  # the names that torch's own writer gives
_LARGEST = 1 << 62  # no place or size is larger: a signed 64-bit number can hold sums of two


class Chunk(NamedTuple):
    """Consecutive elements of a tensor in one file."""

    file: str
    position: int  # bytes from the file's beginning
    start: int  # the first element's place in the tensor, row-major
    length: int  # elements
    crc: int  # CRC-32 of their bytes

    @property
    def stop(self) -> int:
        """One past the last element's place in the tensor."""
        return self.start + self.length


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its chunks, in order, hold each element exactly once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


class Written(NamedTuple):
    """A chunk that a rank has written, and the torch.save stream around it."""

    name: str
    chunk: Chunk
    stream: Stream


@dataclass
class Report:
    """What one rank tells of its share: every tensor that it holds any part of, what it wrote, and its files' sizes."""

    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # dtype and shape
    written: list[Written] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)


def merge(reports: Iterable[Report]) -> tuple[dict[str, StoredTensor], dict[str, int], list[Written]]:
    """All ranks' reports as one: the tensors by name, the files with their sizes, and the chunks.

    Raises:
        ValueError: the ranks contradict each other, or some element was written twice or not at all: a defect of those
            who made the shards.
    """
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, int] = {}
    written: list[Written] = []
    for report in reports:
        files |= report.files
        written += report.written
        for name, (dtype, shape) in report.tensors.items():
            known = tensors.setdefault(name, StoredTensor(dtype, shape, []))
            if (known.dtype, known.shape) != (dtype, shape):
                raise ValueError(f"{name} is {known.dtype} {known.shape} on one rank and {dtype} {shape} on another")
    for name, chunk, _ in written:
        tensors[name].chunks.append(chunk)
    for name, tensor in tensors.items():
        tensor.chunks.sort(key=lambda chunk: chunk.start)
        if problem := _gap(tensor):
            raise ValueError(f"{name}: {problem}")
    return dict(sorted(tensors.items())), files, written


def _gap(tensor: StoredTensor) -> str:
    """What keeps a tensor's chunks, in order, from holding each element exactly once; empty if nothing does."""
    reached = 0
    for chunk in tensor.chunks:
        if chunk.start != reached:
            return f"element {min(chunk.start, reached)} is there {'twice' if chunk.start < reached else 'not at all'}"
        reached = chunk.stop
    total = math.prod(tensor.shape)
    return "" if reached == total else f"{reached} of its {total} elements are there"


# --- as JSON -----------------------------------------------------------------------------------------------------


def dump(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The text of `index.json`."""
    files = sorted({chunk.file for tensor in tensors.values() for chunk in tensor.chunks})
    number = {file: place for place, file in enumerate(files)}
    content = {
        "files": files,
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "chunks": [[number[file], *numbers] for file, *numbers in tensor.chunks],
            }
            for name, tensor in tensors.items()
        },
    }
    return json.dumps(content, separators=(",", ":")).encode()


def parse(text: bytes, sizes: Mapping[str, int], where: str) -> dict[str, StoredTensor]:
    """The tensors by name, from the text of an `index.json`.

    Args:
        text: the file's bytes, from anywhere.
        sizes: of the files that there are, in bytes, by name.
        where: to name in errors.

    Raises:
        UserError: anything in it is not as `dump` writes it, or does not fit the files.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is damaged: it is no JSON") from None
    try:
        files = [_file_name(file) for file in _kind(content["files"], list)]
        tensors = {
            name: _tensor(entry, files, sizes) for name, entry in sorted(_kind(content["tensors"], dict).items())
        }
        _each_byte_once(tensors)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{where} is damaged: {type(error).__name__} at {error}") from None
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from None
    return tensors


def _kind(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is no place or size")
    return value


def _file_name(value: Any) -> str:
    if not FILE_NAME.fullmatch(_kind(value, str)):
        raise ValueError(f"{value[:40]!r} is no name of a tensor file")
    return str(value)


def _tensor(entry: Any, files: list[str], sizes: Mapping[str, int]) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(_number(size) for size in _kind(entry["shape"], list))
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"{str(dtype)[:40]!r} is no type of elements")
    if len(shape) > 64 or math.prod(shape) >= _LARGEST:
        raise ValueError(f"a tensor of shape {str(shape)[:80]} does not exist")
    chunks = []
    for row in _kind(entry["chunks"], list):
        file, position, start, length, crc = (_number(number) for number in row)
        chunk = Chunk(files[file], position, start, length, crc)
        if not length or position + length * DTYPES[dtype].dtype.itemsize > sizes.get(chunk.file, 0):
            raise ValueError(f"a chunk lies beyond the end of tensors/{chunk.file}")
        chunks.append(chunk)
    tensor = StoredTensor(dtype, shape, chunks)
    if problem := _gap(tensor):
        raise ValueError(problem)
    return tensor


def _each_byte_once(tensors: Mapping[str, StoredTensor]) -> None:
    """No two chunks share bytes, so that all tensors together are no larger than the files are."""
    taken = sorted(
        (chunk.file, chunk.position, chunk.position + chunk.length * tensor.itemsize)
        for tensor in tensors.values()
        for chunk in tensor.chunks
    )
    for (file, _, stop), (next_file, start, _) in pairwise(taken):
        if file == next_file and start < stop:
            raise ValueError(f"two chunks share bytes of tensors/{file}")


# --- for torch's tools -------------------------------------------------------------------------------------------


def prefix_of(name: str) -> tuple[str, str]:
    """What a name belongs to, and what is left: `momentum.trunk`, `bn1.bias` of `momentum.trunk.bn1.bias`."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts[:-1]) if part in ("trunk", "head")), -1)
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])


def torch_metadata(tensors: Mapping[str, StoredTensor], written: Iterable[Written]) -> Metadata:
    """The same as torch.distributed.checkpoint's own metadata, whose tools unpack names as nested dictionaries.

    `momentum.trunk.conv1.weight` becomes `["momentum"]["trunk"]["conv1.weight"]`.
    """
    # Imported here: the class is private, and only the metadata of a new checkpoint is made of it.
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    state: dict[str, Any] = {}
    paths: dict[str, tuple[str, ...]] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name, tensor in tensors.items():
        prefix, rest = prefix_of(name)
        paths[name] = (*(prefix.split(".") if prefix else ()), rest)
        properties = TensorProperties(dtype=DTYPES[tensor.dtype].dtype)
        state[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), [])
    for name, chunk, stream in written:
        ((_, _, (offsets, sizes)),) = boxes(tensors[name].shape, chunk.start, chunk.stop)
        known = state[name].chunks
        place = MetadataIndex(name, offsets, len(known))
        known.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        storage[place] = _StorageInfo(chunk.file, stream.offset, stream.length)
    return Metadata(state_dict_metadata=state, planner_data=paths, storage_data=storage, version="1.0.0")
