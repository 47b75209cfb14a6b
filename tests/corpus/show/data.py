"""Small data sets for the page, ordinary and hostile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scale_wsl.hashtags import Entry, Vocabulary
from tests.corpus.toy import noise
from tests.corpus.writing import write_dataset
from tests.loading.fakes import encode

BEAR, CAT, SEAL = "n02132136", "n02121620", "n02076779"
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"'><svg/onload=alert(3)>",
    "]]>--><!--&lt;&#x3c;",
    "\x00\x07\x1b[31m\x7f",
    "\u202egnp.exe\u2066\u200f",
    "\ud800 half",
    "👩\u200d👩\u200d👧\u200d👦🏽",
    "javascript:alert(4)",
    "http://example.invalid/x.png",
    "\u2028\u2029</style>",
    "x" * 10_000,
)


def vocabulary(names: Sequence[str] = ("brownbear", "cat", "seal")) -> Vocabulary:
    """Three labels: one with two spellings, one ambiguous."""
    first, second, third = names
    return Vocabulary(
        (
            Entry(first, (first, "ursusarctos"), (BEAR,), 30),
            Entry(second, (second,), (CAT,), 20),
            Entry(third, (third,), tuple(sorted((SEAL, "n03058603"))), 10),
        )
    )


def write(folder: Path, rows: Sequence[Sequence[int]], words: Vocabulary, *, role: str = "train", **facts: Any) -> Path:
    """A data set of noise images with these labels; image 3 is damaged."""
    records = [
        (f"{role}{number}", "png", encode(noise(number)) if number != 3 else b"no image", (), row)
        for number, row in enumerate(rows)
    ]
    told = {"licence": "CC0-1.0", "attribution": "somebody"} | facts
    name = write_dataset(folder, records, words, records_per_shard=25, role=role, facts=told)
    return folder.rename(folder.with_name(str(name)))


def rows(number: int, labels: int = 3, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [sorted(rng.choice(labels, rng.integers(1, labels + 1), replace=False).tolist()) for _ in range(number)]


def hostile(folder: Path) -> Path:
    """A folder as `prepare` leaves it, in which every text that may be anything is out to harm."""
    words = vocabulary(("שלוםעולם", "猫", "x" * 100))
    evil = "".join(HOSTILE[:-1])
    train = write(folder / "a", rows(40), words)
    validation = write(folder / "b", rows(20, seed=1), words, role="val")
    change_keys(train, [HOSTILE[number % len(HOSTILE)].encode("utf-8", "replace").decode() for number in range(25)])
    for dataset in (train, validation):
        facts = {"licence": evil, "attribution": HOSTILE[-1] + evil, "prepared_with": {"max_pixels": evil}}
        manifest = json.loads((dataset / "manifest.json").read_text()) | facts
        (dataset / "manifest.json").write_text(json.dumps(manifest))  # in ASCII, or half a pair could not be written
    reasons = dict.fromkeys(HOSTILE, 7)
    report = {
        "posts": 99,
        "copies": 3,
        "dropped": reasons,
        "examples": {text: [f"{text}: {text}"] * 3 for text in HOSTILE},
        "dropped_hashtags": reasons,
        "near_identical": {"clusters": 1, HOSTILE[0]: 2},
        "vocabulary": {"dropped_hashtags": reasons},
    }
    recipe = {"settings": {text: text for text in HOSTILE}, "stop": list(HOSTILE), "fingerprint": {evil: evil}}
    prepared = {
        "format": "scale_wsl preparation",
        "version": 2,
        "created": "2026-01-01",
        "recipe": recipe,
        "report": report,
    }
    (folder / "prepared.json").write_text(json.dumps(prepared))
    dropped = {text: dict.fromkeys(HOSTILE, 5) for text in HOSTILE}
    told = {"merged": {words.entries[0].hashtag: {"ursusarctos": 4}}, "dropped": dropped, "coverage": {HOSTILE[0]: 0.5}}
    (folder / "vocabulary.report.json").write_text(json.dumps(told))
    texts = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    pq.write_table(pa.table({"key": texts, "reason": texts, "detail": texts}), folder / "rejects.parquet")
    return folder


def change_keys(dataset: Path, keys: Sequence[str]) -> None:
    """Put other keys into the first shard's index, and what follows from that into the manifest."""
    index = dataset / "000000.parquet"
    table = pq.read_table(index)
    pq.write_table(table.set_column(0, table.schema.field(0), pa.array(keys, pa.string())), index)
    manifest = json.loads((dataset / "manifest.json").read_text())
    content = index.read_bytes()
    manifest["shards"][0]["index"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (dataset / "manifest.json").write_text(json.dumps(manifest))
