"""Finds the nearest training images of every image of an evaluation set, and writes a report to judge them by.

Must never decide what a duplicate is: it finds candidates, and people judge them. Must never publish half a report.

What is worked out is kept in a folder of features, so that a search that was killed goes on where it was. One search
may be shared out to several processes, or machines that see the folder: each takes every n-th block of the training set
(`part`), and the one that finishes last merges what all have found.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from scale_wsl.duplicates.features import BLOCK, Features, cores, decoded, digest_of
from scale_wsl.duplicates.methods import Method, RmacMethod
from scale_wsl.duplicates.report import Report, read_report, write_report
from scale_wsl.duplicates.rmac import Moments, Whitening
from scale_wsl.duplicates.search import Nearest, Search, merged
from scale_wsl.duplicates.sets import ImageSet
from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.randomness import generator

__all__ = ["FindConfig", "Found", "find", "with_whitening"]


@dataclass(frozen=True, kw_only=True)
class FindConfig:
    """How to search. Only `neighbours` and `show_above` change the result; `batch` may change a feature's last bit."""

    neighbours: int = 21  # Mahajan et al. 2018, section 2
    part: int = 0
    parts: int = 1
    workers: int = 0  # threads that decode; 0: one for each core
    batch: int = 16  # images that the network takes at a time
    faiss: bool = False
    show_above: float | None = None  # evaluation images in the report: those whose nearest is at least so similar

    def __post_init__(self) -> None:
        for name, value, least in (
            ("neighbours", self.neighbours, 1),
            ("batch", self.batch, 1),
            ("workers", self.workers, 0),
        ):
            if value < least:
                raise UserError(f"--{name} is {value}, but must be {least} or more")
        if not 0 <= self.part < self.parts:
            raise UserError(f"--part {self.part}/{self.parts} is none: of n parts, they are 0/n to n-1/n")


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    report: Report | None
    """None: other parts are missing."""
    missing: int
    """Parts that have not finished."""
    reused: bool
    """The report was there already."""


def find(
    train: ImageSet,
    evaluation: ImageSet,
    method: Method,
    out: Path,
    features: Path,
    config: FindConfig,
    *,
    device: torch.device | None = None,
) -> Found:
    """Search, and write the report folder `out` once all parts have finished.

    Does nothing where `out` holds this report already.

    Args:
        train: The training images; they stream past.
        evaluation: The evaluation images; all their features are held.
        method: What is compared.
        out: The report's folder, to be made.
        features: The folder where features and results of parts are kept.
        config: How.
        device: Where products are computed.

    Raises:
        UserError: The two sets are one, a file is gone or cannot be written, or `out` holds something else.
    """
    if train.identity == evaluation.identity:
        raise UserError(f"{train.folder} and {evaluation.folder} are the same images: each would find itself")
    if config.faiss:
        _require_faiss()
        if device is not None and device.type != "cpu":
            raise UserError("--faiss is for the CPU: leave it out, or add --device cpu")
    search = {
        "train": train.identity,
        "evaluation": evaluation.identity,
        "method": method.identity,
        "neighbours": config.neighbours,
    }
    if out.exists():
        try:
            there = read_report(out)
        except UserError:
            raise UserError(
                f"{out} is there already, and is no report of this release: choose another folder"
            ) from None
        if there.search != search or there.show_above != config.show_above:
            raise UserError(f"{out} is the report of another search: choose another folder, or remove it")
        return Found(there, 0, reused=True)
    workers = config.workers or cores()
    of_train, of_evaluation = (
        Features(features, images, method, workers=workers, batch=config.batch) for images in (train, evaluation)
    )
    parts = features / "searches" / digest_of([search, BLOCK])[:16]
    own = parts / f"{config.part:05d}-of-{config.parts:05d}.npz"
    kept = _Part.read(own, len(evaluation), config.neighbours, len(train))
    if kept is None:
        kept = _search(of_train, of_evaluation, config, device)
        kept.save(own)
    others = [parts / f"{part:05d}-of-{config.parts:05d}.npz" for part in range(config.parts)]
    all_parts = [_Part.read(path, len(evaluation), config.neighbours, len(train)) for path in others]
    finished = [part for part in all_parts if part is not None]
    if len(finished) < config.parts:
        return Found(None, config.parts - len(finished), reused=False)
    nearest = merged([part.nearest for part in finished])
    report = write_report(
        out,
        train,
        evaluation,
        method,
        nearest,
        search=search,
        unreadable=(sum(part.unreadable_train for part in finished), finished[0].unreadable_evaluation),
        show_above=config.show_above,
        workers=workers,
    )
    return Found(report, 0, reused=False)


def _require_faiss() -> None:
    try:
        importlib.import_module("faiss")
    except ImportError:
        raise UserError("--faiss needs the package faiss-cpu: pip install 'scale-wsl[duplicates]'") from None


