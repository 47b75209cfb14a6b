"""The process beside the trainer that sends a run's spool to MLflow.

A process of its own, because importing MLflow takes seconds of the interpreter, because MLflow, Alembic and SQLAlchemy
set warning filters, logging and signal-unsafe threads for the whole process they live in - and because it can tell when
the trainer is gone: a run whose trainer was killed without a word is marked FAILED.

Must never touch a GPU, import torch, or write to the trainer's screen more than a line when the server goes away and
one when it is back. Sending twice is harmless: a run is found by its tag before it is created, and MLflow's SQL store
takes a point with the same key, step, time and value once.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from scale_wsl.training.spool import ENDED, Event, Settings, Spool, State

__all__ = ["LEFT", "SENT", "Sender", "main", "masked"]

SENT, LEFT = 0, 3  # exit codes: everything was sent; something waits in the spool

IDENTITY_TAG = "scale_wsl.spool"
_POLL = 0.2  # seconds between looks at the spool
_LONGEST_PAUSE = 60.0  # seconds between attempts
_GRACE = 30.0  # seconds past `finish_timeout` after which the process ends whatever it does
_EVENTS_AT_ONCE = 500
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 20  # MLflow takes 1,000 metrics, and 1 MB: 20 params of 6,000 characters
_PARAM_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 5000, 250  # characters; MLflow's limits (tags: those of older servers)
_ATTEMPTS_FOR_A_FILE = 3
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")  # asking again would not help


class _SupersededError(Exception):
    """Another trainer has taken the run over."""


class _ReadAgainError(Exception):
    """The spool is read from its beginning again."""


class Sender:
    """Sends one spool; call `run` once, with the spool's lock held.

    Args:
        spool: what to send.
        settings: where to.
        session: the trainer's session; empty when a finished run is replayed.
        trainer: process id of the trainer.
        say: prints a line where the user sees it.
    """

    def __init__(
        self, spool: Spool, settings: Settings, *, session: str, trainer: int, say: Callable[[str], None]
    ) -> None:
        self.spool, self.settings, self.session, self.trainer, self.say = spool, settings, session, trainer, say
        self.state = spool.state()
        self.terminated = False  # this process was asked to end, most likely because the trainer was too
        self._client: Any = None
        self._run_checked = ""
        self._missing: set[str] = set()  # run ids that the server does not know
        self._failures = 0
        self._file_failures: dict[str, int] = {}
        self._warned = False

    # --- the life of the process ---------------------------------------------------------------------------------

    def trainer_gone(self) -> bool:
        """Whether nothing more will be written."""
        return not self.session or os.getppid() != self.trainer

    def ending(self) -> bool:
        """Whether the run is over, so that waiting for a server that is away makes no sense."""
        return self.trainer_gone() or self.spool.ended()

    def run(self) -> int:
        """Send until the run is over; `SENT` or `LEFT`."""
        pause = 1.0
        while True:
            gone = self.trainer_gone()  # asked first: what it wrote last is then read below
            try:
                if self._send_some():
                    self._answered()
                    pause = 1.0
                    continue
                if self._settle(gone):
                    return SENT
            except _SupersededError:
                return SENT
            except _ReadAgainError:
                continue
            except Exception as error:
                self._failed(error)
                if self.ending() and self._failures >= 2:
                    return LEFT
                self._wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                time.sleep(_POLL)

    def _settle(self, gone: bool) -> bool:
        """With nothing left to send: whether to stop. A run whose trainer is gone must not look like a running one."""
        mine = not self.session or self.state.session == self.session
        if self.state.status in ENDED and mine:
            return gone or self.spool.ended()
        if (gone or self.terminated) and mine and self.state.run_id and self.state.status == "RUNNING":
            status = "KILLED" if self.terminated else "FAILED"
            self._mlflow().set_terminated(self._run(), status, _now())
            self._advance(self.state.offset, status=status)
        return gone

    def _wait(self, seconds: float) -> None:
        ending = self.ending()
        until = time.monotonic() + (min(seconds, 1.0) if ending else seconds)
        while time.monotonic() < until and self.ending() == ending:  # the end of the run is worth an attempt at once
            time.sleep(_POLL)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._run_checked = ""  # it may have been deleted: the next attempt looks, and makes another
        print(f"--- attempt {self._failures}", *traceback.format_exception(error), file=sys.stderr, flush=True)
        if self._failures >= 2 and not self._warned:  # once can be a hiccup
            self._warned = True
            self.say(
                f"tracking: MLflow at {masked(self.settings.uri)} does not answer ({_reason(error)}); the run goes on, "
                f"and what it records waits in {self.spool.folder}"
            )

    def _answered(self) -> None:
        self._failures = 0
        if self._warned and self.state.offset >= self.spool.size():
            self._warned = False
            self.say(f"tracking: MLflow at {masked(self.settings.uri)} answers again and has everything")

    # --- sending -------------------------------------------------------------------------------------------------

    def _send_some(self) -> bool:
        """Send the next events; whether there were any."""
        events = list(self.spool.read(self.state.offset, _EVENTS_AT_ONCE))
        batch: list[Event] = []
        for event, behind in events:
            if event.get("kind") == "metrics":
                if sum(len(other["values"]) for other in batch) + len(event["values"]) > _METRICS_AT_ONCE:
                    self._metrics(batch)
                    batch = []
                batch.append({**event, "behind": behind})
                continue
            self._metrics(batch)
            batch = []
            if event.get("kind") == "start":
                self._start(event, behind)
            elif event.get("kind") == "artifact":
                self._artifact(event)
                self._advance(behind)
                self.spool.drop(event["name"])
            elif event.get("kind") == "finish":
                self._mlflow().set_terminated(self._run(event), event["status"], event["at"])
                self._advance(behind, status=event["status"])
            else:
                self._advance(behind)
        self._metrics(batch)
        return bool(events)

    def _advance(self, offset: int, **changes: str) -> None:
        self.state = dataclasses.replace(self.state, offset=offset, **changes)
        self.spool.publish(self.state)

    def _start(self, event: Event, behind: int) -> None:
        if self.session and event["session"] != self.session and self.state.session == self.session:
            raise _SupersededError
        if event["run_id"] and event["run_id"] not in self._missing and event["run_id"] != self.state.run_id:
            self.state = dataclasses.replace(self.state, run_id=event["run_id"])
        run_id, client = self._run(event), self._mlflow()
        run = client.get_run(run_id)
        tags = dict(event["tags"])
        new: dict[str, str] = {}
        for key, value in event["params"].items():
            value, known = _cut(str(value), _PARAM_LENGTH), run.data.params.get(key)
            if known is None:
                new[key] = value
            elif known != value or f"resumed.{key}" in run.data.tags:  # MLflow's params never change
                tags[f"resumed.{key}"] = value
        from mlflow.entities import Param, RunTag

        params = [Param(key, value) for key, value in new.items()]
        labels = [RunTag(_cut(key, _KEY_LENGTH), _cut(str(value), _TAG_LENGTH)) for key, value in tags.items()]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            self._accepted(client.log_batch, run_id, params=params[first : first + _PARAMS_AT_ONCE], synchronous=True)
        for first in range(0, len(labels), _PARAMS_AT_ONCE):
            self._accepted(client.log_batch, run_id, tags=labels[first : first + _PARAMS_AT_ONCE], synchronous=True)
        client.update_run(run_id, status="RUNNING")
        self._advance(behind, session=event["session"], status="RUNNING")

    def _metrics(self, events: list[Event]) -> None:
        """Send metric lines in one request; where MLflow refuses it, point by point, and leave out what it refuses."""
        if not events:
            return
        from mlflow.entities import Metric

        run_id, client = self._run(events[0]), self._mlflow()
        points = [
            Metric(key, float(value), event["at"], event["step"])
            for event in events
            for key, value in event["values"].items()
        ]
        for first in range(0, len(points), _METRICS_AT_ONCE):  # one pass, but for a line of more than 1,000 metrics
            some = points[first : first + _METRICS_AT_ONCE]
            if not self._accepted(client.log_batch, run_id, metrics=some, synchronous=True, quiet=len(some) > 1):
                for point in some if len(some) > 1 else ():
                    self._accepted(client.log_batch, run_id, metrics=[point], synchronous=True)
        self._advance(events[-1]["behind"])

    def _artifact(self, event: Event) -> None:
        path = self.spool.kept(event["name"])
        if path is None:  # sent before, or removed by hand
            return
        run_id, client = self._run(event), self._mlflow()
        try:
            client.log_artifact(run_id, str(path), event["folder"] or None)
        except Exception as error:
            client.get_run(run_id)  # raises when all of MLflow is away, and not its artifact store alone
            count = self._file_failures[event["name"]] = self._file_failures.get(event["name"], 0) + 1
            if count < _ATTEMPTS_FOR_A_FILE:
                raise
            print(*traceback.format_exception(error), file=sys.stderr, flush=True)
            self.say(f"tracking: MLflow does not take the file {path.name} ({_reason(error)}); it is left out")

    def _accepted(self, request: Callable[..., Any], run_id: str, *, quiet: bool = False, **arguments: Any) -> bool:
        """Whether MLflow takes a request; False where it says that it never will."""
        from mlflow.exceptions import MlflowException

        try:
            request(run_id, **arguments)
        except MlflowException as error:
            if error.error_code not in _REFUSED or not self._exists(run_id):
                raise
            if not quiet:
                print(*traceback.format_exception(error), file=sys.stderr, flush=True)
                self.say(f"tracking: MLflow refuses a record ({_reason(error)}); it is left out")
            return False
        return True

    # --- the run -------------------------------------------------------------------------------------------------

    def _mlflow(self) -> Any:
        if self._client is None:
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=self.settings.uri)
        return self._client

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._mlflow().get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise

    def _run(self, event: Event | None = None) -> str:
        """The id of the run, which is found or created first. Where the server has lost it, everything is sent anew."""
        run_id = self.state.run_id
        if run_id and self._run_checked == run_id:
            return run_id
        if not run_id or not self._exists(run_id):
            lost = run_id
            run_id = self._found_or_created(event or {})
            self._run_checked = run_id
            if lost:
                self._missing.add(lost)
                self.say(f"tracking: MLflow does not know the run {lost}; this run is {run_id} there, with all metrics")
                self.state = State(run_id=run_id)
                self.spool.publish(self.state)
                raise _ReadAgainError
            self._advance(self.state.offset, run_id=run_id)
        self._run_checked = run_id
        return run_id

    def _found_or_created(self, event: Event) -> str:
        from mlflow.exceptions import MlflowException

        client, name = self._mlflow(), self.settings.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                experiment_id = client.create_experiment(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment_id = client.get_experiment_by_name(name).experiment_id  # another run was faster
        elif experiment.lifecycle_stage != "active":
            raise RuntimeError(f"its experiment '{name}' was deleted; restore it, or set tracking.experiment")
        else:
            experiment_id = experiment.experiment_id
        identity = self.settings.identity
        found = client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(
            experiment_id,
            start_time=event.get("at", _now()),
            run_name=event.get("name") or None,
            tags={IDENTITY_TAG: identity},
        )
        return str(run.info.run_id)


def masked(text: str) -> str:
    """`text` without the user name and password of an address in it."""
    return re.sub(r"(?<=://)[^/@\s]*@", "***@", text)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words: what comes last in a chain of errors says most about a connection."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    text = masked(" ".join(str(error).split())) or type(error).__name__
    return _cut(text, 160)


def _now() -> int:
    return int(time.time() * 1000)


# --- the process -------------------------------------------------------------------------------------------------


def _redirect(log: Path) -> IO[str]:
    """Send everything that is printed here to a file; returns the screen, for what the user must see."""
    sys.stdout.flush()
    screen = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.close(written)
    return screen


def _quieten(settings: Settings) -> None:
    """MLflow's own settings, where the user has made none: bounded requests, and no word to its makers."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(settings.request_timeout),  # 120 s by default, seven times
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the spool is what retries
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "300",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _end_in_time(sender: Sender, limit: float) -> None:
    """End the process `limit` seconds after the run, even inside a request that never returns."""
    while not sender.ending():
        time.sleep(1.0)
    time.sleep(limit)
    os._exit(LEFT)


