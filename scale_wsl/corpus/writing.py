"""Writes labelled images as a data set: each shard on its own, in any order and by any process, then the manifest.

Must never re-encode an image, and never write anything that depends on when or where it is written: equal contents give
equal bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.shards import FORMAT, HEADER, VERSION, file_entry, index_schema
from scale_wsl.files import published_file
from scale_wsl.hashtags import Vocabulary

__all__ = ["Record", "write_manifest", "write_shard"]

Record = tuple[str, str, bytes, Sequence[str], Sequence[int]]
"""Key, extension, the image's file as it is, hashtags as typed, and labels, ascending and at least one."""


def write_shard(folder: Path, number: int, records: Iterable[Record], vocabulary: Vocabulary) -> dict[str, Any]:
    """Write shard `number` of a data set, a tar and its index, each published by a rename.

    Args:
        folder: Of the data set; it is there.
        number: The shard's.
        records: At least one.
        vocabulary: What the labels mean.

    Returns:
        What `write_manifest` needs to know of it, as JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[tuple[str, str, int, int, list[int]]] = []
    labels_per_image: Counter[int] = Counter()
    tar, index = folder / f"{number:06d}.tar", folder / f"{number:06d}.parquet"
    with published_file(tar) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, extension, image, hashtags, labels in records:
            ids = list(labels)
            names = [vocabulary.entries[label].hashtag for label in ids]
            facts = {"hashtags": list(hashtags), "labels": ids, "label_names": names}
            offset = _add_member(archive, f"{key}.{extension}", image)
            _add_member(archive, f"{key}.json", json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace"))
            rows.append((key, extension, offset, len(image), ids))
            labels_per_image[len(ids)] += 1
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=index_schema())
    with published_file(index) as aside:
        pq.write_table(table, aside, compression="zstd")
    entry = {"records": len(rows), "tar": file_entry(tar), "index": file_entry(index)}
    return {"shard": entry, "labels_per_image": {str(k): labels_per_image[k] for k in sorted(labels_per_image)}}


def write_manifest(
    folder: Path,
    role: str,
    source: str,
    vocabulary: Vocabulary,
    shards: Iterable[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> DatasetName:
    """Complete a data set, which is none before.

    Args:
        folder: That the shards were written into.
        role: One of `naming.ROLES`.
        source: Of the posts.
        vocabulary: What the labels mean.
        shards: What `write_shard` gave for each, in order.
        facts: What else the manifest is to say (licence, settings: nothing that varies).
    """
    vocabulary.save(folder / "vocabulary.json")
    entries, labels_per_image = [], Counter[int]()
    for shard in shards:
        entries.append(shard["shard"])
        labels_per_image.update({int(k): number for k, number in shard["labels_per_image"].items()})
    images = sum(entry["records"] for entry in entries)
    name = DatasetName(role, source, images, len(vocabulary))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": str(name),
        "role": role,
        "source": source,
        "images": images,
        "labels": len(vocabulary),
        "labels_per_image": {str(k): labels_per_image[k] for k in sorted(labels_per_image)},
        "vocabulary_hash": vocabulary.hash,
        "vocabulary": file_entry(folder / "vocabulary.json"),
        **facts,
        "shards": entries,
    }
    with published_file(folder / "manifest.json") as aside:
        aside.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return name


def _add_member(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a file with nothing of its origin; returns where its contents start."""
    member = tarfile.TarInfo(name)  # time 0, owner 0 without a name, mode 0644
    member.size = len(content)
    offset = archive.offset + HEADER
    archive.addfile(member, io.BytesIO(content))
    return offset
