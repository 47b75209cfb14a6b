"""The grid: every engine in every precision, norm, recomputation, layout and accumulation, against one float64 process.

python -m tests.engines.grid            # walks the whole grid on 2 ranks and rewrites the table in docs/engines.md
"""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scale_wsl.errors import UserError
from scale_wsl.loading.decode import normalize
from scale_wsl.models.norms import FrozenBatchNorm2d
from scale_wsl.models.recompute import Stage
from scale_wsl.models.resnext import Bottleneck
from scale_wsl.models.weights import materialise
from tests.engines import parity
from tests.ranks import run_ranks

RANKS = 2
STEPS = 2
BATCH = 24  # images in a global batch: micro-batches of 12 or 4
ENGINES = ("ddp", "fsdp", "hsdp", "fairscale", "zero1", "zero2", "zero3", "zero3_offload")
PRECISIONS = ("fp32", "bf16")
NORMS = ("batch per rank", "batch synchronised", "batch frozen", "group")
RECOMPUTATIONS = ("none", "blocks", "every 2 blocks", "stages")
LAYOUTS = ("contiguous", "channels_last")
ACCUMULATIONS = (1, 3)


SIDE = 16  # pixels
RATE = 0.005
FP32_BOUND = 1e-5
BF16_LOSS_BOUND, BF16_STEP_BOUND, BF16_STATISTICS_BOUND = 1e-3, 0.4, 5e-3
# A ReLU's gradient jumps at zero, and rounding differs between layouts: on these images no input comes near it.
MARGIN = 2e-6
SEEDS = {
    ("batch per rank", 1): 11,
    ("batch per rank", 3): 28,
    ("batch synchronised", 1): 16,
    ("batch synchronised", 3): 15,
    ("batch frozen", 1): 81,
    ("batch frozen", 3): 81,
    ("group", 1): 10,
    ("group", 3): 10,
}


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
    """What a combination gave: either why it is refused, or how far it is from the reference after two steps.

    Attributes:
        refused: the reason.
        loss: largest relative difference of a loss.
        weights: largest difference of a parameter or statistic, as a share of the largest element of its tensor.
        momentum: likewise of the momentum.
        direction: norm of the difference of all momentum together, as a share of its norm: the trunk's or the head's,
            whichever is larger.
        statistics: likewise of all running statistics.
    """

    refused: str = ""
    loss: float = 0.0
    weights: float = 0.0
    momentum: float = 0.0
    direction: float = 0.0
    statistics: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether it is the reference's training in fp32."""
        return max(self.loss, self.weights, self.momentum) <= FP32_BOUND

    @property
    def near(self) -> bool:
        """Whether it is the reference's training in bf16, in which the gradient of images of noise is mostly noise."""
        return (
            self.loss <= BF16_LOSS_BOUND
            and self.direction <= BF16_STEP_BOUND
            and self.statistics <= BF16_STATISTICS_BOUND
        )


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
    expected = reference(cell.norm, cell.accumulation)
    try:
        trainer = parity.make_trainer(
            cell.engine,
            accumulation=cell.accumulation,
            clip=1.0,
            precision=cell.precision,
            batch=BATCH,
            trunk=describe(cell.norm),
            rate=parity.constant(RATE),
            of_batch={"seed": SEEDS[cell.norm, cell.accumulation], "side": SIDE},
            settings={
                "batchnorm_group": 0 if cell.norm == "batch synchronised" else 1,
                "checkpointing": cell.recomputation,
                "channels_last": cell.layout == "channels_last",
            },
        )
    except UserError as error:
        return Outcome(refused=str(error))
    found = parity.take_steps(trainer, STEPS)
    trainer.combine_batchnorm("mean")
    state = parity.whole_state(trainer)
    assert set(state) == set(expected.state)
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    distances = {name: _relative(state[name], expected.state[name]) for name in state}
    momentum = [name for name in state if name.startswith("momentum.")]

    def apart(*starts: str) -> float:
        """Norm of the difference of the tensors of these names, as a share of their norm."""
        names = [name for name in state if name.startswith(starts)]
        if not names:
            return 0.0
        difference, whole = (
            torch.cat([of(name).double().flatten() for name in names]).norm()
            for of in (lambda name: state[name] - expected.state[name], lambda name: expected.state[name])
        )
        return float(difference / whole)

    running = tuple(name for name in state if ".running_" in name)
    return Outcome(
        loss=max(abs(a / b - 1) for a, b in zip(found, expected.losses, strict=True)),
        weights=max(distance for name, distance in distances.items() if name not in momentum),
        momentum=max(distances[name] for name in momentum),
        direction=max(apart("momentum.trunk."), apart("momentum.head.")),
        statistics=apart(*running) if running else 0.0,
    )


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the reference's largest element; NaN is infinitely far."""
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-3)
    return float(difference) if not difference.isnan() else float("inf")


def run_engine(engine: str, norms: Sequence[str] = NORMS, layouts: Sequence[str] = LAYOUTS) -> dict[Cell, Outcome]:
    """Every combination of an engine with these norms and layouts (collective)."""
    found: dict[Cell, Outcome] = {}
    chosen = [cell for cell in cells(engine) if cell.norm in norms and cell.layout in layouts]
    groups = parity.Groups()
    for number, cell in enumerate(chosen):
        found[cell] = run(cell)
        groups.release(engine)
        if number % 16 == 15:
            gc.collect()  # DeepSpeed's engines and their hooks know each other
    return found


