"""Every engine starts from the same numbers on any world size, and asks for no more of them than its ranks hold."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scale_wsl.engines.build import build_engine
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World
from scale_wsl.models.recompute import residual_blocks
from scale_wsl.models.resnext import ModelConfig, describe_trunk
from scale_wsl.models.weights import initial_weights
from scale_wsl.shards import Source
from tests.engines import parity
from tests.ranks import run_ranks

ENGINES = (*parity.ENGINES, "zero3_offload")


class _Counting:
    """A source that notes how much is read of it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.elements: Counter[str] = Counter()

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        self.elements[name] += stop - start
        return self.source.read(name, shape, start, stop)


def _differences() -> dict[str, list[str]]:
    """By engine, the names of what does not start as it should."""
    expected = {f"trunk.{name}": tensor for name, tensor in parity.make_trunk().state_dict().items()}
    found = {}
    for name in ENGINES:
        state = parity.whole_state(parity.make_trainer(name, accumulation=1, clip=0.0))
        weights = {key: tensor for key, tensor in state.items() if key.startswith("trunk.")}
        momentum = {key: tensor for key, tensor in state.items() if key.startswith("momentum.trunk.")}
        assert set(weights) == set(expected), name
        assert {key.removeprefix("momentum.") for key in momentum} == set(weights), name  # GroupNorm has no buffers
        assert not any(bool(tensor.any()) for tensor in momentum.values()), name
        found[name] = [key for key, tensor in weights.items() if not torch.equal(tensor, expected[key])]
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_initial_weights_are_the_same_numbers_on_every_engine_and_world_size(size: int) -> None:
    for differences in run_ranks(_differences, size):
        assert not any(differences.values()), differences


def _share_read(name: str) -> tuple[dict[str, int], dict[str, int], int]:
    """What this rank reads of each parameter and how large that is, and the elements of the largest block."""
    stage3 = name == "zero3"
    trunk = parity.describe()
    sizes = {key: parameter.numel() for key, parameter in trunk.named_parameters()}
    block = max(sum(p.numel() for p in module.parameters()) for _, module in residual_blocks(trunk))
    source = _Counting(parity.WEIGHTS)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    config = EngineConfig(name="deepspeed" if stage3 else name)
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3},
    }
    engine = build_engine(config, trunk, source, OptimizerSettings(), world, deepspeed)
    held = sum(shard.local.numel() for _, shard in engine.weights())
    assert held == sum(source.elements.values())
    return dict(source.elements), sizes, block


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_a_rank_reads_its_own_shard_alone(name: str) -> None:
    ranks = run_ranks(_share_read, 3, name)
    for read, sizes, _ in ranks:
        for key, size in sizes.items():
            # FSDP2 shards rows, so a rank may get one more; what it keeps whole are norms.
            kept_whole = (name == "fsdp" and "bn" in key) or "downsample.1" in key
            assert read[key] <= (size if kept_whole else math.ceil(size / 3) + 9 * 64), key
    for key, size in ranks[0][1].items():
        total = sum(read[key] for read, _, _ in ranks)
        assert total in (size, 3 * size), key  # each element once, or whole on every rank


def _peak_of_construction(name: str) -> tuple[float, float]:
    """How much more memory than before this rank held at its highest while the engine was made, and the whole trunk."""
    model = ModelConfig(depth=26, width=16)
    trunk = describe_trunk(model)
    whole = sum(4 * parameter.numel() for parameter in trunk.parameters())
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    build_engine(EngineConfig(name=name), parity.describe(), parity.WEIGHTS, OptimizerSettings(), world)  # imports
    torch.ones(1 << 22).sum()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    engine = build_engine(EngineConfig(name=name), trunk, initial_weights(model, 0), OptimizerSettings(), world)
    assert len(list(engine.weights())) > 100
    return _resident("VmHWM") - before, whole


