"""Two sets of images that share some: noise, copies of it that were edited, and files that are no images."""

from __future__ import annotations

import functools
from pathlib import Path

from PIL import Image, ImageOps

from scale_wsl.corpus.writing import Record
from scale_wsl.hashtags import Vocabulary, WordNet
from tests.corpus.toy import noise
from tests.corpus.writing import write_dataset
from tests.loading.fakes import encode

TAGS = ("cat", "dog", "bird", "fish", "horse", "tree", "flower", "house")
SIDES = ((60, 60), (80, 60), (50, 90))  # several shapes, so that a block's batches mix them


def picture(seed: int) -> Image.Image:
    return noise(seed, 90).resize(SIDES[seed % 3], Image.Resampling.BICUBIC)


@functools.cache
def labels() -> Vocabulary:
    return Vocabulary.build([(tag,) for tag in TAGS], WordNet.load())[0]


def write(folder: Path, role: str, images: dict[str, bytes], source: str = "toy") -> Path:
    """A prepared data set; images have the labels of `TAGS` by turns."""
    vocabulary = labels()
    records: list[Record] = []
    for number, (key, data) in enumerate(images.items()):
        tag = TAGS[number % len(TAGS)]
        label = vocabulary.index(tag)
        assert label is not None
        records.append((key, "png", data, [tag], [label]))
    write_dataset(folder, records, vocabulary, records_per_shard=7, role=role, source=source)
    return folder


def training_images(count: int = 30) -> dict[str, bytes]:
    images = {f"t{number}": encode(picture(number)) for number in range(count)}
    return images | {"broken": b"no image"}


def evaluation_images(copies: int = 6, strangers: int = 5) -> dict[str, bytes]:
    """Copies of t0, t1, ... as poor JPEGs, every other one mirrored; and images that the training set has not."""
    images = {}
    for number in range(copies):
        image = ImageOps.mirror(picture(number)) if number % 2 else picture(number)
        images[f"copy{number}"] = encode(image, "JPEG", quality=70)
    images |= {f"stranger{number}": encode(picture(1000 + number)) for number in range(strangers)}
    return images | {"damaged": b"GIF89a"}
