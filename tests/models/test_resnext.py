from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from scale_wsl.errors import UserError
from scale_wsl.models.norms import FrozenBatchNorm2d
from scale_wsl.models.recompute import residual_blocks
from scale_wsl.models.resnext import ModelConfig, ResNeXt, multiply_adds, parameter_count
from scale_wsl.models.weights import build_trunk
from scale_wsl.recipe import load_recipe

_FC = 2049 * 1000  # the paper's counts include a classifier of 1,000 classes
_SMALL = ModelConfig(depth=26, width=1)


def _torchvision(config: ModelConfig, blocks: list[int]) -> ResNet:
    return ResNet(Bottleneck, blocks, groups=config.groups, width_per_group=config.width)


def _images(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("width", "parameters"),
    [(4, 44_177_704), (8, 88_791_336), (16, 194_026_792), (32, 468_530_472), (48, 828_411_176)],
)
def test_parameters_to_the_last_digit(width: int, parameters: int) -> None:
    config = ModelConfig(width=width)
    assert parameter_count(config) + _FC == parameters
    with torch.device("meta"):
        theirs = _torchvision(config, [3, 4, 23, 3])
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters


# Paper section 4: trunk in millions, then GMAC at 224 pixels including the classifier; past 48 extrapolated there.
@pytest.mark.parametrize(
    ("width", "millions", "giga", "digits"),
    [
        (4, 42.1, 7.97, 2),
        (8, 86.7, 16.4, 1),
        (16, 192.0, 36.2, 1),
        (32, 466.5, 87.1, 1),
        (48, 826.4, 153.3, 1),
        (64, 1271.6, 234.8, 1),
        (96, 2418.3, 443.5, 1),
        (128, 3906.4, 713.2, 1),
        (192, 7907, 1436, 0),
    ],
)
def test_the_papers_table(width: int, millions: float, giga: float, digits: int) -> None:
    config = ModelConfig(width=width)
    assert round(parameter_count(config) / 1e6, 0 if width == 192 else 1) == millions
    assert round((multiply_adds(config, 224) + 2048 * 1000) / 1e9, digits) == giga


@pytest.mark.parametrize(
    ("config", "side"), [(ModelConfig(), 224), (ModelConfig(depth=50, groups=4, width=6), 97), (_SMALL, 33)]
)
def test_multiply_adds_against_a_count_by_hooks(config: ModelConfig, side: int) -> None:
    counted = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        assert isinstance(layer, nn.Conv2d)
        kernel_height, kernel_width = layer.kernel_size
        per_value = kernel_height * kernel_width * inputs[0].shape[1] // layer.groups
        counted += output[0].numel() * per_value

    with torch.device("meta"):
        trunk = ResNeXt(config.depth, config.groups, config.width)
        for layer in trunk.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        trunk(torch.empty(2, 3, side, side))
    assert multiply_adds(config, side) == counted


@pytest.mark.parametrize(("depth", "blocks"), [(26, [2, 2, 2, 2]), (50, [3, 4, 6, 3]), (101, [3, 4, 23, 3])])
def test_names_shapes_and_order_are_torchvisions(depth: int, blocks: list[int]) -> None:
    config = ModelConfig(depth=depth)
    with torch.device("meta"):
        ours, theirs = ResNeXt(depth).state_dict(), _torchvision(config, blocks).state_dict()
    expected = [(name, tensor.shape) for name, tensor in theirs.items() if not name.startswith("fc.")]
    assert [(name, tensor.shape) for name, tensor in ours.items()] == expected


@pytest.mark.parametrize("training", [True, False])
def test_computes_what_torchvision_computes(training: bool) -> None:
    theirs = _torchvision(_SMALL, [2, 2, 2, 2]).train(training)
    trunk = build_trunk(_SMALL, 0).train(training)
    trunk.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    theirs.fc = nn.Identity()
    features, expected = trunk(_images()), theirs(_images())
    assert features.shape == (2, trunk.num_features)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    for (name, ours), buffer in zip(trunk.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer, msg=name)


def test_a_stock_torchvision_network_is_the_same() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnext50_32x4d().state_dict()
        ours = ResNeXt(50, 32, 4).state_dict()
    assert list(ours) == [name for name in theirs if not name.startswith("fc.")]


# --- norms -------------------------------------------------------------------------------------------------------


def test_frozen_batchnorm_never_changes_and_takes_batchnorms_state() -> None:
    batch = build_trunk(_SMALL, 0).train()
    batch(_images())  # so that there are statistics to take over
    frozen = build_trunk(ModelConfig(depth=26, width=1, norm="frozen"), 1)
    frozen.load_state_dict(batch.state_dict())
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen.train()
    output = frozen(_images())
    output.sum().backward()
    torch.testing.assert_close(output, batch.eval()(_images()))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    for name, parameter in frozen.named_parameters():
        is_norm = parameter.ndim == 1
        assert parameter.requires_grad != is_norm, name
        assert (parameter.grad is None) == is_norm, name


def test_fresh_frozen_norms_do_not_silence_the_residual_branches() -> None:
    frozen = build_trunk(ModelConfig(depth=26, width=1, norm="frozen"), 0)
    norms = [layer for layer in frozen.modules() if isinstance(layer, FrozenBatchNorm2d)]
    assert len(norms) == 1 + 8 * 3 + 4
    assert all(bool((layer.weight == 1).all()) for layer in norms)


@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
def test_under_bf16_autocast_norms_stay_fp32(norm: str) -> None:
    config = ModelConfig(depth=26, width=1, norm=norm, zero_init_residual=False)
    exact, trunk = build_trunk(config, 0).train(), build_trunk(config, 0).train()
    expected = exact(_images(8))
    with torch.autocast("cpu", torch.bfloat16):
        features = trunk(_images(8))
    features.float().square().sum().backward()
    assert features.dtype == torch.bfloat16
    relative = (features.float() - expected).norm() / expected.norm()
    assert 1e-4 < relative < 0.15  # computed in bf16; statistics of few images amplify its rounding
    for name, tensor in trunk.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith("tracked") else torch.float32), name
    assert all(parameter.grad.dtype == torch.float32 for parameter in trunk.parameters() if parameter.grad is not None)
    for (name, ours), statistics in zip(trunk.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(ours, statistics, rtol=0.05, atol=0.05, msg=name)


def test_groupnorm_treats_each_image_alone() -> None:
    trunk = build_trunk(ModelConfig(depth=26, width=1, norm="group", zero_init_residual=False), 0).train()
    together, alone = trunk(_images(3)), trunk(_images(3)[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


# --- configuration -----------------------------------------------------------------------------------------------


def test_names_and_blocks() -> None:
    assert ModelConfig(width=48).name == "resnext101_32x48d"
    names = [name for name, _ in residual_blocks(build_trunk(_SMALL, 0))]
    assert names == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("width=0", r"model\.width is 0, but must be 1 or more"),
        ("depth=34", "must be one of"),
        ("norm=layer", "must be one of"),
    ],
)
def test_wrong_settings_name_their_key(setting: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(ModelConfig, None, [setting])


def test_groupnorm_must_divide_the_channels() -> None:
    with pytest.raises(UserError, match=r"model\.norm_groups is 24, but must divide the 64 channels"):
        ModelConfig(norm="group", norm_groups=24)
    with pytest.raises(UserError, match="must divide the 12 channels"):
        ModelConfig(norm="group", groups=4, width=3, norm_groups=8)
    with pytest.raises(UserError, match=r"model\.depth is 34"):
        ModelConfig(depth=34)
