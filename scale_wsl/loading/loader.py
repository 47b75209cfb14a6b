"""Batches of decoded, labelled images, read by worker processes in the order that the global sample counter decides.

The order is computed in the trainer's process and workers receive (record, position) pairs, so batches are bit for
bit the same for any number of workers. Must never put another sample in the place of one that cannot be decoded, and
never leave a worker process behind.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from scale_wsl.errors import UserError
from scale_wsl.loading.config import DataConfig
from scale_wsl.loading.decode import CorruptImage, decode, eval_crop, mean_colour, train_crop
from scale_wsl.loading.order import Order, micro_batch_positions
from scale_wsl.randomness import generator

__all__ = ["Batch", "EvalLoader", "Records", "TrainLoader"]

logger = logging.getLogger("scale_wsl.loading")

# To a whole process group these mean "save and stop" to the trainer, which needs batches until it has.
TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

_LOGGED_IN_FULL = 10  # corrupt images that a rank reports one by one, before it reports every thousandth


class Records(Protocol):
    """What the loaders need of a data set (`scale_wsl.corpus.shards.Dataset` has it); workers get a pickled copy."""

    @property
    def keys(self) -> Any:
        """`[N]`, the name of each image."""

    @property
    def max_labels(self) -> int:
        """The largest number of labels of one image, K."""

    def __len__(self) -> int: ...

    def labels(self, i: int, /) -> NDArray[np.int32]:
        """The labels of image i."""

    def read(self, i: int, /) -> bytes:
        """The bytes of image i's file."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's micro-batch.

    A corrupt image, or one that only pads an evaluation batch, is a row without labels: ids -1, mass 0, and the mean
    colour as its picture.
    """

    images: torch.Tensor  # uint8 [N, 3, H, W]
    ids: torch.Tensor  # int64 [N, K]: global label ids, -1 pads
    mass: torch.Tensor  # float32 [N, K]: 1/k for each of an image's k labels, 0 on pads
    records: torch.Tensor  # int64 [N]: the record of the data set, -1 for padding
    corrupt: int = 0  # corrupt images in this micro-batch
    errors: tuple[str, ...] = ()  # key and reason of each of them

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device, without waiting for the copy when it comes from pinned memory."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the data loader's own thread calls this where there is CUDA."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(move(self.images), move(self.ids), move(self.mass), move(self.records), self.corrupt, self.errors)


class TrainLoader:
    """The micro-batches of one rank from a global sample counter on, forever: `accumulation` of them make a step.

    Which samples a step consumes, and which of them come here, is `micro_batch_positions`'s rule. The loader keeps no
    state that a checkpoint would need: the trainer counts `micro_batch * accumulation * world_size` samples a step, and
    hands that counter in as `start` when it resumes. Augmentation is drawn from (seed, global position) alone.

    An iterator and a context manager; `close` ends its workers. Prefetched batches take
    `workers * prefetch * micro_batch * 3 * image_size**2` bytes.
    """

    def __init__(
        self,
        dataset: Records,
        order: Order,
        config: DataConfig,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        start: int,
    ) -> None:
        if order.images != len(dataset):
            raise ValueError(f"the order is one of {order.images} images, but the data set has {len(dataset)}")
        split = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world_size": world_size}
        micro_batch_positions(start, 0, **split)  # raises on a split that cannot be, before any process starts
        samples = _Samples(dataset, config, order.seed)
        self._stream = _Stream(samples, _train_requests(order, start, **split), config)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def close(self) -> None:
        """End the workers; harmless when repeated."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class EvalLoader:
    """Every record of a data set exactly once over all ranks; every rank gets the same number of batches, all full.

    Batch b of rank r holds the records from `(b * world_size + r) * micro_batch` on, and where there are none left rows
    that only pad (records -1). Each iteration is a pass of its own, with workers of its own that end with it.
    """

    def __init__(self, dataset: Records, config: DataConfig, *, micro_batch: int, rank: int, world_size: int) -> None:
        if not (0 <= rank < world_size and micro_batch > 0):
            raise ValueError(f"no batch of {micro_batch} for rank {rank} of {world_size}")
        self._samples = _Samples(dataset, config, None)
        self._config = config
        self._total, self._micro_batch, self._rank, self._world_size = len(dataset), micro_batch, rank, world_size

    def __len__(self) -> int:
        return -(-self._total // (self._micro_batch * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        with _Stream(self._samples, self._requests(), self._config) as stream:
            yield from stream

    def _requests(self) -> Iterator[_Request]:
        for batch in range(len(self)):
            first = (batch * self._world_size + self._rank) * self._micro_batch
            records = np.arange(first, first + self._micro_batch)
            yield np.where(records < self._total, records, -1), None


# --- in the trainer's process --------------------------------------------------------------------------------------

_Request = tuple[NDArray[np.int64], range | None]  # records (-1: padding), and their global positions in training


def _train_requests(order: Order, counter: int, **split: int) -> Iterator[_Request]:
    while True:
        for micro_step in range(split["accumulation"]):
            positions = micro_batch_positions(counter, micro_step, **split)
            yield order.records(positions.start, positions.stop)[0], positions
        counter += split["micro_batch"] * split["accumulation"] * split["world_size"]


class _Stream:
    """The batches that a stream of requests asks for, made by worker processes, and the end of those processes."""

    def __init__(self, samples: _Samples, requests: Iterable[_Request], config: DataConfig) -> None:
        workers: dict[str, Any] = {}
        if config.workers:
            workers = {
                "multiprocessing_context": _WorkerContext(),
                "prefetch_factor": config.prefetch,
                "worker_init_fn": _start_worker,
            }
        self._reported = 0
        with warnings.catch_warnings():
            # More workers than cores is the user's choice, and PyTorch, which counts one rank's, cannot judge it.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            self._batches: Iterator[Batch | _Refusal] | None = iter(
                DataLoader(
                    samples,  # type: ignore[arg-type]  # indexed by requests instead of numbers
                    batch_size=None,  # a request is a batch already
                    sampler=requests,
                    collate_fn=_as_it_is,  # type: ignore[arg-type]
                    num_workers=config.workers,
                    pin_memory=torch.cuda.is_available(),
                    generator=torch.Generator(),  # or it would draw a seed, unused here, from the global one
                    **workers,
                )
            )
        # Workers ignore the SIGTERM by which multiprocessing ends what is left at exit, and would then wait for them
        # forever; so they are ended before that, also when an error keeps `close` from being called.
        self._at_exit = functools.partial(_stop_referenced, weakref.ref(self._batches))
        atexit.register(self._at_exit)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise ValueError("the loader is closed")
        batch = next(self._batches)
        if isinstance(batch, _Refusal):
            raise UserError(batch.sentence)
        for error in batch.errors:
            self._reported += 1
            if self._reported <= _LOGGED_IN_FULL or self._reported % 1000 == 0:
                rest = "; from now on every thousandth is reported" if self._reported == _LOGGED_IN_FULL else ""
                logger.warning("corrupt image %d skipped: %s%s", self._reported, error, rest)
        return batch

    def close(self) -> None:
        if self._batches is not None:
            _stop(self._batches)
            atexit.unregister(self._at_exit)
            self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class WorkerProcess(ForkServerProcess):
    """A process of the loader's; its class is how `_preload` knows it."""


