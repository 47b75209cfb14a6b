"""Made-up training states, sharded in every way that engines shard: what the checkpoint layer is tested with."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_wsl.checkpoint import layout
from scale_wsl.checkpoint.layout import Meta
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.shards import FlatShard, even_range

SHAPES = {
    "trunk.conv1.weight": (6, 3, 5, 5),
    "trunk.bn1.weight": (7,),
    "trunk.bn1.running_mean": (7,),
    "trunk.bn1.num_batches_tracked": (),
    "trunk.fc.weight": (40, 30_001),  # large enough to be shared out among its holders
    "head.weight": (5, 4),
    "head.bias": (5,),
    "momentum.trunk.conv1.weight": (6, 3, 5, 5),
    "exp_avg_sq.head.weight": (5, 4),
    "trunk.nothing": (3, 0),
}
KINDS = ("replicated", "rows", "flat", "groups", "mixed")


def meta(step: int) -> Meta:
    return Meta(
        step=step,
        updates=step,
        samples=step * 8,
        seed=0,
        vocabulary_hash="v",
        order="o",
        run_id="r",
        engine="ddp",
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        recipe="",
    )


def tensors(step: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    """Every tensor whole; each element is another number, and each step has others."""
    made, before = {}, 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        values = torch.arange(before, before + count) + 10_000_000 * step
        made[name] = values.view(shape) if name.endswith("tracked") else values.float().view(shape)
        before += count
    return made


def shards(kind: str, whole: dict[str, torch.Tensor], *, lasting: bool = True) -> Iterator[tuple[str, FlatShard]]:
    """This rank's parts of the tensors, copied, sharded as `kind` says."""
    rank, size = dist.get_rank(), dist.get_world_size()
    kinds = itertools.cycle(KINDS[:-1]) if kind == "mixed" else itertools.repeat(kind)
    for name, tensor in whole.items():
        flat, count = tensor.reshape(-1), tensor.numel()
        match next(kinds):
            case "rows" if tensor.ndim:  # FSDP2's: the last ranks may hold fewer rows, or none
                row = count // max(len(tensor), 1)
                each = -(-len(tensor) // size) * row
                start, stop, copies, copy = min(count, rank * each), min(count, (rank + 1) * each), 1, 0
            case "flat":  # ZeRO's and fairscale's partitions: their borders are anywhere
                start, stop = even_range(count, size, rank)
                copies, copy = 1, 0
            case "groups" if size % 2 == 0:  # a head's rows: shared in a group, each group has a copy
                start, stop = even_range(count, size // 2, rank % (size // 2))
                copies, copy = 2, rank // (size // 2)
            case _:
                start, stop, copies, copy = 0, count, size, rank
        local = flat[start:stop].clone()
        yield name, FlatShard(local, tensor.shape, start, copies, copy, lasting)


def save(folder: Path, step: int, kind: str = "mixed", *, asynchronous: bool = True, keep: int = 2) -> Path:
    """Save `tensors(step)` and wait for it (collective)."""
    with Saver(folder, keep=keep, asynchronous=asynchronous) as saver:
        saver.start(shards(kind, tensors(step)), meta(step), {"vocabulary.json": b"{}"})
    return folder / f"step-{step:08d}"


def save_steps(folder: Path, steps: list[int], keep: int = 2) -> None:
    for step in steps:
        save(folder, step, keep=keep)


def contents(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    checkpoint = Checkpoint.open(path)
    return {
        name: checkpoint.read(name, stored.shape, 0, math.prod(stored.shape)).view(stored.shape)
        for name, stored in checkpoint.tensors.items()
    }


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names that are in only one of the two, or have other values."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    )


def rewrite_meta(path: Path, **changes: Any) -> None:
    """Change a meta.json and its own hash with it, as somebody who means harm would."""
    content = json.loads((path / "meta.json").read_text()) | changes
    (path / "meta.json").write_bytes(layout._meta_text(content))


def rewrite_index(path: Path, text: bytes) -> None:
    """Replace an index.json, and its size and hash in the meta.json with it."""
    (path / "index.json").write_bytes(text)
    content = json.loads((path / "meta.json").read_text())
    content["files"]["index.json"] = len(text)
    content["hashes"]["index.json"] = hashlib.sha256(text).hexdigest()
    rewrite_meta(path, **content)
