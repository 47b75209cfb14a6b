"""The ranks of this job: who we are, which device is ours, and how all ranks agree on an error before they stop.

Reads only what the launchers set (`torchrun`, `deepspeed`, or nothing for a single process); it must never guess a
world size, and never keep the process group in a module global of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from scale_wsl.errors import UserError

__all__ = ["World", "agree", "joined_world", "same_everywhere"]


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that prints, tracks and publishes."""
        return self.rank == 0


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"the environment variable {name} is {text!r}, but launchers set it to a whole number"
        ) from None


@contextmanager
def joined_world(timeout: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Join the job's process group, yield this rank's `World`, and leave the group at the end.

    A process that no launcher started is a world of one rank. `timeout` bounds every collective: a rank that waits
    longer for the others fails instead of hanging for ever.
    """
    rank, size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    local_rank = _from_environment("LOCAL_RANK", 0)
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"this host has {torch.cuda.device_count()} GPUs, too few for local rank {local_rank}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        if "OMP_NUM_THREADS" not in os.environ:  # the deepspeed launcher leaves it unset: ranks would share every core
            on_this_host = _from_environment("LOCAL_WORLD_SIZE", _from_environment("LOCAL_SIZE", 1))
            allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, allowed // on_this_host))
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield World(rank=rank, size=size, local_rank=local_rank, device=device)
    finally:
        dist.destroy_process_group()


@contextmanager
def agree(world: World) -> Iterator[None]:
    """Run a block that uses no collective; if any rank meets a `UserError` in it, every rank raises that same one.

    So a mistake that only one host can see (a missing mount, say) stops all ranks together, with its sentence. After
    any other error on some rank, that rank raises it and the others end without a word.
    """
    mine: str | None = None
    defect: Exception | None = None
    try:
        yield
    except UserError as error:
        mine = str(error)
    except Exception as error:
        defect = error
    found: list[tuple[str | None, bool]] = [(None, False)] * world.size
    dist.all_gather_object(found, (mine, defect is not None))
    if defect is not None:
        raise defect
    if any(failed for _, failed in found):
        time.sleep(1)  # a launcher stops all at the first that ends: let the error out first
        sys.exit(1)
    sentences = [sentence for sentence, _ in found]
    for rank, sentence in enumerate(sentences):
        if sentence is not None:
            everywhere = all(other == sentence for other in sentences)
            raise UserError(sentence if everywhere else f"rank {rank}: {sentence}")


def same_everywhere(world: World, facts: dict[str, str]) -> None:
    """Make sure that every rank is about to do the same (collective).

    Raises:
        UserError: on every rank, where a fact differs between ranks; it names the fact, the ranks and what they have.
    """
    found: list[dict[str, str]] = [{}] * world.size
    dist.all_gather_object(found, facts)
    for name, ours in found[0].items():
        for rank, others in enumerate(found):
            if others.get(name) != ours:
                raise UserError(
                    f"rank {rank} has another {name} than rank 0 ({others.get(name)} and {ours}): "
                    "every host must see the same files"
                )
