"""How a run ends: by a signal, by the death of a rank, without MLflow."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from scale_wsl.checkpoint import layout
from tests.ranks import free_port
from tests.training.launching import ROOT, TINY, Ranks, losses

FAILING = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from scale_wsl.training import loop
    from scale_wsl.training.pretrain import main

    step = loop.Trainer.step

    def failing_step(self, preemption):
        if self.counter.step == 2 and self.world.rank == 1:
            raise ArithmeticError("the cause of it all")
        return step(self, preemption)

    loop.Trainer.step = failing_step
    sys.exit(main(sys.argv[1:], default_recipe=Path(sys.argv[0])))
"""


def arguments(corpus: Path, run: Path, *more: str) -> list[str]:
    return [
        *TINY,
        f"data.train={corpus}",
        f"data.validation={corpus}",
        f"run.folder={run}",
        f"tracking.uri=sqlite:///{run}/mlflow.db",
        "batch.micro=4",
        "schedule.length=1000 steps",
        "schedule.evaluate_every=1000 steps",
        "checkpoint.every=1000 steps",
        *more,
    ]


def mlflow_status(run: Path) -> str:
    """As MLflow's own store has it; MLflow itself would have to be imported, and its warnings are errors here.

    A run that has failed does not wait long for what tells MLflow, which may still be at it on a busy machine: at
    making the store, the run in it, or that run's end.
    """
    until = time.monotonic() + 120
    while True:
        statuses: list[str] = []
        with (
            suppress(sqlite3.OperationalError),  # no file yet, no table yet, or it is being written
            closing(sqlite3.connect(f"file:{run / 'mlflow.db'}?mode=ro", uri=True)) as store,
        ):
            statuses = [status for (status,) in store.execute("select status from runs")]
        if (statuses and statuses != ["RUNNING"]) or time.monotonic() > until:
            return ", ".join(statuses)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=["SIGTERM", "SIGUSR2"])
def test_a_preempted_run_saves_and_exits_0(emoji_corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    ranks = Ranks(arguments(emoji_corpus, run), 2, tmp_path)
    ranks.wait_for("step 3/")
    ranks.processes[1].send_signal(number)  # one rank is enough: all stop together
    assert ranks.wait() == [0, 0], ranks.output()
    newest = layout.newest(run / "checkpoints")
    assert newest is not None
    assert layout.read_meta(newest).step == max(losses(run))
    assert mlflow_status(run) == "KILLED"


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_down(emoji_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = Ranks(arguments(emoji_corpus, run), 2, tmp_path)
    ranks.wait_for("step 3/")
    ranks.processes[1].kill()
    ranks.processes[0].wait(30)
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert "rank 0 of 2 failed" in ranks.output()
    assert mlflow_status(run) == "FAILED"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_failing_ranks_error_is_the_last_that_a_rank_prints(
    emoji_corpus: Path, tmp_path: Path, launcher: str
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    recipe = ROOT / "recipes" / "pretrain" / "emoji.yaml"
    port = str(free_port())
    binaries = Path(sys.executable).parent
    if launcher == "deepspeed":
        command = [str(binaries / "deepspeed"), "--num_accelerators", "2", "--master_port", port]
        engine = ["--ds_config", "zero2.json"]
    else:
        command = [str(binaries / "torchrun"), "--nproc-per-node", "2", "--master-port", port]
        engine = []
    path = os.pathsep.join([str(binaries), os.environ["PATH"]])
    process = subprocess.Popen(
        [*command, str(script), "--recipe", str(recipe), *engine, *arguments(emoji_corpus, tmp_path / "run")],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, output
    assert "rank 1 of 2 failed" in output
    assert "rank 0 of 2 failed" not in output
    after = output[output.rindex("ArithmeticError: the cause of it all") :]
    assert "Traceback" not in after, after
    assert mlflow_status(tmp_path / "run") == "FAILED"


@pytest.mark.slow
def test_a_run_without_mlflow_goes_on_and_is_replayed(emoji_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    nobody = f"http://127.0.0.1:{free_port()}"
    more = [f"tracking.uri={nobody}", "tracking.finish_timeout=2", "schedule.length=3 steps"]
    ranks = Ranks(arguments(emoji_corpus, run, *more), 1, tmp_path)
    assert ranks.wait() == [0], ranks.output()
    assert nobody in ranks.output()
    assert "replay" in ranks.output()
    assert sorted(losses(run)) == [1, 2, 3]
    replayed = subprocess.run(
        [sys.executable, "-m", "scale_wsl.cli", "track", "replay", str(run), "--uri", f"sqlite:///{run}/mlflow.db"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert replayed.returncode == 0, replayed.stderr
    assert mlflow_status(run) == "FINISHED"
