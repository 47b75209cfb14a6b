"""How large a network each engine trains on this machine: the ladder of ResNeXt-101 32xCd, climbed until memory ends.

    python benchmarks/capacity.py                                  # every engine, 2 gloo ranks, 20 GiB in all
    python benchmarks/capacity.py --engines fsdp zero3 --widths 4 8 --limit-gib 6

A rung is taken when 3 real training steps are done - forward, backward, Nesterov momentum - on the same images, the
loss falls from the first to the last, and the ranks together never held more than the limit. Each rung is tried in
processes of its own; memory is their proportional set size (PSS), looked at every 50 ms, and the first look above the
limit ends them. Weights are fp32, every block is recomputed, and the head has 1,500 hashtags. Nothing is simulated.

Engines: those of a recipe. Those of DeepSpeed have the shipped file of that name with small buckets and, under ZeRO-3,
without gathering weights before they are needed. zero3_nvme keeps weights, gradients and momentum on the disk under
--scratch, of which it needs 16 bytes per parameter.
"""

from __future__ import annotations

import argparse
import contextlib
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
from synthetic import random_batch, random_trainer, resolved

from scale_wsl.engines import ds_config
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.world import joined_world
from scale_wsl.models.resnext import ModelConfig, parameter_count
from scale_wsl.training.preemption import Preemption

_ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fairscale", "zero3_nvme")
_WIDTHS = (4, 8, 16, 32, 48, 64, 96, 128, 192)
_STEPS = 3
# Bytes from which on glibc gives memory back when it is freed. Left to itself it moves the limit up to 32 MiB, and
# what it then keeps in holes between kernels is a third of a rank's memory.
_GIVEN_BACK = 1 << 20
_DONE = "losses"


# --- one rung, on each rank --------------------------------------------------------------------------------------


def _content(name: str) -> dict[str, Any]:
    """The shipped ds_config, with small buckets and, under ZeRO-3, nothing gathered before it is needed."""
    content = ds_config.read(ds_config.find(f"{name}.json"))
    block = content["zero_optimization"]
    block["reduce_bucket_size"] = 1e7
    if block["stage"] < 3:
        block["allgather_bucket_size"] = 1e7
    else:
        none_early = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        block |= {f"stage3_{key}": 0 for key in none_early} | {"sub_group_size": 1e7}
    if name == "zero3_nvme":  # every kernel a sub-group of its own, and no more buffers than it needs
        block["sub_group_size"] = 1
        block["offload_optimizer"]["buffer_count"] = 2
        block["offload_param"] |= {"buffer_count": 1, "max_in_cpu": 0}
    return content


def _rung(name: str, width: int, arguments: argparse.Namespace) -> None:
    """Train three steps; rank 0 prints the losses and the seconds of a step."""
    warnings.simplefilter("ignore")
    model = ModelConfig(depth=arguments.depth, width=width)
    with joined_world() as world:
        deepspeed = None
        if name.startswith("zero"):
            deepspeed = resolved(_content(name), model, arguments.micro, world, arguments.scratch)
        config = EngineConfig(name="deepspeed" if deepspeed else name, checkpointing="blocks")
        batch = random_batch(arguments.micro, arguments.image_size, world)
        trainer = random_trainer(config, model, batch, arguments.rate, world, deepspeed)
        preemption = Preemption()
        started = time.perf_counter()
        for _ in range(_STEPS):
            trainer.step(preemption)
        seconds = (time.perf_counter() - started) / _STEPS
        losses = torch.stack(trainer.interval.losses).double()
        dist.all_reduce(losses)
        if world.is_main:
            print(_DONE, *losses.tolist(), seconds, flush=True)


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
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_GIVEN_BACK)}
    peak, over = 0.0, False
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
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
    parser.add_argument("--depth", type=int, default=101, help="layers (default: 101)")
    parser.add_argument("--micro", type=int, default=2, help="images per rank and step")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate")
    parser.add_argument("--scratch", default="", help="folder on a disk, for zero3_nvme; default: a temporary one")
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
                sizes = {
                    key: getattr(arguments, key.replace("-", "_")) for key in ("ranks", "depth", "micro", "image-size")
                }
                sizes |= {"rate": arguments.rate, "scratch": scratch}
                arguments.passed_on = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
                outcome = _try(name, width, arguments)
                shutil.rmtree(scratch, ignore_errors=True)
                Path(scratch).mkdir(exist_ok=True)
            parameters = parameter_count(ModelConfig(depth=arguments.depth, width=width)) / 1e6
            row = f"{name:13} {f'{arguments.depth} 32x{width}d':12} {parameters:9,.0f}M {outcome.peak:10.1f}"
            if outcome.reason:
                print(f"{row}   not taken: {outcome.reason}", flush=True)
                break
            print(f"{row} {outcome.seconds:10.1f}   " + " ".join(f"{loss:.4f}" for loss in outcome.losses), flush=True)


if __name__ == "__main__":
    main()
