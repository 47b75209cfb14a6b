"""Fetches the images of a table of posts by their URLs, into a folder of tars that `prepare` reads.

Must never ask for what is no public http or https address unless the user allows it, never hold more of the table than
a few shards, and never lose what was fetched: a run that was killed goes on where it was.

A folder is:

    download.json          what was asked for, and what came of it once all shards are there
    000000.tar             the images, as they were sent, and a .json beside each
    000000.parquet         every row of the shard: its URL, and what became of it
    000000_stats.json      img2dataset's statistics; its being there says that the shard is whole
    rejects.parquet        row, url, reason and detail of every row without an image

Shard k holds the rows [k n, (k + 1) n) of the table, counted from 0 over all its files, whatever becomes of them. So
nothing but the finished shards needs to be known to go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from scale_wsl.corpus.addresses import Guard
from scale_wsl.corpus.download_processes import Processes
from scale_wsl.corpus.download_rows import count, digest, read_rows, reduce_row, table_files, write_rows
from scale_wsl.corpus.download_shard import Settings, files_of
from scale_wsl.corpus.images import LARGEST_MAX_PIXELS
from scale_wsl.corpus.rejects import RowReject
from scale_wsl.errors import UserError
from scale_wsl.files import published_file, sync_folder

__all__ = ["REASONS", "DownloadConfig", "Downloaded", "download"]

FORMAT = "scale_wsl download"
VERSION = 1

REASONS = frozenset(
    (
        # of a row, before any request
        "no URL",
        "too long a URL",
        "control characters",
        "malformed URL",
        "scheme",
        "credentials",
        "private address",
        "disguised address",
        "hashtags",
        "too much text",
        # of a request; beside these, "HTTP 404" and the like
        "unknown host",
        "no connection",
        "certificate",
        "TLS",
        "no HTTP",
        "timeout",
        "broken off",
        "too many redirects",
        "too many bytes",
        "opted out",
        # of an image
        "undecodable",
        "too many pixels",
        # img2dataset's own
        "lost",
        "other",
    )
)
"""Why a row has no image."""

_HTTP_ERROR = re.compile(r"HTTP [0-9]{3}")
_OPTED_OUT = "Use of image disallowed by X-Robots-Tag directive"  # img2dataset's words
_STAGING = ".part"
_LEFTOVER = re.compile(r"\.(download\.json|rejects\.parquet)\.[0-9a-f]{8}\.part")  # of published_file, after a crash
_LARGEST_JSON = 64 << 20  # bytes of download.json or of a shard's statistics; img2dataset counts its messages in these


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """How a table is downloaded. What may differ from run to run is the last five."""

    image: str = "url"
    """Column of the URLs."""
    hashtags: str = "hashtags"
    """Column of the hashtags: a list, or a text as `TableSource` takes it."""
    group: str | None = None
    """Column whose equal values mark variants; None: there is none."""
    size: int | None = None
    """Images with a shorter side of more pixels are shrunk to it and become JPEG; None: all stay as they were sent."""
    images_per_shard: int = 1000
    """Rows for each tar."""
    limit: int | None = None
    """Take only so many rows; None: all."""
    max_bytes: int = 64 << 20
    """Files of more bytes are not taken."""
    max_pixels: int = 25_000_000
    """Images of more pixels are not taken."""
    allow_private: bool = False
    """Take addresses that are not public, and use the environment's proxies."""
    processes: int | None = None
    """At a time; None: one for each core, four at most."""
    threads: int = 64
    """Connections of each process."""
    timeout: float = 30.0
    """Seconds for an attempt, redirects and all."""
    retries: int = 1
    """Attempts after the first, where it may have been bad luck."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("size", 16, 10_000),
            ("images_per_shard", 1, 100_000),
            ("limit", 1, None),
            ("max_bytes", 1, 1 << 32),
            ("max_pixels", 1, LARGEST_MAX_PIXELS),
            ("processes", 1, 1024),
            ("threads", 1, 1024),
            ("timeout", 0.1, 3600),
            ("retries", 0, 100),
        ):
            value = getattr(self, key)
            if value is not None and not (low <= value and (high is None or value <= high)):
                right = f"at least {low}" if high is None else f"between {low} and {high:,}"
                raise UserError(f"{key.replace('_', ' ')} is {value}, but must be {right}")

    def recorded(self) -> dict[str, Any]:
        """What decides which samples there will be."""
        free = ("processes", "threads", "timeout", "retries")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in free}


@dataclass(frozen=True)
class Downloaded:
    """A folder of tars, and how it came about."""

    out: Path
    reused: bool
    """It was there already."""
    report: Mapping[str, Any]
    """Rows, images, shards, bytes of the tars, and rejects by reason."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        report = self.report
        rejects = ", ".join(f"{number:,} {reason}" for reason, number in report["rejects"].items())
        return (
            f"{report['rows']:,} posts: {report['images']:,} images, {report['bytes'] / 1e6:,.1f} MB in "
            f"{report['shards']:,} tars\nwithout an image: {rejects or 'none'}\n"
            f"{self.out / 'rejects.parquet'} says which and why"
        )


