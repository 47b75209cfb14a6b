"""Data sets for tests, from records in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.writing import Record, write_manifest, write_shard
from scale_wsl.hashtags import Vocabulary


def write_dataset(
    folder: Path,
    records: Sequence[Record],
    vocabulary: Vocabulary,
    *,
    records_per_shard: int,
    role: str = "train",
    source: str = "toy",
    facts: Mapping[str, Any] | None = None,
) -> DatasetName:
    """Write records as a data set into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [records[start : start + records_per_shard] for start in range(0, len(records), records_per_shard)]
    shards = [write_shard(folder, number, part, vocabulary) for number, part in enumerate(parts)]
    return write_manifest(folder, role, source, vocabulary, shards, facts or {"licence": "none"})
