"""Says in a few lines what is in a checkpoint."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from scale_wsl.checkpoint.index import StoredTensor, prefix_of
from scale_wsl.checkpoint.reader import Checkpoint

__all__ = ["describe"]


def describe(checkpoint: Checkpoint, *, each: bool = False) -> str:
    """A table of a checkpoint's tensors by group, or of every one of them, below what its meta says."""
    meta = checkpoint.meta
    lines = [
        f"checkpoint      {checkpoint.path}",
        f"step            {meta.step:,} ({meta.step - meta.updates:,} of them skipped)",
        f"images          {meta.samples:,}",
        f"written by      {meta.engine or 'an unnamed engine'} on {meta.world_size} ranks, format {meta.format}",
        f"vocabulary      {meta.vocabulary_hash[:12]}{'' if checkpoint.vocabulary else ' (not in the checkpoint)'}",
        f"MLflow run      {meta.run_id or 'none'}",
        f"files           {len(meta.files)}, {sum(meta.files.values()):,} bytes",
        "",
    ]
    groups: dict[str, list[StoredTensor]] = defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        groups[prefix_of(name)[0] or name].append(tensor)
    rows = [_row(name, tensors, f"{len(tensors):,}") for name, tensors in groups.items()]
    rows.append(_row("all", checkpoint.tensors.values(), f"{len(checkpoint.tensors):,}"))
    lines += _table(("group", "tensors", "elements", "bytes", "type", "chunks"), rows)
    if each:
        rows = [
            _row(name, [tensor], "x".join(map(str, tensor.shape)) or "one number")
            for name, tensor in checkpoint.tensors.items()
        ]
        lines += ["", *_table(("tensor", "shape", "elements", "bytes", "type", "chunks"), rows)]
    return "\n".join(lines)


def _row(name: str, tensors: Iterable[StoredTensor], second: str) -> tuple[str, ...]:
    tensors = list(tensors)
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    types = " ".join(sorted({tensor.dtype for tensor in tensors}))
    chunks = sum(len(tensor.chunks) for tensor in tensors)
    return name, second, f"{elements:,}", f"{nbytes:,}", types, f"{chunks:,}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Columns under their heads: names and types to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if head[column] in ("group", "tensor", "type") else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
