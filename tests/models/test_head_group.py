from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.models.head import HeadConfig
from scale_wsl.models.head_group import best_group_size, choose_group_size, ranks_per_node, step_bytes
from scale_wsl.recipe import load_recipe

_PAPER = {"ranks": 336, "images": 24, "classes": 17_000, "features": 2048}  # 336 GPUs, 24 images each


def test_at_the_papers_size_the_node_wins() -> None:
    assert best_group_size(**_PAPER, ranks_per_node=8) == 8
    # Without nodes the bytes alone count: near sqrt(14 V / 4 b), and all ranks or none are far from it.
    anywhere = best_group_size(**_PAPER)
    assert anywhere in (48, 56)
    assert step_bytes(anywhere, **_PAPER) < 0.4 * step_bytes(8, **_PAPER) < 0.2 * step_bytes(1, **_PAPER)


@pytest.mark.parametrize(
    ("group", "embeddings", "gradients", "state"),
    [(1, 0.2, 132, 332), (8, 1.5, 16.2, 41.5), (56, 10.5, 2.0, 5.9), (336, 63, 0.0, 1.0)],
)
def test_bytes_of_a_step_are_those_of_the_formula(
    group: int, embeddings: float, gradients: float, state: float
) -> None:
    logits = 4 * 24 * 17_000 / 2**20
    expected = embeddings + gradients + state + logits
    assert step_bytes(group, **_PAPER) / 2**20 == pytest.approx(expected, rel=0.02)


@given(st.integers(1, 512), st.integers(1, 256), st.integers(1, 2_000_000), st.integers(1, 4096), st.integers(0, 16))
def test_the_best_size_can_be_used_and_is_best(
    ranks: int, images: int, classes: int, features: int, per_node: int
) -> None:
    sizes = {"ranks": ranks, "images": images, "classes": classes, "features": features}
    best = best_group_size(**sizes, ranks_per_node=per_node)
    usable = [g for g in range(1, ranks + 1) if ranks % g == 0 and (per_node == 0 or per_node % g == 0)]
    assert best in usable
    assert step_bytes(best, **sizes) == min(step_bytes(size, **sizes) for size in usable)


def test_what_the_recipe_says() -> None:
    assert choose_group_size(0, **_PAPER) == 336
    assert choose_group_size(42, **_PAPER) == 42
    assert choose_group_size("auto", **_PAPER, ranks_per_node=8) == 8
    with pytest.raises(UserError, match=r"head\.group_size is 5, but must divide the 336 ranks"):
        choose_group_size(5, **_PAPER)


def test_recipes_take_a_number_or_auto(tmp_path: Path) -> None:
    assert load_recipe(HeadConfig, None, ["group_size=8"]).group_size == 8
    assert load_recipe(HeadConfig, None, ["group_size=auto"]).group_size == "auto"
    file = tmp_path / "head.yaml"
    for text, value in (("8", 8), ("'8'", 8), ("auto", "auto")):
        file.write_text(f"group_size: {text}\n")
        assert load_recipe(HeadConfig, file).group_size == value
    with pytest.raises(UserError, match=r"head\.group_size is 'node', but must be a number of ranks, 0 or auto"):
        load_recipe(HeadConfig, None, ["group_size=node"])
    with pytest.raises(UserError, match=r"head\.group_size is -2, but must be 0 or more"):
        load_recipe(HeadConfig, None, ["group_size=-2"])
    with pytest.raises(UserError, match=r"group_size is \[8\] in the command line, but must be a whole number or text"):
        load_recipe(HeadConfig, None, ["group_size=[8]"])


def test_ranks_of_a_node_are_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert ranks_per_node() == 0
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert ranks_per_node() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ranks_per_node() == 8
