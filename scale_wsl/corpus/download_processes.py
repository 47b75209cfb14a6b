"""Starts, asks and ends the processes that fetch shards for `download.py`.

Must never outlive its block with a process left, nor take a process that died for a shard that is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scale_wsl.corpus.download_shard import ROWS, Settings
from scale_wsl.errors import UserError

__all__ = ["Processes"]

_ATTEMPTS = 3  # at a shard, by processes that die
_CODE = (
    f"import sys; sys.path.append({str(Path(__file__).resolve().parents[2])!r}); "
    "from scale_wsl.corpus.download_shard import main; main()"
)


class Processes:
    """Processes that fetch shards (`download_shard.py`), started when they are needed and ended with the block.

    Args:
        settings: What they are told.
        count: How many at a time.
    """

    def __init__(self, settings: Settings, count: int) -> None:
        self.count = count
        self._settings = settings
        self._staging = Path(settings.staging)
        self._pool = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[str]] = []
        self._ended = False

    def submit(self, number: int) -> Future[int]:
        """Have a shard fetched; how many images it has."""
        return self._pool.submit(self._fetch, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._pool.shutdown()  # whoever waited for an answer got none
        for process in self._all:
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()

    def _fetch(self, number: int) -> int:
        for attempt in range(_ATTEMPTS):
            try:
                process = self._idle.get_nowait()
            except queue.Empty:
                process = self._start()
            answer = self._ask(process, number)
            if answer:
                self._idle.put(process)
                shutil.rmtree(self._staging / str(number), ignore_errors=True)
                break
            code = process.wait()
            if self._ended:
                return 0
            if attempt + 1 < _ATTEMPTS:
                self._clear(number)
        else:
            raise UserError(
                f"the process that fetches shard {number} ended {_ATTEMPTS} times (exit code {code}, which is -9 where "
                f"memory was short; see {self._log}): run again with fewer --processes, or a smaller --max-bytes"
            )
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "defect" in answer:
            raise RuntimeError(f"fetching shard {number} failed:\n{answer['defect']}")
        return int(answer["images"])

    def _ask(self, process: subprocess.Popen[str], number: int) -> dict[str, Any]:
        """The process's answer; an empty one where it has ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            if line := process.stdout.readline():
                answer: dict[str, Any] = json.loads(line)
                return answer
        return {}

    def _clear(self, number: int) -> None:
        """Remove what a dead process left of a shard, all but what it was asked for."""
        for path in (self._staging / str(number)).iterdir():
            if path.name != ROWS:
                path.unlink()

    @property
    def _log(self) -> Path:
        return self._staging / "log"

    def _start(self) -> subprocess.Popen[str]:
        # -P: the working folder is not a place to import from. Warnings are img2dataset's own affair. Ctrl-C is the
        # parent's: a new session does not get it.
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-c", _CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                cwd=self._staging,
            )
        self._all.append(process)
        if self._ended:
            process.kill()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(dataclasses.asdict(self._settings)) + "\n")
            process.stdin.flush()
        return process
