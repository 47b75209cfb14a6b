"""How posts become data sets: section `prepare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from scale_wsl.corpus.images import LARGEST_MAX_PIXELS
from scale_wsl.errors import UserError
from scale_wsl.hashtags.lists import read_hashtags
from scale_wsl.hashtags.rules import VocabularyRule
from scale_wsl.recipe import setting

__all__ = ["PrepareConfig"]

_NEAR = ("auto", "all", "validation")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How posts become data sets. All of it is recorded: the same settings give the same bytes."""

    vocabulary: str = setting(
        "noun", "Rule of the vocabulary: noun, in1k, noun:8500, list:FILE ...; or a vocabulary.json, taken as it is."
    )
    under: tuple[str, ...] = setting((), "Only hashtags of senses at or below these synsets, such as [animal.n.01].")
    stop: str | None = setting(None, "File of hashtags that never become labels, one a line.")
    min_count: int = setting(5, "Training images that a canonical hashtag must be on to become a label.")
    size: int | None = setting(None, "Keep only so many labels, the most frequent ones; null: all.")
    validation_share: float = setting(0.15, "Share of the images that goes to the validation split.")
    near: str = setting(
        "auto",
        "Near-identical images. all: come to the same side, which takes time with the square of their number; "
        "validation: training images that are near a validation image are dropped; auto: all up to 50,000 images.",
        choices=_NEAR,
    )
    seed: int = setting(0, "Of the split and of the order within the shards.")
    shuffle: bool = setting(
        True, "Shuffle the images over the shards; false: the posts' order, for images that are slow to get one by one."
    )
    records_per_shard: int = setting(1000, "Images in a shard.")
    max_pixels: int = setting(25_000_000, "Images of more pixels are dropped.")
    max_bytes: int = setting(64 << 20, "Image files of more bytes are dropped.")

    def __post_init__(self) -> None:
        for key, good, right in (
            ("min_count", self.min_count >= 1, "at least 1"),
            ("size", self.size is None or self.size >= 1, "at least 1"),
            ("validation_share", 0 < self.validation_share < 1, "above 0 and below 1"),
            ("near", self.near in _NEAR, f"one of {', '.join(_NEAR)}"),
            ("seed", self.seed >= 0, "0 or more"),
            ("records_per_shard", 1 <= self.records_per_shard <= 1_000_000, "between 1 and 1,000,000"),
            ("max_pixels", 1 <= self.max_pixels <= LARGEST_MAX_PIXELS, f"between 1 and {LARGEST_MAX_PIXELS:,}"),
            ("max_bytes", 1 <= self.max_bytes <= 1 << 32, f"between 1 and {1 << 32:,}"),
        ):
            if not good:
                raise UserError(f"{key} is {getattr(self, key)}, but must be {right}")
        if self.is_file:
            given = [key for key in ("under", "stop", "size") if getattr(self, key)]
            if given or self.min_count != PrepareConfig.min_count:
                raise UserError(
                    f"vocabulary is the file {self.vocabulary}, which is taken as it is: leave out "
                    f"{', '.join(given or ['min_count'])}"
                )

    @property
    def is_file(self) -> bool:
        """Whether the vocabulary is there already."""
        return self.vocabulary.endswith(".json")

    def rule(self, stop: tuple[str, ...]) -> VocabularyRule:
        """The rule that is meant; `stop` is the source's own stop list.

        Raises:
            UserError: It is none, or a file that it needs cannot be read.
        """
        named = read_hashtags(self.stop, "stop list") if self.stop else ()
        return VocabularyRule(self.vocabulary, self.under, (*stop, *named))

    def recorded(self) -> dict[str, Any]:
        """What decides the contents of the data sets."""
        return dataclasses.asdict(self)
