"""What counting, labelling and writing a table of posts costs, beside DuckDB's SQL for the same result.

    python benchmarks/corpus.py                                        # 1, 4 and 20 million posts: half an hour
    python benchmarks/corpus.py --posts 200000 400000 --rounds 1       # seconds

The posts are made up: hashtags by a Zipf law over the lemmas of WordNet in several spellings (upper case, #, plural),
with junk that WordNet does not know (a quarter of all tags, half of it unique), 4.4 tags a post, in Parquet files of a
million rows with a key and a URL each.

Both count the posts of each canonical hashtag, each post once; and both label the posts by the vocabulary that follows
(hashtags on 5 posts or more) and write key, URL and labels of those that have any. DuckDB is given what it cannot know:
a table from every normalised form that occurs to its canonical hashtag. It need not count junk or normalise Unicode,
which ours does. The results are compared: counts by the vocabulary that they give, labels by a hash of each row. DuckDB
has the same number of threads as ours has processes, and 4 GB of memory before it goes to disk.

Printed: rows/s of each pass, the ratio of ours to DuckDB's in the same round, the largest memory of all processes
together (proportional set size, sampled), and the exponent b of time = a * rows^b by least squares on logarithms.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scale_wsl.corpus.counting import count_posts, label_posts
from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.sources import TableSource
from scale_wsl.hashtags import Vocabulary, WordNet, normalize
from scale_wsl.hashtags.rules import VocabularyRule

_FILE = 1_000_000
_RULE = VocabularyRule("noun")
_MIN_COUNT = 5


# --- posts ---------------------------------------------------------------------------------------------------------


def make_posts(folder: Path, posts: int, seed: int = 0) -> None:
    """Write made-up posts; the first n of them are the same whatever their number."""
    rng = np.random.default_rng(seed)
    lemmas = np.array(sorted(WordNet.load().hashtags), object)
    rng.shuffle(lemmas)
    spellings = np.concatenate([lemmas, "#" + lemmas, "#" + np.array([lemma.title() for lemma in lemmas], object)])
    spellings = np.concatenate([spellings, lemmas + "s"])
    weight = np.tile(1 / (np.arange(len(lemmas)) + 10.0), 4) * np.repeat([0.3, 0.4, 0.2, 0.1], len(lemmas))
    cumulative = np.cumsum(weight) / weight.sum()
    junk = np.array([f"#{number:x}zq" for number in rng.integers(0, 2**40, 200_000)], object)
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, posts, _FILE)):
        rows = min(_FILE, posts - start)
        draw = np.random.default_rng([seed, number])
        k = np.minimum(draw.geometric(0.25, rows) + draw.integers(0, 2, rows), 30)
        total = int(k.sum())
        tags = spellings[np.searchsorted(cumulative, draw.random(total))]
        kind = draw.random(total)
        repeated, unique = kind < 0.125, (kind >= 0.125) & (kind < 0.25)
        tags[repeated] = junk[(draw.pareto(1.0, int(repeated.sum())) * 50).astype(np.int64) % len(junk)]
        tags[unique] = [f"my{value:x}xk" for value in draw.integers(0, 2**50, int(unique.sum()))]
        ids = np.arange(start, start + rows)
        table = pa.table(
            {
                "id": pa.array([f"p{i:011d}" for i in ids]),
                "image": pa.array([f"https://images.example/{i % 997:03d}/{i:011d}.jpg" for i in ids]),
                "hashtags": pa.ListArray.from_arrays(
                    np.concatenate(([0], np.cumsum(k))).astype(np.int32), pa.array(tags, pa.string())
                ),
            }
        )
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=131_072, compression="zstd")


def lookup_table(folder: Path) -> pa.Table:
    """Every normalised form in the posts that has a place, and its canonical hashtag: DuckDB's help."""
    candidates = _RULE.candidates(WordNet.load())
    seen: set[str] = set()
    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(columns=["hashtags"]):
            seen.update(batch.column("hashtags").flatten().unique().to_pylist())
    forms = {form for text in seen if (form := normalize(text)) is not None}
    placed = sorted((form, key) for form in forms if (key := candidates.key(form)))
    keys = {key: i for i, key in enumerate(sorted({key for _, key in placed}))}
    columns = [[form for form, _ in placed], [keys[key] for _, key in placed], [key for _, key in placed]]
    return pa.table(columns, names=["form", "number", "key"])


# --- the two -------------------------------------------------------------------------------------------------------

