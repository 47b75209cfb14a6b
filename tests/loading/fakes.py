"""A data set in memory, of flat-coloured images that show which record they are."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scale_wsl.errors import UserError


def encode(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def colour_of(record: int) -> tuple[int, int, int]:
    return (record * 37 % 256, record * 101 % 256, record % 256)


class FakeDataset:
    """Has what the loaders and the order need of a data set; image i is of one colour unless `files` replaces it."""

    def __init__(
        self, rows: Sequence[Sequence[int]], files: dict[int, bytes] | None = None, noise: bool = False
    ) -> None:
        self.rows = [np.array(row, np.int32) for row in rows]
        self.label_ids = np.concatenate(self.rows).astype(np.int32)
        self.label_start = np.cumsum([0, *map(len, rows)]).astype(np.int64)
        self.max_labels = max(map(len, rows))
        self.keys = [f"key{i}" for i in range(len(rows))]
        self.manifest_hash = hashlib.sha256(repr(rows).encode()).hexdigest()
        self.files = [
            encode(self._noise(i) if noise else np.full((9, 12, 3), colour_of(i), np.uint8)) for i in range(len(rows))
        ]
        for record, data in (files or {}).items():
            self.files[record] = data

    @staticmethod
    def _noise(record: int) -> np.ndarray:
        return np.random.default_rng(record).integers(0, 256, (20 + record % 5, 24, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self, i: int) -> np.ndarray:
        return self.rows[i]

    def read(self, i: int) -> bytes:
        return self.files[i]


class FailingDataset(FakeDataset):
    """A data set whose shards cannot be read, which is no fault of an image's."""

    def read(self, i: int) -> bytes:
        raise OSError(5, "Input/output error")


class RefusingDataset(FakeDataset):
    """A data set that has changed under the run, which the user can mend."""

    def read(self, i: int) -> bytes:
        raise UserError("000000.tar has become shorter than its index says: restore the data set")


class DyingDataset(FakeDataset):
    """A data set that takes down the process that reads it, as the kernel does when memory runs out."""

    def read(self, i: int) -> bytes:
        os.kill(os.getpid(), 9)
        return b""


class StuckDataset(FakeDataset):
    """A data set on a file system that does not answer."""

    stuck: Path

    def read(self, i: int) -> bytes:
        self.stuck.touch()
        time.sleep(600)
        return b""


def zipf_rows(images: int, labels: int = 12) -> list[list[int]]:
    """Long-tailed labels, one to three an image; a pure function of its arguments."""
    rng = np.random.default_rng(images)
    weights = 1 / np.arange(1, labels + 1)
    return [
        sorted(rng.choice(labels, rng.integers(1, 4), replace=False, p=weights / weights.sum()).tolist())
        for _ in range(images)
    ]
