"""SIGTERM and SIGUSR2 mean: finish the step, save, exit 0. A cluster that takes the machines back loses nothing."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Preemption"]


class Preemption:
    """A context in which SIGTERM and SIGUSR2 only raise a flag; every rank looks at it once a step."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
