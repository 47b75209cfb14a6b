"""Recording a run in MLflow, from rank 0, in a way that can neither stop nor delay it.

Every record is appended to a spool in the run folder, and that is all the trainer does; a process beside it
(`scale_wsl.training.sender`) sends the spool to MLflow. While MLflow is away records wait, and are sent with their
original times when it is back: at the latest by the next session of the run, or by `replay`. This module must never
import MLflow, use the network, or raise an error because of telemetry.

How a run ends in MLflow: FINISHED, FAILED or KILLED as `Tracker.finish` says. A trainer that dies without a word
(`kill -9`, out of memory) is marked FAILED by its sender. Only where the whole machine dies does a run stay RUNNING,
until it is resumed or replayed.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import posixpath
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from scale_wsl.errors import UserError
from scale_wsl.recipe import setting
from scale_wsl.training.sender import SENT, masked
from scale_wsl.training.spool import Settings, Spool, metric_value

__all__ = ["Replayed", "Tracker", "TrackingConfig", "replay"]

_log = logging.getLogger(__name__)
_RESTARTS = 3  # of a sender that died, say because memory ran out
_WAIT_AFTER_FAILURE = 5.0  # seconds; the other ranks, and the launcher, wait for this one to end
_ROOT = Path(__file__).resolve().parents[2]  # where the package `scale_wsl` lies

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Section `tracking`: what is recorded in MLflow, and where."""

    enabled: bool = setting(True, "record the run in MLflow")
    uri: str = setting("sqlite:///mlflow.db", "MLflow's tracking address: sqlite:///FILE, http://HOST:PORT, ...")
    experiment: str = setting("scale-wsl", "MLflow experiment that the run belongs to; made where it is not there")
    every: int = setting(10, "steps between two metric lines")
    request_timeout: int = setting(10, "seconds after which a request to MLflow counts as unanswered")
    finish_timeout: float = setting(30.0, "seconds that the end of a run waits until MLflow has everything")

    def __post_init__(self) -> None:
        for name in ("uri", "experiment"):
            if not getattr(self, name):
                raise UserError(f"tracking.{name} is empty; set tracking.enabled=false to record nothing")
        for name in ("every", "request_timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"tracking.{name} is {getattr(self, name)}, but must be 1 or more")
        if self.finish_timeout < 0:
            raise UserError(f"tracking.finish_timeout is {self.finish_timeout}, but must not be negative")


class Tracker:
    """Records one session of a run, that is, one process from its start to its end.

    A run that is resumed in the same folder, or with the `run_id` of its checkpoint, goes on in the same MLflow run.
    No method waits for MLflow but `finish`, and that one not for long.

    Args:
        config: section `tracking`; with `enabled` false every method does nothing.
        folder: the run's folder; the spool is `folder/spool`.
        name: of the run in MLflow; "": the name of the run folder.
        run_id: MLflow's run id as the checkpoint has it; None or "" where there is none.
    """

    def __init__(self, config: TrackingConfig, folder: Path, *, name: str = "", run_id: str | None = None) -> None:
        self._config, self._folder, self._given_run_id = config, folder, run_id or ""
        self._name = name or folder.absolute().name
        self._session = uuid.uuid4().hex
        self._spool: Spool | None = None
        self._sender: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._redone: dict[tuple[int, str], float | str] | None = None
        self._finished = False
        if not config.enabled:
            return
        spool = Spool((folder / "spool").absolute())
        try:
            spool.open()
            before = spool.settings()
            spool.publish(
                Settings(
                    uri=_absolute(config.uri),
                    experiment=config.experiment,
                    identity=before.identity if before else uuid.uuid4().hex,
                    request_timeout=config.request_timeout,
                    finish_timeout=config.finish_timeout,
                )
            )
        except OSError as error:
            _log.warning("tracking: cannot write to %s (%s); nothing of this run is recorded", spool.folder, error)
            return
        self._spool = spool
        self._start_sender()

    @classmethod
    def null(cls) -> Tracker:
        """A tracker that records nothing: that of every rank but the first."""
        return cls(TrackingConfig(enabled=False), Path())

    # --- recording -----------------------------------------------------------------------------------------------

    def start(self, params: dict[str, Any], tags: dict[str, str] | None = None) -> None:
        """Say that the run is running, with which parameters and tags.

        Parameters are recorded once; those that a resumed run has changed become tags `resumed.<name>`.
        """
        self._record(
            {
                "kind": "start",
                "session": self._session,
                "run_id": self._given_run_id,
                "name": self._name,
                "params": {metric_name(key): masked(str(value)) for key, value in params.items()},
                "tags": _system_tags() | {key: str(value) for key, value in (tags or {}).items()},
            }
        )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record values at a step, with the present time. NaN and infinities are recorded as what they are.

        What a resumed run does again, with the same result, is not recorded again.
        """
        if self._spool is None:
            return
        points = {metric_name(key): metric_value(value) for key, value in values.items()}
        if self._redone is None:
            self._redone = self._recorded_since(step)
        points = {key: value for key, value in points.items() if self._redone.get((step, key)) != value}
        if points:
            self._record({"kind": "metrics", "step": int(step), "values": points})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, as it is now, under `folder` of the run's artifacts."""
        self._keep(path.name, folder, lambda kept: shutil.copyfile(path, kept))

    def text(self, name: str, content: str) -> None:
        """Record a text as the artifact `name`, which may name folders too (`a/b.txt`)."""
        folder, _, base = name.rpartition("/")
        self._keep(base, folder, lambda kept: kept.write_text(content, encoding="utf-8", errors="replace"))

    def _keep(self, name: str, folder: str, write: Callable[[Path], object]) -> None:
        if self._spool is None:
            return
        try:
            kept = self._spool.keep(name, write)
        except OSError as error:
            _log.warning("tracking: cannot keep the file %s (%s); it is not recorded", name, error)
            return
        self._record({"kind": "artifact", "name": kept, "folder": folder})

    def _record(self, event: dict[str, Any]) -> None:
        if self._spool is None:
            return
        try:
            self._spool.append(event)
        except OSError as error:
            _log.warning(
                "tracking: cannot write to %s (%s); this run is recorded no further", self._spool.folder, error
            )
            self._spool = None
            return
        self._start_sender()

    def _recorded_since(self, step: int) -> dict[tuple[int, str], float | str]:
        """What an earlier session has recorded at `step` and later."""
        assert self._spool is not None
        recorded: dict[tuple[int, str], float | str] = {}
        for event, _ in self._spool.read():
            if event.get("kind") == "metrics" and event["step"] >= step:
                recorded |= {(event["step"], key): value for key, value in event["values"].items()}
        return recorded

    # --- the other process ---------------------------------------------------------------------------------------

    def _start_sender(self) -> None:
        """Start the sender, or start it again when it died."""
        assert self._spool is not None
        if self._starts > _RESTARTS or (self._sender is not None and self._sender.poll() is None):
            return
        self._starts += 1
        try:
            self._sender = _spawn(self._spool, self._session, "")
        except OSError as error:
            _log.warning("tracking: cannot start the process that sends to MLflow (%s)", error)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has answered for the first time (or when nothing is recorded)."""
        if self._spool is None:
            return self._given_run_id or None
        return self._spool.state().run_id or self._given_run_id or None

    # --- the end -------------------------------------------------------------------------------------------------

    def finish(self, status: Status) -> None:
        """Say how the run ended, and wait a while until MLflow has everything; only the first call counts.

        What MLflow does not have by then stays in the spool, and a warning says how to send it.
        """
        if self._finished:
            return
        self._finished = True
        self._record({"kind": "finish", "status": status})
        if self._spool is None:
            return
        limit = self._config.finish_timeout
        sent = False
        if self._sender is not None:
            try:
                limit = limit if status != "FAILED" else min(limit, _WAIT_AFTER_FAILURE)
                sent = self._sender.wait(limit) == SENT
            except subprocess.TimeoutExpired:
                # It ends by itself soon; until then somebody has to wait for it, or it becomes a zombie.
                threading.Thread(target=self._sender.wait, daemon=True).start()
        try:
            self._spool.close()
        except OSError as error:
            _log.warning("tracking: %s may not be whole on disk (%s)", self._spool.folder, error)
        left = 0 if sent else self._spool.count(self._spool.state().offset)
        if left:
            _log.warning(
                "tracking: MLflow at %s does not have all of this run yet: %d records wait in %s; "
                "send them with: scale-wsl track replay %s",
                masked(self._config.uri),
                left,
                self._spool.folder,
                self._folder,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")


@dataclass(frozen=True)
class Replayed:
    """What `replay` did."""

    run_id: str  # MLflow's
    records: int  # that were sent now


def replay(folder: Path, uri: str | None = None) -> Replayed:
    """Send what waits in the spool of the run in `folder`; to `uri`, where it is given, instead of the run's own.

    An MLflow that does not know the run gets a new one with all its metrics (files that were sent elsewhere are gone).

    Raises:
        UserError: the folder has no spool, its run is still going, or MLflow does not answer.
    """
    spool = Spool((folder / "spool").absolute())
    settings = spool.settings()
    if settings is None:
        raise UserError(f"{folder} has no spool of MLflow records: it must be the folder of a run that was recorded")
    if spool.trainer_alive():
        raise UserError(f"the run in {folder} is still going, and sends its records itself as soon as MLflow answers")
    lock = spool.lock()
    if lock is None:
        raise UserError(f"the records of {folder} are being sent right now by another process: try again in a minute")
    lock.close()
    before = spool.state()
    process = _spawn(spool, "", _absolute(uri) if uri else "")
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    after = spool.state()
    if code != SENT:
        raise UserError(
            f"MLflow at {masked(uri or settings.uri)} did not take everything: {spool.count(after.offset)} records "
            f"wait in {spool.folder}, and {spool.log.name} there says why"
        )
    first = before.offset if after.run_id == before.run_id else 0
    return Replayed(after.run_id, spool.count(first))


def _spawn(spool: Spool, session: str, uri: str) -> subprocess.Popen[bytes]:
    """Start the sender. Its signals are its own (a new session): Ctrl-C must not cut off the last records."""
    code = (
        f"import sys; sys.path.append({str(_ROOT)!r}); from scale_wsl.training.sender import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    # -P: the working folder is not a place to import from. Warnings are MLflow's own affair.
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, str(spool.folder), session, str(os.getpid()), uri]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONWARNINGS", None)
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.__stderr__, start_new_session=True, env=environment
    )


def metric_name(name: str) -> str:
    """`name` with what MLflow does not take in a metric's or parameter's name replaced by `_`, at most 250 characters.

    It takes letters, digits, `_ - . : /` and spaces, and a name must be a normal relative path.
    """
    clean = re.sub(r"[^/\w.\- :]", "_", name)[:250].lstrip("/")
    clean = posixpath.normpath(clean) if clean else "_"
    parts = [part if part not in (".", "..") else "_" for part in clean.split("/")]
    return "/".join(parts)


def _absolute(uri: str) -> str:
    """An SQLite address that means the same file from any working folder; other addresses as they are."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri.startswith(prefix + ":memory:"):
        return uri
    path, mark, options = uri.removeprefix(prefix).partition("?")
    return f"{prefix}{Path(path).absolute()}{mark}{options}"


def _system_tags() -> dict[str, str]:
    """The tags that MLflow's own pages show: who, and which program."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a user id without a name, as in many containers
        tags["mlflow.user"] = getpass.getuser()
    return tags