def download(
    posts: str, out: str | Path, config: DownloadConfig | None = None, *, overwrite: bool = False
) -> Downloaded:
    """Download the images of a table into `out`, or go on with it.

    Args:
        posts: A .csv, .jsonl or .parquet file, a folder with such files, or a pattern for some.
        out: The folder to make; its parents are made too.
        config: How; the defaults when None.
        overwrite: Remove an earlier download from `out` and start anew.

    Raises:
        UserError: img2dataset is not installed, the table cannot be read, or `out` holds something else.
    """
    config = config or DownloadConfig()
    if importlib.util.find_spec("img2dataset") is None:
        raise UserError(
            "scale-wsl download needs img2dataset, which is not installed: pip install 'scale-wsl[download]'"
        )
    files = table_files(posts)
    recipe = {"posts": digest(files), **config.recorded()}
    out = _resolved(out)
    with _locked(out):
        _begin(out, recipe, overwrite)
        report = _read_facts(out).get("report")
        if isinstance(report, dict):
            return Downloaded(out, True, report)
        staging = out / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        shards = _fetch(files, out, staging, config)
        report = _report(out, shards)
        _write_facts(out, recipe, report)
        shutil.rmtree(staging, ignore_errors=True)
    return Downloaded(out, False, report)


# --- the folder ----------------------------------------------------------------------------------------------------


