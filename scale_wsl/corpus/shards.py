"""Labelled images on disk: tar shards in WebDataset's layout, an index beside each, and a manifest over all.

Must never believe a folder before its sizes, hashes and bounds are checked. `writing` makes what is read here.

A data set is a folder:

    manifest.json      what it is, and size and SHA-256 of every other file
    vocabulary.json    what the label ids mean
    000000.tar         `key.png` (or jpg, webp, gif, bmp) and `key.json` of each image, which any tar reader can stream
    000000.parquet     key, extension, offset, length and labels of each image: where its bytes are in the tar
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.naming import ROLES, DatasetName
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Vocabulary

__all__ = ["FORMAT", "HEADER", "VERSION", "Dataset", "file_entry", "find_dataset", "index_schema"]

FORMAT = "scale_wsl data set"
VERSION = 1
HEADER = 512  # bytes of a tar member's header
_MOST_HANDLES = 64  # shards that a process holds open at a time
_LARGEST_MANIFEST = 1 << 30  # bytes


def index_schema() -> Any:
    """The columns of a shard's index."""
    import pyarrow as pa

    columns = {"key": pa.string(), "extension": pa.string(), "offset": pa.int64(), "length": pa.int64()}
    return pa.schema([*columns.items(), ("labels", pa.list_(pa.int32()))])


def file_entry(path: Path) -> dict[str, Any]:
    """A file's name, size in bytes and SHA-256, as a manifest holds them."""
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


