"""The report of a search: a folder with the neighbours as a table and as pages to judge them by.

Must never fetch anything, never let a key or a hashtag become markup, and never depend on when or where it was made.

    report.json          which sets and method, how many images
    neighbours.parquet   evaluation key, training key and similarity of every neighbour, nearest first
    page-0001.html ...   200 evaluation images each, those with the most similar neighbours first
"""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scale_wsl.corpus.judgements import SetId, is_sha256, is_text
from scale_wsl.duplicates.features import digest_of
from scale_wsl.duplicates.methods import Method, preview
from scale_wsl.duplicates.page import page
from scale_wsl.duplicates.search import Nearest
from scale_wsl.duplicates.sets import ImageSet
from scale_wsl.errors import UserError
from scale_wsl.files import published_folder

__all__ = ["Report", "neighbours", "read_report", "write_report"]

FORMAT = "scale_wsl duplicates report"
VERSION = 1
ON_A_PAGE = 200
"""Evaluation images on a page."""

_PREVIEW = 144  # longer side in pixels
_LARGEST = 1 << 20  # bytes of report.json
_TEXT, _COLUMNS = 60, ("evaluation", "training", "similarity")
_LABELS = 6  # hashtags that are shown beneath an image


@dataclass(frozen=True)
class Report:
    """A report's folder, and what report.json says."""

    folder: Path
    train: SetId
    evaluation: SetId
    evaluation_folder: Path
    """Where the evaluation set was."""
    method: str
    suggested: float
    search: Mapping[str, Any]
    """All that the neighbours follow from."""
    show_above: float | None
    images: tuple[int, int]
    """Of the training and the evaluation set."""
    unreadable: tuple[int, int]
    pages: int
    near: int
    """Evaluation images whose nearest is at least as similar as `suggested`."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.images[1]:,} images of {self.evaluation.name} against {self.images[0]:,} of {self.train.name}, by "
            f"{self.method}",
            f"{self.near:,} have a neighbour of similarity {self.suggested:g} or more; judge them in "
            f"{self.folder / 'page-0001.html'}" + (f" (and {self.pages - 1:,} more)" if self.pages > 1 else ""),
        ]
        if any(self.unreadable):
            lines.append(f"not readable: {self.unreadable[0]:,} training and {self.unreadable[1]:,} evaluation images")
        return "\n".join(lines)


def write_report(
    out: Path,
    train: ImageSet,
    evaluation: ImageSet,
    method: Method,
    nearest: Nearest,
    *,
    search: Mapping[str, Any],
    unreadable: tuple[int, int],
    show_above: float | None,
    workers: int,
) -> Report:
    """Write the folder `out`, published by one rename.

    Args:
        out: Which must not be there; if another process publishes it first, that one stays.
        train: The training images.
        evaluation: The evaluation images.
        method: How they were compared.
        nearest: Of each evaluation image.
        search: All that `nearest` follows from.
        unreadable: Training and evaluation images that could not be read.
        show_above: Leave evaluation images whose nearest is less similar out of the pages; None: show all.
        workers: Threads that make the small images.

    Raises:
        UserError: The folder cannot be written, or an image file is gone.
    """
    best = nearest.similarity[:, 0]
    order = np.lexsort((np.arange(len(best)), -best))
    shown = [int(i) for i in order if np.isfinite(best[i]) and (show_above is None or best[i] >= show_above)]
    pages = max(1, -(-len(shown) // ON_A_PAGE))
    report = Report(
        folder=out,
        train=SetId(train.name, train.identity),
        evaluation=SetId(evaluation.name, evaluation.identity),
        evaluation_folder=evaluation.folder,
        method=method.about,
        suggested=method.suggested,
        search=dict(search),
        show_above=show_above,
        images=(len(train), len(evaluation)),
        unreadable=unreadable,
        pages=pages,
        near=int((best >= method.suggested).sum()),
    )
    try:
        with published_folder(out) as folder:
            (folder / "report.json").write_text(_dumped(report), "utf-8")
            _write_table(folder / "neighbours.parquet", train, evaluation, nearest)
            with (
                warnings.catch_warnings(),  # set here, and not by each thread: the filters are the whole process's
                tqdm(total=len(shown), desc="report", unit=" images", disable=None) as bar,
                ThreadPoolExecutor(workers) as pool,
            ):
                warnings.simplefilter("ignore")
                for number in range(pages):
                    rows = shown[number * ON_A_PAGE : (number + 1) * ON_A_PAGE]
                    data = _page_data(report, number, rows, train, evaluation, nearest, pool)
                    (folder / f"page-{number + 1:04d}.html").write_text(page(data), "utf-8")
                    bar.update(len(rows))
    except FileExistsError:  # another part finished in the same moment
        return read_report(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    return report


def _dumped(report: Report) -> str:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "train": vars(report.train) | {"images": report.images[0], "unreadable": report.unreadable[0]},
        "evaluation": vars(report.evaluation)
        | {
            "images": report.images[1],
            "unreadable": report.unreadable[1],
            "near": report.near,
            "folder": str(report.evaluation_folder.absolute()),
        },
        "method": report.method,
        "suggested": report.suggested,
        "show_above": report.show_above,
        "pages": report.pages,
        "search": report.search,
    }
    return json.dumps(content, indent=1) + "\n"


def _write_table(path: Path, train: ImageSet, evaluation: ImageSet, nearest: Nearest) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, place = np.nonzero(nearest.index >= 0)
    columns = [
        pa.array([evaluation.key(i) for i in row.tolist()], pa.string()),
        pa.array([train.key(i) for i in nearest.index[row, place].tolist()], pa.string()),
        pa.array(nearest.similarity[row, place], pa.float64()),
    ]
    pq.write_table(pa.table(columns, names=list(_COLUMNS)), path, compression="zstd")


def _page_data(
    report: Report,
    number: int,
    rows: Sequence[int],
    train: ImageSet,
    evaluation: ImageSet,
    nearest: Nearest,
    pool: ThreadPoolExecutor,
) -> dict[str, Any]:
    """All that a page shows, as JSON; each small image once."""
    wanted = sorted({int(i) for row in rows for i in nearest.index[row] if i >= 0})
    places = {image: place for place, image in enumerate(wanted)}
    jobs = [(train, image) for image in wanted] + [(evaluation, image) for image in rows]
    previews = list(pool.map(lambda job: _preview(*job), jobs))

    def labels(images: ImageSet, image: int) -> str:
        found = images.labels(image)
        more = f" +{len(found) - _LABELS}" if len(found) > _LABELS else ""
        return " ".join(f"#{tag[:_TEXT]}" for tag in found[:_LABELS]) + more

    return {
        "id": digest_of(report.search),
        "train": vars(report.train),
        "evaluation": vars(report.evaluation),
        "method": report.method,
        "suggested": report.suggested,
        "page": number + 1,
        "pages": report.pages,
        "previews": previews,
        "rows": [
            {
                "key": evaluation.key(row),
                "labels": labels(evaluation, row),
                "preview": len(wanted) + position,
                "neighbours": [
                    [train.key(image), round(similarity, 6), labels(train, image), places[image]]
                    for image, similarity in zip(
                        nearest.index[row].tolist(), nearest.similarity[row].tolist(), strict=True
                    )
                    if image >= 0
                ],
            }
            for position, row in enumerate(rows)
        ],
    }


def _preview(images: ImageSet, image: int) -> str:
    made = preview(images.read(image), _PREVIEW)
    return base64.b64encode(made).decode() if made else ""


# --- reading -----------------------------------------------------------------------------------------------------


def read_report(folder: Path) -> Report:
    """A report's folder.

    Raises:
        UserError: It is none, or of another version.
    """
    path = folder / "report.json"
    wrong = UserError(f"{folder} is no report of scale-wsl duplicates find: its report.json is missing or damaged")
    try:
        if path.stat().st_size > _LARGEST:
            raise wrong
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise wrong
        if found["version"] != VERSION:
            raise UserError(f"{folder} has version {found['version']!r:.40}, where this release reads {VERSION}")
        train, evaluation, above = found["train"], found["evaluation"], found["show_above"]
        if not (
            all(map(is_text, (train["name"], evaluation["name"], found["method"])))
            and is_sha256(train["sha256"])
            and is_sha256(evaluation["sha256"])
        ):
            raise wrong
        return Report(
            folder=folder,
            train=SetId(train["name"], train["sha256"]),
            evaluation=SetId(evaluation["name"], evaluation["sha256"]),
            evaluation_folder=Path(evaluation["folder"]),
            method=found["method"],
            suggested=float(found["suggested"]),
            search=dict(found["search"]),
            show_above=None if above is None else float(above),
            images=(int(train["images"]), int(evaluation["images"])),
            unreadable=(int(train["unreadable"]), int(evaluation["unreadable"])),
            pages=int(found["pages"]),
            near=int(evaluation["near"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None


def neighbours(report: Report) -> dict[tuple[str, str], float]:
    """The similarity of every (evaluation key, training key) in a report.

    Raises:
        UserError: Its table is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = report.folder / "neighbours.parquet"
    schema = pa.schema([("evaluation", pa.string()), ("training", pa.string()), ("similarity", pa.float64())])
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.remove_metadata() != schema:
                raise UserError(f"{path} is no table of neighbours: it has other columns")
            table = file.read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    evaluation, training, similarity = (table.column(name).to_pylist() for name in _COLUMNS)
    whole = all(map(is_text, evaluation)) and all(map(is_text, training))
    if not whole or not all(value is not None and -2 <= value <= 2 for value in similarity):
        raise UserError(f"{path} is damaged: its cells are no keys and similarities")
    return {(a, b): value for a, b, value in zip(evaluation, training, similarity, strict=True)}