def _resolved(out: str | Path) -> Path:
    """Where links lead: they stay, and the folder that they name is what is filled."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a ring
        raise UserError(f"{out} is no place for a folder: its links cannot be followed") from None


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    path = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))  # FileLock would wait for some errors to pass
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is downloading into {out}: wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot write into {out.parent}: {error.strerror}") from None
    try:
        yield
    except OSError as error:  # the table's own errors are told where it is read
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from None
    finally:
        lock.release()


def _begin(out: Path, recipe: Mapping[str, Any], overwrite: bool) -> None:
    """Make `out` hold this download, begun or further on."""
    old = out.with_name(f".{out.name}.old.part")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder")
    out.mkdir(exist_ok=True)
    for path in out.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()
    if any(out.iterdir()):
        facts = _read_facts(out)
        if not overwrite:
            there = facts["recipe"]
            changed = sorted(key for key in there.keys() | recipe.keys() if there.get(key) != recipe.get(key))
            if changed:
                raise UserError(
                    f"{out} holds another download (different: {', '.join(changed)}): choose another folder, or start "
                    "anew with --overwrite"
                )
            return
        os.rename(out, old)
        out.mkdir()
        sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    _write_facts(out, recipe, None)


def _read_facts(out: Path) -> dict[str, Any]:
    facts = _read_json(out / "download.json")
    if facts.get("format") != FORMAT or not isinstance(facts.get("recipe"), dict):
        raise UserError(f"{out} is not empty and was not made by scale-wsl download: choose another folder")
    if facts.get("version") != VERSION:
        raise UserError(
            f"{out} holds a download of version {facts.get('version')!r}, where this release makes {VERSION}: choose "
            "another folder"
        )
    return facts


def _write_facts(out: Path, recipe: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    facts = {"format": FORMAT, "version": VERSION, "recipe": recipe, "report": report}
    with published_file(out / "download.json") as aside:
        aside.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """An object from a file; an empty one where there is none."""
    try:
        with open(path, "rb") as handle:
            facts = json.loads(handle.read(_LARGEST_JSON))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _rows_of(out: Path, number: int) -> int | None:
    """The rows of a shard that is there whole, its files as they were written; None where it is not."""
    *files, stats = files_of(out, number)
    facts = _read_json(stats)
    try:
        sizes = {path.name: path.stat().st_size for path in files}
    except OSError:
        return None
    rows = facts.get("rows")
    return rows if facts.get("files") == sizes and isinstance(rows, int) else None


# --- fetching ------------------------------------------------------------------------------------------------------


def _fetch(files: list[str], out: Path, staging: Path, config: DownloadConfig) -> int:
    """Fetch every shard that is not there yet; how many there are."""
    number = images = 0
    waiting: dict[Future[int], int] = {}
    bar = tqdm(desc="downloading", unit=" posts", disable=None, total=count(files, config.limit))

    def finish_some() -> None:
        nonlocal images
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            images += future.result()
            bar.set_postfix_str(f"{images:,} images", refresh=False)
            bar.update(waiting.pop(future))

    with bar, Processes(_settings(out, staging, config), config.processes or min(4, _cores())) as processes:
        columns = [config.image, config.hashtags, *([] if config.group is None else [config.group])]
        rows = read_rows(files, columns, config.limit)
        guard = Guard(allow_private=config.allow_private)
        while True:
            taken = itertools.islice(rows, config.images_per_shard)
            if (there := _rows_of(out, number)) is not None:
                if (passed := sum(1 for _ in taken)) != there:
                    raise UserError(f"shard {number} in {out} has {there:,} rows, not {passed:,}: use --overwrite")
                bar.update(passed)
            elif shard := [reduce_row(row, guard) for row in taken]:
                while len(waiting) > processes.count:  # one for each, and one that the next takes
                    finish_some()
                write_rows(shard, staging / str(number))
                waiting[processes.submit(number)] = len(shard)
            else:
                break
            number += 1
        while waiting:
            finish_some()
    if number == 0:
        raise UserError(f"the table {files[0]} has no rows")
    return number


def _settings(out: Path, staging: Path, config: DownloadConfig) -> Settings:
    own = {field.name for field in dataclasses.fields(Settings)} - {"out", "staging"}
    return Settings(out=str(out), staging=str(staging), **{key: getattr(config, key) for key in own})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- what came of it -----------------------------------------------------------------------------------------------


def _report(out: Path, shards: int) -> dict[str, Any]:
    """Write rejects.parquet, and count."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {name: pa.string() for name in ("url", "reason", "detail")}
    schema = pa.schema([("row", pa.int64()), *texts.items()])
    rows = tar_bytes = 0
    reasons: Counter[str] = Counter()
    with (
        published_file(out / "rejects.parquet") as aside,
        pq.ParquetWriter(aside, schema, compression="zstd") as writer,
    ):
        for number in range(shards):
            tar, table, _ = files_of(out, number)
            tar_bytes += tar.stat().st_size
            found = pq.read_table(table, columns=["row", "url", "status", "error_message"])
            rows += len(found)
            rejects = [
                {"url": line["url"], **dataclasses.asdict(_reject(line["row"], line["error_message"] or ""))}
                for line in found.to_pylist()
                if line["status"] != "success"
            ]
            reasons.update(reject["reason"] for reject in rejects)
            if rejects:
                writer.write_table(pa.Table.from_pylist(rejects, schema))
    return {
        "rows": rows,
        "images": rows - reasons.total(),
        "shards": shards,
        "bytes": tar_bytes,
        "rejects": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    }


def _reject(row: int, message: str) -> RowReject:
    """Why a row has no image, from the message in its shard's table: `reason: detail`, or img2dataset's own words."""
    reason, _, detail = message.partition(": ")
    if reason in REASONS or _HTTP_ERROR.fullmatch(reason):
        return RowReject(row, reason, detail)
    if message == _OPTED_OUT:
        return RowReject(row, "opted out", message)
    return RowReject(row, "other", message)
