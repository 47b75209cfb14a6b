from __future__ import annotations

import json
import math
import os
import posixpath
import re
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.training.environment import environment
from scale_wsl.training.spool import Settings, Spool, State, metric_value
from scale_wsl.training.tracking import Tracker, TrackingConfig, metric_name, replay
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]


class Store:
    """MLflow's SQLite store, read with plain SQL: what is there, not what a client makes of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.uri = f"sqlite:///{file}"

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.file)
        try:
            return connection.execute(query, values).fetchall()
        except sqlite3.OperationalError:  # no table yet
            return []
        finally:
            connection.close()

    def change(self, statement: str, *values: Any) -> None:
        connection = sqlite3.connect(self.file)
        with connection:
            connection.execute(statement, values)
        connection.close()

    def status(self, run_id: str | None) -> str | None:
        found = self.rows("select status from runs where run_uuid = ?", run_id)
        return found[0][0] if found else None

    def runs(self, experiment: str) -> list[str]:
        query = "select run_uuid from runs join experiments using (experiment_id) where experiments.name = ?"
        return [run_id for (run_id,) in self.rows(query, experiment)]

    def points(self, run_id: str | None, key: str) -> list[tuple[int, float]]:
        query = "select step, value from metrics where run_uuid = ? and key = ? order by step, timestamp"
        return self.rows(query, run_id, key)

    def tags(self, run_id: str | None) -> dict[str, str]:
        return dict(self.rows("select key, value from tags where run_uuid = ?", run_id))

    def params(self, run_id: str | None) -> dict[str, str]:
        return dict(self.rows("select key, value from params where run_uuid = ?", run_id))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


def config(uri: str, experiment: str, **changes: Any) -> TrackingConfig:
    return TrackingConfig(uri=uri, experiment=experiment, **{"finish_timeout": 240.0, **changes})


def eventually(true: Callable[[], bool], what: str) -> None:
    """Wait for something that another process does."""
    until = time.monotonic() + 240
    while not true():
        assert time.monotonic() < until, f"never happened: {what}"
        time.sleep(0.1)


def test_a_run_is_recorded_whole_and_resumed_as_the_same_run(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, picture = tmp_path / "a-run", tmp_path / "sheet.png"
    picture.write_bytes(b"first")
    with Tracker(config(store.uri, "whole"), folder) as tracker:
        params = {"optim.lr": 0.1, "long": "x" * 9000, "odd@name": 1, "gone": "\ud800", "uri": "http://me:pw@host/"}
        tracker.start(params, {"data_set": "train-emoji"})
        tracker.text("texts/recipe.yaml", "model: {}\n")
        tracker.artifact(picture, "pictures")
        picture.write_bytes(b"second")  # recorded as it was
        tracker.artifact(tmp_path / "missing.png")  # a warning, never an error
        tracker.metrics(1, {"train/loss": 2.0, "bad": math.nan, "up": math.inf, "../a#b": 1.0})
        tracker.metrics(1, {"train/loss": 2.5})
        tracker.metrics(1, {"train/loss": 2.5})
        tracker.metrics(2, {f"many/{number}": number for number in range(1500)})
    run_id = tracker.run_id
    assert run_id is not None
    assert store.runs("whole") == [run_id]
    assert store.status(run_id) == "FINISHED"
    assert store.points(run_id, "train/loss") == [(1, 2.0), (1, 2.5), (1, 2.5)]
    assert store.points(run_id, "_/a_b") == [(1, 1.0)]
    assert store.rows("select is_nan from metrics where run_uuid = ? and key = 'bad'", run_id) == [(1,)]
    assert store.points(run_id, "up") == [(1, sys.float_info.max)]  # SQL knows no infinity
    assert store.rows("select count(*) from metrics where run_uuid = ? and key like 'many/%'", run_id) == [(1500,)]
    recorded = store.params(run_id)
    assert recorded["optim.lr"] == "0.1"
    assert recorded["long"] == "x" * 5999 + "…"
    assert recorded["odd_name"] == "1"
    assert recorded["gone"] == "?"
    assert recorded["uri"] == "http://***@host/"
    assert store.tags(run_id)["data_set"] == "train-emoji"
    assert store.tags(run_id)["mlflow.runName"] == "a-run"
    ((place,),) = store.rows("select artifact_uri from runs where run_uuid = ?", run_id)
    assert Path(place).is_relative_to(store.file.parent)
    assert (Path(place) / "pictures" / "sheet.png").read_bytes() == b"first"
    assert (Path(place) / "texts" / "recipe.yaml").read_text() == "model: {}\n"
    assert not list((folder / "spool" / "artifacts").iterdir())
    assert capfd.readouterr() == ("", "")  # of MLflow's own chatter nothing reaches the screen

    # A resumed session: the same run; a changed setting; step 1 done again with one result that differs.
    again = Tracker(config(store.uri, "whole"), folder, run_id="")
    again.start({**params, "optim.lr": 0.2, "new": "yes"}, {"data_set": "train-emoji"})
    again.metrics(1, {"train/loss": 2.5, "up": math.inf, "bad": 3.0})
    again.metrics(3, {"train/loss": 1.0})
    with pytest.raises(ZeroDivisionError), again:
        1 / 0  # noqa: B018
    # The first to finish counts, and a failure does not wait long: its sender goes on alone.
    again.finish("FINISHED")
    eventually(lambda: store.status(run_id) == "FAILED", "FAILED")
    assert again.run_id == run_id
    assert store.runs("whole") == [run_id]
    assert store.points(run_id, "train/loss") == [(1, 2.0), (1, 2.5), (1, 2.5), (3, 1.0)]
    assert len(store.points(run_id, "up")) == 1
    assert len(store.points(run_id, "bad")) == 2
    assert store.params(run_id) == {**recorded, "new": "yes"}
    assert store.tags(run_id)["resumed.optim.lr"] == "0.2"


TRAINER = """
    import os, signal, sys, time
    touched = []
    sys.addaudithook(lambda event, _: touched.append(event) if event.startswith("socket.") else None)
    from pathlib import Path
    from scale_wsl.training.tracking import Tracker, TrackingConfig
    tracker = Tracker(TrackingConfig(uri=sys.argv[1], experiment="killed"), Path(sys.argv[2]))
    tracker.start({"optim.lr": 0.1})
    tracker.metrics(1, {"train/loss": 4.0})
    while tracker.run_id is None:
        time.sleep(0.1)
    tracker.metrics(2, {"train/loss": 3.0})
    tracker.text("note.txt", "still here")
    assert not touched, touched
    assert not {"mlflow", "sqlalchemy", "torch"} & set(sys.modules)
    print(tracker.run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_trainer_is_failed_until_it_is_resumed_and_never_uses_the_network_itself(
    store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), store.uri, str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    run_id = done.stdout.strip()
    eventually(lambda: store.status(run_id) == "FAILED", "FAILED")
    assert store.points(run_id, "train/loss") == [(1, 4.0), (2, 3.0)]

    tracker = Tracker(config(store.uri, "killed"), folder, run_id=run_id)
    tracker.start({"optim.lr": 0.1})
    tracker.metrics(2, {"train/loss": 3.0})  # done again, bit for bit
    tracker.metrics(3, {"train/loss": 2.0})
    eventually(lambda: store.status(run_id) == "RUNNING", "RUNNING")
    with pytest.raises(UserError, match="still going"):
        replay(folder)
    # A launcher that ends all processes asks the sender too; it notes that, and stays for the trainer's last words.
    assert tracker._sender is not None
    tracker._sender.terminate()
    eventually(lambda: store.status(run_id) == "KILLED", "KILLED")
    tracker.finish("FINISHED")
    assert store.status(run_id) == "FINISHED"
    assert store.runs("killed") == [run_id]
    assert store.points(run_id, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0)]

    # The same run, deleted on the server: everything is recorded in a new one.
    store.change("update runs set lifecycle_stage = 'deleted' where run_uuid = ?", run_id)
    with Tracker(config(store.uri, "killed"), folder, run_id=run_id) as tracker:
        tracker.start({"optim.lr": 0.1})
        tracker.metrics(4, {"train/loss": 1.0})
    (new,) = set(store.runs("killed")) - {run_id}
    assert tracker.run_id == new
    assert store.status(new) == "FINISHED"
    assert store.points(new, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert len(store.points(run_id, "train/loss")) == 3


def test_without_an_answer_the_spool_stays_and_is_replayed(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    address = f"http://user:secret@127.0.0.1:{free_port()}"
    with Tracker(config(address, "replayed"), folder) as tracker:
        tracker.start({"optim.lr": 0.1})
        tracker.metrics(1, {"train/loss": 4.0})
        tracker.text("note.txt", "kept")
    assert tracker.run_id is None
    screen = capfd.readouterr().err
    assert screen.count("does not answer") == 1
    assert len(screen.splitlines()) == 1
    assert "secret" not in screen + caplog.text
    assert f"4 records wait in {folder / 'spool'}" in caplog.text
    assert f"scale-wsl track replay {folder}" in caplog.text
    with pytest.raises(UserError, match=r"did not take everything: 4 records wait"):
        replay(folder)

    assert replay(folder, store.uri).records == 4
    (run_id,) = store.runs("replayed")
    assert store.status(run_id) == "FINISHED"
    assert store.points(run_id, "train/loss") == [(1, 4.0)]
    ((started, ended, place),) = store.rows(
        "select start_time, end_time, artifact_uri from runs where run_uuid = ?", run_id
    )
    times = [event["at"] for event, _ in Spool(folder / "spool").read()]
    assert (started, ended) == (times[0], times[-1])  # when it happened, not when it was sent
    assert (Path(place) / "note.txt").read_text() == "kept"

    # A sender that died before it noted what it had sent: everything is sent again, and nothing is there twice.
    spool = Spool(folder / "spool")
    spool.publish(State())
    again = replay(folder, store.uri)
    assert (again.run_id, again.records) == (run_id, 4)
    assert store.points(run_id, "train/loss") == [(1, 4.0)]
    assert replay(folder, store.uri).records == 0


class Server:
    """A real `mlflow server` on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "server.db")
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--backend-store-uri", self.store.uri]
        command += ["--artifacts-destination", str(self.folder / "files")]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            )

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_comes_late_and_goes_away_gets_everything_once(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, folder = server.store, tmp_path / "run"
    spool = Spool(folder / "spool")
    with Tracker(config(server.uri, "outage", request_timeout=60), folder) as tracker:
        tracker.start({"optim.lr": 0.1})
        for step in range(3):
            tracker.metrics(step, {"train/loss": float(step), "bad": math.nan, "down": -math.inf})
        eventually(lambda: b"attempt 2" in spool.log.read_bytes() if spool.log.exists() else False, "two attempts")
        server.start()
        eventually(lambda: tracker.run_id is not None, "a run")
        tracker.text("before.txt", "sent")
        eventually(lambda: spool.state().offset == spool.size(), "everything sent")
        assert [step for step, _ in store.points(tracker.run_id, "train/loss")] == [0, 1, 2]

        server.kill()
        for step in range(3, 6):
            tracker.metrics(step, {"train/loss": float(step)})
        tracker.text("while/away.txt", "kept")
        attempts = spool.log.read_bytes().count(b"--- attempt 2")
        eventually(lambda: spool.log.read_bytes().count(b"--- attempt 2") > attempts, "the outage is noticed")
        server.start()
        eventually(lambda: spool.state().offset == spool.size(), "everything sent")
    assert store.runs("outage") == [tracker.run_id]
    assert store.status(tracker.run_id) == "FINISHED"
    assert [step for step, _ in store.points(tracker.run_id, "train/loss")] == list(range(6))
    assert len(store.points(tracker.run_id, "bad")) == 3
    assert (sent := list((tmp_path / "files").rglob("away.txt")))
    assert sent[0].read_text() == "kept"
    screen = capfd.readouterr().err.splitlines()
    assert ["does not answer" in line for line in screen] == [True, False, True, False]
    assert ["answers again" in line for line in screen] == [False, True, False, True]


# --- the parts ---------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_off_does_nothing(tmp_path: Path) -> None:
    for tracker in (Tracker.null(), Tracker(TrackingConfig(enabled=False), tmp_path / "run", run_id="abc")):
        with tracker:
            tracker.start({"a": 1})
            tracker.metrics(1, {"a": 1.0})
            tracker.artifact(tmp_path / "missing")
            tracker.text("a", "b")
    assert tracker.run_id == "abc"  # so that the next checkpoint still has it
    assert Tracker.null().run_id is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file is in the way")
    with Tracker(TrackingConfig(), tmp_path / "run") as tracker:
        tracker.metrics(1, {"a": 1.0})
    assert "nothing of this run is recorded" in caplog.text


def test_replay_refuses_a_folder_without_a_spool(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no spool"):
        replay(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"uri": ""}, {"experiment": ""}, {"every": 0}, {"request_timeout": 0}, {"finish_timeout": -1.0}]
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"tracking.{next(iter(wrong))}"):
        TrackingConfig(**wrong)


@given(st.text())
def test_metric_names_are_those_that_mlflow_takes(name: str) -> None:
    clean = metric_name(name)
    assert re.fullmatch(r"[/\w.\- :]+", clean)  # MLflow's rule, and that the name is a normal relative path:
    assert posixpath.normpath(clean) == clean
    assert not clean.startswith(("/", ".."))
    assert clean != "."
    assert len(clean) <= 250
    assert metric_name(clean) == clean


@given(st.floats(allow_nan=True))
def test_metric_values_survive_strict_json(value: float) -> None:
    read = float(json.loads(json.dumps(metric_value(value), allow_nan=False)))
    assert read == value or (math.isnan(read) and math.isnan(value))


@given(rubbish=st.lists(st.binary(max_size=40), min_size=1, max_size=4))
@settings(max_examples=50)
def test_a_damaged_spool_gives_what_is_whole(tmp_path_factory: pytest.TempPathFactory, rubbish: list[bytes]) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    spool.open()
    for number, line in enumerate(rubbish):
        spool.append({"kind": "metrics", "step": number, "values": {"a": "nan"}})
        spool.close()
        with open(spool.events, "ab") as handle:  # as a crash, or a full disk, leaves it
            handle.write(line)
        spool.open()
    spool.append({"kind": "finish", "status": "FINISHED"})
    spool.close()
    events = list(spool.read())
    assert [event["step"] for event, _ in events if event.get("kind") == "metrics"] == list(range(len(rubbish)))
    assert events[-1][0]["kind"] == "finish"
    assert events[-1][1] == spool.size()
    assert spool.ended()
    for (_, behind), rest in zip(events, range(len(events) - 1, -1, -1), strict=True):
        assert len(list(spool.read(behind))) == rest


@given(st.binary(max_size=200) | st.from_type(dict[str, int]).map(lambda value: json.dumps(value).encode()))
def test_damaged_state_is_no_state(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    (spool.folder / "state.json").write_bytes(content)
    (spool.folder / "settings.json").write_bytes(content)
    assert spool.state() == State()
    assert spool.settings() is None


def test_state_and_settings_are_read_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    settings, state = Settings("http://x", "e", "id", 5, 7.5), State(12, "run", "session", "RUNNING")
    spool.publish(settings)
    spool.publish(state)
    assert (spool.settings(), spool.state()) == (settings, state)


def test_kept_files_do_not_escape(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.open()
    (tmp_path / "secret").write_text("x")
    name = spool.keep("a.txt", lambda path: path.write_text("y"))
    kept = spool.kept(name)
    assert kept is not None
    assert kept.read_text() == "y"
    assert spool.kept("../../secret") is None
    assert spool.kept(str(tmp_path / "secret")) is None
    spool.drop("../../secret")
    spool.drop(name)
    assert (tmp_path / "secret").exists()
    assert not kept.parent.exists()
    spool.close()


def test_environment_names_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "very-secret-value")
    found = environment()
    assert found["python"].startswith(f"{sys.version_info.major}.")
    assert {"torch", "numpy", "mlflow"} <= set(found["packages"])
    assert "very-secret-value" not in json.dumps(found)