def main(arguments: list[str]) -> int:
    """Entry point: `<spool folder> <session> <trainer's process id> <MLflow address or ''>`."""
    folder, session, trainer, uri = Path(arguments[0]), arguments[1], int(arguments[2]), arguments[3]
    spool = Spool(folder)
    screen = _redirect(spool.log)

    def say(line: str) -> None:
        try:
            print(line, file=screen, flush=True)
        except OSError:  # the screen is gone with the trainer
            print(line, file=sys.stderr, flush=True)

    settings = spool.settings()
    if settings is None:
        return LEFT
    settings = dataclasses.replace(settings, uri=uri) if uri else settings
    _quieten(settings)
    if settings.uri.startswith("sqlite:///"):
        # A store in a file keeps what has no place of its own in ./mlruns: so let that be beside the file.
        place = Path(settings.uri.removeprefix("sqlite:///").partition("?")[0]).parent
        place.mkdir(parents=True, exist_ok=True)
        os.chdir(place)
    sender = Sender(spool, settings, session=session, trainer=trainer, say=say)

    def terminated(*_: object) -> None:
        sender.terminated = True  # the trainer saves now and ends; what it still has to say is worth waiting for

    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if session:
        limit = settings.finish_timeout + _GRACE
        threading.Thread(target=_end_in_time, args=(sender, limit), daemon=True).start()
    while (lock := spool.lock()) is None:  # the sender of an earlier session is still at it
        if not session:
            return LEFT
        time.sleep(_POLL)
    with lock:
        sender.state = spool.state()
        return sender.run()
