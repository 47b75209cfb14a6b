"""From a source of posts to a training and a validation data set, in one folder that appears at once or not at all.

Must never leave a half-made data set under its final name, let the two share an image or a near-identical one, or
choose the vocabulary by a look at the validation images.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

import scale_wsl
from scale_wsl.corpus.dedup import clusters, split
from scale_wsl.corpus.gather import Gathered, Record, gather
from scale_wsl.corpus.images import LARGEST_MAX_PIXELS
from scale_wsl.corpus.labels import label_ids
from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.posts import Source
from scale_wsl.corpus.shards import Dataset, ShardWriter
from scale_wsl.errors import UserError
from scale_wsl.files import published_folder, sync_folder
from scale_wsl.hashtags import Vocabulary, VocabularyRule, WordNet
from scale_wsl.randomness import generator
from scale_wsl.recipe import setting

__all__ = ["PrepareConfig", "Prepared", "prepare"]

FORMAT = "scale_wsl preparation"
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How posts become data sets. All but `workers` is recorded: the same settings give the same bytes."""

    min_count: int = setting(5, "Training images that a canonical hashtag must be on to become a label.")
    size: int | None = setting(None, "Keep only so many labels, the most frequent ones; null: all.")
    validation_share: float = setting(0.15, "Share of the images that goes to the validation split.")
    seed: int = setting(0, "Of the split and of the order within the shards.")
    records_per_shard: int = setting(1000, "Images in a shard.")
    max_pixels: int = setting(25_000_000, "Images of more pixels are dropped.")
    max_bytes: int = setting(64 << 20, "Image files of more bytes are dropped.")
    workers: int | None = setting(None, "Threads that decode images; null: one for each core.")

    def __post_init__(self) -> None:
        for key, good, right in (
            ("min_count", self.min_count >= 1, "at least 1"),
            ("size", self.size is None or self.size >= 1, "at least 1"),
            ("validation_share", 0 < self.validation_share < 1, "above 0 and below 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("records_per_shard", 1 <= self.records_per_shard <= 1_000_000, "between 1 and 1,000,000"),
            ("max_pixels", 1 <= self.max_pixels <= LARGEST_MAX_PIXELS, f"between 1 and {LARGEST_MAX_PIXELS:,}"),
            ("max_bytes", 1 <= self.max_bytes <= 1 << 32, f"between 1 and {1 << 32:,}"),
            ("workers", self.workers is None or self.workers >= 1, "at least 1"),
        ):
            if not good:
                raise UserError(f"{key} is {getattr(self, key)}, but must be {right}")

    def recorded(self) -> dict[str, Any]:
        """What decides the contents of the data sets."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "workers"}


@dataclass(frozen=True)
class Prepared:
    """Two data sets, and how they came about."""

    train: Path
    validation: Path
    reused: bool
    """They were there already."""
    report: Mapping[str, Any]
    """Counts of everything that was read, kept, merged and dropped, as in prepared.json."""
    images_compared: bool = True
    """That they are reused means that no image file was changed either."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        report = self.report
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in report["dropped"].items())
        near = report["near_identical"]
        lines = [
            f"{report['posts']:,} posts; dropped: {dropped or 'none'}; {report['copies']:,} exact copies merged",
            f"{near['images']:,} images are near-identical to others, or variants, in {near['clusters']:,} clusters"
            + (f", the largest of {near['largest']:,}" if near["clusters"] else ""),
            f"{report['vocabulary']['entries']:,} labels, {report['vocabulary']['ambiguous']:,} of them ambiguous; the "
            f"most frequent: {', '.join(report['vocabulary']['most_frequent'][:8])}",
        ]
        for path, role in ((self.train, "train"), (self.validation, "val")):
            side = report[role]
            lines.append(f"{path}: {side['images']:,} images, {side['labels_per_image']:.2f} labels each")
        if self.reused and not self.images_compared:
            lines.append("the image files were not compared with those of then: --overwrite prepares them anew")
        return "\n".join(lines)


