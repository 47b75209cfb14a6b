"""Starts a function on n gloo ranks of this machine: what the benchmarks that need ranks share."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

__all__ = ["free_port", "on_ranks"]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(function: Callable[..., None], ranks: int, *arguments: Any, threads: int = 1) -> None:
    """Run `function(*arguments)` on each of `ranks` processes, with the environment that a launcher sets.

    Processes of a fork server end without Python's finalisation, in which a rank of head.py has aborted once: it seems
    by a gloo thread, which DDP keeps alive to the end.
    """
    start_processes(  # type: ignore[no-untyped-call]
        _rank, args=(ranks, free_port(), threads, function, arguments), nprocs=ranks, start_method="forkserver"
    )


def _rank(
    rank: int, ranks: int, port: int, threads: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }
    torch.set_num_threads(threads)
    function(*arguments)