def _resident(key: str) -> int:
    """Bytes of this process, by a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def test_no_rank_holds_the_whole_trunk_even_for_a_moment() -> None:
    """A third of 217 MB, and the 16 MB that are drawn at a time."""
    for held, whole in run_ranks(_peak_of_construction, 3, "fsdp"):
        assert whole > 200e6
        assert whole / 4 < held < 0.7 * whole


def _same_bits(name: str) -> list[str]:
    """What activation checkpointing changes in two steps with BatchNorm."""
    found = []
    for parts in ("none", "blocks", "every 2 blocks", "stages"):
        settings = {"checkpointing": parts}
        trainer = parity.make_trainer(name, accumulation=2, clip=1.0, norm=torch.nn.BatchNorm2d, settings=settings)
        losses = parity.take_steps(trainer, 2)
        trainer.combine_batchnorm("mean")
        found.append((losses, parity.whole_state(trainer)))
    (losses, state), *others = found
    changed = [key for _, other in others for key in state if not torch.equal(state[key], other[key])]
    return changed + ["losses" for other, _ in others if other != losses]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fairscale", "zero2", "zero3"])
def test_recomputation_changes_no_bit_on_any_engine(name: str) -> None:
    assert run_ranks(_same_bits, 2, name) == [[], []]


FSDP_SETTINGS = (
    {"reshard_after_forward": False},
    {"offload": "cpu"},
    {"offload": "cpu", "reshard_after_forward": False},
)


def _fsdp_settings() -> list[list[float]]:
    plain = parity.take_steps(parity.make_trainer("fsdp", accumulation=2, clip=1.0), 4)
    found = [plain]
    for settings in FSDP_SETTINGS:
        trainer = parity.make_trainer("fsdp", accumulation=2, clip=1.0, settings=settings)
        found.append(parity.take_steps(trainer, 4))
    return found


def test_fsdp_settings_change_where_things_are_and_nothing_else() -> None:
    plain, *others = run_ranks(_fsdp_settings, 2)[0]
    for settings, losses in zip(FSDP_SETTINGS, others, strict=True):
        assert losses == plain, settings


def _evaluates() -> list[tuple[bool, bool]]:
    """Whether training goes on after an evaluation as if there had been none, and evaluates as a plain trunk does."""
    found = []
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ENGINES:
        undisturbed = parity.take_steps(parity.make_trainer(name, accumulation=1, clip=1.0), 4)
        trainer = parity.make_trainer(name, accumulation=1, clip=1.0)
        losses = parity.take_steps(trainer, 2)
        trainer.engine.train(False)
        with torch.no_grad():
            features = trainer.engine.forward(images)
        trainer.engine.train(True)
        plain = parity.make_trunk()
        state = parity.whole_state(trainer)
        plain.load_state_dict(
            {key.removeprefix("trunk."): value for key, value in state.items() if key.startswith("trunk.")}
        )
        with torch.no_grad():
            same = torch.allclose(plain(images), features, rtol=1e-5, atol=1e-6)
        found.append((losses + parity.take_steps(trainer, 2) == undisturbed, same))
    return found


def _momentum_after_evaluation(settings: dict[str, Any]) -> list[str]:
    """What of the state differs after an evaluation, which must change nothing of it."""
    trainer = parity.make_trainer("fsdp", accumulation=1, clip=1.0, settings=settings)
    parity.take_steps(trainer, 2)
    before = parity.whole_state(trainer)
    trainer.engine.train(False)
    with torch.no_grad():
        trainer.engine.forward(torch.zeros(2, 3, 32, 32))
    trainer.engine.train(True)
    after = parity.whole_state(trainer)
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@pytest.mark.parametrize("settings", FSDP_SETTINGS)
def test_fsdp_saves_after_an_evaluation_what_it_would_have_saved_before(settings: dict[str, Any]) -> None:
    assert run_ranks(_momentum_after_evaluation, 2, settings) == [[], []]


def test_an_evaluation_in_between_leaves_no_trace() -> None:
    for found in run_ranks(_evaluates, 2, timeout=400):
        assert dict(zip(ENGINES, found, strict=True)) == dict.fromkeys(ENGINES, (True, True))