def prepare(
    source: Source, out: str | Path, config: PrepareConfig | None = None, *, overwrite: bool = False
) -> Prepared:
    """Prepare a source into `out`: `train-<source>-I-L/`, `val-<source>-I-L/` and prepared.json.

    Does nothing where `out` already holds just this. Of several processes that want the same `out`, one works and the
    others wait for it. What dead runs left aside is removed, or put in place where it is whole and `out` is gone.

    Args:
        source: Where the posts come from.
        out: The folder to make; its parents are made too.
        config: How; the defaults when None.
        overwrite: Replace what `out` holds, which must be the result of an earlier preparation.

    Raises:
        UserError: The source cannot be read, `out` holds something else, or no image or no label is left.
    """
    config = config or PrepareConfig()
    DatasetName("train", source.name, 0, 0)  # a name that is none is refused before the work, not after
    out = _resolved(out)
    recipe = _recipe(source, config)
    lock = _locked(out)
    try:
        _remove_leftovers(out)
        if (found := _existing(out, recipe, overwrite)) is not None:
            return dataclasses.replace(found, images_compared=source.compares_images)
        replacement = out.with_name(f".{out.name}.new.part")  # of what is there; published whole, then moved
        with published_folder(replacement if out.exists() else out) as aside:
            _fill(aside, source, config, recipe)
        if replacement.exists():
            _replace(out, replacement)
        prepared = _existing(out, recipe, overwrite=False)
        assert prepared is not None
        return dataclasses.replace(prepared, reused=False)
    finally:
        lock.release()


def _recipe(source: Source, config: PrepareConfig) -> dict[str, Any]:
    """All that the data sets follow from, as it will be read back from JSON."""
    recipe = {
        "source": source.name,
        "licence": source.licence,
        "attribution": source.attribution,
        "stop": source.stop,
        "fingerprint": dict(source.fingerprint()),
        "settings": config.recorded(),
    }
    parsed: dict[str, Any] = json.loads(json.dumps(recipe))
    return parsed


# --- the folder ----------------------------------------------------------------------------------------------------


