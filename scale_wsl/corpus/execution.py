"""Runs one function over many tasks: in processes of this machine, or on daft, alone or on a Ray cluster.

A task writes its own result as a file, published by one rename, and a task whose file is there is not run again: that
is how a killed preparation goes on. So what a stage leaves depends neither on the engine nor on how often it was begun.
Must never hold results: a task returns nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from scale_wsl.errors import UserError
from scale_wsl.recipe import setting

__all__ = ["Workers", "refuse_import", "run_stage"]

Task = TypeVar("Task")

_RETRIES = 3  # of a stage on a cluster whose nodes may go


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Section `workers`: who does the work. Whoever it is, the result is the same, byte for byte."""

    engine: str = setting(
        "processes", "processes: of this machine; daft: the library of that name, on Ray where `address` is given."
    )
    count: int | None = setting(None, "Processes of this machine; null: one for each core.")
    address: str | None = setting(
        None, "daft: a Ray cluster, such as auto or ray://head:10001, whose nodes all see the folders that are named."
    )

    def __post_init__(self) -> None:
        if self.engine not in ("processes", "daft"):
            raise UserError(f"workers.engine is {self.engine!r}, but must be processes or daft")
        if self.count is not None and self.count < 1:
            raise UserError(f"workers.count is {self.count}, but must be at least 1")
        if self.address is not None and self.engine != "daft":
            raise UserError(f"workers.address is {self.address}, which needs workers.engine=daft")
        if self.address is not None and self.count is not None:
            raise UserError("workers.count is of this machine's processes, and a cluster has its own: leave it out")

    @property
    def here(self) -> int:
        """How many processes of this machine work."""
        return self.count or _cores()


def refuse_import() -> None:
    """Refuse to work in a process that is only importing the user's script, in order to become a worker.

    Raises:
        UserError: That is so; the worker would wait for the lock that its parent holds.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError("a script that prepares a data set must do so under: if __name__ == '__main__'")


def run_stage(
    what: str,
    tasks: Sequence[Task],
    function: Callable[[Task], None],
    result: Callable[[Task], Path],
    workers: Workers,
    weight: Callable[[Task], int] = lambda task: 1,
    unit: str = " parts",
) -> None:
    """Run `function` on each task whose `result` is not there yet, in any order.

    Args:
        what: Names the stage on the progress bar.
        tasks: Picklable.
        function: Picklable; publishes `result(task)`.
        result: The file or folder that says that a task is done.
        workers: Who does it.
        weight: How much of the progress bar a task is.
        unit: What the weights count.

    Raises:
        UserError: A task's own, or a worker was killed.
    """
    todo = [task for task in tasks if not result(task).exists()]
    done = sum(map(weight, tasks)) - sum(map(weight, todo))
    with tqdm(total=done + sum(map(weight, todo)), initial=done, desc=what, unit=unit, disable=None) as bar:
        if workers.engine == "daft":
            finished = _on_daft(function, todo, result, workers)
        elif workers.here == 1 or len(todo) <= 1:
            finished = _here(function, todo)
        else:
            finished = _in_processes(function, todo, workers.here)
        for task in finished:
            bar.update(weight(task))
    missing = next((result(task) for task in todo if not result(task).exists()), None)
    if missing is not None:
        raise UserError(f"{missing} was made and is not there: do all workers see the same {missing.parent}?")


def _here(function: Callable[[Task], None], tasks: Sequence[Task]) -> Iterator[Task]:
    for task in tasks:
        function(task)
        yield task


# --- processes of this machine -------------------------------------------------------------------------------------

_function: Callable[[Any], None]


def _begin(function: Callable[[Any], None]) -> None:
    global _function
    _function = function
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # killed, it told nobody
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(task: Any) -> None:
    _function(task)


def _in_processes(function: Callable[[Task], None], tasks: Sequence[Task], count: int) -> Iterator[Task]:
    # Not forked: a fork would copy the locks of other threads, held as they are.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(min(count, len(tasks)), context, initializer=_begin, initargs=(function,))
    waiting: dict[Future[None], Task] = {}
    rest = iter(tasks)
    try:
        while True:
            for task in rest:
                waiting[pool.submit(_work, task)] = task
                if len(waiting) >= 4 * count:
                    break
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                future.result()
                yield waiting.pop(future)
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended, perhaps for want of memory: what is done is kept, start again with a smaller "
            "workers.count"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- daft ----------------------------------------------------------------------------------------------------------


def _on_daft(
    function: Callable[[Task], None], tasks: Sequence[Task], result: Callable[[Task], Path], workers: Workers
) -> Iterator[Task]:
    daft = _daft(workers)
    for attempt in range(_RETRIES):
        todo = [task for task in tasks if not result(task).exists()]
        try:
            for number, mistake in _numbers_done(daft, function, todo, workers):
                if mistake:
                    raise UserError(mistake)
                yield todo[number]
            return
        except UserError:
            raise
        except Exception as error:  # what a lost node raises depends on where it was lost
            if workers.address is None or attempt == _RETRIES - 1:
                raise
            tqdm.write(f"the cluster failed ({type(error).__name__}); what is left is tried again")


def _numbers_done(
    daft: Any, function: Callable[[Task], None], tasks: Sequence[Task], workers: Workers
) -> Iterator[tuple[int, str]]:
    """(number of a task, the user's mistake or "") as they end. What goes through daft is numbers and texts alone."""
    if not tasks:
        return
    text = daft.DataType.string()

    def run(number: int) -> str:
        try:
            function(tasks[number])
        except UserError as error:
            return f"{number} {error}"
        return f"{number} "

    frame = daft.from_pydict({"number": list(range(len(tasks)))})
    if workers.address is None:  # its own processes, or Python's lock would let one of them work at a time

        class Local:
            def run(self, numbers: Any) -> list[str]:
                return [run(number) for number in numbers.to_pylist()]

        Local.run = daft.method.batch(return_dtype=text, batch_size=1)(Local.run)  # type: ignore[method-assign]
        local = daft.cls(max_concurrency=workers.here, use_process=True)(Local)()
        frame = frame.select(local.run(daft.col("number")).alias("done"))
    else:  # stateless, so that what a lost node had is given to another
        remote = daft.func(return_dtype=text)(run)
        frame = frame.into_partitions(len(tasks)).select(remote(daft.col("number")).alias("done"))
    for row in frame.iter_rows():
        number, _, mistake = row["done"].partition(" ")
        yield int(number), mistake


def _daft(workers: Workers) -> Any:
    # It would tell its makers about every import and query.
    os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        import daft
    except ImportError:
        raise UserError("workers.engine=daft needs daft: pip install 'scale-wsl[cluster]'") from None
    running = daft.get_or_infer_runner_type()
    if workers.address is None:
        return daft
    try:
        import ray
    except ImportError:
        raise UserError("workers.address needs Ray: pip install 'scale-wsl[cluster]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=workers.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"there is no Ray cluster at workers.address={workers.address}: {' '.join(str(error).split())[:200]}"
            ) from None
    if running != "ray":
        try:
            daft.set_runner_ray()
        except Exception as error:
            raise UserError(f"daft cannot be moved to Ray in this process: {error}") from None
    return daft
