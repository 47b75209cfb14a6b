"""Starts recipes/pretrain.py as users do, each rank a process, and reads what a run has recorded."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from scale_wsl.checkpoint.layout import find
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.training.spool import Spool
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "pretrain.py"

# A network and images that a step takes a tenth of a second for.
TINY = (
    "model.depth=26",
    "model.groups=4",
    "model.width=4",
    "data.image_size=32",
    "data.workers=1",
    "evaluate.pictures=2",
    "evaluate.resamples=100",
    "tracking.every=1",
    "tracking.finish_timeout=60",
)


class Ranks:
    """The processes of one launch, their output in files."""

    def __init__(self, arguments: list[str], size: int, folder: Path, script: Path = SCRIPT) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            with open(output, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, script, *arguments],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                    )
                )

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit codes of all ranks."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """`kill -9` of every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def output(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        return self.outputs[rank].read_text(errors="replace")

    def wait_for(self, text: str, rank: int = 0, timeout: float = 180) -> None:
        """Wait until a rank has printed a text."""
        deadline = time.monotonic() + timeout
        while text not in self.output(rank):
            if self.processes[rank].poll() is not None and text not in self.output(rank):
                raise AssertionError(f"rank {rank} ended without saying {text!r}:\n{self.output(rank)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} never said {text!r}:\n{self.output(rank)}")
            time.sleep(0.02)


def losses(run: Path) -> dict[int, set[float]]:
    """Every training loss that a run has recorded, by step; a step done again with another result has two."""
    found: dict[int, set[float]] = defaultdict(set)
    for event, _ in Spool(run / "spool").read():
        if event.get("kind") == "metrics" and "train/loss" in event["values"]:
            found[event["step"]].add(event["values"]["train/loss"])
    return dict(found)


def newest_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, whole."""
    checkpoint = Checkpoint.open(find(run))
    return {
        name: checkpoint.read(name, stored.shape, 0, math.prod(stored.shape)).view(stored.shape)
        for name, stored in checkpoint.tensors.items()
    }
