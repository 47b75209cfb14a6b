"""ResNeXt trunks: images in, pooled features out, under torchvision's parameter names.

There is no `fc`: the hashtag head lives beside the trunk (`scale_wsl.models.head`). A trunk is described here, on the
meta device; `scale_wsl.models.weights` gives it memory and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from scale_wsl.errors import UserError
from scale_wsl.models.norms import FrozenBatchNorm2d
from scale_wsl.models.recompute import Recomputable, Stage, residual_blocks
from scale_wsl.recipe import setting

__all__ = ["Bottleneck", "ModelConfig", "ResNeXt", "describe_trunk", "multiply_adds", "parameter_count"]

# Blocks in each of the four stages. 50, 101 and 152 are He et al. 2015, table 1; 26 is the same with two blocks each.
_BLOCKS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_NORM_GROUPS = 32  # of a GroupNorm, as its authors have it (Wu and He 2018)
_EXPANSION = 4  # a block's output is four times its stage's base width


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Section `model`: the trunk."""

    depth: int = setting(101, "layers of the trunk; the paper's networks have 101", choices=tuple(_BLOCKS))
    groups: int = setting(32, "groups of each 3x3 convolution (the 32 of 32x48d)")
    width: int = setting(4, "channels per group in the first stage (the 48 of 32x48d)")
    norm: str = setting(
        "batch",
        "batch: BatchNorm; group: GroupNorm; frozen: BatchNorm that is never trained, for weights that were loaded",
        choices=("batch", "group", "frozen"),
    )
    norm_groups: int = setting(_NORM_GROUPS, "groups of each GroupNorm (norm=group)")
    zero_init_residual: bool = setting(
        True, "start each residual branch at zero through its last norm's weight, where norms are trained"
    )

    def __post_init__(self) -> None:
        """Check what one key cannot know of another.

        Raises:
            UserError: a number is not positive, GroupNorm does not divide a layer's channels, or its groups are set for
                another norm.
        """
        for key in ("groups", "width", "norm_groups"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key} is {getattr(self, key)}, but must be 1 or more")
        if self.depth not in _BLOCKS:
            raise UserError(f"model.depth is {self.depth}, but must be one of {', '.join(map(str, _BLOCKS))}")
        if self.norm != "group" and self.norm_groups != _NORM_GROUPS:
            raise UserError(
                f"model.norm_groups is {self.norm_groups}, but model.norm is {self.norm}, which has no groups"
            )
        if self.norm == "group":
            for channels in (64, self.groups * self.width):  # every other layer has a multiple of these
                if channels % self.norm_groups:
                    raise UserError(
                        f"model.norm_groups is {self.norm_groups}, but must divide the {channels} channels of a layer"
                    )

    @property
    def name(self) -> str:
        """The field's name for the network: `resnext101_32x48d`."""
        return f"resnext{self.depth}_{self.groups}x{self.width}d"


class Bottleneck(Recomputable):
    """1x1, grouped 3x3 (which carries the stride), 1x1, each with its norm, beside a shortcut.

    The shape of He et al. 2015 with the stride where torchvision has it, and the groups of Xie et al. 2017.
    """

    def __init__(
        self, inputs: int, inner: int, outputs: int, stride: int, groups: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), norm(outputs))
            if stride > 1 or inputs != outputs
            else None
        )

    def compute(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, outputs, H/stride, W/stride]`."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return torch.relu_(y)


class ResNeXt(nn.Module):
    """A ResNeXt without classifier; `state_dict` is that of torchvision's `ResNet(Bottleneck, ...)` without `fc`.

    Attributes:
        num_features: channels of the features, D (2048).
    """

    layer1: Stage
    layer2: Stage
    layer3: Stage
    layer4: Stage

    def __init__(
        self,
        depth: int = 101,
        groups: int = 32,
        width: int = 4,
        norm: str = "batch",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {
            "batch": nn.BatchNorm2d,
            "group": partial(nn.GroupNorm, norm_groups),
            "frozen": FrozenBatchNorm2d,
        }
        make_norm = norms[norm]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, count in enumerate(_BLOCKS[depth]):
            base = 64 << stage
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                inner = groups * (width << stage)
                blocks.append(Bottleneck(channels, inner, base * _EXPANSION, stride, groups, make_norm))
                channels = base * _EXPANSION
            self.add_module(f"layer{stage + 1}", Stage(*blocks))
        self.num_features = channels

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` to the last feature map `[N, D, H/32, W/32]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[N, 3, H, W]` to pooled features `[N, D]`."""
        return self.forward_features(x).mean((2, 3))


def describe_trunk(config: ModelConfig) -> ResNeXt:
    """The trunk of a recipe on the meta device: its shapes, without memory and without weights drawn."""
    with torch.device("meta"):
        return ResNeXt(config.depth, config.groups, config.width, config.norm, config.norm_groups)


# --- size --------------------------------------------------------------------------------------------------------


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the trunk, norms included; a head of L classes adds (num_features + 1) * L."""
    return sum(parameter.numel() for parameter in describe_trunk(config).parameters())


def multiply_adds(config: ModelConfig, image_size: int) -> int:
    """Multiply-adds of the trunk's convolutions for one forward pass of one `image_size` x `image_size` image.

    A convolution of k x k with c_in inputs in g groups needs k^2 * c_in / g multiply-adds for each output value. A step
    of training costs three times as much, four times with full recomputation.
    """
    total = 0

    def convolve(layer: nn.Module, side: int) -> int:
        nonlocal total
        assert isinstance(layer, nn.Conv2d)
        side = -(-side // layer.stride[0])  # every padding here is half the kernel
        total += layer.weight.numel() * side * side
        return side

    trunk = describe_trunk(config)
    side = convolve(trunk.conv1, image_size)
    side = -(-side // 2)  # the max-pool
    for _, block in residual_blocks(trunk):
        assert isinstance(block, Bottleneck)
        if block.downsample is not None:
            convolve(block.downsample[0], side)
        side = convolve(block.conv3, convolve(block.conv2, convolve(block.conv1, side)))
    return total
