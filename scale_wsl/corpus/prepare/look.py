"""The second stage: fetches the images of a chunk of posts and looks at each once.

Must never keep an image: what is remembered is a hash, a thumbnail and a format, or why it is refused.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from scale_wsl.corpus.fetch import fetch
from scale_wsl.corpus.images import SIDE, Look, RefusedImage, look
from scale_wsl.corpus.prepare.work import Chunk, Work
from scale_wsl.corpus.sources.files import is_remote
from scale_wsl.files import published_file

__all__ = ["Looker"]

_AT_ONCE = 16  # images of an object store that are asked for at a time


@dataclass(frozen=True)
class Looker:
    """Looks at a chunk's images; picklable.

    The result has a row for each post of the chunk: `key_hash` (16 bytes), `sha256` (32), `thumbnail` (SIDE * SIDE),
    `extension`, `reason` and `detail`; the reason is null for an image that can be used, else all but it is empty.
    """

    work: Work
    max_pixels: int
    max_bytes: int

    def __call__(self, chunk: Chunk) -> None:
        """Publish what was seen of a chunk's images."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        posts = self.work.posts(chunk, ["key", "path", "offset", "length"]).to_pydict()
        keys = [hashlib.sha256(key.encode()).digest()[:16] for key in posts.pop("key")]
        rows: list[tuple[Any, ...]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs and damaged metadata are judged by `look`
            for outcome in self._outcomes(list(zip(*posts.values(), strict=True))):
                if isinstance(outcome, RefusedImage):
                    detail = outcome.detail.encode("utf-8", "replace").decode()
                    rows.append((bytes(32), bytes(SIDE * SIDE), "", outcome.reason, detail))
                else:
                    digest, seen = outcome
                    rows.append((digest, seen.thumbnail.tobytes(), seen.extension, None, None))
        kinds = (pa.binary(32), pa.binary(SIDE * SIDE), pa.string(), pa.string(), pa.string())
        names = ("sha256", "thumbnail", "extension", "reason", "detail")
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
        table = pa.table([pa.array(keys, pa.binary(16)), *columns], names=["key_hash", *names])
        with published_file(self.work.looked(chunk)) as aside:
            pq.write_table(table, aside, compression="zstd", use_dictionary=["extension", "reason"])

    def _outcomes(self, places: list[tuple[Any, ...]]) -> Iterator[tuple[bytes, Look] | RefusedImage]:
        if any(is_remote(path.decode("utf-8", "replace")) for path, *_ in places):
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                yield from pool.map(self._outcome, places)
        else:
            yield from map(self._outcome, places)

    def _outcome(self, place: tuple[Any, ...]) -> tuple[bytes, Look] | RefusedImage:
        try:
            path, offset, length = place
            data = fetch(path, offset, length, self.max_bytes)
            return hashlib.sha256(data).digest(), look(data, self.max_pixels)
        except RefusedImage as refused:
            return refused
