"""Weights of a trunk as a pure function of a seed, and the memory to hold them - of a part as well as of the whole.

A trunk is described on the meta device; whoever shards it reads only the elements that a rank holds. Initial values are
drawn in blocks, each from a seed of its own, so every engine and world size starts from the same numbers. Must never
draw from PyTorch's global generator.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from scale_wsl.models.resnext import ModelConfig, ResNeXt, describe_trunk
from scale_wsl.randomness import derived_seed
from scale_wsl.shards import FlatShard, Source

__all__ = ["InitialWeights", "build_trunk", "initial_weights", "materialise"]

_BLOCK = 1 << 22  # elements drawn from one seed


class InitialWeights:
    """The source of a trunk's initial weights: Goyal et al. 2017, section 5.1, whose recipe the paper follows.

    Convolutions are He-normal by fan-out, norms one and zero; `zero_residual`: the last norm of each residual branch
    starts at zero, so that a block starts as the identity.
    """

    def __init__(self, seed: int, *, zero_residual: bool) -> None:
        self.seed = seed
        self.zero_residual = zero_residual

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        if name.endswith("num_batches_tracked"):
            return torch.zeros(stop - start, dtype=torch.int64)
        if name.endswith(("bias", "running_mean")):
            return torch.zeros(stop - start)
        if len(shape) == 1:  # a norm's weight, or running variance
            last_of_branch = re.fullmatch(r"layer\d\.\d+\.bn3\.weight", name) is not None
            return torch.zeros(stop - start) if last_of_branch and self.zero_residual else torch.ones(stop - start)
        fan_out = shape[0] * shape[2:].numel()  # as torchvision counts it, groups ignored
        values = torch.empty(stop - start)
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            first, last = block * _BLOCK, min((block + 1) * _BLOCK, shape.numel())
            drawn = self._draw(name, block, last - first, (2.0 / fan_out) ** 0.5)
            here = slice(max(start, first), min(stop, last))
            values[here.start - start : here.stop - start] = drawn[here.start - first : here.stop - first]
        return values

    def _draw(self, name: str, block: int, count: int, std: float) -> Tensor:
        """The values of one block. Its length is the tensor's business alone: normal_ depends on it."""
        parts = ("init", self.seed, name, block) if block else ("init", self.seed, name)
        numbers = torch.Generator().manual_seed(derived_seed(*parts))
        return torch.empty(count).normal_(0.0, std, generator=numbers)


def initial_weights(config: ModelConfig, seed: int) -> InitialWeights:
    """The source of a recipe's initial weights.

    Behind a frozen norm, a residual branch that starts at zero would stay zero for ever, so none does.
    """
    return InitialWeights(seed, zero_residual=config.zero_init_residual and config.norm != "frozen")


@torch.no_grad()
def materialise(module: nn.Module, source: Source, device: torch.device, prefix: str = "") -> None:
    """Give a module on the meta device its memory and its values, all of them; dtypes stay as they are.

    Args:
        module: on the meta device, or a part of it.
        source: of the values.
        device: where to.
        prefix: what the source's names have before the module's, with its dot.
    """
    module.to_empty(device=device)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        FlatShard.whole(tensor).fill(prefix + name, source)


def build_trunk(config: ModelConfig, seed: int) -> ResNeXt:
    """A whole trunk on the CPU in fp32, with its initial weights."""
    trunk = describe_trunk(config)
    materialise(trunk, initial_weights(config, seed), torch.device("cpu"))
    return trunk
