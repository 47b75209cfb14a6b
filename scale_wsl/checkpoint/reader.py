"""Reads a checkpoint: any flat range of any tensor, for any engine, world size and head group, without a collective.

Goes by `meta.json` and `index.json` alone and reads plain ranges of bytes. Must never unpickle anything.
"""

from __future__ import annotations

import bisect
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from scale_wsl.checkpoint import index
from scale_wsl.checkpoint.layout import INDEX, TENSORS, VOCABULARY, Meta, read_meta
from scale_wsl.checkpoint.stream import DTYPES, raw_bytes
from scale_wsl.errors import UserError
from scale_wsl.shards import FlatShard

__all__ = ["Checkpoint"]

_BLOCK = 8 << 20  # bytes that are read and checked at a time
_READERS = 4  # threads that check; beyond a few, disks and memory are the limit


class Checkpoint:
    """A checkpoint that is open for reading; a `Source` of tensors' values.

    Attributes:
        path: its folder.
        meta: its `meta.json`.
        tensors: what is stored of each tensor, by name.
    """

    def __init__(self, path: Path, meta: Meta, tensors: Mapping[str, index.StoredTensor]) -> None:
        self.path, self.meta, self.tensors = path, meta, tensors
        self._starts: dict[str, list[int]] = {}  # of the chunks read from so far

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a checkpoint, whose files must be there with their sizes; elements are checked by `verify`.

        Raises:
            UserError: it is not whole, or says what cannot be.
        """
        meta = read_meta(path)
        prefix = f"{TENSORS}/"
        sizes = {name.removeprefix(prefix): size for name, size in meta.files.items() if name.startswith(prefix)}
        try:
            text = (path / INDEX).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path / INDEX}: {error.strerror}") from None
        return cls(path, meta, index.parse(text, sizes, f"{path}/{INDEX}"))

    @property
    def vocabulary(self) -> Path | None:
        """The vocabulary of the head's rows, where there is one."""
        return self.path / VOCABULARY if VOCABULARY in self.meta.files else None

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, name: str, shape: torch.Size | tuple[int, ...], start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` in row-major order of a tensor that must have this whole shape; 1-D, on the CPU.

        Raises:
            UserError: the tensor is not there, is another network's, or its file has been cut short meanwhile.
        """
        stored = self._stored(name, tuple(shape))
        if not 0 <= start <= stop <= _elements(stored.shape):
            raise ValueError(f"{name} has no elements {start} to {stop}")
        values = torch.empty(stop - start, dtype=DTYPES[stored.dtype].dtype)
        self._read_range(name, stored, start, values)
        return values

    @torch.no_grad()
    def load(self, shards: Mapping[str, FlatShard]) -> None:
        """Fill all shards in place, after `check`; straight into their memory where that is the CPU's."""
        self.check({name: shard.shape for name, shard in shards.items()})
        for name, shard in shards.items():
            stored = self.tensors[name]
            if shard.local.device.type == "cpu" and shard.local.dtype == DTYPES[stored.dtype].dtype:
                self._read_range(name, stored, shard.start, shard.local)
            else:
                shard.fill(name, self)

    def _read_range(self, name: str, stored: index.StoredTensor, start: int, values: Tensor) -> None:
        """Read as many elements from `start` as there is room for; 1-D, contiguous, on the CPU."""
        into, size, stop = raw_bytes(values), stored.itemsize, start + values.numel()
        starts = self._starts.setdefault(name, [chunk.start for chunk in stored.chunks])
        for chunk in stored.chunks[max(0, bisect.bisect_right(starts, start) - 1) :]:
            if chunk.start >= stop:
                break
            first, last = max(start, chunk.start), min(stop, chunk.stop)
            if first < last:
                with self._opened(chunk.file) as file:
                    place = chunk.position + (first - chunk.start) * size
                    self._read_into(file, into[(first - start) * size : (last - start) * size], place, name, chunk)

    def check(self, shapes: Mapping[str, torch.Size | tuple[int, ...]]) -> None:
        """Make sure that this is the checkpoint of a network with exactly these tensors.

        Raises:
            UserError: a tensor is missing or has another shape here, or there is one more under a prefix (`trunk`,
                `momentum.head`) that is asked for.
        """
        for name, shape in shapes.items():
            self._stored(name, tuple(shape))
        prefixes = {index.prefix_of(name)[0] for name in shapes}
        for name in self.tensors:
            if name not in shapes and index.prefix_of(name)[0] in prefixes:
                raise UserError(f"{self.path} has {name}, which this recipe's network has not: {_hint(name)}")

    def _stored(self, name: str, shape: tuple[int, ...]) -> index.StoredTensor:
        stored = self.tensors.get(name)
        if stored is None:
            raise UserError(f"{self.path} has no {name}: {_hint(name)}")
        if stored.shape != shape:
            raise UserError(
                f"{self.path} has {name} of shape {list(stored.shape)}, but this recipe's is {list(shape)}: "
                + _hint(name)
            )
        return stored

    @contextmanager
    def _opened(self, file: str) -> Iterator[int]:
        try:
            descriptor = os.open(self.path / TENSORS / file, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {self.path / TENSORS / file}: {error.strerror}") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_into(self, file: int, into: memoryview, position: int, name: str, chunk: index.Chunk) -> None:
        done = 0
        while done < into.nbytes:
            try:
                count = os.preadv(file, [into[done : done + _BLOCK]], position + done)
            except OSError as error:
                raise UserError(
                    f"cannot read {name} from {self.path / TENSORS / chunk.file}: {error.strerror}"
                ) from None
            if not count:
                raise UserError(f"{self.path} is damaged: {TENSORS}/{chunk.file} ends within {name}")
            done += count

    # --- checking ------------------------------------------------------------------------------------------------

    def verify(
        self,
        rank: int = 0,
        size: int = 1,
        progress: Callable[[int], object] = lambda _: None,
        only: Iterable[str] | None = None,
    ) -> int:
        """Compare the elements with their CRC-32, of this rank's share of about equal bytes; no collective.

        Args:
            rank: which share, of `size` that are checked elsewhere.
            size: shares.
            progress: told how many more bytes are done, from one thread at a time.
            only: names of the tensors to check; None: all.

        Returns:
            Bytes checked.

        Raises:
            UserError: it names the file and the tensor that are damaged first, in the files' order.
        """
        everything = sorted(
            (chunk.file, chunk.position, chunk.length * tensor.itemsize, name, chunk)
            for name, tensor in ((name, self.tensors[name]) for name in (self.tensors if only is None else only))
            for chunk in tensor.chunks
        )
        total, before, mine = sum(nbytes for _, _, nbytes, _, _ in everything), 0, []
        for _, _, nbytes, name, chunk in everything:
            if (before + nbytes // 2) * size // total == rank:
                mine.append((name, chunk, nbytes))
            before += nbytes
        buffers, turn = threading.local(), threading.Lock()

        def damage(entry: tuple[str, index.Chunk, int]) -> str:
            name, chunk, nbytes = entry
            if not hasattr(buffers, "block"):
                buffers.block = memoryview(bytearray(_BLOCK))
            crc = 0
            try:
                with self._opened(chunk.file) as file:
                    for start in range(0, nbytes, _BLOCK):
                        block = buffers.block[: min(_BLOCK, nbytes - start)]
                        self._read_into(file, block, chunk.position + start, name, chunk)
                        crc = zlib.crc32(block, crc)
                        with turn:
                            progress(block.nbytes)
            except UserError as error:
                return str(error)
            if crc != chunk.crc:
                return f"{self.path} is damaged: {TENSORS}/{chunk.file} has other bytes of {name} than were saved"
            return ""

        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:
            found = [sentence for sentence in readers.map(damage, mine) if sentence]
        if found:
            more = len(found) - 1
            raise UserError(found[0] + (f", and there are {more} more such places" if more else ""))
        return sum(nbytes for _, _, nbytes in mine)


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _hint(name: str) -> str:
    section = "head" if name.endswith("head.bias") else "model"
    return f"it is another network's; set the {section} section as in the recipe text of the checkpoint's meta.json"