def _resolved(out: str | Path) -> Path:
    """Where links lead: they stay, and the folder that they name is what is made, locked and replaced."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a ring
        raise UserError(f"{out} is no place for a folder: its links cannot be followed") from None


def _locked(out: Path) -> FileLock:
    """The lock of `out`, held: of several processes one goes on, and the others wait here."""
    path = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))  # FileLock would wait for some errors to pass
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is preparing {out}: waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write into {out.parent}: {error.strerror}") from None
    return lock


def _replace(out: Path, replacement: Path) -> None:
    old = out.with_name(f".{out.name}.old.part")
    os.rename(out, old)  # a crash here leaves no `out`: the next run puts the replacement in its place
    os.rename(replacement, out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Folders that a run made aside and did not live to publish; holding the lock says that none is at work.

    A crash between the two renames of `_replace` left no `out`, but two whole ones: the replacement takes its place.
    """
    for whole in (out.with_name(f".{out.name}.new.part"), out.with_name(f".{out.name}.old.part")):
        if whole.exists() and not out.exists():
            os.rename(whole, out)
            sync_folder(out.parent)
    name = re.escape(out.name)
    aside = re.compile(rf"\.{name}\.([0-9a-f]{{8}}|new|old)\.part|\.\.{name}\.new\.part\.[0-9a-f]{{8}}\.part")
    for path in out.parent.iterdir():
        if aside.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _existing(out: Path, recipe: Mapping[str, Any], overwrite: bool) -> Prepared | None:
    """What `out` holds, if it is this preparation whole; None where it is free to be written."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder")
    if not any(out.iterdir()):
        out.rmdir()
        return None
    try:
        prepared = json.loads((out / "prepared.json").read_bytes())
        is_ours, version = prepared["format"] == FORMAT, prepared["version"]
        if is_ours and version == VERSION:
            same = {key: prepared["recipe"].get(key) for key in recipe}
            train, validation = out / prepared["train"], out / prepared["validation"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{out} is not empty and was not made by scale-wsl prepare: choose another folder")
    if overwrite:
        return None
    if version != VERSION:
        raise UserError(
            f"{out} holds a preparation of version {version!r}, where this release makes {VERSION}: "
            "choose another folder, or replace it with --overwrite"
        )
    if same != recipe:
        changed = ", ".join(_differences(same, recipe))
        raise UserError(
            f"{out} holds another preparation (different: {changed}): choose another folder, or replace it "
            "with --overwrite"
        )
    for path in (train, validation):
        Dataset.open(path).close()
    return Prepared(train, validation, True, prepared["report"])


def _differences(there: Any, wanted: Any, prefix: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        keys = sorted(there.keys() | wanted.keys())
        return [found for key in keys for found in _differences(there.get(key), wanted.get(key), f"{prefix}.{key}")]
    return [] if there == wanted else [prefix.removeprefix(".")]


# --- the contents --------------------------------------------------------------------------------------------------


def _fill(folder: Path, source: Source, config: PrepareConfig, recipe: Mapping[str, Any]) -> None:
    started = time.monotonic()
    workers = config.workers or _cores()
    spool = folder / "spool"
    gathered = gather(source, spool, max_pixels=config.max_pixels, max_bytes=config.max_bytes, workers=workers)
    records = gathered.records
    if not records:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in gathered.dropped.items()) or "no post"
        raise UserError(f"the source {source.name} gave no usable image ({reasons})")

    cluster = clusters(gathered.thumbnails, [record.groups for record in records])
    chosen = split(cluster, [record.key for record in records], config.validation_share, config.seed)
    sides = {
        "train": [record for record, other in zip(records, chosen, strict=True) if not other],
        "val": [record for record, other in zip(records, chosen, strict=True) if other],
    }
    wordnet = WordNet.load()
    vocabulary, counted = Vocabulary.build(
        (record.normalised for record in sides["train"]),
        wordnet,
        VocabularyRule(stop=source.stop),
        min_count=config.min_count,
        size=config.size,
    )
    if not vocabulary.entries:
        raise UserError(
            f"no hashtag that WordNet knows is on {config.min_count} of the {len(sides['train']):,} training images "
            "or more (min_count)"
        )
    facts = {"licence": source.licence, "attribution": source.attribution, "prepared_with": recipe["settings"]}
    names, figures = {}, {}
    for role, side in sides.items():
        labelled = (
            (record, label_ids(record.normalised, vocabulary, wordnet)) for record in _order(side, role, config)
        )
        names[role], figures[role] = _write(folder, role, labelled, gathered, vocabulary, source.name, config, facts)
    spool.unlink()

    sizes = np.bincount(cluster)
    report = {
        "posts": gathered.posts,
        "copies": gathered.copies,
        "dropped": dict(gathered.dropped.most_common()),
        "examples": gathered.examples,
        "dropped_hashtags": dict(gathered.dropped_hashtags.most_common()),
        "near_identical": {
            "clusters": int((sizes > 1).sum()),
            "largest": int(sizes.max()),
            "images": int(sizes[sizes > 1].sum()),
        },
        "vocabulary": {
            "entries": counted.entries,
            "ambiguous": counted.ambiguous,
            "merged_hashtags": sum(map(len, counted.merged.values())),
            "most_frequent": [entry.hashtag for entry in vocabulary.entries[:20]],
            "dropped_hashtags": {reason: len(hashtags) for reason, hashtags in counted.dropped.items()},
        },
        **figures,
        "seconds": round(time.monotonic() - started, 1),
    }
    prepared = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "scale_wsl": scale_wsl.__version__,
        "train": str(names["train"]),
        "validation": str(names["val"]),
        "recipe": recipe,
        "report": report,
    }
    (folder / "prepared.json").write_text(json.dumps(prepared, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _order(records: Sequence[Record], role: str, config: PrepareConfig) -> list[Record]:
    """The order of the records in the shards, which depends on their keys and the seed alone."""
    ordered = sorted(records, key=lambda record: record.key)
    return [ordered[i] for i in generator("shards", role, config.seed).permutation(len(ordered)).tolist()]


def _write(
    folder: Path,
    role: str,
    records: Iterable[tuple[Record, NDArray[np.int32]]],
    gathered: Gathered,
    vocabulary: Vocabulary,
    source: str,
    config: PrepareConfig,
    facts: Mapping[str, Any],
) -> tuple[DatasetName, dict[str, Any]]:
    """Write those of `records` that have labels as a data set, in the order given."""
    unfinished = folder / role
    unfinished.mkdir()
    labels_per_image: Counter[int] = Counter()
    with ShardWriter(unfinished, vocabulary, records_per_shard=config.records_per_shard) as writer:
        for record, labels in tqdm(records, f"{role}: shards", unit=" images", disable=None):
            if len(labels):
                writer.add(record.key, record.extension, gathered.read(record), record.hashtags, labels)
                labels_per_image[len(labels)] += 1
            else:
                gathered.drop("no label in the vocabulary", record.key)
        if not labels_per_image:
            raise UserError(
                f"no image is left for the {role} split of {source}: take a larger source, a larger validation_share "
                "or a smaller min_count"
            )
        name = writer.close(role, source, facts)
    os.rename(unfinished, folder / str(name))
    images = labels_per_image.total()
    pairs = sum(k * number for k, number in labels_per_image.items())
    return name, {"images": images, "labels_per_image": round(pairs / images, 3), "most_labels": max(labels_per_image)}