# --- the reference -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Losses and final state of the float64 process, and how near to zero any input of a ReLU came."""

    losses: list[float]
    state: dict[str, torch.Tensor]
    margin: float


@cache
def reference(norm: str, accumulation: int) -> Reference:
    """The same training in float64 in one process, without any engine."""
    found = train_reference(norm, accumulation, SEEDS[norm, accumulation])
    assert found.margin > MARGIN, "rounding could carry a ReLU's input across zero: choose other SEEDS"
    return found


def train_reference(norm: str, accumulation: int, seed: int) -> Reference:
    """`reference` on images of any seed. BatchNorm per rank: micro-batches pass through statistics of their rank's."""
    trunk = describe(norm)
    materialise(trunk, parity.WEIGHTS, torch.device("cpu"))
    trunk.double()
    head = parity.dense_head(trunk.num_features)
    optimizer = parity.dense_optimizer(trunk, head)
    together = norm == "batch synchronised"
    buffers = [copy.deepcopy(dict(trunk.named_buffers())) for _ in range(1 if together else RANKS)]
    losses, relus = [], _ReLUInputs()
    for step in range(STEPS):
        images, ids, _ = parity.global_batch(step, BATCH, seed=seed, side=SIDE)
        targets = parity.dense_targets(ids)
        labelled = (targets.sum(1) > 0).sum()
        loss = 0.0
        for rows, rank in _micro_batches(accumulation, together):
            _swap(trunk, buffers[rank])
            with relus:
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
    state |= {f"head.{name}": parameter.detach() for name, parameter in head.named_parameters()}
    for prefix, module in (("trunk", trunk), ("head", head)):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                state[f"momentum.{prefix}.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    return Reference(losses, state, relus.margin)


class _ReLUInputs(TorchDispatchMode):
    """Watches how near to zero the input of any ReLU comes."""

    margin = float("inf")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            self.margin = min(self.margin, float(args[0].detach().abs().min()))
        return func(*args, **(kwargs or {}))


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


def walk(engine: str) -> dict[Cell, Outcome]:
    """An engine's part of the grid, on two ranks in processes of their own."""
    found: dict[Cell, Outcome] = run_ranks(run_engine, RANKS, engine, timeout=900)[0]
    return found


def walk_hsdp_on_four() -> dict[Cell, Outcome]:
    """HSDP's part again, in two groups of two: contiguous alone, and no BatchNorm per rank, another network there."""
    norms = [norm for norm in NORMS if norm != "batch per rank"]
    found: dict[Cell, Outcome] = run_ranks(run_engine, 4, "hsdp", norms, LAYOUTS[:1], timeout=900)[0]
    return found


# --- the table ---------------------------------------------------------------------------------------------------


def rows(engine: str, found: dict[Cell, Outcome]) -> Iterator[list[str]]:
    """The table's rows: what each of an engine's norms and precisions gave, over the combinations of all else."""
    for precision, norm in itertools.product(PRECISIONS, NORMS):
        of_row = [outcome for cell, outcome in found.items() if (cell.precision, cell.norm) == (precision, norm)]
        if not of_row:
            continue
        ran = [outcome for outcome in of_row if not outcome.refused]
        passed = sum(outcome.equal if precision == "fp32" else outcome.near for outcome in ran)
        worst = [max((getattr(outcome, field) for outcome in ran), default=0.0) for field in _DISTANCES]
        yield [engine, precision, norm, f"{passed} of {len(of_row)}", *(f"{value:.1e}" for value in worst)]


def walk_all() -> Iterator[list[str]]:
    """The whole table's rows, and on standard error how long each engine takes."""
    walks: dict[str, Callable[[], dict[Cell, Outcome]]] = {engine: partial(walk, engine) for engine in ENGINES}
    for engine, walk_it in (walks | {"hsdp 2 x 2": walk_hsdp_on_four}).items():
        started = time.perf_counter()
        yield from rows(engine, walk_it())
        print(f"{engine}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def table(lines: Iterable[list[str]]) -> str:
    """The rows as a Markdown table."""
    head = ["engine", "precision", "norm", "equal", *_DISTANCES]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def documented() -> list[list[str]]:
    """The rows that docs/engines.md shows."""
    lines = _between_marks(DOCUMENT.read_text(encoding="utf-8"))[1].strip().splitlines()[2:]
    return [[field.strip() for field in line.strip("|").split("|")] for line in lines]


def _between_marks(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition("<!-- grid -->\n")
    inside, end, after = rest.partition("<!-- end of grid -->")
    assert begin
    assert end
    return before + begin, inside, end + after


_DISTANCES = ("loss", "weights", "momentum", "direction", "statistics")
DOCUMENT = Path(__file__).parents[2] / "docs" / "engines.md"

if __name__ == "__main__":
    whole = table(walk_all())
    first, _, last = _between_marks(DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(first + whole + last, encoding="utf-8")