class _WorkerContext(ForkServerContext):
    """Workers are forked from a small process without threads or sockets, not from the trainer, which has both."""

    Process = WorkerProcess

    def __init__(self) -> None:
        self.set_forkserver_preload(["scale_wsl.loading._preload"])  # without effect when the server runs already
        # multiprocessing's process that tracks semaphores ignores SIGINT and SIGTERM, but a SIGUSR2 to the whole
        # process group would kill it; a signal mask is inherited.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            resource_tracker.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        forkserver.ensure_running()


def _stop(batches: Any) -> None:
    if hasattr(batches, "_shutdown_workers"):  # absent where the trainer's own process decodes
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():  # stuck, say in a read from a dead file system
                worker.kill()
                worker.join(5.0)


def _stop_referenced(reference: weakref.ref[Any]) -> None:
    if (batches := reference()) is not None:
        _stop(batches)


# --- in the workers ------------------------------------------------------------------------------------------------


def _start_worker(_: int) -> None:
    for number in TRAINERS_SIGNALS:  # again, in case that the fork server was another's, without `_preload`
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End at once when the trainer is gone: PyTorch's own watch is on the fork server, which outlives its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """A `UserError` on its way from a worker; raised there, it would arrive with the worker's traceback in its text."""

    sentence: str


def _as_it_is(batch: Batch | _Refusal) -> Batch | _Refusal:
    return batch


class _Samples:
    """Turns a request into a batch: random crops where it names positions (training), centre crops where not."""

    def __init__(self, dataset: Records, config: DataConfig, seed: int | None) -> None:
        self.dataset = dataset
        self.config = config
        self.seed = seed

    def __getitem__(self, request: _Request) -> Batch | _Refusal:
        try:
            return self._batch(*request)
        except UserError as error:  # a shard that is gone, say
            return _Refusal(str(error))

    def _batch(self, records: NDArray[np.int64], positions: range | None) -> Batch:
        rows, side = len(records), self.config.image_size
        images = torch.empty(rows, 3, side, side, dtype=torch.uint8)
        ids = torch.full((rows, self.dataset.max_labels), -1, dtype=torch.int64)
        mass = torch.zeros(rows, self.dataset.max_labels, dtype=torch.float32)
        errors = []
        for row, record in enumerate(records.tolist()):
            if record < 0:
                images[row] = mean_colour(side)
                continue
            try:
                images[row] = self._image(record, None if positions is None else positions[row])
            except CorruptImage as error:
                errors.append(f"{self.dataset.keys[record]} (record {record}): {error}")
                images[row] = mean_colour(side)
                continue
            labels = np.asarray(self.dataset.labels(record), np.int64)
            if len(labels):
                ids[row, : len(labels)] = torch.from_numpy(labels)
                mass[row, : len(labels)] = 1 / len(labels)
        return Batch(images, ids, mass, torch.from_numpy(np.asarray(records, np.int64)), len(errors), tuple(errors))

    def _image(self, record: int, position: int | None) -> torch.Tensor:
        config = self.config
        image = decode(self.dataset.read(record), config.max_pixels)
        if position is None:
            return eval_crop(image, config.short_side, config.image_size)
        assert self.seed is not None
        rng = generator("augment", self.seed, position)
        return train_crop(image, config.image_size, rng, min_scale=config.min_scale, flip=config.flip)
