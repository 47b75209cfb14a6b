"""Gradients under ZeRO-3 with the optimizer on disk: stepped by where they are, and kept in a file too.

DeepSpeed 0.19 has all of a rank's gradients in one buffer in memory, one sub-group after another. And yet it writes
each parameter's to a file of its own, and reads these back to addresses that are not multiples of 512 bytes, where
reads may fail without a word: parameters then get each other's gradients, or none. Here nothing is written twice: the
optimizer steps by views of the buffer.

The buffer itself is a file that is mapped into memory, whose pages this process gives up once they are written, and
once they are used; the kernel writes them out when it needs the room. A buffer in page-locked memory stays there, for a
GPU copies into it while it computes.
"""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_wsl.errors import UserError

__all__ = ["keep_gradients", "require_room"]


def require_room(zero_block: dict[str, Any], elements: int, states: int, ranks: int) -> None:
    """Make sure, before anything is made, that what will be offloaded has room on the disk.

    Args:
        zero_block: a resolved `zero_optimization`.
        elements: that a rank holds of the trunk.
        states: tensors of optimizer state per parameter.
        ranks: that share this host's disk.

    Raises:
        UserError: there is less room than is needed.
    """
    needed: dict[str, int] = {}
    for key in ("offload_param", "offload_optimizer"):
        block = zero_block.get(key, {})
        if block.get("device") == "nvme":
            # In fp32: the weights, and what the optimizer steps beside its state and, see above, the gradients.
            tensors = 1 if key == "offload_param" else 1 + states + (not block["pin_memory"])
            needed[block["nvme_path"]] = needed.get(block["nvme_path"], 0) + 4 * elements * tensors * ranks
    for folder, size in needed.items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise UserError(f"cannot offload to {folder}: {error.strerror}") from None
        if free < size:
            raise UserError(
                f"offloading to {folder} takes {size / 1e9:.1f} GB for the {ranks} ranks of this host, but its disk "
                f"has {free / 1e9:.1f} GB left: make room, or set nvme_path to a folder on another disk"
            )


def keep_gradients(zero: Any, folder: Path, rank: int) -> None:
    """Let a DeepSpeedZeroOptimizer_Stage3 whose optimizer is on disk step by the gradients of its own buffer.

    Args:
        zero: before its first step.
        folder: on the disk.
        rank: of this process, for a name.

    Raises:
        UserError: the file cannot be made, or the disk has no room for it.
    """
    try:
        pages = None if zero.offload_optimizer_pin_memory else _move_to_file(zero, folder / f"gradients-{rank}")
    except OSError as error:
        raise UserError(f"cannot keep gradients in {folder}: {error.strerror}") from None
    places: dict[str, tuple[int, int]] = {}
    start = 0
    for flat, length in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat_numel, strict=True):
        places[flat.ds_id] = (start, length)
        start += length
    swapper = zero.optimizer_swapper
    swap_in, swap_out = swapper.swap_in_optimizer_state, swapper.swap_out_optimizer_state

    def swap_in_with_gradients(*, parameter: Any, async_parameter: Any) -> None:
        swap_in(parameter=parameter, async_parameter=async_parameter)
        parameter.grad = zero.grad_partitions_flat_buffer.narrow(0, *places[parameter.ds_id])

    def swap_out_without_gradients(*, parameter: Any, async_swap: bool) -> None:
        swap_out(parameter=parameter, async_swap=async_swap)
        give_up(parameter)

    def give_up(parameter: Any, **_: Any) -> None:
        if pages is not None:
            start, length = places[parameter.ds_id]
            pages.give_up(start, length)

    swapper.swap_in_optimizer_state = swap_in_with_gradients
    swapper.swap_out_optimizer_state = swap_out_without_gradients
    swapper.swap_out_gradients = give_up


class _Pages:
    """A file's pages in this process's memory."""

    def __init__(self, file: mmap.mmap, element_size: int) -> None:
        self._file, self._element_size = file, element_size

    def give_up(self, start: int, length: int) -> None:
        """Unmap these elements' pages, which the kernel keeps, and writes out, as it does with any file's."""
        first = start * self._element_size // mmap.PAGESIZE * mmap.PAGESIZE
        self._file.madvise(mmap.MADV_DONTNEED, first, (start + length) * self._element_size - first)


def _move_to_file(zero: Any, path: Path) -> _Pages:
    """Put a file without a name, which goes with this process, in the place of the buffer, which nothing is in yet."""
    old: Tensor = zero.grad_partitions_flat_buffer
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, old.nbytes)  # a disk that filled up later would be a SIGBUS
        mapped = mmap.mmap(file.fileno(), old.nbytes)
    path.unlink()
    zero.grad_partitions_flat_buffer = torch.frombuffer(mapped, dtype=old.dtype)
    partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for number, partition in partitions.items():
        partitions[number] = zero.grad_partitions_flat_buffer.narrow(0, partition.storage_offset(), partition.numel())
    return _Pages(mapped, old.element_size())
