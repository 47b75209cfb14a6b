"""The grid: every engine in every precision, norm, recomputation, layout and accumulation, against one float64 process.

    python -m tests.engines.grid            # walks the whole grid on 2 ranks and rewrites the table in docs/engines.md
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from scale_wsl.errors import UserError
from scale_wsl.loading.decode import normalize
from scale_wsl.models.norms import FrozenBatchNorm2d
from scale_wsl.models.recompute import Stage
from scale_wsl.models.resnext import Bottleneck
from scale_wsl.models.weights import materialise
from tests.engines import parity

RANKS = 2
STEPS = 3
BATCH = 24  # images in a global batch: micro-batches of 12 or 4
RATE = 0.005

ENGINES = ("ddp", "fsdp", "hsdp", "fairscale", "zero1", "zero2", "zero3", "zero3_offload")
PRECISIONS = ("fp32", "bf16")
NORMS = ("batch per rank", "batch synchronised", "batch frozen", "group")
RECOMPUTATIONS = ("none", "blocks", "every 2 blocks", "stages")
LAYOUTS = ("contiguous", "channels_last")
ACCUMULATIONS = (1, 3)


class Cell(NamedTuple):
    """One combination."""

    engine: str
    precision: str
    norm: str
    recomputation: str
    layout: str
    accumulation: int


def cells(engine: str) -> Iterator[Cell]:
    """Every combination of an engine."""
    rest = (PRECISIONS, NORMS, RECOMPUTATIONS, LAYOUTS, ACCUMULATIONS)
    return (Cell(engine, *combination) for combination in itertools.product(*rest))


@dataclass(frozen=True)
class Outcome:
    """What a combination gave: either why it is refused, or how far it is from the reference.

    Distances are the largest over losses, and over weights, momentum and running statistics as a share of the largest
    element of their tensor.
    """

    refused: str = ""
    loss: float = 0.0
    state: float = 0.0


class Trunk(nn.Module):
    """A ResNeXt of two stages of two blocks, 16 pixels wide: every part that an engine can trip over, once or twice."""

    num_features = 64

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(16)
        self.layer1 = Stage(Bottleneck(16, 16, 32, 1, 4, norm), Bottleneck(32, 16, 32, 1, 4, norm))
        self.layer2 = Stage(Bottleneck(32, 32, 64, 2, 4, norm), Bottleneck(64, 32, 64, 1, 4, norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))).mean((2, 3))
        return features


def describe(norm: str) -> Trunk:
    """The trunk on the meta device."""
    layer = {"batch frozen": FrozenBatchNorm2d, "group": partial(nn.GroupNorm, 4)}.get(norm, nn.BatchNorm2d)
    with torch.device("meta"):
        return Trunk(layer)


def run(cell: Cell) -> Outcome:
    """Train a combination on this world's ranks and compare it with the reference (collective)."""
    losses, expected, state = reference(cell.norm, cell.accumulation)
    try:
        trainer = parity.make_trainer(
            cell.engine,
            accumulation=cell.accumulation,
            clip=1.0,
            precision=cell.precision,
            batch=BATCH,
            trunk=describe(cell.norm),
            rate=parity.constant(RATE),
            settings={
                "batchnorm_group": 0 if cell.norm == "batch synchronised" else 1,
                "checkpointing": cell.recomputation,
                "channels_last": cell.layout == "channels_last",
            },
        )
    except UserError as error:
        return Outcome(refused=str(error))
    except Exception as error:
        return Outcome(refused=f"ERROR {type(error).__name__} {str(error)[:300]}")
    try:
        found = parity.take_steps(trainer, STEPS)
    except Exception as error:
        return Outcome(refused=f"ERROR {type(error).__name__} {str(error)[:300]}")
    trainer.combine_batchnorm("mean")
    whole = parity.whole_state(trainer)
    assert set(whole) == set(state)
    distances = [relative(whole[name], state[name]) for name in state]
    loss = max(abs(a / b - 1) for a, b in zip(found, losses, strict=True))
    del trainer, expected
    gc.collect()
    return Outcome(loss=loss, state=max(distances))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the reference's largest element; NaN is infinitely far."""
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-3)
    return float(difference) if not difference.isnan() else float("inf")


