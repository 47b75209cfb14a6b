"""Host memory that a rank's share of a checkpoint is copied to, so that training can go on while it is written.

Allocated once and used again for every save: the first touch of fresh memory costs several times a copy.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["Staging"]

_ALIGNMENT = 64  # bytes; a cache line
_BLOCK = 256 << 20  # bytes of a block at least
_SLACK = 4 << 20  # bytes more than were asked for: for alignment


class Staging:
    """Gives out memory, which is all taken back at once by `reset`.

    Args:
        pinned: page-locked, so that a GPU copies into it while it computes.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: list[Tensor] = []
        self._block = self._used = 0
        self._touching: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(block.numel() for block in self._blocks)

    def reserve(self, nbytes: int) -> None:
        """Begin to get this much memory ready in the background; to be called once, before anything is taken."""

        def touch() -> None:
            self._blocks.append(self._allocate(nbytes + _SLACK))
            self._blocks[-1].zero_()

        self._touching = threading.Thread(target=touch, name="checkpoint-staging")
        self._touching.start()

    def reset(self) -> None:
        """Take everything back; what was given out must not be used any more."""
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        self._block = self._used = 0

    def like(self, values: Tensor) -> Tensor:
        """Memory for the values of a 1-D tensor, on the CPU, with anything in it."""
        nbytes = values.numel() * values.element_size()
        while self._block < len(self._blocks) and self._used + nbytes > self._blocks[self._block].numel():
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(self._allocate(max(nbytes, _BLOCK)))
        taken = self._blocks[self._block][self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return taken.view(values.dtype)

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
