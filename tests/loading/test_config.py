from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scale_wsl.corpus.views import ViewSpec
from scale_wsl.errors import UserError
from scale_wsl.loading import DataConfig
from scale_wsl.loading.decode import LARGEST_MAX_PIXELS
from scale_wsl.recipe import describe, load_recipe, recipe_yaml
from scale_wsl.training.job import PretrainRecipe


def test_config() -> None:
    assert DataConfig().short_side == 256
    assert DataConfig(image_size=112).short_side == 128
    assert DataConfig(image_size=112, resize=112).short_side == 112
    assert "data.resampling must" not in describe(DataConfig)
    for key, value, right in (
        ("image_size", 0, "at least 1"),
        ("resize", 223, r"image_size \(224\) or more"),
        ("min_scale", 0.0, "above 0"),
        ("min_scale", 1.1, "at most 1"),
        ("resampling", "sqrt", "natural, square-root, uniform"),
        ("threshold", 0.0, "above 0"),
        ("threshold", 1.5, "at most 1"),
        ("workers", -1, "0 or more"),
        ("prefetch", 0, "at least 1"),
        ("max_pixels", 0, "between 1 and"),
        ("max_pixels", LARGEST_MAX_PIXELS + 1, "between 1 and 178,956,970"),
        ("max_corrupt", -0.1, "between 0 and 1"),
        ("max_corrupt", 1.1, "between 0 and 1"),
    ):
        with pytest.raises(UserError, match=rf"^data\.{key} is {value}, but must be .*{right}"):
            DataConfig(**{key: value})  # type: ignore[arg-type]


def test_what_is_taken_of_the_training_set() -> None:
    assert DataConfig().view == ViewSpec()
    assert DataConfig().stated_length is None
    config = DataConfig(images="35k", subset_seed=2, label_noise=0.25, noise_seed=3, epoch_length="5M images")
    assert config.view == ViewSpec(images="35k", subset_seed=2, label_noise=0.25, noise_seed=3)
    assert config.stated_length == 5_000_000
    assert DataConfig(epoch_length=0, threshold=0.1).stated_length is None
    help_text = describe(DataConfig, "data.")
    for key in ("images", "subset_seed", "label_noise", "noise_seed", "epoch_length"):
        assert f"data.{key}=" in help_text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"images": "lots"}, "data.images is 'lots', but must be a number of images such as 35000, 35k, 3.5M or 1e6"),
        ({"images": -0.5}, "data.images is -0.5, but a share of the images must be above 0 and at most 1 (100 %)"),
        ({"label_noise": 2.0}, "data.label_noise is 2.0, but must be between 0 and 1"),
        ({"subset_seed": 4}, "data.subset_seed is set, but not images, which it is about: take it out"),
        ({"noise_seed": 4}, "data.noise_seed is set, but not label_noise, which it is about: take it out"),
        ({"epoch_length": "long"}, "data.epoch_length is 'long', but must be a number of images"),
        ({"epoch_length": -1}, "data.epoch_length is -1, but must be a number of images"),
        (
            {"epoch_length": "5k", "threshold": 0.1},
            "data.epoch_length is 5k, and data.threshold, which it would choose",
        ),
        ({"epoch_length": 5, "resampling": "natural"}, "data.epoch_length is 5, but data.resampling is natural"),
    ],
)
def test_settings_that_contradict_each_other_or_mean_nothing(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        DataConfig(**settings)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "value"),
    [("35k", "35k"), ("35000", 35_000), ("3.5e6", 3_500_000), ("0.1", 0.1), ("10 %", "10 %"), ("null", None)],
)
def test_numbers_of_images_on_the_command_line_and_back_from_yaml(text: str, value: object, tmp_path: Path) -> None:
    recipe = load_recipe(PretrainRecipe, None, [f"data.images={text}"])
    assert recipe.data.images == value
    assert type(recipe.data.images) is type(value)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(PretrainRecipe, tmp_path / "recipe.yaml") == recipe


def test_who_set_what_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {threshold: 0.03}")
    with pytest.raises(
        UserError, match=r"data\.threshold set in .*recipe\.yaml, .*epoch_length set on the command line"
    ):
        load_recipe(PretrainRecipe, tmp_path / "recipe.yaml", ["data.epoch_length=5k"])