_PAIRS = """
    SELECT file_row_number + {million} * CAST(regexp_extract(filename, '([0-9]+).parquet', 1) AS BIGINT) AS post,
           regexp_replace(lower(unnest(hashtags)), '[# _.''/-]', '', 'g') AS form
    FROM read_parquet('{folder}/*.parquet', filename = true, file_row_number = true)
"""


class DuckDB:
    """Hand-written SQL: the pairs of posts and tags, joined with the lookup, made distinct, and aggregated."""

    def __init__(self, folder: Path, lookup: pa.Table, threads: int, scratch: Path) -> None:
        import duckdb

        self.connection = duckdb.connect()
        self.connection.execute(f"SET threads = {threads}; SET memory_limit = '4GB'")
        self.connection.execute(f"SET temp_directory = '{scratch}'; SET preserve_insertion_order = false")
        self.connection.register("given", lookup)
        self.connection.execute("CREATE TABLE lookup AS SELECT form, number FROM given")
        self.pairs = _PAIRS.format(folder=folder, million=_FILE)
        self.folder = folder

    def count(self) -> dict[int, int]:
        """Posts of each canonical hashtag."""
        rows = self.connection.execute(
            f"""
            SELECT number, count(*) FROM (SELECT DISTINCT post, number FROM ({self.pairs}) JOIN lookup USING (form))
            GROUP BY number
            """
        ).fetchall()
        return dict(rows)

    def label(self, labels: dict[int, int], out: Path) -> None:
        """Write the posts that have labels."""
        table = pa.table({"number": list(labels), "label": pa.array(labels.values(), pa.int32())})
        self.connection.register("labels", table)
        self.connection.execute(
            "CREATE OR REPLACE TABLE labelled AS SELECT form, label FROM lookup JOIN labels USING (number)"
        )
        out.mkdir()
        self.connection.execute(
            f"""
            COPY (
              SELECT id, image, labels FROM (
                SELECT post, list_sort(list(DISTINCT label)) AS labels
                FROM ({self.pairs}) JOIN labelled USING (form) GROUP BY post
              ) JOIN (
                SELECT id, image,
                  file_row_number + {_FILE} * CAST(regexp_extract(filename, '([0-9]+).parquet', 1) AS BIGINT) AS post
                FROM read_parquet('{self.folder}/*.parquet', filename = true, file_row_number = true)
              ) USING (post)
            ) TO '{out}' (FORMAT parquet, COMPRESSION zstd, PER_THREAD_OUTPUT)
            """
        )


