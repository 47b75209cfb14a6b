"""Runs a function on n gloo ranks, each a process of its own, and hands back what every rank returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# The fork server imports these once; ranks then start in milliseconds instead of re-importing torch and DeepSpeed, and
# of what DeepSpeed imports with its first engine.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed.tensor", "deepspeed.runtime.zero.muon.muon_optimizer", "tests.engines.parity", "tests.ranks"]
)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    args: tuple[Any, ...],
    process_group: bool,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import torch.distributed as dist

    gc.freeze()  # what has been imported need not be looked at again by every collection
    warnings.simplefilter("error")  # as in the tests' own process
    torch.set_num_threads(1)
    try:
        if process_group:
            dist.init_process_group("gloo")
        # By value: torch's pickling for processes would leave tensors in this one, which may end before they are read.
        pipe.send_bytes(pickle.dumps(("ok", function(*args))))
        if process_group:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", f"rank {rank} of {size}:\n{traceback.format_exc()}")))
        raise SystemExit(1) from None


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 240.0, process_group: bool = True
) -> list[Any]:
    """Run `function(*args)` on `size` ranks and return the results in rank order.

    Gloo is initialised as the default group, unless `process_group` is false: then there is only the environment.

    `function` and `args` must be picklable: a module-level function, and tensors passed as NumPy arrays or plain
    tensors. The first error of any rank is raised here, and the other ranks are stopped.
    """
    port = free_port()
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_rank_main, args=(theirs, function, rank, size, port, args, process_group))
        process.start()
        theirs.close()
        pipes[ours] = rank
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        while len(results) < size:
            ready = wait([pipe for pipe, rank in pipes.items() if rank not in results], timeout)
            if not ready:
                raise TimeoutError(f"{size - len(results)} of {size} ranks gave no result within {timeout} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own rank's
                except EOFError:
                    raise RuntimeError(f"rank {pipes[pipe]} of {size} died without a word") from None
                if kind == "error":
                    raise RuntimeError(value)
                results[pipes[pipe]] = value
        for process in processes:
            process.join(timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [results[rank] for rank in range(size)]
