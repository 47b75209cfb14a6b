"""How the parts of a tensor that ranks hold are named: as ranges of its elements in row-major order.

Every engine's shard is such a range - whole tensors, FSDP2's rows, ZeRO's and fairscale's flat partitions, the head's
rows - so checkpoints and initial weights need to know nothing else about an engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["FlatShard", "Source", "even_range"]


class Source(Protocol):
    """Where the values of tensors come from: a seed, or a checkpoint."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` in row-major order of the tensor `name` of this whole shape: 1-D, on the CPU.

        Uses no collective, so that each rank reads what it holds, when it likes.
        """


def even_range(length: int, parts: int, part: int) -> tuple[int, int]:
    """Bounds of one of `parts` consecutive ranges of `length` elements that differ by at most one in size."""
    return part * length // parts, (part + 1) * length // parts


@dataclass(frozen=True)
class FlatShard:
    """Elements `[start, stop)` of a tensor in row-major order, as this rank holds them.

    Attributes:
        local: 1-D, contiguous; shares memory with what is trained, so that writing to it loads the tensor.
        shape: of the whole tensor.
        start: the first element's place in the whole tensor.
        copies: ranks that hold these same elements, this one included.
        copy: which of them this rank is, counted from 0.
        lasting: the values stay as they are until the next update of the weights; otherwise only until the next forward
            pass (BatchNorm statistics), or until the next shard is taken (what was gathered for this one). A checkpoint
            copies lasting ones while the next step is already computing.
    """

    local: Tensor
    shape: torch.Size
    start: int = 0
    copies: int = 1
    copy: int = 0
    lasting: bool = False

    @classmethod
    def whole(cls, tensor: Tensor, copies: int = 1, copy: int = 0, *, lasting: bool = False) -> FlatShard:
        """A tensor that this rank holds entirely; it must be contiguous."""
        return cls(tensor.detach().view(-1), tensor.shape, 0, copies, copy, lasting)

    @property
    def stop(self) -> int:
        """One past the last element's place in the whole tensor."""
        return self.start + self.local.numel()

    @torch.no_grad()
    def fill(self, name: str, source: Source) -> None:
        """Take the values from a source, in place."""
        if self.local.numel():
            self.local.copy_(source.read(name, self.shape, self.start, self.stop))

    def __post_init__(self) -> None:
        if self.local.ndim != 1 or self.stop > math.prod(self.shape):
            raise ValueError(f"elements {self.start} to {self.stop} are no part of a tensor of shape {self.shape}")
