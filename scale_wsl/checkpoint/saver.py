"""Saves checkpoints while training goes on, or at once; all ranks together succeed or fail.

A save has two parts. First this rank's share of the tensors is copied to host memory: what the next forward pass or
the next shard would change at once, the rest while the next step computes, until `wait_staged`. Then a thread writes
it, and the ranks agree through a process group of their own that all is on disk, before the first of them publishes it.
So the training's own process groups never wait for a disk, and a checkpoint is never made of two steps.

At most one save is in flight. What goes wrong in it is raised later, by whichever method comes next: `failed` is for
the trainer, which lets the ranks agree that some rank has seen it.
"""

from __future__ import annotations

import logging
import shutil
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scale_wsl.checkpoint import index
from scale_wsl.checkpoint.layout import TENSORS, Meta, aside_of, publish, remove_leftovers
from scale_wsl.checkpoint.pieces import Box, Piece, owned_pieces
from scale_wsl.checkpoint.staging import Staging
from scale_wsl.checkpoint.stream import dtype_name
from scale_wsl.checkpoint.writer import complete, write_pieces
from scale_wsl.errors import UserError
from scale_wsl.shards import FlatShard

__all__ = ["Saver"]

_THREADS = 2  # that copy and write, on each rank
_COPIED = 16 << 20  # bytes that a thread copies at a time
_PATIENCE = timedelta(hours=6)  # for the slowest rank's disk; a rank that has died is noticed at once
_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_Problem = tuple[bool, str]  # whether the user can mend it, and what it is


