"""From a source of posts to a training and a validation data set, in one folder that appears at once or not at all.

Must never leave a half-made data set under its final name, let the two share an image or a near-identical one, or
choose the vocabulary by a look at the validation images.

The stages, each many tasks that any process or machine may do, in any order, and as often as it must:

    scan     posts of a split -> those with a hashtag that could get a place; counts; rejects
    look     images of a chunk of posts -> hash, thumbnail, or why it is refused
    choose   exact copies, near-identical images, which side (here)
    count    hashtags of the training posts -> the vocabulary (here)
    deal     posts of a span -> labelled, in their final order
    write    shards
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import scale_wsl
from scale_wsl.corpus.execution import Workers, refuse_import, run_stage
from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.posts import Source
from scale_wsl.corpus.prepare import choose
from scale_wsl.corpus.prepare.config import PrepareConfig
from scale_wsl.corpus.prepare.deal import ROLES, Dealer, SpanCounter
from scale_wsl.corpus.prepare.look import Looker
from scale_wsl.corpus.prepare.publish import FORMAT, VERSION, Place, Prepared
from scale_wsl.corpus.prepare.scan import Scanner, ScanReport, read_scans
from scale_wsl.corpus.prepare.tables import write_rejects
from scale_wsl.corpus.prepare.work import Chunk, Span, Work, chunks_of, spans_of
from scale_wsl.corpus.prepare.write import Writer, dealt_facts, shard_tasks
from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.writing import write_manifest
from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags import Vocabulary, WordNet
from scale_wsl.hashtags.counts import HashtagCounts
from scale_wsl.hashtags.report import VocabularyReport
from scale_wsl.hashtags.rules import VocabularyRule

__all__ = ["PrepareConfig", "Prepared", "prepare"]

_WORK_VERSION = 1  # of what is kept between two tries
_MOST_COMPARED = 50_000  # images of which every pair is compared unless something else is asked for


def prepare(
    source: Source,
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    workers: Workers | None = None,
    overwrite: bool = False,
) -> Prepared:
    """Prepare a source into `out`: `train-<source>-I-L/`, `val-<source>-I-L/`, rejects.parquet and prepared.json.

    Does nothing where `out` already holds just this. Of several processes that want the same `out`, one works and the
    others wait for it. What a run that was killed had done is gone on with; it lies beside `out`, in `.<out>.work`.

    Args:
        source: Where the posts come from.
        out: The folder to make; its parents are made too.
        config: How; the defaults when None.
        workers: Who does the work; the processes of this machine when None. Not recorded: the result is the same.
        overwrite: Replace what `out` holds, which must be the result of an earlier preparation.

    Raises:
        UserError: The source cannot be read, `out` holds something else, or no image or no label is left.
    """
    refuse_import()
    config, workers = config or PrepareConfig(), workers or Workers()
    DatasetName("train", source.name, 0, 0)  # a name that is none is refused before the work, not after
    rule = Vocabulary.load(config.vocabulary) if config.is_file else config.rule(source.stop)
    with Place(out) as place:
        recipe = _recipe(source, config, rule)
        if (found := place.existing(recipe, overwrite=overwrite)) is not None:
            place.remove_work()
            return replace(found, images_compared=source.compares_images)
        limits = {"max_pixels": config.max_pixels, "max_bytes": config.max_bytes, "work": _WORK_VERSION}
        read = {"source": [source.name, recipe["fingerprint"]], "rule": recipe["rule"], **limits}
        work = Work.open(place.work, read, recipe)
        if not (work.whole / "prepared.json").exists():
            _Preparation(source, config, rule, workers, work, recipe).run()
        place.publish(work.whole)
        prepared = place.existing(recipe, overwrite=False)
        assert prepared is not None
        return replace(prepared, reused=False)


def _recipe(source: Source, config: PrepareConfig, rule: VocabularyRule | Vocabulary) -> dict[str, Any]:
    """All that the data sets follow from, as it will be read back from JSON."""
    recipe = {
        "source": source.name,
        "licence": source.licence,
        "attribution": source.attribution,
        "rule": rule.hash if isinstance(rule, Vocabulary) else dataclasses.asdict(rule) | {"_listed": None},
        "fingerprint": dict(source.fingerprint()),
        "settings": config.recorded(),
    }
    parsed: dict[str, Any] = json.loads(json.dumps(recipe))
    return parsed


@dataclass
class _Preparation:
    """One preparation at work."""

    source: Source
    config: PrepareConfig
    rule: VocabularyRule | Vocabulary
    workers: Workers
    work: Work
    recipe: Mapping[str, Any]

    def run(self) -> None:
        """Go through the stages, as far as they are not done, and leave a whole folder."""
        started = time.monotonic()
        for role in ROLES:  # a run that was killed in `_finish` may have named one
            for named in self.work.whole.glob(f"{role}-*"):
                named.rename(self.work.whole / role)
        scanned = self._scan()
        chunks = chunks_of(scanned.groups)
        spans = spans_of(chunks)
        self._look(chunks)
        dropped, examples = Counter(scanned.dropped), dict(scanned.examples)
        self._refused(chunks, dropped, examples)
        chosen = self._choose(chunks, spans, scanned, dropped)
        vocabulary, report = self._vocabulary(chosen, spans)
        for role in ROLES:
            self._deal(role, spans, dropped, examples)
        about = {
            "licence": self.source.licence,
            "attribution": self.source.attribution,
            "prepared_with": self.recipe["settings"],
            "posts": scanned.posts,
            "dropped": dict(dropped.most_common()),
        }
        figures = {role: self._write(role, spans, vocabulary, about) for role in ROLES}
        report.save(self.work.whole / "vocabulary.report.json", vocabulary.hash)
        write_rejects(self.work, chunks, len(scanned.groups), self.work.whole / "rejects.parquet")
        self._finish(
            {role: figures[role].pop("name") for role in ROLES},
            {
                "posts": scanned.posts,
                "copies": len(chosen.copy),
                "dropped": dict(dropped.most_common()),
                "examples": examples,
                "dropped_hashtags": dict(scanned.counts.dropped_tags.most_common()),
                "near_identical": dict(chosen.clusters),
                "vocabulary": {
                    "entries": report.entries,
                    "ambiguous": report.ambiguous,
                    "merged_hashtags": sum(map(len, report.merged.values())),
                    "most_frequent": [entry.hashtag for entry in vocabulary.entries[:20]],
                    "dropped_hashtags": {reason: len(hashtags) for reason, hashtags in report.dropped.items()},
                },
                **figures,
                "seconds": round(time.monotonic() - started, 1),
            },
        )

    # --- the stages ------------------------------------------------------------------------------------------------

    def _scan(self) -> ScanReport:
        name, work = self.source.name, self.work
        splits = list(enumerate(self.source.splits()))
        expected = self.source.count()
        # Small enough for many workers, large enough that there are not too many.
        rows = min(max((expected or 65_536) // 64, 64), 4096)
        scanner = Scanner(self.source, self.rule, work, rows)
        run_stage(f"{name}: posts", splits, scanner, lambda task: work.scanned(task[0]), self.workers)
        scanned = read_scans(work, len(splits))
        if not any(map(sum, scanned.groups)):
            raise self._nothing(scanned.dropped)
        return scanned

    def _look(self, chunks: Sequence[Chunk]) -> None:
        looker = Looker(self.work, self.config.max_pixels, self.config.max_bytes)
        what = f"{self.source.name}: images"
        run_stage(what, chunks, looker, self.work.looked, self.workers, lambda chunk: chunk.rows, " images")

    def _refused(self, chunks: Sequence[Chunk], dropped: Counter[str], examples: dict[str, list[str]]) -> None:
        for chunk in chunks:
            seen = self.work.seen(chunk, ["reason", "detail"])
            refused = np.flatnonzero(seen.column("reason").is_valid().to_numpy())
            if not len(refused):
                continue
            keys = self.work.posts(chunk, ["key"]).column("key").take(refused).to_pylist()
            for key, row in zip(keys, seen.take(refused).to_pylist(), strict=True):
                dropped[row["reason"]] += 1
                some = examples.setdefault(row["reason"], [])
                if len(some) < 3:
                    some.append(f"{key}: {row['detail']}")

    def _choose(
        self, chunks: Sequence[Chunk], spans: Sequence[Span], scanned: ScanReport, dropped: Counter[str]
    ) -> choose.Chosen:
        work, config = self.work, self.config
        chosen = choose.merge_copies(work, chunks)
        usable = int((chosen.fate == choose.TRAIN).sum())
        if not usable:
            raise self._nothing(dropped)
        share, seed = config.validation_share, config.seed
        if config.near == "all" or (config.near == "auto" and usable <= _MOST_COMPARED):
            choose.choose_by_cluster(work, chunks, chosen, share, seed, has_variants=scanned.has_variants)
        else:
            thumbnails = choose.choose_by_hash(work, chunks, chosen, share, seed, has_variants=scanned.has_variants)
            files = [str(work.output / "near" / name) for name in ("fates.npy", "validation.npy")]
            for file, array in zip(files, (chosen.fate, thumbnails), strict=True):
                with published_file(file) as aside, open(aside, "wb") as handle:
                    np.save(handle, array)
            finder, what = choose.NearFinder(work, *files), f"{self.source.name}: near validation"
            run_stage(what, chunks, finder, work.near, self.workers, lambda chunk: chunk.rows, " images")
            for chunk in chunks:
                chosen.fate[chunk.start : chunk.start + chunk.rows][np.load(work.near(chunk))] = choose.NEAR_VALIDATION
            near = int((chosen.fate == choose.NEAR_VALIDATION).sum())
            chosen.clusters = {"near_validation": near}
            if near:
                dropped["near a validation image"] += near
        choose.write_choices(work, spans, chosen)
        return chosen

    def _vocabulary(self, chosen: choose.Chosen, spans: Sequence[Span]) -> tuple[Vocabulary, VocabularyReport]:
        """That of the training posts, and in the folder that is made."""
        counts = HashtagCounts()
        counter = SpanCounter(self.work, self.rule)
        run_stage(f"{self.source.name}: hashtags", spans, counter, self.work.counts, self.workers)
        for span in spans:
            counts.merge(HashtagCounts.load(self.work.counts(span)))
        if isinstance(self.rule, Vocabulary):
            vocabulary, rule = self.rule, self.rule.rule
            _, report = Vocabulary.of_counts(counts, rule, min_count=1, wordnet=WordNet.load())
        else:
            vocabulary, report = Vocabulary.of_counts(
                counts, self.rule, min_count=self.config.min_count, size=self.config.size, wordnet=WordNet.load()
            )
        if not vocabulary.entries:
            training = int((chosen.fate == choose.TRAIN).sum())
            raise UserError(
                f"no hashtag that the rule {self.config.vocabulary} takes is on {self.config.min_count} of the "
                f"{training:,} training images or more (min_count)"
            )
        vocabulary.save(self._vocabulary_file)
        return vocabulary, report

    @property
    def _vocabulary_file(self) -> Path:
        return self.work.output / "vocabulary.json"

    def _deal(self, role: str, spans: Sequence[Span], dropped: Counter[str], examples: dict[str, list[str]]) -> None:
        dealer = Dealer(self.work, str(self._vocabulary_file), self.config.seed, self.config.shuffle)
        tasks = [(role, span) for span in spans]
        what = f"{self.source.name}: {role} labels"
        run_stage(what, tasks, dealer, lambda task: self.work.dealt(*task), self.workers)
        unlabelled, keys = dealt_facts(self.work, role, spans)
        if unlabelled:
            reason = "no label in the vocabulary"
            dropped[reason] += unlabelled
            examples[reason] = (examples.get(reason, []) + keys)[:3]

    def _write(
        self, role: str, spans: Sequence[Span], vocabulary: Vocabulary, about: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the labelled posts of a role as a data set; its name and figures."""
        config, work = self.config, self.work
        shards = shard_tasks(work, role, spans, config.records_per_shard)
        if not shards:
            raise UserError(
                f"no image is left for the {role} split of {self.source.name}: take a larger source, a larger "
                "validation_share or a smaller min_count"
            )
        folder = work.whole / role
        folder.mkdir(exist_ok=True)
        writer = Writer(work, role, tuple(spans), folder, str(self._vocabulary_file), config.max_bytes)
        what = f"{self.source.name}: {role} shards"
        run_stage(
            what, shards, writer, lambda task: work.shard_done(role, task.number, folder), self.workers, unit=" shards"
        )
        facts = [json.loads(work.facts(role, task.number).read_bytes()) for task in shards]
        name = write_manifest(folder, role, self.source.name, vocabulary, facts, about)
        Dataset.open(folder).close()  # before it takes anything's place
        labels_per_image = Counter[int]()
        for shard in facts:
            labels_per_image.update({int(k): number for k, number in shard["labels_per_image"].items()})
        images, pairs = labels_per_image.total(), sum(k * number for k, number in labels_per_image.items())
        per_image = round(pairs / images, 3)
        return {"name": name, "images": images, "labels_per_image": per_image, "most_labels": max(labels_per_image)}

    def _finish(self, names: Mapping[str, DatasetName], report: Mapping[str, Any]) -> None:
        whole = self.work.whole
        for role, name in names.items():
            (whole / role).rename(whole / str(name))
        prepared = {
            "format": FORMAT,
            "version": VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "scale_wsl": scale_wsl.__version__,
            "train": str(names["train"]),
            "validation": str(names["val"]),
            "recipe": self.recipe,
            "report": report,
        }
        with published_file(whole / "prepared.json") as aside:
            aside.write_text(json.dumps(prepared, ensure_ascii=False, indent=1) + "\n", "utf-8")

    def _nothing(self, dropped: Counter[str]) -> UserError:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items()) or "no post"
        return UserError(f"the source {self.source.name} gave no usable image ({reasons})")
