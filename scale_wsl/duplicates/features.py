"""The features of a set of images, in blocks, each a published file: what is there is not computed again.

So a search that was killed goes on where it was, several processes share the work, and the features of a training set
serve for one evaluation set after another. Must never take a file that is of other images, another method, or cut
short.

A file holds 4,096 images: `features` and, for each image, whether it could be read, as an uncompressed .npz, whose
members carry a CRC-32. R-MAC of 2,048 channels takes 4 kB an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.duplicates.methods import Method, Unreadable
from scale_wsl.duplicates.sets import ImageSet
from scale_wsl.errors import UserError
from scale_wsl.files import published_file

__all__ = ["BLOCK", "Block", "Features", "cores", "decoded", "digest_of"]

BLOCK = 4096
"""Images in a file."""

_SLACK = 4096  # bytes of an .npz beside its arrays


@dataclass(frozen=True)
class Block:
    """The features of some consecutive images.

    Attributes:
        first: The number of the first one.
        features: `[n, ...]`; zero where an image could not be read.
        readable: `[n]`
    """

    first: int
    features: NDArray[Any]
    readable: NDArray[np.bool_]


class Features:
    """The features of a set of images by a method, in a folder of their own.

    Args:
        root: Where the folder is made, beside those of other sets and methods.
        images: Whose.
        method: By which.
        workers: Threads that read and decode.
        batch: Images that the method takes at a time.
    """

    def __init__(self, root: Path, images: ImageSet, method: Method, *, workers: int, batch: int) -> None:
        self.images, self.method = images, method
        self.workers, self.batch = workers, batch
        identity = {"images": images.identity, "method": method.identity, "block": BLOCK}
        self.folder = root / f"{images.identity[:16]}-{digest_of(identity)[:16]}"
        path = self.folder / "identity.json"
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        try:
            if not path.exists():
                with published_file(path) as aside:
                    aside.write_text(text, "utf-8")
            elif path.read_bytes() != text.encode():
                raise UserError(f"{path} is of other features than its folder's name says: remove {self.folder}")
        except OSError as error:
            raise UserError(f"cannot keep features in {root}: {error.strerror}") from None

    def __len__(self) -> int:
        """Blocks."""
        return -(-len(self.images) // BLOCK)

    def numbers(self, block: int) -> range:
        """The images of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.images)))

    def block(self, number: int, progress: Callable[[int], object] = lambda _: None) -> Block:
        """A block, from its file or, where there is none that is whole, from the images.

        Args:
            number: Of the block.
            progress: Told how many more images are done.

        Raises:
            UserError: An image file is gone, the method cannot work, or the file cannot be written.
        """
        path = self.folder / f"{number:08d}.npz"
        if (found := self._read(path, number)) is not None:
            progress(len(found.readable))
            return found
        made = self._compute(number, progress)
        try:
            with published_file(path) as aside, open(aside, "wb") as handle:
                np.savez(handle, features=made.features, readable=made.readable)
        except OSError as error:
            raise UserError(f"cannot keep features in {self.folder}: {error.strerror}") from None
        return made

    def _read(self, path: Path, number: int) -> Block | None:
        numbers = self.numbers(number)
        shape, dtype = (len(numbers), *self.method.shape), np.dtype(self.method.dtype)
        try:
            expected = int(np.prod(shape)) * dtype.itemsize + len(numbers)
            if not expected <= path.stat().st_size <= expected + _SLACK:
                return None
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
                features, readable = file["features"], file["readable"]
        # OSError: there is none; the others: it is damaged.
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if (features.shape, features.dtype) != (shape, dtype) or readable.shape != shape[:1] or readable.dtype != bool:
            return None
        return Block(numbers.start, features, readable)

    def _compute(self, number: int, progress: Callable[[int], object]) -> Block:
        numbers = self.numbers(number)
        features = np.zeros((len(numbers), *self.method.shape), self.method.dtype)
        readable = np.zeros(len(numbers), np.bool_)
        waiting: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}  # by the shape of the pixels

        def finish(some: Sequence[tuple[int, NDArray[np.uint8]]]) -> None:
            places = [image - numbers.start for image, _ in some]
            features[places] = self.method.features([pixels for _, pixels in some])
            readable[places] = True
            progress(len(some))

        for image, pixels in decoded(self.images, numbers, self.method, self.workers):
            if pixels is None:
                progress(1)
                continue
            alike = waiting.setdefault(pixels.shape, [])
            alike.append((image, pixels))
            if len(alike) == self.batch:
                finish(waiting.pop(pixels.shape))
        for alike in waiting.values():
            finish(alike)
        return Block(numbers.start, features, readable)


def decoded(
    images: ImageSet, numbers: Sequence[int], method: Method, workers: int
) -> Iterator[tuple[int, NDArray[np.uint8] | None]]:
    """(number, pixels) of images in order; None for one that cannot be read. Threads read and decode ahead."""

    def one(number: int) -> NDArray[np.uint8] | None:
        try:
            return method.pixels(images.read(number))
        except Unreadable:
            return None

    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # Bombs and damaged metadata are judged by the decoder, so nothing is left to warn of. The filters are the whole
        # process's, so they are set here, before the threads start, and set back when all have ended.
        warnings.simplefilter("ignore")
        ahead: deque[tuple[int, Future[NDArray[np.uint8] | None]]] = deque()
        try:
            for number in numbers:
                ahead.append((number, pool.submit(one, number)))
                if len(ahead) == 4 * workers:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def digest_of(identity: Any) -> str:
    """SHA-256 of something that is JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