class Saver:
    """Saves to one run's checkpoint folder. All ranks of the default process group make one and call it alike.

    Args:
        folder: where `step-<step>/` folders go, seen by all ranks.
        keep: how many checkpoints stay, the newest.
        asynchronous: write while training goes on, for one more copy of this rank's share in host memory; otherwise
            `start` returns when the checkpoint is published, and needs no such memory.
        device: where the tensors are.
    """

    def __init__(
        self, folder: Path, *, keep: int, asynchronous: bool = True, device: torch.device | None = None
    ) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self._cuda = device is not None and device.type == "cuda"
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._staging = Staging(pinned=self._cuda)
        self._copies: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._copied: Any = None  # the event after the last copy
        self._staged = threading.Event()
        self._staged.set()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    # --- what the trainer calls ----------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> None:
        """Get memory for this rank's share ready in the background, so that the first save need not wait for it."""
        if self.asynchronous:
            self._staging.reserve(nbytes)

    def start(
        self, shards: Iterable[tuple[str, FlatShard]], meta: Meta, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Begin to save `step-<meta.step>/`; first waits for the save before, if it is still in flight (collective).

        Args:
            shards: every tensor that this rank holds any part of, by its name in the checkpoint. A shard that is not
                `lasting` is copied, or written, before the next one is taken, so they may be made one by one.
            meta: without `files` and `hashes`.
            files: contents of small files that go along (`vocabulary.json`), the same on every rank.

        Raises:
            UserError: the save before, or this one where it is not asynchronous, has failed: the disk is full, for one.
            RuntimeError: it failed by a defect, or a rank has died.
        """
        self.wait()
        final = self.folder / f"step-{meta.step:08d}"
        files = files or {}
        if not self.asynchronous:
            with ThreadPoolExecutor(_THREADS) as threads:
                self._failure = self._save(
                    final, meta, files, lambda: self._write_at_once(threads, aside_of(final), shards)
                )
            self._raise()
            return
        report, pieces, later = self._stage(shards)
        self._staged.clear()

        def job() -> None:
            with ThreadPoolExecutor(_THREADS) as threads:
                try:
                    _, problem = _attempt(lambda: self._copy(threads, later))
                finally:
                    self._staged.set()
                if self._copies is not None:
                    _, lost = _attempt(self._copies.synchronize)
                    problem = problem or lost
                self._failure = self._save(
                    final, meta, files, lambda: self._write(threads, aside_of(final), 0, report, pieces), problem
                )

        self._thread = threading.Thread(target=job, name="checkpoint")
        self._thread.start()

    def wait_staged(self) -> None:
        """Wait until the weights may change: to be called before every update. Costs nothing while nothing is saved."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)  # the device waits, not this thread
            self._copied = None
        self._staged.wait()

    @property
    def failed(self) -> bool:
        """Whether a save has failed on this rank as far as is known; other ranks may know it a moment sooner or later.

        So the ranks must agree (any of them, by the all-reduce that each step has anyway) before they `raise_failure`.
        """
        return self._failure is not None

    def raise_failure(self) -> None:
        """Raise what `failed` told of, on any rank: waits for this rank's own part of it first.

        Raises:
            UserError: the checkpoint could not be written: folder, reason and rank.
            RuntimeError: by a defect, or a rank has died.
        """
        self.wait()
        raise RuntimeError("another rank has failed to save a checkpoint")  # only where it has told nobody

    def wait(self) -> None:
        """Wait until nothing is in flight (at the end of training, say).

        Raises:
            UserError: see `raise_failure`.
            RuntimeError: see there.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the save in flight; after an error its own is only logged."""
        try:
            self.wait()
        except (UserError, RuntimeError) as failure:
            if error is None:
                raise
            _log.warning("%s", failure)

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # --- this rank's share ---------------------------------------------------------------------------------------

    def _stage(
        self, shards: Iterable[tuple[str, FlatShard]]
    ) -> tuple[index.Report, list[tuple[Piece, Box]], list[tuple[Tensor, Tensor]]]:
        """Copy what does not last; returns the pieces in host memory, and what is left for threads to copy: to, from.

        What lasts on a GPU is copied by a stream of its own; what is offloaded is in host memory already, as on a CPU.
        """
        self._staging.reset()
        report, pieces = index.Report(), []
        later: list[tuple[Tensor, Tensor]] = []
        streamed: list[tuple[Tensor, Tensor]] = []
        for name, shard in shards:
            report.tensors[name] = (dtype_name(shard.local.dtype), tuple(shard.shape))
            for piece, box in owned_pieces(name, shard):
                values = self._staging.like(piece.values)
                pieces.append((replace(piece, values=values), box))
                if shard.lasting:
                    (streamed if piece.values.is_cuda else later).append((values, piece.values))
                else:
                    values.copy_(piece.values, non_blocking=self._cuda)
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):
                for values, live in streamed:
                    values.copy_(live, non_blocking=True)
                self._copied = self._copies.record_event()
        return report, pieces, later

    def _copy(self, threads: ThreadPoolExecutor, later: list[tuple[Tensor, Tensor]]) -> None:
        """Copy what lasts in host memory; runs beside training."""
        for _ in threads.map(lambda pair: pair[0].copy_(pair[1]), _in_blocks(later)):
            pass

    def _write_at_once(
        self, threads: ThreadPoolExecutor, aside: Path, shards: Iterable[tuple[str, FlatShard]]
    ) -> index.Report:
        """Write without a copy: what does not last as it comes, then the rest with several threads."""
        report, lasting = index.Report(), []

        def passing() -> Iterator[tuple[Piece, Box]]:
            for name, shard in shards:
                report.tensors[name] = (dtype_name(shard.local.dtype), tuple(shard.shape))
                for piece, box in owned_pieces(name, shard):
                    if shard.lasting:
                        lasting.append((piece, box))
                    else:
                        yield replace(piece, values=piece.values.cpu()), box

        coming = passing()
        try:
            passed = write_pieces(aside / TENSORS, self._file(0), coming)
        finally:
            for _ in coming:  # to make a shard can be a collective, which this rank must not leave
                pass
        return _join([passed, self._write(threads, aside, 1, report, lasting)])

    def _write(
        self,
        threads: ThreadPoolExecutor,
        aside: Path,
        number: int,
        report: index.Report,
        pieces: list[tuple[Piece, Box]],
    ) -> index.Report:
        """Write pieces that last, a file for each thread; a file gets the next largest piece when it has the least.

        Args:
            threads: that write.
            aside: the checkpoint's folder.
            number: of this rank's first file.
            report: of the tensors that the pieces are of.
            pieces: in any order.

        Returns:
            The report with what was written.
        """
        shares: list[list[tuple[Piece, Box]]] = [[] for _ in range(_THREADS)]
        sizes = [0] * _THREADS
        for piece, box in sorted(pieces, key=lambda entry: -entry[0].nbytes):
            least = sizes.index(min(sizes))
            shares[least].append((piece, box))
            sizes[least] += piece.nbytes
        written = []
        for place, share in enumerate(shares):
            on_host = ((replace(piece, values=piece.values.cpu()), box) for piece, box in share)
            written.append(threads.submit(write_pieces, aside / TENSORS, self._file(number + place), on_host))
        wait(written)  # all of them: after an error nothing must be written any more
        return _join([report, *(future.result() for future in written)])

    def _file(self, number: int) -> str:
        return f"__{self._rank}_{number}.distcp"

    # --- all ranks together --------------------------------------------------------------------------------------

    def _save(
        self,
        final: Path,
        meta: Meta,
        files: Mapping[str, bytes],
        write: Callable[[], index.Report],
        problem: _Problem | None = None,
    ) -> Exception | None:
        """Write this rank's share by `write`, and publish everybody's (collective); returns what went wrong.

        `problem` is what has gone wrong on this rank already.
        """
        aside = aside_of(final)
        main = self._rank == 0
        try:
            _, unopened = _attempt(lambda: _open(aside) if main else None)
            failure = self._failure_of(problem or unopened, final)
            if failure is None:
                report, problem = _attempt(write)
                failure = self._failure_of(problem, final)
            if failure is None:
                reports = self._gather(report)
                _, problem = _attempt(
                    lambda: publish(final, complete(aside, reports, meta, files), keep=self.keep) if main else None
                )
                failure = self._failure_of(problem, final)
            if failure is not None and main:
                shutil.rmtree(aside, ignore_errors=True)
            return failure
        except Exception as error:  # of the process group
            lost = RuntimeError(f"cannot save {final}: another rank was lost meanwhile")
            lost.__cause__ = error
            return lost

    def _failure_of(self, mine: _Problem | None, final: Path) -> Exception | None:
        """What the ranks have met so far, the same on every rank (collective)."""
        found: list[_Problem | None] = [None] * self._size
        dist.all_gather_object(found, mine, group=self._group)
        for mendable in (False, True):  # a defect first
            for rank, problem in enumerate(found):
                if problem is not None and problem[0] == mendable:
                    text = f"cannot save {final}: {problem[1]} (rank {rank})"
                    return UserError(text) if mendable else RuntimeError(text)
        return None

    def _gather(self, report: index.Report | None) -> list[index.Report]:
        """All ranks' reports on the first rank, none on the others (collective)."""
        reports: list[Any] | None = [None] * self._size if self._rank == 0 else None
        dist.gather_object(report, reports, dst=0, group=self._group)
        return reports or []


def _open(aside: Path) -> None:
    """Make the folder that the ranks write to."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(aside.parent)
    (aside / TENSORS).mkdir(parents=True)


def _attempt(do: Callable[[], _T]) -> tuple[_T | None, _Problem | None]:
    """Do it, and tell what went wrong instead of raising it: the other ranks must hear of it first."""
    try:
        return do(), None
    except OSError as error:
        return None, (True, error.strerror or str(error))
    except UserError as error:
        return None, (True, str(error))
    except Exception:
        return None, (False, traceback.format_exc())


def _in_blocks(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors cut into parts of equal bytes, so that threads share large ones."""
    for values, live in pairs:
        count = max(1, _COPIED // values.element_size())
        for start in range(0, values.numel(), count):
            yield values[start : start + count], live[start : start + count]


def _join(reports: Iterable[index.Report]) -> index.Report:
    joined = index.Report()
    for report in reports:
        joined.tensors |= report.tensors
        joined.written += report.written
        joined.files |= report.files
    return joined
