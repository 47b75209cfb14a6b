"""SIGTERM and SIGUSR2 mean: finish the step, save, exit 0. A cluster that takes the machines back loses nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from scale_wsl.training.failure import NOTE

__all__ = ["Preemption"]


class Preemption:
    """A context in which SIGTERM and SIGUSR2 only raise a flag; every rank looks at it once a step.

    A launcher sends SIGTERM too, to the ranks that are left when one has failed. Those may be waiting for it in a
    collective that no signal interrupts; so from the first signal on, a thread ends this process as soon as the run
    folder says that a rank has failed.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.requested = False
        self._folder = folder
        self._before: dict[signal.Signals, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self.requested and self._folder is not None:
            threading.Thread(target=self._end_with_the_others, args=(self._folder,), daemon=True).start()
        self.requested = True

    @staticmethod
    def _end_with_the_others(folder: Path) -> None:
        while not (folder / NOTE).exists():
            time.sleep(0.5)
        time.sleep(5)  # time to end by itself, which is cleaner
        os._exit(1)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
