"""What the sharded hashtag head costs: time and peak memory of a training step, against its peers.

    python benchmarks/head.py                                                   # the whole table: a quarter of an hour
    python benchmarks/head.py --vocabulary 1500 --images 16 --rounds 3 --ranks 2        # seconds

A step is forward, backward and the update of the head's rows by Nesterov momentum SGD with weight decay, for N images
over all ranks. Peers, measured in the same run, in turns, on the same ranks, images and weights:

    linear + DDP    nn.Linear under DistributedDataParallel: every rank holds all V rows, soft cross-entropy of its
                    share of the images with a dense k-hot target
    loss_parallel   torch.distributed.tensor.parallel.loss_parallel over the same row shards; one index an image
    three reduces   the sharded cross-entropy of Megatron-LM: gathered features, logits, then all-reduces of maximum,
                    sum and target logit, everything in place; one index an image
    ours, one-hot   the same head with one hashtag an image: what k-hot costs
    ours, sampled   the same head with 1 % of the classes sampled, from 1M classes on; its gradient is sparse and counts
                    as memory

Every contender has PyTorch's fused SGD kernel, so that what differs is the head. The sharded ones share one weight and
one momentum; each turn is a step that is not timed, from a state without gradient memory, and one that is.

Time is the median over rounds, from barrier to barrier; ratios are ours over the peer's in the same round, median
(quartiles). CPU time is that of all ranks together: what a machine with other work to do can still compare.

Memory is the peak beyond weights, their gradient and momentum, of the rank that needs most: the sum of what PyTorch's
allocator gives and takes back during one step (torch.profiler's memory events, exact, without the process groups' own
buffers), less one weight gradient where the contender allocates it anew in each step.

A contender that needs more than --memory-gib on all ranks together is not run: the table says what it would need. Where
that leaves none, the same vocabulary is measured with half the features, or a quarter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from scale_wsl.collectives import all_gather_rows, all_reduce, start_reduce_scatter_rows
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.head_optimizer import HeadSGD

_K = 5  # most hashtags of an image
_OURS, _ONE_HOT, _SAMPLED, _DDP = "ours", "ours, one-hot", "ours, sampled", "linear + DDP"
_MANY = 1_000_000  # classes from which on fewer rounds are timed, and sampling is
_SGD: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "lr": 0.1}


@dataclass(frozen=True)
class Contender:
    """One way to do a step."""

    step: Callable[[], None]
    forget: Callable[[], None]  # gradients, and memory kept for them
    new_gradient: int = 0  # bytes of the weight gradient, where each step allocates it anew


@dataclass(frozen=True)
class Row:
    """What was measured of a contender, or the bytes for which it was left out."""

    seconds: tuple[float, ...] = ()
    work: tuple[float, ...] = ()  # CPU seconds of all ranks together
    beyond: float = 0.0
    needs: float = 0.0


# --- peers -------------------------------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather_rows(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return start_reduce_scatter_rows(gradient).wait()


class _ThreeReduces(torch.autograd.Function):
    """Cross-entropy `[N]` of logits `[N, v]`, which it overwrites; after Megatron-LM's `_VocabParallelCrossEntropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tags: Tensor, first: int) -> Tensor:
        maximum = logits.max(dim=1)[0]
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        logits -= maximum[:, None]
        elsewhere = (tags < first) | (tags >= first + logits.shape[1])
        places = (tags - first).masked_fill(elsewhere, 0)
        rows = torch.arange(len(logits))
        target = logits[rows, places].masked_fill(elsewhere, 0.0)
        dist.all_reduce(target)
        torch.exp(logits, out=logits)
        total = logits.sum(dim=1)
        dist.all_reduce(total)
        logits.div_(total[:, None])
        ctx.save_for_backward(logits, elsewhere, places)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        softmax, elsewhere, places = ctx.saved_tensors
        softmax[torch.arange(len(softmax)), places] -= 1.0 - elsewhere.to(softmax.dtype)
        softmax.mul_(gradient[:, None])
        return softmax, None, None


