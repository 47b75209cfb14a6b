"""Offloading to CPU memory and to disk (ZeRO-Infinity) changes where things are kept, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scale_wsl.engines.ds_disk import require_room
from scale_wsl.errors import UserError
from scale_wsl.models.norms import FrozenBatchNorm2d
from scale_wsl.models.recompute import Stage
from scale_wsl.models.resnext import Bottleneck
from tests.engines import parity
from tests.ranks import run_ranks


class Wide(nn.Module):
    """4.6 million parameters in few blocks: DeepSpeed keeps what is smaller than 1 MiB off the disk.

    The first kernel's odd size moves all others to addresses to which nothing can be read straight from a disk.
    """

    num_features = 1024

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(3, 1024, 8, stride=8, bias=False)
        self.layer1 = Stage(*(Bottleneck(1024, 1024, 1024, 1, 64, FrozenBatchNorm2d) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer1(self.conv1(self.odd(x))).mean((2, 3))
        return features


def describe() -> Wide:
    """The trunk on the meta device."""
    with torch.device("meta"):
        return Wide()


def _train(name: str, scratch: Path) -> tuple[list[float], dict[str, list[float]], int]:
    """Losses of four steps, two norms of each tensor of the state after the second, and the bytes on disk."""
    trainer = parity.make_trainer(
        name, accumulation=2, clip=1.0, trunk=describe(), rate=parity.constant(0.01), scratch=scratch
    )
    losses = parity.take_steps(trainer, 2)
    state = parity.whole_state(trainer)
    norms = {key: [float(tensor.double().norm()), float(tensor.double().sum())] for key, tensor in state.items()}
    losses += parity.take_steps(trainer, 2)
    on_disk = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    # The gradients' file has no name any more.
    assert ("/gradients-" in Path("/proc/self/maps").read_text()) == (name == "zero3_nvme")
    return losses, norms, on_disk


def _build_disk_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False) or not shutil.which("ninja") or not shutil.which("g++"):
        return False
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    builder.load(verbose=False)
    return True


def require_disk_io() -> None:
    """DeepSpeed's disk operator, compiled with all CPUs: 10 minutes of their time, on a machine's first time."""
    if not run_ranks(_build_disk_io, 1, timeout=1200)[0]:
        pytest.skip("DeepSpeed's disk operator needs libaio's headers, g++ and ninja")


def test_offloaded_to_cpu_memory_the_training_is_the_same(tmp_path: Path) -> None:
    plain = run_ranks(_train, 2, "zero3", tmp_path)
    for name in ("zero3_offload", "zero3_parameters", "zero2_offload", "zero1_offload"):
        for (losses, norms, _), (expected, expected_norms, _) in zip(
            run_ranks(_train, 2, name, tmp_path), plain, strict=True
        ):
            assert losses == pytest.approx(expected, rel=1e-6), name
            for key, values in norms.items():
                assert values == pytest.approx(expected_norms[key], rel=1e-4, abs=1e-5), (name, key)


@pytest.mark.slow
def test_offloaded_to_disk_the_training_is_the_same(tmp_path: Path) -> None:
    require_disk_io()
    plain = run_ranks(_train, 2, "zero3", tmp_path / "nothing")
    offloaded = run_ranks(_train, 2, "zero3_nvme", tmp_path, timeout=900)
    for (losses, norms, on_disk), (expected, expected_norms, none) in zip(offloaded, plain, strict=True):
        assert losses == expected
        assert norms == expected_norms
        assert none == 0
        assert on_disk > 3 * 4 * 3_000_000  # weights, masters and momentum of most parameters, over both ranks


def _go_on(folder: Path, before: str, after: str) -> tuple[list[float], list[float], list[str]]:
    """Losses without a break and after one, and what was not loaded as it was saved."""
    keywords: dict[str, Any] = {"accumulation": 1, "clip": 1.0, "rate": parity.constant(0.01)}
    trainer = parity.make_trainer(before, trunk=describe(), scratch=folder / before, **keywords)
    parity.take_steps(trainer, 2)
    path = parity.save(trainer, folder / "checkpoints")
    saved = parity.whole_state(trainer)
    undisturbed = parity.take_steps(trainer, 2)
    other = parity.make_trainer(after, trunk=describe(), scratch=folder / after, resume=path, **keywords)
    loaded = parity.whole_state(other)
    differing = [name for name, tensor in saved.items() if not torch.equal(tensor, loaded[name])]
    return undisturbed, parity.take_steps(other, 2), differing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("zero3_nvme", "zero3_nvme"), ("zero3_nvme", "fsdp"), ("ddp", "zero3_nvme")]
)
def test_a_run_on_disk_saves_and_goes_on(before: str, after: str, tmp_path: Path) -> None:
    require_disk_io()
    for undisturbed, losses, differing in run_ranks(_go_on, 2, tmp_path, before, after, timeout=900):
        assert differing == []
        assert losses == pytest.approx(undisturbed, rel=1e-6)


def test_a_disk_without_room_is_told_before_anything_is_made(tmp_path: Path) -> None:
    block: dict[str, Any] = {
        key: {"device": "nvme", "nvme_path": str(tmp_path / key), "pin_memory": False}
        for key in ("offload_param", "offload_optimizer")
    }
    require_room(block, 1000, states=1, ranks=2)
    with pytest.raises(
        UserError, match=r"optimizer takes 24000000.0 GB for the 2 ranks.*GB left: make room, or set nvme_path"
    ):
        require_room({"offload_optimizer": block["offload_optimizer"]}, 10**15, states=1, ranks=2)
    (tmp_path / "file").touch()
    block["offload_param"]["nvme_path"] = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot offload to"):
        require_room(block, 1000, states=1, ranks=2)


def _without_libaio(scratch: Path) -> str:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder.is_compatible = lambda self, verbose=False: False
    try:
        parity.make_trainer("zero3_nvme", accumulation=1, clip=0.0, scratch=scratch)
    except UserError as error:
        return str(error)
    return ""


def test_without_libaio_the_message_says_what_to_install(tmp_path: Path) -> None:
    for sentence in run_ranks(_without_libaio, 2, tmp_path):
        assert "libaio-dev" in sentence
        assert 'offload to "cpu"' in sentence