def fingerprint(folder: Path, column: str) -> tuple[int, int]:
    """Posts written, and the sum of the hashes of (key, labels) over all of them."""
    import duckdb

    row = duckdb.execute(
        f"SELECT count(*), sum(hash({column}, labels)) FROM read_parquet('{folder}/*.parquet')"
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


# --- measuring -----------------------------------------------------------------------------------------------------


class Peak:
    """The largest proportional set size of this process and its children while it is entered, in bytes."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.25):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)


def timed(function: Callable[[], object]) -> tuple[float, int]:
    """Seconds and bytes."""
    with Peak() as peak:
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
    return seconds, peak.bytes


def exponent(rows: Sequence[int], seconds: Sequence[float]) -> float:
    """b of seconds = a * rows^b."""
    slope: NDArray[np.float64] = np.polyfit(np.log(rows), np.log(seconds), 1)
    return float(slope[0])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posts", type=int, nargs="+", default=[1_000_000, 4_000_000, 20_000_000])
    parser.add_argument("--rounds", type=int, default=3, help="of the pair, on the largest number of posts")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        run(arguments.posts, arguments.rounds, arguments.workers, Path(scratch))


def run(sizes: Sequence[int], rounds: int, workers: int, scratch: Path) -> None:
    """Measure every size once, the largest `rounds` times beside DuckDB."""
    print(f"{workers} workers\n")
    print(f"{'posts':>12} {'':8} {'count, rows/s':>16} {'label and write':>16} {'both':>12} {'peak, GiB':>10}")
    both: list[float] = []
    for posts in sizes:
        folder = scratch / f"posts-{posts}"
        make_posts(folder, posts)
        last = posts == sizes[-1]
        lookup = lookup_table(folder)
        ratios: dict[str, list[float]] = {"count": [], "label": [], "both": []}
        for number in range(rounds if last else 1):
            ours = measure_ours(folder, scratch / f"ours-{number}", workers)
            print_row(posts, "ours", ours)
            if number == 0:
                both.append(ours["count"][0] + ours["label"][0])
            if last:
                theirs = measure_duckdb(folder, lookup, scratch / f"theirs-{number}", workers)
                print_row(posts, "DuckDB", theirs)
                for key in ("count", "label"):
                    ratios[key].append(theirs[key][0] / ours[key][0])
                ratios["both"].append(sum(theirs[k][0] for k in theirs) / sum(ours[k][0] for k in ours))
                if number == 0:
                    compare(scratch / f"ours-{number}", scratch / f"theirs-{number}", lookup)
                shutil.rmtree(scratch / f"theirs-{number}")
            shutil.rmtree(scratch / f"ours-{number}")
        shutil.rmtree(folder)
    print("\nours against DuckDB in the same round, rows/s, median (least to most)")
    for key, values in ratios.items():
        print(f"  {key:6} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    if len(sizes) > 1:
        print(f"\ntime grows with rows to the power of {exponent(sizes, both):.3f}, from {sizes[0]:,} to {sizes[-1]:,}")


Measured = dict[str, tuple[float, int]]


def measure_ours(folder: Path, out: Path, workers: int) -> Measured:
    """Count, then label and write."""
    out.mkdir()
    source, crew = TableSource(path=str(folder), key="id"), Workers(count=workers)

    def count() -> None:
        vocabulary, _ = Vocabulary.of_counts(count_posts(source, _RULE, workers=crew), _RULE, min_count=_MIN_COUNT)
        vocabulary.save(out / "vocabulary.json")

    def label() -> None:
        label_posts(source, out / "vocabulary.json", out / "labelled", workers=crew)

    return {"count": timed(count), "label": timed(label)}


def measure_duckdb(folder: Path, lookup: pa.Table, out: Path, workers: int) -> Measured:
    """The same in SQL."""
    out.mkdir()
    duckdb = DuckDB(folder, lookup, workers, out)
    key = dict(zip(lookup.column("number").to_pylist(), lookup.column("key").to_pylist(), strict=True))
    labels: dict[int, int] = {}

    def count() -> None:
        counts = duckdb.count()
        kept = sorted((-number, key[i], i) for i, number in counts.items() if number >= _MIN_COUNT)
        labels.update({i: rank for rank, (_, _, i) in enumerate(kept)})

    measured = {"count": timed(count), "label": timed(lambda: duckdb.label(labels, out / "labelled"))}
    pq.write_table(pa.table({"number": list(labels), "label": list(labels.values())}), out / "labels.parquet")
    return measured


def compare(ours: Path, theirs: Path, lookup: pa.Table) -> None:
    """Both have labelled the same posts with the same classes, whose order is a matter of names; else raise."""
    import duckdb

    vocabulary = Vocabulary.load(ours / "vocabulary.json")
    key = dict(zip(lookup.column("number").to_pylist(), lookup.column("key").to_pylist(), strict=True))
    labels = pq.read_table(theirs / "labels.parquet").to_pydict()
    names = pa.table(
        {
            "theirs": pa.array(labels["label"], pa.int32()),
            "ours": pa.array([vocabulary.index_of_key(key[i]) for i in labels["number"]], pa.int32()),
        }
    )
    if names.column("ours").null_count or len(names) != len(vocabulary):
        raise AssertionError("the vocabularies differ")
    connection = duckdb.connect()
    connection.register("names", names)
    mine = fingerprint(ours / "labelled", "key")
    row = connection.execute(
        f"""
        SELECT count(*), sum(hash(id, labels)) FROM (
          SELECT id, list_sort(list(names.ours)) AS labels
          FROM (SELECT id, unnest(labels) AS label FROM read_parquet('{theirs}/labelled/*.parquet'))
          JOIN names ON label = theirs GROUP BY id)
        """
    ).fetchone()
    if row is None or (int(row[0]), int(row[1])) != mine:
        raise AssertionError(f"the labels differ: {mine} and {row}")
    print(f"{'':12} the same {mine[0]:,} labelled posts, the same {len(vocabulary):,} labels")


def print_row(posts: int, who: str, measured: Measured) -> None:
    """One line."""
    (count, first), (label, second) = measured["count"], measured["label"]
    rates = [posts / count, posts / label, posts / (count + label)]
    peak = max(first, second) / 2**30
    print(f"{posts:12,} {who:8} {rates[0]:16,.0f} {rates[1]:16,.0f} {rates[2]:12,.0f} {peak:10.2f}", flush=True)
    assert all(math.isfinite(rate) for rate in rates)


if __name__ == "__main__":
    main()