def run_engine(engine: str) -> dict[Cell, Outcome]:
    """Every combination of an engine (collective)."""
    return {cell: run(cell) for cell in cells(engine)}


# --- the reference -----------------------------------------------------------------------------------------------


@cache
def reference(norm: str, accumulation: int) -> tuple[list[float], None, dict[str, torch.Tensor]]:
    """Losses and state after the same training in float64 in one process, without any engine.

    BatchNorm per rank: each rank's micro-batches pass through statistics of their own.
    """
    trunk = describe(norm)
    materialise(trunk, parity.WEIGHTS, torch.device("cpu"))
    trunk.double()
    head = parity.dense_head(trunk.num_features)
    optimizer = parity.dense_optimizer(trunk, head)
    together = norm == "batch synchronised"
    buffers = [copy.deepcopy(dict(trunk.named_buffers())) for _ in range(1 if together else RANKS)]
    losses = []
    for step in range(STEPS):
        images, ids, _ = parity.global_batch(step, BATCH)
        targets = parity.dense_targets(ids)
        labelled = (targets.sum(1) > 0).sum()
        loss = 0.0
        for rows, rank in _micro_batches(accumulation, together):
            _swap(trunk, buffers[rank])
            logits = head(trunk(normalize(images[rows], torch.float64)))
            share = -(targets[rows] * F.log_softmax(logits, 1)).sum() / labelled
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_([*trunk.parameters(), *head.parameters()], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    state = {f"trunk.{name}": parameter.detach() for name, parameter in trunk.named_parameters()}
    for name in buffers[0]:
        values = [of_rank[name] for of_rank in buffers]
        state[f"trunk.{name}"] = values[0] if name.endswith("tracked") else torch.stack(values).mean(0)
    for name, parameter in trunk.named_parameters():
        if parameter.requires_grad:
            state[f"momentum.trunk.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    return losses, None, state


def _micro_batches(accumulation: int, together: bool) -> Iterator[tuple[slice, int]]:
    """Rows of the global batch that pass through one BatchNorm, and whose statistics it is, as the loader deals."""
    micro = BATCH // accumulation // RANKS
    for number in range(accumulation):
        first = number * RANKS * micro
        if together:
            yield slice(first, first + RANKS * micro), 0
        else:
            for rank in range(RANKS):
                yield slice(first + rank * micro, first + (rank + 1) * micro), rank


def _swap(trunk: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Let a trunk's statistics be these from now on."""
    for name, buffer in buffers.items():
        module, _, local = name.rpartition(".")
        setattr(trunk.get_submodule(module), local, buffer)


def outcomes(engines: tuple[str, ...] = ENGINES) -> dict[Cell, Outcome]:
    """The grid, walked on two ranks, one engine after another in processes of its own."""
    from tests.ranks import run_ranks

    found: dict[Cell, Outcome] = {}
    for engine in engines:
        found |= run_ranks(run_engine, RANKS, engine, timeout=900)[0]
    return found


def summary(found: dict[Cell, Outcome]) -> dict[str, Any]:
    """For a look at it: the largest distances by engine and precision, and what is refused."""
    table: dict[str, Any] = {}
    for cell, outcome in found.items():
        if outcome.refused:
            table.setdefault(f"{cell.engine} refused", set()).add((cell[1:], outcome.refused))
        else:
            row = table.setdefault((cell.engine, cell.precision, cell.norm), [0.0, 0.0])
            row[0], row[1] = max(row[0], outcome.loss), max(row[1], outcome.state)
    return table


if __name__ == "__main__":
    import sys
    import time

    for name in sys.argv[1:] or ENGINES:
        started = time.perf_counter()
        for key, value in summary(outcomes((name,))).items():
            print(key, value)
        print(name, f"{time.perf_counter() - started:.0f} s", flush=True)
    _ = dist
