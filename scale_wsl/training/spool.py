"""What a run records for MLflow, on local disk first: an append-only file, and how much of it has been sent.

Two processes share a spool: the trainer appends, the sender reads. Neither may ever wait for the other, and nothing
here may touch the network or import MLflow.

    <run>/spool/
        settings.json    where to send, and a random identity by which the run is found on the server
        events.jsonl     every event in order, kept whole after sending: it is the run's own record too
        state.json       what the sender has done (published by rename)
        artifacts/       copies of files that wait to be sent
        sender.log       what MLflow and its libraries print, and tracebacks of the sender
        lock             held by the one sender that is at work
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from scale_wsl.files import published_file

__all__ = ["ENDED", "Settings", "Spool", "State", "metric_value"]

ENDED = ("FINISHED", "FAILED", "KILLED")

Event = dict[str, Any]
Content = TypeVar("Content", "Settings", "State")


@dataclass(frozen=True)
class Settings:
    """Where a spool is sent: `settings.json`."""

    uri: str
    experiment: str
    identity: str  # a tag of the MLflow run, so that a run is never created twice
    request_timeout: int  # seconds
    finish_timeout: float  # seconds


@dataclass(frozen=True)
class State:
    """What a sender has done: `state.json`."""

    offset: int = 0  # bytes of events.jsonl that have been sent
    run_id: str = ""  # MLflow's; empty until the run was created
    session: str = ""  # the trainer process whose start was sent last
    status: str = ""  # the run's status as last sent


class Spool:
    """A spool folder. Everything that the trainer's side raises is an `OSError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = folder / "events.jsonl"
        self.log = folder / "sender.log"
        self._handle: IO[bytes] | None = None
        self._torn = False
        self._last_time = 0

    # --- the trainer's side --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the folder and open the file for appending; a line that a dying process left half-written is ended."""
        (self.folder / "artifacts").mkdir(parents=True, exist_ok=True)
        self._handle = open(self.events, "ab+", buffering=0)  # noqa: SIM115 - as long as the run lasts
        if self._handle.tell():
            self._handle.seek(-1, os.SEEK_END)
            self._torn = self._handle.read(1) != b"\n"
        # Tells `trainer_alive` that somebody is here. Worth nothing more, so no error where it does not work.
        with contextlib.suppress(OSError):
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def append(self, event: Event) -> None:
        """Add an event, with the time (`at`, milliseconds since 1970, all different within a process)."""
        assert self._handle is not None
        self._last_time = max(self._last_time + 1, int(time.time() * 1000))
        text = json.dumps({**event, "at": self._last_time}, allow_nan=False, ensure_ascii=False)
        line = text.encode(errors="replace") + b"\n"  # a lone surrogate, which no database takes, becomes "?"
        line = b"\n" + line if self._torn else line
        self._torn = True  # until the write is known to be whole; a full disk cuts it anywhere
        self._torn = self._handle.write(line) != len(line)

    def keep(self, name: str, write: Callable[[Path], object]) -> str:
        """Let `write` write a file called `name` under `artifacts/`; returns what an event calls it."""
        folder = self.folder / "artifacts" / f"{time.time_ns():020d}"
        folder.mkdir()
        try:
            write(folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return f"{folder.name}/{name}"

    def close(self) -> None:
        """Flush to disk and close."""
        if self._handle is not None:
            os.fsync(self._handle.fileno())
            self._handle.close()
            self._handle = None

    # --- the sender's side ---------------------------------------------------------------------------------------

    def read(self, offset: int = 0, limit: int | None = None) -> Iterator[tuple[Event, int]]:
        """Whole events from `offset` on, each with the offset behind it; a line that is not an event comes as `{}`."""
        if not self.events.exists():
            return
        with open(self.events, "rb") as handle:
            handle.seek(offset)
            for _, line in zip(iter(int, 1) if limit is None else range(limit), handle, strict=False):
                if not line.endswith(b"\n"):
                    return  # still being written
                offset += len(line)
                event = _parse(line)
                yield event or {}, offset  # without its kind, so that the reader gets past it

    def size(self) -> int:
        """Bytes written so far."""
        return self.events.stat().st_size if self.events.exists() else 0

    def count(self, offset: int) -> int:
        """Whole events behind `offset`."""
        return sum(bool(event) for event, _ in self.read(offset))

    def ended(self) -> bool:
        """Whether the last event says that the run is over."""
        if not self.size():
            return False
        with open(self.events, "rb") as handle:
            handle.seek(max(0, self.size() - 4096))
            lines = handle.read().splitlines()
        return bool(lines) and (_parse(lines[-1]) or {}).get("kind") == "finish"

    def trainer_alive(self) -> bool:
        """Whether a trainer has this spool open (False where the file system knows no locks)."""
        if not self.events.exists():
            return False
        with open(self.events, "rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                return False
        return False

    def kept(self, name: str) -> Path | None:
        """The file that an event calls `name`; None when it is not there, or not below `artifacts/`."""
        root = (self.folder / "artifacts").resolve()
        path = (root / name).resolve()
        return path if path.is_file() and root in path.parents else None

    def drop(self, name: str) -> None:
        """Remove a kept file and its folder."""
        path = self.kept(name)
        if path is not None and path.parent != self.folder / "artifacts":
            shutil.rmtree(path.parent, ignore_errors=True)

    def lock(self) -> IO[bytes] | None:
        """Become the one sender of this spool, until the handle is closed; None while another one is."""
        handle = open(self.folder / "lock", "ab")  # noqa: SIM115 - as long as the sender lives
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        except OSError:  # a file system without locks: two senders at once send some events twice, which is harmless
            pass
        return handle

    # --- settings and state --------------------------------------------------------------------------------------

    def settings(self) -> Settings | None:
        """Where to send; None when this is no spool."""
        return _load(self.folder / "settings.json", Settings)

    def state(self) -> State:
        """What has been sent; nothing when no sender ran yet, or its file is damaged (sending again is harmless)."""
        return _load(self.folder / "state.json", State) or State()

    def publish(self, content: Settings | State) -> None:
        """Write `settings.json` or `state.json`."""
        name = "state.json" if isinstance(content, State) else "settings.json"
        with published_file(self.folder / name) as aside:
            aside.write_text(json.dumps(dataclasses.asdict(content), indent=2), encoding="utf-8")


def metric_value(value: float) -> float | str:
    """A metric as strict JSON has it: `float()` reads back what this returns, NaN and infinities as text."""
    value = float(value)
    return value if math.isfinite(value) else repr(value)


_KINDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"session": str, "run_id": str, "name": str, "params": dict, "tags": dict},
    "metrics": {"step": int, "values": dict},
    "artifact": {"name": str, "folder": str},
    "finish": {"status": str},
}


def _parse(line: bytes) -> Event | None:
    """The event on a line; None where it was cut short by a crash or a full disk, or is something else."""
    try:
        event = json.loads(line)
        kinds = _KINDS[event["kind"]] | {"at": int}
        whole = all(isinstance(event[key], kind) for key, kind in kinds.items())
        [float(value) for value in event.get("values", {}).values()]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return event if whole else None


def _load(path: Path, cls: type[Content]) -> Content | None:
    kinds: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: content[field.name] for field in dataclasses.fields(cls)}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    right = all(isinstance(values[field.name], kinds[str(field.type)]) for field in dataclasses.fields(cls))
    return cls(**values) if right else None
