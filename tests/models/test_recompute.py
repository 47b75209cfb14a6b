from __future__ import annotations

import pytest
import torch

from scale_wsl.errors import UserError
from scale_wsl.models.norms import FrozenBatchNorm2d
from scale_wsl.models.recompute import Recomputable, Recomputation, Stage, recompute, residual_blocks
from scale_wsl.models.resnext import ModelConfig
from scale_wsl.models.weights import build_trunk

_MODEL = ModelConfig(depth=26, groups=4, width=2, zero_init_residual=False)


def _train(parts: str, steps: int = 2, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Gradients and statistics after some passes, and the bytes that the last one kept for its backward pass."""
    trunk = build_trunk(_MODEL, 0).train()
    recompute(trunk, Recomputation.parse(parts, "key"))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for step in range(steps):
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=autocast):
            features = trunk(images)
        activations = float(sum(kept.values()))
        features.float().square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in trunk.named_parameters() if parameter.grad is not None}
    return found | dict(trunk.named_buffers()) | {"activations": torch.tensor(activations)}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("parts", ["blocks", "every 2 blocks", "every 3 blocks", "stages"])
def test_recomputation_changes_no_bit_of_gradients_and_statistics(parts: str, autocast: bool) -> None:
    plain, recomputed = _train("none", autocast=autocast), _train(parts, autocast=autocast)
    for name, tensor in plain.items():
        if name != "activations":
            assert torch.equal(tensor, recomputed[name]), name
    assert plain["bn1.num_batches_tracked"] == 2


def test_the_more_is_recomputed_the_less_is_kept() -> None:
    kept = {parts: float(_train(parts, 1)["activations"]) for parts in ("none", "every 2 blocks", "blocks", "stages")}
    assert kept["stages"] < kept["blocks"] < kept["every 2 blocks"] < kept["none"]
    assert kept["blocks"] < 0.35 * kept["none"]


def test_which_blocks() -> None:
    trunk = build_trunk(_MODEL, 0)
    for parts, expected in (("none", "00000000"), ("blocks", "11111111"), ("every 3 blocks", "10010010")):
        recompute(trunk, Recomputation.parse(parts, "key"))
        assert "".join(str(int(block.recomputed)) for _, block in residual_blocks(trunk)) == expected
    recompute(trunk, Recomputation.parse("stages", "key"))
    marked = {name for name, module in trunk.named_modules() if isinstance(module, Recomputable) and module.recomputed}
    assert marked == {"layer1", "layer2", "layer3", "layer4"}
    assert all(isinstance(trunk.get_submodule(name), Stage) for name in marked)


def test_nothing_is_recomputed_without_gradients() -> None:
    trunk = build_trunk(_MODEL, 0).train()
    recompute(trunk, Recomputation.parse("blocks", "key"))
    with torch.no_grad():
        assert not trunk(torch.randn(1, 3, 64, 64)).requires_grad
    assert trunk.bn1.num_batches_tracked == 1


def test_frozen_norms_stay_frozen() -> None:
    trunk = build_trunk(ModelConfig(depth=26, groups=4, width=2, norm="frozen"), 0).train()
    recompute(trunk, Recomputation.parse("stages", "key"))
    trunk(torch.randn(1, 3, 64, 64)).sum().backward()
    norms = [layer for layer in trunk.modules() if isinstance(layer, FrozenBatchNorm2d)]
    assert all(layer.num_batches_tracked == 0 and layer.momentum == 0.1 and not layer.training for layer in norms)


@pytest.mark.parametrize("text", ["all", "every 0 blocks", "every -1 blocks", "every two blocks", "", "blocks "])
def test_other_words_are_a_users_mistake(text: str) -> None:
    with pytest.raises(UserError, match=r"engine\.checkpointing is .*, but must be none, blocks, stages"):
        Recomputation.parse(text, "engine.checkpointing")
