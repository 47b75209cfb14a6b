"""What the sharded hashtag head costs: time and peak memory of one forward and backward pass, against its peers.

    python benchmarks/head.py                                   # 17k and 100k hashtags, 1 and 2 gloo ranks
    python benchmarks/head.py --vocabulary 1000 --images 32 --rounds 3 --ranks 1        # seconds

Peers, measured in the same run, in turns, on the same ranks, images and weights (N images over all ranks, D features):

    dense           F.cross_entropy with an N x V probability target; on several ranks each holds all V rows and its
                    share of the images, and the weight's gradient is all-reduced, as in data parallel training
    one tag         F.linear and F.cross_entropy with one index per image, which is no k-hot loss: the least that a
                    dense head could cost
    loss_parallel   torch.distributed.tensor.parallel.loss_parallel over the same row shards, one index per image too

Time is the median over rounds; ratios are the sharded head's over the peer's in the same round, median (quartiles).
Memory is the peak resident set during a pass above what was resident before it, gradients included; ratio likewise.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.spawn import spawn

from scale_wsl.collectives import all_reduce
from scale_wsl.models.head import ShardedHead, head_mesh

_K = 5  # most hashtags of an image
_Step = Callable[[], None]


def _resident() -> float:
    """MiB of this process that are in memory."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak(step: _Step) -> float:
    """MiB by which a step raises the resident set at its highest, looked at every millisecond; NaN without /proc."""
    if not os.path.exists("/proc/self/statm"):
        return float("nan")
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what an earlier step left in the heap would hide what this one takes
    before = highest = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return highest - before


def _contenders(vocabulary: int, images: int, features: int, precision: torch.dtype) -> tuple[dict[str, _Step], _Step]:
    """One forward and backward pass each, by name, on the same numbers; and what frees their gradients."""
    world, rank = dist.get_world_size(), dist.get_rank()
    numbers = torch.Generator().manual_seed(0)
    k = torch.randint(1, _K + 1, (images, 1), generator=numbers)
    pads = torch.arange(_K) >= k
    ids = torch.randint(0, vocabulary, (images, _K), generator=numbers).masked_fill(pads, -1)
    mass = (1 / k).expand(-1, _K).masked_fill(pads, 0.0).contiguous()
    mine = slice(rank * images // world, (rank + 1) * images // world)
    ids, mass = ids[mine], mass[mine]
    x = torch.randn(images, features, generator=numbers)[mine].requires_grad_()
    mesh = head_mesh()
    head = ShardedHead(vocabulary, features, mesh=mesh)
    whole = ShardedHead(vocabulary, features) if world == 1 else None
    weight = torch.empty(vocabulary, features).normal_(0, 0.01).requires_grad_() if whole is None else whole.weight
    bias = torch.zeros(vocabulary, requires_grad=True)
    compute = torch.autocast("cpu", precision, enabled=precision != torch.float32)

    trained = [x, weight, bias, *head.parameters()]

    def clear() -> None:
        for tensor in trained:
            tensor.grad = None

    def sum_gradients() -> None:
        for tensor in (weight, bias):
            assert tensor.grad is not None
            all_reduce(tensor.grad)

    def sharded() -> None:
        clear()
        with compute:
            loss = head.loss(x, ids, mass).loss / images
        loss.backward()  # type: ignore[no-untyped-call]
        head.sync_gradients()

    def dense() -> None:
        clear()
        target = torch.zeros(len(x), vocabulary)
        rows = torch.arange(len(x))[:, None].expand_as(ids)
        target.index_put_((rows, ids.clamp(min=0)), mass, accumulate=True)
        with compute:
            logits = F.linear(x, weight, bias)
        loss = F.cross_entropy(logits.float(), target, reduction="sum") / images
        loss.backward()  # type: ignore[no-untyped-call]
        sum_gradients()

    def one_tag() -> None:
        clear()
        with compute:
            logits = F.linear(x, weight, bias)
        loss = F.cross_entropy(logits.float(), ids[:, 0], reduction="sum") / images
        loss.backward()  # type: ignore[no-untyped-call]
        sum_gradients()

    contenders = {"sharded": sharded, "dense": dense, "one tag": one_tag}
    if world > 1 and precision == torch.float32:
        assert mesh is not None
        over = mesh["head"]
        rows, shares = (distribute_tensor(tensor.detach(), over, [Shard(0)]) for tensor in (weight, bias))
        trained += [rows.requires_grad_(), shares.requires_grad_()]
        tags = DTensor.from_local(ids[:, 0].contiguous(), over, [Shard(0)]).redistribute(over, [Replicate()])

        def parallel() -> None:
            clear()
            gathered = DTensor.from_local(x, over, [Shard(0)]).redistribute(over, [Replicate()])
            with loss_parallel():
                loss = F.cross_entropy(F.linear(gathered, rows, shares), tags, reduction="sum") / images
                loss.backward()  # type: ignore[no-untyped-call]

        contenders["loss_parallel"] = parallel
    return contenders, clear


def _seconds(step: _Step) -> float:
    dist.barrier()
    started = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - started


def _rank(rank: int, port: int, world: int, arguments: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo")
    for vocabulary in arguments.vocabulary:
        for images in arguments.images:
            contenders, clear = _contenders(vocabulary, images, arguments.features, arguments.precision)
            memory = {}
            for name, step in contenders.items():
                step()  # warm up
                clear()
                memory[name] = _peak(step)
                clear()
            rounds = [{name: _seconds(step) for name, step in contenders.items()} for _ in range(arguments.rounds)]
            if rank == 0:
                for name in contenders:
                    _print_row(world, vocabulary, images, name, memory, rounds)
    dist.destroy_process_group()


def _print_row(
    world: int, vocabulary: int, images: int, name: str, memory: dict[str, float], rounds: list[dict[str, float]]
) -> None:
    milliseconds = 1e3 * statistics.median(one[name] for one in rounds)
    row = f"{world:5} {vocabulary:10,} {images:6} {name:14} {milliseconds:8.0f} {memory[name]:8.0f}"
    if name != "sharded":
        low, middle, high = statistics.quantiles([one["sharded"] / one[name] for one in rounds], n=4)
        row += f"   {middle:5.2f} ({low:.2f}-{high:.2f})   {memory['sharded'] / memory[name]:5.2f}"
    print(row, flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[17_000, 100_000], help="hashtags, V")
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256], help="images over all ranks, N")
    parser.add_argument("--features", type=int, default=2048, help="D (default: 2048)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="gloo ranks (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads per rank (default: 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="compute type (default: fp32)")
    arguments = parser.parse_args()
    arguments.precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    print("ranks          V      N head             ms      MiB   time: sharded/this   memory: sharded/this")
    for world in arguments.ranks:
        spawn(_rank, args=(_free_port(), world, arguments), nprocs=world)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