def _contenders(vocabulary: int, images: int, features: int, with_ddp: bool) -> dict[str, Contender]:
    world, rank = dist.get_world_size(), dist.get_rank()
    numbers = torch.Generator().manual_seed(0)
    k = torch.randint(1, _K + 1, (images, 1), generator=numbers)
    pads = torch.arange(_K) >= k
    ids = torch.randint(0, vocabulary, (images, _K), generator=numbers).masked_fill(pads, -1)
    mass = (1 / k).expand(-1, _K).masked_fill(pads, 0.0).contiguous()
    all_tags = ids[:, 0].contiguous()
    mine = slice(rank * images // world, (rank + 1) * images // world)
    ids, mass, tags = ids[mine], mass[mine], all_tags[mine, None]
    x = torch.randn(images, features, generator=numbers)[mine].requires_grad_()
    mesh = head_mesh()
    head = ShardedHead(vocabulary, features, mesh=mesh)
    assert mesh is not None
    assert head.bias is not None
    weight, bias = head.weight, head.bias
    optimizer = HeadSGD(head, weight_decay=1e-4, **_SGD)
    bytes_of_gradient = weight.numel() * 4

    def forget() -> None:
        head.spare = x.grad = None
        for parameter in head.parameters():
            parameter.grad = None

    def ours(ids: Tensor, mass: Tensor) -> None:
        x.grad = None
        head.loss(x, ids, mass, scale=1 / images).loss.backward()  # type: ignore[no-untyped-call]
        head.sync_gradients()
        optimizer.step()
        optimizer.zero_grad()

    def sampled() -> None:
        head.sampled = vocabulary // 100
        ours(ids, mass)
        head.sampled = 0

    def three_reduces() -> None:
        logits = F.linear(_GatherRows.apply(x), weight, bias)
        loss = _ThreeReduces.apply(logits, all_gather_rows(tags)[:, 0], head.rows.start).sum() / images
        loss.backward()
        optimizer.step()
        forget()

    over = mesh["head"]
    rows, shares = (
        DTensor.from_local(tensor.detach(), over, [Shard(0)], run_check=False).requires_grad_()
        for tensor in (weight, bias)
    )

    def parallel() -> None:
        gathered = DTensor.from_local(x, over, [Shard(0)], run_check=False).redistribute(over, [Replicate()])
        with loss_parallel():
            logits = F.linear(gathered, rows, shares)
            all_targets = DTensor.from_local(all_tags, over, [Replicate()], run_check=False)
            loss = F.cross_entropy(logits, all_targets, reduction="sum") / images
            loss.backward()  # type: ignore[no-untyped-call]
        for whole, own in ((rows, weight), (shares, bias)):
            assert isinstance(whole.grad, DTensor)
            own.grad, whole.grad = whole.grad.to_local(), None
        optimizer.step()
        forget()

    one = torch.ones(len(tags), 1)
    found = {
        _OURS: Contender(lambda: ours(ids, mass), forget),
        _ONE_HOT: Contender(lambda: ours(tags, one), forget),
        "loss_parallel": Contender(parallel, forget, bytes_of_gradient),
        "three reduces": Contender(three_reduces, forget, bytes_of_gradient),
    }
    if vocabulary >= _MANY:
        found[_SAMPLED] = Contender(sampled, forget)
    if with_ddp:
        found[_DDP] = _ddp(x, ids, mass, vocabulary, images)
    return found


def _ddp(x: Tensor, ids: Tensor, mass: Tensor, vocabulary: int, images: int) -> Contender:
    linear = nn.Linear(x.shape[1], vocabulary)
    module = DistributedDataParallel(linear, gradient_as_bucket_view=True)
    groups = [{"params": [linear.weight], "weight_decay": 1e-4}, {"params": [linear.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, fused=True, **_SGD)
    rows = torch.arange(len(ids))[:, None].expand_as(ids)

    def step() -> None:
        x.grad = None
        target = torch.zeros(len(ids), vocabulary)
        target.index_put_((rows, ids.clamp(min=0)), mass, accumulate=True)
        loss = F.cross_entropy(module(x), target, reduction="sum") * dist.get_world_size() / images
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, lambda: None)  # its gradient lives in DDP's bucket


def _needs(name: str, vocabulary: int, features: int, ranks: int) -> float:
    """Bytes on all ranks: weights, gradient, momentum, and the second gradient that DDP copies into its bucket."""
    state = 4 * vocabulary * (features + 1)
    return 4 * ranks * state if name == _DDP else 3 * state


# --- measuring ---------------------------------------------------------------------------------------------------


def _beyond(contender: Contender) -> float:
    """Bytes that a step takes at its highest beyond weights, gradient and momentum."""
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender.step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = gradients = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        if abs(event.nbytes()) == contender.new_gradient:
            gradients += 1 if event.nbytes() > 0 else -1
        highest = max(highest, live - contender.new_gradient * min(max(gradients, 0), 1))
    return float(highest)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what is printed below Python: the profiler says that there is no GPU, and that it began after others did."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        for place in (1, 2):
            os.dup2(nowhere.fileno(), place)
    try:
        yield
    finally:
        for place, old in zip((1, 2), kept, strict=True):
            os.dup2(old, place)
            os.close(old)


def _seconds(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds from barrier to barrier, and CPU seconds of all ranks together."""
    dist.barrier()
    started, before = time.perf_counter(), time.process_time()
    step()
    worked = torch.tensor(time.process_time() - before, dtype=torch.float64)
    dist.barrier()
    seconds = time.perf_counter() - started
    return seconds, float(all_reduce(worked))


def _measure(vocabulary: int, features: int, arguments: argparse.Namespace) -> dict[str, Row]:
    """Every contender's row, those that do not fit included."""
    world, limit = dist.get_world_size(), arguments.memory_gib * 2**30
    shared, replicated = (_needs(name, vocabulary, features, world) for name in (_OURS, _DDP))
    if shared > limit:
        return {_OURS: Row(needs=shared), "peers": Row(needs=shared), _DDP: Row(needs=replicated)}
    with_ddp = shared + replicated <= limit
    contenders = _contenders(vocabulary, arguments.images, features, with_ddp)
    memory: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for name, contender in contenders.items():
        contender.step()
        contender.step()
        highest = torch.tensor(_beyond(contender), dtype=torch.float64)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        memory[name] = float(highest)
        contender.forget()
    rounds = arguments.rounds if vocabulary < _MANY else max(3, arguments.rounds // 2)
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in names:
            contenders[name].step()
            times[name].append(_seconds(contenders[name].step))
            contenders[name].forget()
    found = {}
    for name in contenders:
        seconds, work = zip(*times[name], strict=True)
        found[name] = Row(seconds, work, memory[name])
    if not with_ddp:
        found[_DDP] = Row(needs=replicated)
    return found


def _on_rank(arguments: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    measured = []
    for vocabulary in arguments.vocabulary:
        features = arguments.features
        while True:
            rows = _measure(vocabulary, features, arguments)
            if rank == 0:
                _print_rows(world, vocabulary, features, rows)
            if rows[_OURS].seconds:
                measured.append((vocabulary, features, rows[_OURS]))
            if rows[_OURS].seconds or features < 2:
                break
            features //= 2
    if rank == 0:
        _print_growth(world, measured)
    agreed = torch.zeros(1)
    all_reduce(agreed)
    dist.destroy_process_group()


# --- the table ---------------------------------------------------------------------------------------------------


def _print_rows(world: int, vocabulary: int, features: int, rows: dict[str, Row]) -> None:
    ours = rows[_OURS]
    for name, row in rows.items():
        line = f"{world:5} {vocabulary:10,} {features:6} {name:14}"
        if row.needs:
            print(f"{line}   left out: needs {row.needs / 2**30:.1f} GiB on all ranks", flush=True)
            continue
        line += f" {1e3 * statistics.median(row.seconds):9.1f} {row.beyond / 2**20:9.2f}"
        if name != _OURS:
            line += f"   {_ratio(ours.seconds, row.seconds)}   {_ratio(ours.work, row.work)}"
            line += f"   {ours.beyond / row.beyond:6.2f}"
        print(line, flush=True)


def _ratio(ours: tuple[float, ...], theirs: tuple[float, ...]) -> str:
    low, middle, high = statistics.quantiles([one / other for one, other in zip(ours, theirs, strict=True)], n=4)
    return f"{middle:4.2f} ({low:4.2f}-{high:4.2f})"


def _print_growth(world: int, measured: list[tuple[int, int, Row]]) -> None:
    """How our head grows from one vocabulary to the next, relative to V (times D, where D had to change)."""
    for (v, d, row), (larger_v, larger_d, larger) in pairwise(measured):
        size = larger_v * larger_d / (v * d)
        time_ratio = statistics.median(larger.seconds) / statistics.median(row.seconds)
        state = (3 * 4 * larger_v // world * (larger_d + 1) + larger.beyond) / (
            3 * 4 * v // world * (d + 1) + row.beyond
        )
        print(
            f"{world:5} growth from V {v:,} to {larger_v:,}: V x D x{size:.1f}, time x{time_ratio:.1f}, "
            f"memory of a rank x{state:.1f}, beyond weights, gradient and momentum x{larger.beyond / row.beyond:.2f}",
            flush=True,
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [1_500, 17_000, 100_000, 1_000_000]
    parser.add_argument("--vocabulary", type=int, nargs="+", default=sizes, help="hashtags, V")
    parser.add_argument("--images", type=int, default=64, help="images over all ranks, N (default: 64)")
    parser.add_argument("--features", type=int, default=2048, help="D (default: 2048)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="gloo ranks (default: 2 4)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each (default: 7); half from 1M on")
    parser.add_argument("--threads", type=int, default=1, help="threads per rank (default: 1)")
    parser.add_argument("--memory-gib", type=float, default=12.0, help="limit on all ranks together (default: 12)")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more, or there is no spread to show")
    print(f"N {arguments.images}, fp32; ratios are ours / this: median (quartiles) over the rounds")
    print("ranks          V      D head                  ms       MiB   time               CPU time           memory")
    for world in arguments.ranks:
        on_ranks(_on_rank, world, arguments, threads=arguments.threads)


if __name__ == "__main__":
    main()
