"""How large a network each engine trains on this machine: the ladder of ResNeXt-101 32xCd, climbed until memory ends.

    python benchmarks/capacity.py                                  # every engine, 2 gloo ranks, 20 GiB in all
    python benchmarks/capacity.py --engines fsdp zero3 --widths 4 8 --limit-gib 6

A rung is taken when 3 real training steps are done - forward, backward, Nesterov momentum - on the same images, the
loss falls from the first to the last, and the ranks together never held more than the limit. Each rung is tried in
processes of its own; memory is their proportional set size (PSS), looked at every 50 ms, and the first look above the
limit ends them. Weights are fp32, every block is recomputed, and the head has 1,500 hashtags. Nothing is simulated.

Engines: those of a recipe; zero3_disk keeps weights, gradients and momentum on the disk under --scratch, of which it
needs 16 bytes per parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import on_ranks

from scale_wsl.engines import ds_config
from scale_wsl.engines.build import build_engine
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.world import World, joined_world
from scale_wsl.loading.loader import Batch
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.resnext import ModelConfig, describe_trunk, parameter_count
from scale_wsl.models.weights import initial_weights
from scale_wsl.training.loop import Counter, Trainer
from scale_wsl.training.preemption import Preemption
from scale_wsl.training.schedule import LearningRate, OptimConfig

_ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fairscale", "zero3_disk")
_WIDTHS = (4, 8, 16, 32, 48, 64, 96, 128, 192)
_LABELS = 1500
_STEPS = 3
_DONE = "losses"


# --- one rung, on each rank --------------------------------------------------------------------------------------


def _content(name: str, scratch: str) -> dict[str, Any]:
    """A ds_config for little memory: small buckets, nothing kept gathered."""
    block: dict[str, Any] = {
        "stage": int(name[4]),
        "reduce_bucket_size": 10_000_000,
        "allgather_bucket_size": 10_000_000,
    }
    if block["stage"] == 3:
        block |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "sub_group_size": 50_000_000,
        }
    if name.endswith("disk"):
        block["offload_optimizer"] = {"device": "nvme", "nvme_path": scratch, "buffer_count": 5, "pin_memory": False}
        block["offload_param"] = {"device": "nvme", "nvme_path": scratch, "buffer_count": 5, "pin_memory": False}
    return {"zero_optimization": block}


def _rung(name: str, width: int, arguments: argparse.Namespace) -> None:
    """Train three steps; rank 0 prints the losses and the seconds of a step."""
    warnings.simplefilter("ignore")
    model = ModelConfig(width=width)
    optim = OptimConfig()
    zero = name.startswith("zero")
    with joined_world() as world:
        trunk = describe_trunk(model)
        deepspeed = None
        if zero:
            content = _content(name, arguments.scratch)
            if name.endswith("disk"):  # a buffer holds this rank's part of the largest kernel
                largest = max(parameter.numel() for parameter in trunk.parameters())
                size = -(-largest // world.size // 1024 + 1) * 1024
                content["zero_optimization"]["offload_param"]["buffer_size"] = size
            deepspeed = ds_config.resolve(
                content,
                "the benchmark",
                batch=ds_config.BatchSizes(arguments.micro, 1, world.size),
                optimizer=optim.settings,
                learning_rate=arguments.rate,
                clip=0.0,
                precision="fp32",
                scratch=arguments.scratch,
            )
        config = EngineConfig(name="deepspeed" if zero else name, checkpointing="blocks")
        head = ShardedHead(_LABELS, trunk.num_features, mesh=head_mesh())
        trainer = Trainer(
            engine=build_engine(config, trunk, initial_weights(model, 0), optim.settings, world, deepspeed),
            head=head,
            head_optimizer=optim.settings.of_head(head),
            batches=itertools.repeat(_batch(arguments, world)),
            accumulation=1,
            world=world,
            optim=optim,
            learning_rate=LearningRate(arguments.rate, arguments.rate, 0, 10**9, 0),
            max_corrupt=0.0,
            seed=0,
            counter=Counter(),
        )
        preemption = Preemption()
        started = time.perf_counter()
        for _ in range(_STEPS):
            trainer.step(preemption)
        seconds = (time.perf_counter() - started) / _STEPS
        losses = torch.stack(trainer.interval.losses).double()
        dist.all_reduce(losses)
        if world.is_main:
            print(_DONE, *losses.tolist(), seconds, flush=True)


def _batch(arguments: argparse.Namespace, world: World) -> Batch:
    numbers = torch.Generator().manual_seed(world.rank)
    shape = (arguments.micro, 3, arguments.image_size, arguments.image_size)
    images = torch.randint(0, 256, shape, generator=numbers, dtype=torch.uint8)
    ids = torch.randint(0, _LABELS, (arguments.micro, 3), generator=numbers)
    return Batch(images, ids, torch.full(ids.shape, 1 / 3), torch.arange(arguments.micro))


# --- the climb ---------------------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    peak: float  # GiB over all processes
    losses: list[float]
    seconds: float  # of a step
    reason: str = ""  # why the rung was not taken


def _try(name: str, width: int, arguments: argparse.Namespace) -> _Outcome:
    """One rung, in processes of their own."""
    command = [sys.executable, __file__, "--rung", name, str(width), *arguments.passed_on]
    peak, over = 0.0, False
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None:
            held = sum(_pss(pid) for pid in _family(process.pid)) / 2**30
            peak, over = max(peak, held), held > arguments.limit_gib
            late = time.monotonic() - started > arguments.patience
            if over or late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return _Outcome(peak, [], 0.0, "more memory" if over else f"more than {arguments.patience} s")
            time.sleep(0.05)
        output.seek(0)
        lines = output.read().splitlines()
    for line in lines:
        if line.startswith(_DONE):
            *losses, seconds = map(float, line.split()[1:])
            falls = losses[-1] < losses[0]
            return _Outcome(peak, losses, seconds, "" if falls else "the loss does not fall")
    return _Outcome(peak, [], 0.0, f"failed: {lines[-1] if lines else 'without a word'}")


def _family(root: int) -> Iterator[int]:
    """A process and all below it."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _pss(pid: int) -> int:
    """Proportional set size in bytes; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Climb the ladder with each engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=_ENGINES, default=list(_ENGINES))
    parser.add_argument("--widths", nargs="+", type=int, default=list(_WIDTHS), help="C of 32xCd, tried in this order")
    parser.add_argument("--limit-gib", type=float, default=20.0, help="memory of all ranks together (default: 20)")
    parser.add_argument("--patience", type=int, default=3600, help="seconds for a rung (default: 3600)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro", type=int, default=2, help="images per rank and step")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate")
    parser.add_argument("--scratch", default="", help="folder on a disk, for zero3_disk; default: a temporary one")
    parser.add_argument("--rung", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rung:
        name, width = arguments.rung
        on_ranks(_rung, arguments.ranks, name, int(width), arguments)
        return
    print("engine        network      parameters   peak GiB   s a step   losses of 3 steps")
    for name in arguments.engines:
        for width in arguments.widths:
            with tempfile.TemporaryDirectory(dir=arguments.scratch or None) as scratch:
                sizes = {"ranks": arguments.ranks, "micro": arguments.micro, "image-size": arguments.image_size}
                sizes |= {"rate": arguments.rate, "scratch": scratch}
                arguments.passed_on = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
                outcome = _try(name, width, arguments)
                shutil.rmtree(scratch, ignore_errors=True)
                Path(scratch).mkdir(exist_ok=True)
            parameters = parameter_count(ModelConfig(width=width)) / 1e6
            row = f"{name:13} {f'101 32x{width}d':12} {parameters:9,.0f}M {outcome.peak:10.1f}"
            if outcome.reason:
                print(f"{row}   not taken: {outcome.reason}", flush=True)
                break
            print(f"{row} {outcome.seconds:10.1f}   " + " ".join(f"{loss:.4f}" for loss in outcome.losses), flush=True)


if __name__ == "__main__":
    main()
