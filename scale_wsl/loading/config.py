"""The recipe section `data`: what is read, how much of it, how often, and how it is cropped.

Must never open a data set: what only its images can tell is refused by whoever opens them.
"""

from __future__ import annotations

import dataclasses

from scale_wsl.corpus.naming import wanted_count
from scale_wsl.corpus.resample import DEFAULT_THRESHOLD, MODES
from scale_wsl.corpus.views import ViewSpec
from scale_wsl.errors import UserError
from scale_wsl.loading.decode import LARGEST_MAX_PIXELS
from scale_wsl.recipe import setting

__all__ = ["DataConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how often, and how it is cropped (recipe section `data`)."""

    train: str = setting("", "folder of the data set to train on, or what prepare has made")
    validation: str = setting("", "folder of the data set to evaluate on, or what prepare has made")
    images: int | float | str | None = setting(
        None,
        "train on a subset of so many images (35000, 35k, 3.5M) or of this share of them (0.1, '10 %'); a smaller "
        "subset is part of every larger one; null: all",
    )
    subset_seed: int = setting(0, "images: which subset")
    label_noise: float = setting(
        0.0,
        "probability with which each hashtag of a training image is replaced by one that is drawn as often as it is in "
        "the data set (the paper: 0, 0.1, 0.25, 0.5)",
    )
    noise_seed: int = setting(0, "label_noise: which hashtags are replaced, and by which")
    image_size: int = setting(224, "side of the square that the network sees, in pixels")
    resize: int | None = setting(
        None, "short side to which an evaluation image is resized before its centre is cut; null: image_size * 256/224"
    )
    min_scale: float = setting(0.08, "smallest share of an image's area that a random training crop may cover")
    flip: bool = setting(True, "mirror half of the training images")
    resampling: str = setting("square-root", "how often images with rare hashtags are repeated", choices=MODES)
    threshold: float | None = setting(
        None,
        "share of images below which a hashtag counts as rare; the paper leaves it open; null: what epoch_length "
        f"needs, or else {DEFAULT_THRESHOLD}, LVIS's",
    )
    epoch_length: int | float | str | None = setting(
        None, "choose the threshold by which an epoch has so many images on average ('5M images'); null or 0: do not"
    )
    workers: int = setting(2, "processes per rank that read and decode images; 0: the trainer's own process does")
    prefetch: int = setting(4, "micro-batches that each worker prepares ahead")
    max_pixels: int = setting(100_000_000, "images of more pixels are not decoded but counted as corrupt")
    max_corrupt: float = setting(0.01, "share of corrupt images at which the run stops")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        for key, good, right in (
            ("image_size", self.image_size >= 1, "at least 1"),
            (
                "resize",
                self.resize is None or self.resize >= self.image_size,
                f"image_size ({self.image_size}) or more",
            ),
            ("min_scale", 0 < self.min_scale <= 1, "above 0 and at most 1"),
            ("resampling", self.resampling in MODES, f"one of {', '.join(MODES)}"),
            ("threshold", self.threshold is None or 0 < self.threshold <= 1, "above 0 and at most 1"),
            ("workers", self.workers >= 0, "0 or more"),
            ("prefetch", self.prefetch >= 1, "at least 1"),
            ("max_pixels", 1 <= self.max_pixels <= LARGEST_MAX_PIXELS, f"between 1 and {LARGEST_MAX_PIXELS:,}"),
            ("max_corrupt", 0 <= self.max_corrupt <= 1, "between 0 and 1"),
        ):
            if not good:
                raise UserError(f"data.{key} is {getattr(self, key)}, but must be {right}")
        try:
            _ = self.view
        except UserError as error:  # which begins with the key
            raise UserError(f"data.{error}") from None
        if self.stated_length is not None and self.threshold is not None:
            raise UserError(
                f"data.epoch_length is {self.epoch_length}, and data.threshold, which it would choose, is "
                f"{self.threshold}: set one of them to null"
            )
        if self.stated_length is not None and self.resampling == "natural":
            raise UserError(
                f"data.epoch_length is {self.epoch_length}, but data.resampling is natural, which repeats no image: "
                "set data.epoch_length=null, or another resampling"
            )

    @property
    def view(self) -> ViewSpec:
        """What of the training set is trained on."""
        return ViewSpec(
            images=self.images,
            subset_seed=self.subset_seed,
            label_noise=self.label_noise,
            noise_seed=self.noise_seed,
        )

    @property
    def stated_length(self) -> int | None:
        """How many images an epoch is to have on average; None where the threshold decides."""
        return wanted_count(self.epoch_length, "data.epoch_length") if self.epoch_length not in (None, 0) else None

    @property
    def short_side(self) -> int:
        """Short side of an evaluation image before its centre is cut, in pixels."""
        return round(self.image_size * 256 / 224) if self.resize is None else self.resize
