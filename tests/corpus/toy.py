"""A made-up source of posts with every kind of duplicate and defect, and settings that suit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scale_wsl.corpus.posts import Post, PostSource, Reject
from scale_wsl.corpus.prepare import PrepareConfig
from tests.loading.fakes import encode

TAGS = ("cat", "dog", "bird", "fish", "horse")


def noise(seed: int, side: int = 24) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


class ToySource(PostSource):
    """Noise images, each with a near-identical mate and now and then an exact copy, and some that are of no use."""

    name = "toy"
    licence = "none"
    attribution = "nobody"
    stop: tuple[str, ...] = ("horse",)
    compares_images = True

    def __init__(self, images: int = 60, version: int = 1) -> None:
        self.images = images
        self.version = version

    def fingerprint(self) -> Mapping[str, object]:
        return {"images": self.images, "version": self.version}

    def count(self) -> int | None:
        return None

    def _at(self, key: str) -> None:
        """Called for each post that is made."""

    def posts(self, split: Any = None) -> Iterator[Post | Reject]:
        def post(key: str, image: bytes, *hashtags: str) -> Post:
            self._at(key)
            return Post(key, lambda: image, hashtags)

        for i in range(self.images):
            image, tag = encode(noise(i)), TAGS[i % 4]
            yield post(f"a{i}", image, f"#{tag.title()}", "zzz", "horse")
            yield post(f"near{i}", encode(noise(i, 30), "JPEG", quality=90), tag)
            if i % 10 == 0:
                yield post(f"copy{i}", image, TAGS[(i + 1) % 4])
        yield post("nohashtag", encode(noise(1000)), "!!!", "123")
        yield post("broken", encode(noise(1001))[:200], "cat")
        yield post("large", encode(Image.new("1", (2000, 2000))), "cat")
        yield post("heavy", bytes(300_000), "cat")
        yield post("nolabel", encode(noise(1002)), "zzz")
        yield Post("gone", Path("/nonexistent/image.png"), ("cat",))


CONFIG = PrepareConfig(min_count=2, validation_share=0.3, records_per_shard=16, max_pixels=1_000_000, max_bytes=200_000)
