"""Every file of ds_configs/ trains, and as DDP does."""

from __future__ import annotations

from pathlib import Path

import pytest

from scale_wsl.engines.ds_config import read
from scale_wsl.training.schedule import OptimConfig
from tests.engines import parity
from tests.engines.test_ds_config import SHIPPED, optimizer_of
from tests.engines.test_offload import require_disk_io
from tests.ranks import run_ranks

STEPS = 3


def _losses(paths: list[Path], scratch: Path) -> dict[str, tuple[list[float], list[float]]]:
    """By file, the losses with it and with DDP."""
    found = {}
    for path in paths:
        optim = OptimConfig(name=optimizer_of(path).name)
        rate = parity.constant(0.001)
        ddp = parity.make_trainer("ddp", accumulation=2, clip=1.0, optim=optim, rate=rate)
        zero = parity.make_trainer(
            path.stem, accumulation=2, clip=1.0, optim=optim, rate=rate, ds_content=read(path), scratch=scratch
        )
        found[path.name] = (parity.take_steps(zero, STEPS), parity.take_steps(ddp, STEPS))
    return found


ON_DISK = [path for path in SHIPPED if "nvme" in path.name]


def test_every_shipped_file_trains_as_ddp_does(tmp_path: Path) -> None:
    paths = [path for path in SHIPPED if path not in ON_DISK]
    assert len(paths) >= 10
    for name, (losses, expected) in run_ranks(_losses, 2, paths, tmp_path, timeout=400)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), name


@pytest.mark.slow
def test_the_shipped_file_for_a_disk_trains_as_ddp_does(tmp_path: Path) -> None:
    require_disk_io()
    for name, (losses, expected) in run_ranks(_losses, 2, ON_DISK, tmp_path, timeout=900)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), name
