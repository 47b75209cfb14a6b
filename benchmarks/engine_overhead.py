"""What an engine costs beside the library that it drives: a trainer's step against a bare loop's, for the same network.

    python benchmarks/engine_overhead.py                        # every engine, 2 gloo ranks
    python benchmarks/engine_overhead.py --engines ddp fsdp --rounds 5

Both sides have the same ResNeXt, hashtag head, images and optimizer (PyTorch's fused SGD, but for bare FSDP2, which it
does not take), and take turns on the same ranks. The bare loop is what the library's own documentation shows - wrap,
forward, backward, step - and nothing else: no joint norm, no guard against gradients that are not finite, no agreement
between ranks. The trainer's step has all of these. A round is some steps of one side, twice as many of the other, and
some of the first; times are the median over rounds, ratios are ours over theirs in the same round, median (quartiles).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from launch import on_ranks
from synthetic import LABELS, OPTIM, random_batch, random_trainer, resolved
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.world import World, joined_world
from scale_wsl.loading.decode import normalize
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.recompute import residual_blocks
from scale_wsl.models.resnext import ModelConfig
from scale_wsl.models.weights import build_trunk
from scale_wsl.training.preemption import Preemption

_ENGINES = ("ddp", "fsdp", "hsdp", "fairscale", "zero0", "zero1", "zero2", "zero3")
_RATE = 0.01
_Step = Callable[[], None]


def _model(arguments: argparse.Namespace) -> ModelConfig:
    return ModelConfig(depth=arguments.depth, width=arguments.width)


def _deepspeed(name: str, arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """The same resolved ds_config for both sides."""
    stage = int(name[4])
    block = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return resolved({"zero_optimization": block}, _model(arguments), arguments.micro, world)


def _ours(name: str, arguments: argparse.Namespace, world: World) -> _Step:
    zero = name.startswith("zero")
    config = EngineConfig(
        name="deepspeed" if zero else name.replace("hsdp", "fsdp"), shard_group=world.size // 2 if name == "hsdp" else 0
    )
    deepspeed = _deepspeed(name, arguments, world) if zero else None
    batch = random_batch(arguments.micro, arguments.image_size, world)
    trainer = random_trainer(config, _model(arguments), batch, _RATE, world, deepspeed)
    preemption = Preemption()

    def step() -> None:
        trainer.step(preemption)

    return step


def _bare(name: str, arguments: argparse.Namespace, world: World) -> _Step:
    """The library alone: its averages over ranks stand, as in its documentation."""
    trunk = build_trunk(_model(arguments), 0)
    head = ShardedHead(LABELS, trunk.num_features, mesh=head_mesh())
    batch = random_batch(arguments.micro, arguments.image_size, world)
    labelled = arguments.micro * world.size
    wrapped, update = _wrap(name, trunk, arguments, world)
    head_optimizer = OPTIM.settings.of_head(head)

    def step() -> None:
        features = wrapped(normalize(batch.images))
        loss = head.loss(features, batch.ids, batch.mass, scale=1 / labelled).loss
        update(loss)
        head_optimizer.step()
        head_optimizer.zero_grad()

    return step


def _wrap(
    name: str, trunk: nn.Module, arguments: argparse.Namespace, world: World
) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """A trunk as the library wraps it, and what goes backward from a loss and updates it."""

    def sgd(module: nn.Module) -> torch.optim.SGD:
        fused = name not in ("fsdp", "hsdp")  # whose DTensors torch has no fused kernel for
        return torch.optim.SGD(
            module.parameters(), lr=_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=fused
        )

    if name.startswith("zero"):
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=trunk, optimizer=sgd(trunk), config=_deepspeed(name, arguments, world), dist_init_required=False
        )

        def with_deepspeed(loss: Tensor) -> None:
            engine.backward(loss)
            engine.step()

        return engine, with_deepspeed
    if name == "ddp":
        wrapped: nn.Module = DistributedDataParallel(trunk)
    elif name == "fairscale":
        from scale_wsl.engines.fairscale import require_fairscale

        fairscale = require_fairscale(world.device)
        keywords = {"flatten_parameters": False, "compute_device": world.device, "bucket_cap_mb": 0}
        for block, module in list(residual_blocks(trunk)):
            parent, _, local = block.rpartition(".")
            setattr(trunk.get_submodule(parent), local, fairscale(module, **keywords))
        wrapped = fairscale(trunk, **keywords)
    else:
        shape, names = ((world.size,), ("shard",)) if name == "fsdp" else ((2, world.size // 2), ("replica", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for _, module in residual_blocks(trunk):
            fully_shard(module, mesh=mesh)
        wrapped = trunk
        fully_shard(trunk, mesh=mesh)
    optimizer = sgd(wrapped)

    def plain(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, plain


def _measure(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    with joined_world() as world:
        for name in arguments.engines:
            sides = {"ours": _ours(name, arguments, world), "bare": _bare(name, arguments, world)}
            for step in sides.values():
                step()
                step()
            rounds = []
            for number in range(arguments.rounds):
                order = list(sides) if number % 2 else list(sides)[::-1]
                spent = dict.fromkeys(sides, 0.0)
                for side in (*order, *reversed(order)):  # there and back: what drifts, and who comes first, cancels
                    spent[side] += _seconds(sides[side], arguments.steps) / 2
                rounds.append(spent)
            if world.is_main:
                ours, bare = (statistics.median(one[side] for one in rounds) for side in ("ours", "bare"))
                low, middle, high = statistics.quantiles([one["ours"] / one["bare"] for one in rounds], n=4)
                times = f"{name:10} {1e3 * ours:9.0f} {1e3 * bare:9.0f}"
                print(f"{times}   {middle:5.3f} ({low:.3f}-{high:.3f})", flush=True)


def _seconds(step: _Step, steps: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - started) / steps


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=_ENGINES, default=list(_ENGINES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--depth", type=int, default=26)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16, help="images per rank and step")
    parser.add_argument("--steps", type=int, default=3, help="steps of a side in half a round")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print("engine       ours ms   bare ms   ours/bare")
    on_ranks(_measure, arguments.ranks, arguments)


if __name__ == "__main__":
    main()