def _search(of_train: Features, of_evaluation: Features, config: FindConfig, device: torch.device | None) -> _Part:
    """The nearest of every evaluation image among the training images of this part."""
    features, readable = _all_features(of_evaluation, config)
    rows = np.flatnonzero(readable)
    ways = of_train.method.queries(features[rows])
    search = Search(np.concatenate(ways), config.neighbours, device=device, faiss=config.faiss)
    blocks = range(config.part, len(of_train), config.parts)
    unreadable = 0
    with _bar(f"{of_train.images.name}: searching", sum(len(of_train.numbers(block)) for block in blocks)) as bar:
        for number in blocks:
            block = of_train.block(number, bar.update)
            unreadable += int((~block.readable).sum())
            there = np.flatnonzero(block.readable)
            search.add(of_train.method.vectors(block.features[there]), block.first + there)
    result = search.result()
    each = [
        Nearest(result.similarity[start : start + len(rows)], result.index[start : start + len(rows)])
        for start in range(0, len(rows) * len(ways), max(1, len(rows)))
    ]
    nearest = Nearest.none(len(readable), config.neighbours)
    if len(rows):
        best = merged(each)
        nearest.similarity[rows], nearest.index[rows] = best.similarity, best.index
    return _Part(nearest, unreadable, int((~readable).sum()))


def _all_features(of_evaluation: Features, config: FindConfig) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Features `[M, ...]` of the evaluation images, and which could be read."""
    count = len(of_evaluation)
    blocks = {}
    with _bar(f"{of_evaluation.images.name}: features", len(of_evaluation.images)) as bar:
        for step in range(count):  # each part begins elsewhere, so that parts share the work
            number = (step + config.part * count // config.parts) % count
            blocks[number] = of_evaluation.block(number, bar.update)
    ordered = [blocks[number] for number in range(count)]
    return np.concatenate([block.features for block in ordered]), np.concatenate([block.readable for block in ordered])


def _bar(text: str, total: int) -> tqdm[Any]:
    return tqdm(total=total, desc=text, unit=" images", smoothing=0.05, disable=None)


@dataclass(frozen=True)
class _Part:
    """What a part has found."""

    nearest: Nearest
    unreadable_train: int
    unreadable_evaluation: int

    def save(self, path: Path) -> None:
        try:
            with published_file(path) as aside, open(aside, "wb") as handle:
                np.savez(
                    handle,
                    similarity=self.nearest.similarity,
                    index=self.nearest.index,
                    unreadable=np.array([self.unreadable_train, self.unreadable_evaluation]),
                )
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def read(cls, path: Path, rows: int, k: int, train: int) -> _Part | None:
        """What `save` wrote; None where there is none that is whole."""
        try:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
                similarity, index, unreadable = (file[name] for name in ("similarity", "index", "unreadable"))
        # OSError: there is none; the others: it is damaged.
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if not (
            similarity.shape == index.shape == (rows, k)
            and (similarity.dtype, index.dtype) == (np.float64, np.int64)
            and unreadable.shape == (2,)
            and unreadable.dtype.kind == "i"
            and index.min(initial=0) >= -1
            and index.max(initial=0) < train
        ):
            return None
        return cls(Nearest(similarity, index), int(unreadable[0]), int(unreadable[1]))


# --- whitening ---------------------------------------------------------------------------------------------------


def with_whitening(
    method: RmacMethod,
    train: ImageSet,
    sample: int,
    dimensions: int | None,
    features: Path,
    *,
    workers: int = 0,
    batch: int = 16,
) -> RmacMethod:
    """The method with a PCA whitening, learned from the regions of training images drawn at random, and kept.

    Args:
        method: Without one.
        train: Where the sample is from.
        sample: Images.
        dimensions: To keep; None: all in which the sample varies.
        features: Where it is kept.
        workers: Threads that decode; 0: one for each core.
        batch: Images that the network takes at a time.

    Raises:
        UserError: The sample is too small, or the file that was kept is damaged.
    """
    if sample < 2:
        raise UserError(f"--whiten is {sample}, but must be 2 training images or more")
    sample = min(sample, len(train))
    identity = {"images": train.identity, "method": method.identity, "sample": sample, "dimensions": dimensions}
    path = features / f"whitening-{digest_of(identity)[:16]}.safetensors"
    channels = method.network.channels
    try:
        features.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # parts that start together learn it once, and have the same
            if path.exists():
                whitening = Whitening.load(path, channels)
            else:
                whitening = Whitening.learn(_moments(method, train, sample, workers or cores(), batch), dimensions)
                whitening.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return RmacMethod(method.network, side=method.side, whitening=whitening, device=method.device)


def _moments(method: RmacMethod, train: ImageSet, sample: int, workers: int, batch: int) -> Moments:
    moments = Moments(method.network.channels)
    drawn = np.sort(generator("whitening", train.identity).permutation(len(train))[:sample]).tolist()
    waiting: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}

    def take(alike: list[NDArray[np.uint8]], told: Callable[[int], object]) -> None:
        moments.add(method.regions(alike))
        told(len(alike))

    with _bar(f"{train.name}: whitening", sample) as bar:
        for _, pixels in decoded(train, drawn, method, workers):
            if pixels is None:
                bar.update()
                continue
            alike = waiting.setdefault(pixels.shape, [])
            alike.append(pixels)
            if len(alike) == batch:
                take(waiting.pop(pixels.shape), bar.update)
        for alike in waiting.values():
            take(alike, bar.update)
    return moments
