"""Writes elements as the bytes that `torch.save` would write for a tensor, and says where the raw elements lie in them.

A stream is a zip archive that stores, uncompressed, a pickle of the tensor's shape and the elements themselves. So
torch's own tools load it as a tensor, while our reader takes the elements as a plain range of bytes: this module writes
a pickle, and nothing of ours ever reads one.
"""

from __future__ import annotations

import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

__all__ = ["DTYPES", "ElementType", "Stream", "dtype_name", "raw_bytes", "write_stream"]

_BLOCK = 8 << 20  # bytes that are checked and written at a time, while they are in the processor's cache


class ElementType(NamedTuple):
    """A type of elements: torch's, the class that stands for it in torch.save's pickles, and safetensors' name."""

    dtype: torch.dtype
    storage: Any
    safetensors: str


DTYPES = {
    "float64": ElementType(torch.float64, torch.DoubleStorage, "F64"),
    "float32": ElementType(torch.float32, torch.FloatStorage, "F32"),
    "bfloat16": ElementType(torch.bfloat16, torch.BFloat16Storage, "BF16"),
    "float16": ElementType(torch.float16, torch.HalfStorage, "F16"),
    "int64": ElementType(torch.int64, torch.LongStorage, "I64"),
    "int32": ElementType(torch.int32, torch.IntStorage, "I32"),
    "uint8": ElementType(torch.uint8, torch.ByteStorage, "U8"),
    "bool": ElementType(torch.bool, torch.BoolStorage, "BOOL"),
}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`; it must be a key of `DTYPES`."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"tensors of type {name} cannot be saved")
    return name


def raw_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, sharing memory with it."""
    raw: Any = values.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


@dataclass(frozen=True)
class Stream:
    """Where a stream and the raw elements in it are, in bytes from the file's beginning, and the elements' CRC-32."""

    offset: int
    length: int
    position: int
    crc: int


@dataclass(frozen=True)
class _Storage:
    """Stands for the elements, which lie beside the pickle."""

    dtype: str
    count: int


class _Tensor:
    """Pickles as torch.save's tensor of these elements would."""

    def __init__(self, dtype: str, sizes: tuple[int, ...]) -> None:
        self.dtype, self.sizes = dtype, sizes

    def __reduce__(self) -> tuple[Any, ...]:
        elements = _Storage(self.dtype, math.prod(self.sizes))
        strides = tuple(math.prod(self.sizes[dimension + 1 :]) for dimension in range(len(self.sizes)))
        return _rebuild_tensor_v2, (elements, 0, self.sizes, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Names the elements as torch.save does, instead of pickling them."""

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", DTYPES[obj.dtype].storage, "0", "cpu", obj.count) if isinstance(obj, _Storage) else None


class _Part:
    """The rest of a file as a file of its own: a stream's inner places count from its own beginning."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.base = file, file.tell()
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self.file.tell() - self.base

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(self.base + offset if whence == 0 else offset, whence) - self.base


def write_stream(file: BinaryIO, values: Tensor, sizes: tuple[int, ...]) -> Stream:
    """Append a tensor of these sizes to a file, which must be seekable and at its end.

    Args:
        file: opened for writing bytes.
        values: its elements, contiguous, on the CPU.
        sizes: of the tensor, whose product is the number of elements.

    Raises:
        OSError: the disk is full, for one.
    """
    described = BytesIO()
    _Pickler(described, protocol=2).dump(_Tensor(dtype_name(values.dtype), sizes))
    part: Any = _Part(file)
    with zipfile.ZipFile(part, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), described.getvalue())
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        data = zipfile.ZipInfo("archive/data/0")
        raw = raw_bytes(values)
        data.file_size = raw.nbytes  # more than 2 GiB need another header
        with archive.open(data, "w") as elements:
            position = file.tell()
            for start in range(0, raw.nbytes, _BLOCK):
                elements.write(raw[start : start + _BLOCK])
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
    return Stream(part.base, part.tell(), position, data.CRC)
