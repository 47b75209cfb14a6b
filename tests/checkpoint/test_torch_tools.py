"""torch's own tools read what we write, straight from the checkpoint's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from scale_wsl.checkpoint.saver import Saver
from tests.checkpoint import states
from tests.ranks import run_ranks


def _network() -> torchvision.models.ResNet:
    torch.manual_seed(1)
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], groups=4, width_per_group=4, num_classes=11)


def _save_network(folder: Path, kind: str) -> None:
    whole = {}
    for name, tensor in _network().state_dict().items():
        whole[f"head.{name.removeprefix('fc.')}" if name.startswith("fc.") else f"trunk.{name}"] = tensor
    whole |= {f"momentum.{name}": torch.full_like(whole[name], 0.5) for name in ("trunk.conv1.weight", "head.weight")}
    with Saver(folder, keep=1) as saver:
        saver.start(states.shards(kind, whole), states.meta(1))


@pytest.fixture(scope="module", params=[("flat", 3), ("mixed", 4)], ids=lambda param: param[0])
def tensors_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, size = request.param
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(_save_network, size, folder, kind)
    return Path(folder / "step-00000001" / "tensors")


def _fills(loaded: dict[str, dict[str, torch.Tensor]]) -> None:
    network, expected = _network(), _network().state_dict()
    for tensor in network.state_dict().values():
        tensor.fill_(7)
    network.load_state_dict(loaded["trunk"] | {f"fc.{name}": tensor for name, tensor in loaded["head"].items()})
    assert states.differing(dict(network.state_dict()), dict(expected)) == []


def test_the_converted_file_fills_torchvisions_network(tensors_folder: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(tensors_folder, tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    _fills(loaded)
    assert set(loaded["momentum"]) == {"trunk", "head"}
    assert bool((loaded["momentum"]["trunk"]["conv1.weight"] == 0.5).all())


def test_torchs_converter_as_a_command(tensors_folder: Path, tmp_path: Path) -> None:
    tool = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    subprocess.run([*tool, tensors_folder, tmp_path / "out.pt"], check=True, capture_output=True)
    _fills(torch.load(tmp_path / "out.pt", weights_only=True))


def test_load_into_a_plain_state_dict(tensors_folder: Path) -> None:
    network = _network()
    wanted = {
        "trunk": {name: torch.zeros_like(t) for name, t in network.state_dict().items() if not name.startswith("fc.")},
        "head": {"weight": torch.zeros(11, 2048), "bias": torch.zeros(11)},
    }
    with pytest.warns(UserWarning, match="load in a single process"):  # torch says that it takes us at our word
        dcp_load(wanted, storage_reader=dcp.FileSystemReader(tensors_folder), no_dist=True)
    _fills(wanted)


def _load_sharded(folder: Path) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wanted = {"head": {"weight": distribute_tensor(torch.zeros(11, 2048), mesh, [Shard(0)])}}
    dcp_load(wanted, checkpoint_id=folder)
    return torch.equal(wanted["head"]["weight"].full_tensor(), _network().state_dict()["fc.weight"])


def test_load_into_sharded_tensors_on_other_ranks(tensors_folder: Path) -> None:
    assert run_ranks(_load_sharded, 2, tensors_folder) == [True, True]


def test_torchs_metadata_says_what_the_index_says(tensors_folder: Path) -> None:
    metadata = dcp.FileSystemReader(tensors_folder).read_metadata()
    contents = states.contents(tensors_folder.parent)
    assert metadata.state_dict_metadata.keys() == contents.keys()
    for name, stored in metadata.state_dict_metadata.items():
        assert stored.size == contents[name].shape
        assert stored.properties.dtype == contents[name].dtype
        assert sum(chunk.sizes.numel() for chunk in stored.chunks) == contents[name].numel()
