"""Every recipe and ds_config that is shipped can be read, and every recipe's header says how to run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scale_wsl.recipe import load_recipe
from scale_wsl.training.job import PretrainRecipe
from scale_wsl.training.pretrain import read_arguments

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "pretrain").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_its_header_tells_command_runtime_and_result(path: Path) -> None:
    recipe = load_recipe(PretrainRecipe, path)
    assert recipe.run.name == path.stem
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for part in ("recipes/pretrain.py", "Expected runtime", "Measured result"):
        assert part in header


def test_the_papers_recipe_is_the_papers() -> None:
    recipe = load_recipe(PretrainRecipe, ROOT / "recipes" / "pretrain" / "ig_32x48d.yaml")
    assert (recipe.model.depth, recipe.model.groups, recipe.model.width) == (101, 32, 48)
    assert recipe.batch.micro * 336 == 8064
    assert recipe.optim.lr * 8064 / 256 == pytest.approx(3.15)
    assert (recipe.optim.momentum, recipe.optim.nesterov, recipe.optim.weight_decay) == (0.9, True, 1e-4)


def test_the_readmes_command_lines_are_read() -> None:
    """The words after `recipes/pretrain.py` in every indented command of the README."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    .*recipes/pretrain\.py(.*)$", text, re.M)
    assert len(commands) >= 3
    for command in commands:
        words = command.split("#")[0].split()
        if "--help" not in words:
            words = [word for word in words if word != "..."]
            recipes = [str(ROOT / word) if word.endswith(".yaml") else word for word in words]
            read_arguments(recipes, ROOT / "recipes" / "pretrain" / "emoji.yaml")
