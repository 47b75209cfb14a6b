from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from scale_wsl import cli
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.models.resnext import ModelConfig
from scale_wsl.models.weights import build_trunk
from scale_wsl.shards import FlatShard
from tests.checkpoint import states
from tests.ranks import run_ranks

MODEL = {"depth": 26, "groups": 4, "width": 4}
NORMS: dict[str, dict[str, Any]] = {"batch": {}, "group": {"norm": "group", "norm_groups": 8}}
LABELS = 11
VOCABULARY = b'{"hashtags": []}'


def _network_tensors(norm: str, bias: bool) -> dict[str, torch.Tensor]:
    """The trunk and head of a network none of whose tensors is what it starts as."""
    trunk = build_trunk(ModelConfig(**MODEL, **NORMS[norm]), seed=1).state_dict()
    numbers = torch.Generator().manual_seed(2)
    for tensor in trunk.values():
        tensor.copy_(torch.rand(tensor.shape, generator=numbers) + 0.5 if tensor.is_floating_point() else 3)
    made = {f"trunk.{name}": tensor for name, tensor in trunk.items()}
    made["head.weight"] = torch.rand(LABELS, 2048, generator=numbers)
    made |= {"head.bias": torch.rand(LABELS, generator=numbers)} if bias else {}
    return made | {f"momentum.{name}": tensor for name, tensor in made.items() if tensor.is_floating_point()}


def _save(folder: Path, norm: str, bias: bool) -> None:
    meta = dataclasses.replace(states.meta(7), recipe=yaml.safe_dump({"model": MODEL | NORMS[norm]}))
    with Saver(folder / "checkpoints", keep=1) as saver:
        saver.start(states.shards("mixed", _network_tensors(norm, bias)), meta, {"vocabulary.json": VOCABULARY})


@pytest.fixture(scope="module", params=[("batch", True), ("batch", False), ("group", True)], ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, bool]:
    norm, bias = request.param
    folder = tmp_path_factory.mktemp("run")
    run_ranks(_save, 2, folder, norm, bias)
    return folder, norm, bias


def _torchvision(config: dict[str, Any]) -> torchvision.models.ResNet:
    """The network that a config.json describes, built as its reader would."""
    norm = None if config["norm"] == "BatchNorm2d" else lambda channels: torch.nn.GroupNorm(8, channels)
    return torchvision.models.ResNet(
        getattr(torchvision.models.resnet, config["block"]),
        config["layers"],
        num_classes=config.get("num_classes", 1000),
        groups=config["groups"],
        width_per_group=config["width_per_group"],
        norm_layer=norm,
    )


def _export(*arguments: str | Path) -> int:
    return cli.main(["checkpoint", "export", *map(str, arguments)])


