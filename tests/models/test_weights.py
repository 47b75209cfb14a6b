from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scale_wsl.models import weights
from scale_wsl.models.resnext import ModelConfig
from scale_wsl.models.weights import InitialWeights, build_trunk, initial_weights, materialise

_SMALL = ModelConfig(depth=26, width=1)


def test_initial_weights_follow_the_paper_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    trunk = build_trunk(ModelConfig(depth=26), 3)
    assert torch.equal(torch.get_rng_state(), before)
    for name, layer in trunk.named_modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert float(layer.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
            assert abs(float(layer.weight.detach().mean())) < 0.05 * (2 / fan_out) ** 0.5
        elif isinstance(layer, nn.BatchNorm2d):
            assert bool((layer.weight == (0 if name.endswith("bn3") else 1)).all()), name
            assert bool((layer.bias == 0).all())
            assert bool((layer.running_mean == 0).all())
            assert bool((layer.running_var == 1).all())
    without = build_trunk(ModelConfig(depth=26, zero_init_residual=False), 3)
    assert all(bool((layer.weight == 1).all()) for layer in without.modules() if isinstance(layer, nn.BatchNorm2d))


def test_a_parameter_starts_as_a_function_of_its_name_and_the_seed_alone() -> None:
    trunk, source = build_trunk(_SMALL, 5), initial_weights(_SMALL, 5)
    for name, parameter in trunk.named_parameters():
        drawn = source.read(name, parameter.shape, 0, parameter.numel())
        assert torch.equal(parameter, drawn.view_as(parameter)), name
    other = build_trunk(_SMALL, 6)
    assert not torch.equal(trunk.conv1.weight, other.conv1.weight)
    first, second = (trunk.get_parameter(f"layer1.{block}.conv3.weight") for block in (0, 1))
    assert not torch.equal(first, second)


@given(st.data())
def test_any_part_of_a_tensor_is_that_part_of_the_whole(data: st.DataObject) -> None:
    """However small the blocks are in which it is drawn."""
    shape = torch.Size(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    start = data.draw(st.integers(0, shape.numel()))
    stop = data.draw(st.integers(start, shape.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_BLOCK", data.draw(st.integers(1, 50)))
        source = InitialWeights(3, zero_residual=True)
        whole = source.read("conv1.weight", shape, 0, shape.numel())
        assert torch.equal(source.read("conv1.weight", shape, start, stop), whole[start:stop])


def test_blocks_of_a_large_tensor_are_different_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 100)
    drawn = InitialWeights(0, zero_residual=True).read("conv1.weight", torch.Size([300, 1, 1, 1]), 0, 300)
    first, second, third = drawn.split(100)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_frozen_residual_branches_do_not_start_at_zero() -> None:
    for norm, expected in (("batch", 0.0), ("group", 0.0), ("frozen", 1.0)):
        source = initial_weights(ModelConfig(norm=norm), 0)
        assert source.read("layer1.0.bn3.weight", torch.Size([4]), 0, 4).tolist() == [expected] * 4


def test_a_part_takes_its_values_under_the_wholes_names() -> None:
    trunk = build_trunk(_SMALL, 2)
    with torch.device("meta"):
        layer = nn.Conv2d(64, 32, 1, bias=False)
    materialise(layer, initial_weights(_SMALL, 2), torch.device("cpu"), "layer1.0.conv1.")
    assert torch.equal(layer.weight, trunk.layer1[0].conv1.weight)