class Dataset:
    """A data set folder, checked when it is opened; reads any image by its number without parsing a tar.

    Needs about 40 bytes of memory for each image and 4 for each label. A pickled copy is a path: it opens the folder
    again where it is unpickled, and refuses it if it has changed. Threads may share one.

    Attributes:
        folder: Where it is.
        name: Its `DatasetName` with the exact counts.
        manifest: What manifest.json says.
        manifest_hash: SHA-256 of the bytes of manifest.json: equal contents, equal hash.
        vocabulary: What the label ids mean.
        keys: `[N]` text.
        extensions: `[N]` text: png, jpg, webp, gif or bmp.
        shard: `[N]` int32, offset and length `[N]` int64: bytes `offset:offset + length` of that shard are the image.
        label_ids: `[total]` int32, the labels of image 0, ascending, then of image 1, ...
        label_start: `[N + 1]` int64; the labels of image i are `label_ids[label_start[i]:label_start[i + 1]]`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], manifest_hash: str, vocabulary: Vocabulary) -> None:
        self.folder = folder
        self.manifest = manifest
        self.manifest_hash = manifest_hash
        self.vocabulary = vocabulary
        self.name = DatasetName(manifest["role"], manifest["source"], manifest["images"], manifest["labels"])
        columns = [_read_index(folder, shard, len(vocabulary)) for shard in manifest["shards"]]
        records = [shard["records"] for shard in manifest["shards"]]
        self.keys, self.extensions, self.offset, self.length, k, self.label_ids = (
            np.concatenate(column) for column in zip(*columns, strict=True)
        )
        self.shard: NDArray[np.int32] = np.repeat(np.arange(len(records), dtype=np.int32), records)
        self.label_start: NDArray[np.int64] = np.concatenate(([0], np.cumsum(k, dtype=np.int64)))
        self.max_labels = int(k.max())
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Open a data set, checking its version, its hashes and the size of every file; `verify` reads them all.

        Raises:
            UserError: The folder is no data set, is of another version, or is damaged or incomplete.
        """
        folder = Path(folder)
        manifest, manifest_hash = _read_manifest(folder)
        _check_size(folder, manifest["vocabulary"])
        for shard in manifest["shards"]:
            _check_size(folder, shard["tar"])
            _check_size(folder, shard["index"])
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        if vocabulary.hash != manifest["vocabulary_hash"] or len(vocabulary) != manifest["labels"]:
            raise UserError(
                f"{folder / 'vocabulary.json'} is another vocabulary ({vocabulary.hash[:12]}) than the one that the "
                f"shards were labelled with ({manifest['vocabulary_hash'][:12]}): put back the original"
            )
        return cls(folder, manifest, manifest_hash, vocabulary)

    def __len__(self) -> int:
        return len(self.length)

    def __reduce__(self) -> Any:
        return _reopen, (self.folder, self.manifest_hash)

    @property
    def vocabulary_hash(self) -> str:
        """The vocabulary's hash, which is also the manifest's."""
        return self.vocabulary.hash

    def labels(self, i: int) -> NDArray[np.int32]:
        """The labels `[k]` of image i, ascending; at least one."""
        return self.label_ids[self.label_start[i] : self.label_start[i + 1]]

    def read(self, i: int) -> bytes:
        """The bytes of image i's file, by one positioned read.

        Raises:
            UserError: The shard has become shorter, or is gone.
        """
        number, offset, length = int(self.shard[i]), int(self.offset[i]), int(self.length[i])
        with self._lock:  # or another thread could close the handle in between
            data = os.pread(self._handle(number), length, offset)
        if len(data) != length:
            raise UserError(f"{self._tar(number)} has become shorter than its index says: restore the data set")
        return data

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest: reads the whole data set.

        Raises:
            UserError: A file's contents differ.
        """
        shards = self.manifest["shards"]
        for entry in (self.manifest["vocabulary"], *(shard[kind] for shard in shards for kind in ("tar", "index"))):
            _check_size(self.folder, entry)
            if file_entry(self.folder / entry["file"])["sha256"] != entry["sha256"]:
                raise UserError(f"{self.folder / entry['file']} is damaged: its SHA-256 is not the manifest's")

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def _tar(self, number: int) -> Path:
        return self.folder / f"{number:06d}.tar"

    def _handle(self, number: int) -> int:
        if number not in self._handles:
            if len(self._handles) == _MOST_HANDLES:
                os.close(self._handles.popitem(last=False)[1])
            try:
                self._handles[number] = os.open(self._tar(number), os.O_RDONLY)
            except OSError as error:
                raise UserError(f"cannot read the shard {self._tar(number)}: {error.strerror}") from None
        self._handles.move_to_end(number)
        return self._handles[number]


def find_dataset(out: str | Path, role: str) -> Path:
    """The folder of the data set with this role (train, val, test) in a folder that `prepare` made.

    Raises:
        UserError: There is none, or more than one.
    """
    found = sorted(manifest.parent for manifest in Path(out).glob(f"{role}-*/manifest.json"))
    if len(found) != 1:
        raise UserError(
            f"there are {len(found)} data sets of the role {role} in {out}, which must hold exactly one: "
            "name the folder itself"
            if found
            else f"there is no data set of the role {role} in {out}: prepare one with scale-wsl prepare"
        )
    return found[0]


def _reopen(folder: Path, manifest_hash: str) -> Dataset:
    dataset = Dataset.open(folder)
    if dataset.manifest_hash != manifest_hash:
        raise UserError(f"the data set {folder} was replaced by another one while it was in use")
    return dataset


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / "manifest.json"
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise UserError(f"{path} is larger than 1 GiB, which no manifest is")
        content = path.read_bytes()
    except OSError as error:
        what = "there is no data set" if isinstance(error, FileNotFoundError) else "the data set cannot be read"
        raise UserError(f"{what} in {folder} (manifest.json: {error.strerror}): see scale-wsl prepare") from None
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not valid JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f'{path} is no data set\'s manifest: it does not say "format": "{FORMAT}"')
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{folder} has version {manifest.get('version')!r} of the data set format, where this release reads "
            f"{VERSION}: prepare it again"
        )
    if not _is_manifest(manifest):
        raise UserError(f"{path} is damaged: its entries are missing, of a wrong type, or contradict each other")
    return manifest, hashlib.sha256(content).hexdigest()


def _is_manifest(manifest: dict[str, Any]) -> bool:
    texts = [manifest.get(key) for key in ("name", "source", "vocabulary_hash")]
    shards = manifest.get("shards")
    if not all(isinstance(text, str) for text in texts) or manifest.get("role") not in ROLES:
        return False
    if not isinstance(shards, list) or not _is_entry(manifest.get("vocabulary"), "vocabulary.json"):
        return False
    for number, shard in enumerate(shards):
        if not isinstance(shard, dict) or not _is_count(shard.get("records")) or not shard["records"]:
            return False
        if not _is_entry(shard.get("tar"), f"{number:06d}.tar") or not _is_entry(
            shard.get("index"), f"{number:06d}.parquet"
        ):
            return False
    images = sum(shard["records"] for shard in shards)
    return _is_count(manifest.get("labels")) and images > 0 and manifest.get("images") == images


def _is_entry(entry: Any, file: str) -> bool:
    # The names are fixed, so no manifest can lead out of its folder.
    return (
        isinstance(entry, dict)
        and entry.get("file") == file
        and _is_count(entry.get("bytes"))
        and isinstance(entry.get("sha256"), str)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_size(folder: Path, entry: Mapping[str, Any]) -> None:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path} is missing: the data set is incomplete; copy it again or prepare it again") from None
    if size != entry["bytes"]:
        raise UserError(
            f"{path} has {size:,} bytes where the manifest says {entry['bytes']:,}: copy it again or prepare it again"
        )


def _read_index(folder: Path, shard: Mapping[str, Any], labels: int) -> tuple[NDArray[Any], ...]:
    """Keys, extensions, offsets, lengths, numbers of labels, and labels of one shard's images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / shard["index"]["file"]
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            # Before anything is unpacked: a small file may claim any number of rows.
            rows = file.metadata.num_rows
            if file.schema_arrow.remove_metadata() != index_schema() or rows != shard["records"]:
                raise UserError(f"{path} is no index of this data set: it has other columns or another number of rows")
            table = file.read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no index that can be read: {' '.join(str(error).split())[:200]}") from None
    table = table.combine_chunks()
    keys, extensions, offset, length, ids = (table.column(name).chunk(0) for name in table.column_names)
    flat = ids.flatten()
    if any(column.null_count for column in (keys, extensions, offset, length, ids, flat)):
        raise UserError(f"{path} is damaged: it has empty cells")
    text = np.dtypes.StringDType()
    offset, length, flat = (column.to_numpy(zero_copy_only=False) for column in (offset, length, flat))
    k = np.diff(ids.offsets.to_numpy(zero_copy_only=False))
    rising = np.ones(len(flat), np.bool_)
    rising[1:] = np.diff(flat) > 0
    if k.min() >= 1:
        rising[np.cumsum(k)[:-1]] = True  # where another image begins, its labels start anew
    if not (
        k.min() >= 1
        and rising.all()
        and flat.min() >= 0
        and flat.max() < labels
        and offset.min() >= HEADER
        and length.min() >= 0
        and max(offset.max(), length.max()) <= shard["tar"]["bytes"]  # each, or their sum could overflow
        and (offset + length).max() <= shard["tar"]["bytes"]
    ):
        raise UserError(f"{path} is damaged: it points outside its shard, or its labels outside the vocabulary")
    return np.array(keys.to_pylist(), text), np.array(extensions.to_pylist(), text), offset, length, k, flat