def test_deepspeeds_own_script_reads_what_is_exported_for_it(run: tuple[Path, str, bool], tmp_path: Path) -> None:
    folder, _, _ = run
    assert _export(folder, "--out", tmp_path / "plain") == 0
    assert _export(folder, "--out", tmp_path / "zero", "--format", "deepspeed") == 0
    tool = """
        import sys, torch
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        torch.save(dict(get_fp32_state_dict_from_zero_checkpoint(sys.argv[1])), sys.argv[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(tool), tmp_path / "zero", tmp_path / "fp32.bin"]
    subprocess.run(command, check=True, capture_output=True)
    found = torch.load(tmp_path / "fp32.bin", weights_only=True)
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert states.differing(found, expected) == []


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_torchvision_loads_it_strictly(run: tuple[Path, str, bool], tmp_path: Path, form: str) -> None:
    folder, norm, bias = run
    out = tmp_path / "out"
    assert _export(folder, "--out", out, "--format", form) == 0
    config = json.loads((out / "config.json").read_text())
    network = _torchvision(config)
    if form == "torch":
        loaded = torch.load(out / "pytorch_model.bin", weights_only=True)
    else:
        loaded = load_file(out / "model.safetensors")
    network.load_state_dict(loaded, strict=True)
    expected = _network_tensors(norm, bias)
    weights = {f"trunk.{name}": tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    weights["head.weight"] = network.fc.weight.detach()
    if bias:
        weights["head.bias"] = network.fc.bias.detach()
    else:
        assert bool((network.fc.bias == 0).all())
    assert (
        states.differing(weights, {name: t for name, t in expected.items() if not name.startswith("momentum.")}) == []
    )
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, LABELS)
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert config["architecture"] == "resnext26_4x4d"


def test_the_head_and_what_its_rows_mean(run: tuple[Path, str, bool], tmp_path: Path) -> None:
    folder, norm, bias = run
    assert _export(folder / "checkpoints" / "step-00000007", "--out", tmp_path / "out") == 0
    head, expected = load_file(tmp_path / "out" / "head.safetensors"), _network_tensors(norm, bias)
    assert set(head) == ({"weight", "bias"} if bias else {"weight"})
    assert torch.equal(head["weight"], expected["head.weight"])
    assert (tmp_path / "out" / "vocabulary.json").read_bytes() == VOCABULARY
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"]["width"] == 4


def test_the_trunk_alone(run: tuple[Path, str, bool], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _export(run[0], "--out", out, "--without-head") == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "recipe.yaml"]
    network = _torchvision(json.loads((out / "config.json").read_text()))
    network.fc = torch.nn.Identity()
    network.load_state_dict(load_file(out / "model.safetensors"), strict=True)


def test_every_tensor_is_aligned(run: tuple[Path, str, bool], tmp_path: Path) -> None:
    assert _export(run[0], "--out", tmp_path / "out") == 0
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for entry in header.values():
        assert entry["data_offsets"][0] % (8 if entry["dtype"] == "I64" else 4) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(header)


def test_what_cannot_be_exported(
    run: tuple[Path, str, bool], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert _export(tmp_path / "nothing", "--out", out) == 2
    assert "is not a whole checkpoint" in capsys.readouterr().err
    out.mkdir()
    assert _export(run[0], "--out", out) == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert _export(run[0], "--out", tmp_path / "file" / "below") == 2
    assert "cannot write to" in capsys.readouterr().err
    run_ranks(states.save_steps, 1, tmp_path / "other", [1])
    assert _export(tmp_path / "other", "--out", tmp_path / "new") == 2
    assert "does not say which network" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "out"]


@pytest.mark.parametrize("form", ["safetensors", "torch", "deepspeed"])
def test_a_damaged_checkpoint_is_not_exported(
    run: tuple[Path, str, bool], tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(run[0] / "checkpoints" / "step-00000007", tmp_path / "step-00000007"))
    tensors = Checkpoint.open(damaged).tensors

    def flip(name: str) -> None:
        chunk = tensors[name].chunks[-1]
        with open(damaged / "tensors" / chunk.file, "r+b") as file:
            file.seek(chunk.position)
            byte = file.read(1)
            file.seek(chunk.position)
            file.write(bytes([byte[0] ^ 1]))

    flip("momentum.head.weight")  # which does not go out
    assert _export(damaged, "--out", tmp_path / "whole", "--format", form) == 0
    flip("trunk.conv1.weight")
    assert _export(damaged, "--out", tmp_path / "out", "--format", form) == 2
    assert "has other bytes of trunk.conv1.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["safetensors", "torch", "deepspeed"])
def test_a_full_disk_is_one_sentence(
    run: tuple[Path, str, bool], tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # files cannot grow beyond it, as on a full disk
    try:
        assert _export(run[0], "--out", tmp_path / "out", "--format", form) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write to {tmp_path / 'out'}: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_listed(run: tuple[Path, str, bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _export(run[0], "--out", tmp_path / "out", "--format", "deepspeed") == 0
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in capsys.readouterr().out.splitlines()}
    files = {str(path): path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert listed == files
    assert sum(path.endswith(".pt") for path in files) == 2


def _large(mebibytes: int) -> Iterator[tuple[str, FlatShard]]:
    for number in range(mebibytes // 64):
        yield f"trunk.layer1.{number}.conv1.weight", FlatShard.whole(torch.full((16, 1 << 20), float(number)))
    yield "head.weight", FlatShard.whole(torch.ones(2, 2))


def _save_large(folder: Path, mebibytes: int) -> None:
    meta = dataclasses.replace(states.meta(1), recipe=yaml.safe_dump({"model": MODEL}))
    with Saver(folder, keep=1, asynchronous=False) as saver:
        saver.start(_large(mebibytes), meta)


MEASURED = """
    import resource, sys
    from scale_wsl import cli

    import torch, safetensors, yaml, scale_wsl.checkpoint.export, scale_wsl.loading.decode
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = cli.main(["checkpoint", "export", sys.argv[1], "--out", sys.argv[2]])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    sys.exit(code)
"""


def test_memory_does_not_grow_with_the_network(tmp_path: Path) -> None:
    run_ranks(_save_large, 1, tmp_path / "checkpoints", 512)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), tmp_path / "checkpoints", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 512 << 20
    assert grown < 100 << 20
