"""The loader's processes: how they end, and what reaches the trainer from them."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import pytest

from scale_wsl.errors import UserError
from scale_wsl.loading import EvalLoader, TrainLoader
from tests.loading.batches import ALONE, CONFIG, order_of, take
from tests.loading.fakes import (
    DyingDataset,
    FailingDataset,
    FakeDataset,
    RefusingDataset,
    StuckDataset,
    zipf_rows,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_images_fault_is_raised_here(workers: int) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        take(FailingDataset(zipf_rows(9)), 1, dataclasses.replace(CONFIG, workers=workers))
    assert active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_found_while_reading_arrives_as_its_one_sentence(workers: int) -> None:
    config = dataclasses.replace(CONFIG, workers=workers)
    dataset = RefusingDataset(zipf_rows(9))
    for batches in (
        lambda: take(dataset, 1, config),
        lambda: list(EvalLoader(dataset, config, micro_batch=4, rank=0, world_size=1)),
    ):
        with pytest.raises(UserError) as refused:
            batches()
        assert str(refused.value) == "000000.tar has become shorter than its index says: restore the data set"
    assert active_children() == []


def test_a_worker_that_dies_is_an_error_here() -> None:
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        take(DyingDataset(zipf_rows(9)), 1, dataclasses.replace(CONFIG, workers=1))
    assert active_children() == []


@pytest.mark.slow  # PyTorch waits twice 5 s for a worker before it is given up
def test_closing_ends_a_worker_that_is_stuck(tmp_path: Path) -> None:
    dataset = StuckDataset(zipf_rows(9))
    dataset.stuck = tmp_path / "stuck"
    loader = TrainLoader(dataset, order_of(dataset), dataclasses.replace(CONFIG, workers=1), **ALONE)
    while not dataset.stuck.exists():
        time.sleep(0.05)
    loader.close()
    assert active_children() == []


def test_closing_ends_the_workers() -> None:
    dataset = FakeDataset(zipf_rows(9))
    loader = TrainLoader(dataset, order_of(dataset), dataclasses.replace(CONFIG, workers=2), **ALONE)
    next(loader)
    assert len(active_children()) == 2
    loader.close()
    loader.close()
    assert active_children() == []
    with pytest.raises(ValueError, match="closed"):
        next(loader)


TRAINER = """
import multiprocessing, os, signal, sys, time
from multiprocessing import forkserver
from scale_wsl.loading import DataConfig, Order, TrainLoader
from tests.loading.fakes import FakeDataset, zipf_rows

dataset = FakeDataset(zipf_rows(23))
order = Order.of(dataset, seed=5, resampling="natural", threshold=1.0)
config = DataConfig(image_size=16, workers=2, prefetch=1)
loader = TrainLoader(dataset, order, config, micro_batch=4, accumulation=1, rank=0, world_size=1, start=0)
next(loader)
pids = [worker.pid for worker in multiprocessing.active_children()]
print(*pids, forkserver._forkserver._forkserver_pid, flush=True)
"""


@pytest.fixture
def trainer() -> Iterator[object]:
    started = []

    def start(script: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", TRAINER + script],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3, process.communicate()[1]
        return process, pids

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their trainer"
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@needs_proc
def test_a_killed_trainer_leaves_no_process(trainer) -> None:  # type: ignore[no-untyped-def]
    process, pids = trainer("time.sleep(600)")
    assert all(runs(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_until_gone(pids)


@needs_proc
def test_a_trainer_that_fails_without_closing_ends_and_leaves_no_process(trainer) -> None:  # type: ignore[no-untyped-def]
    process, pids = trainer("raise RuntimeError('out of luck')")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "RuntimeError: out of luck"
    wait_until_gone(pids)


@needs_proc
@pytest.mark.slow
def test_signals_to_the_whole_group_are_the_trainers_to_handle(trainer) -> None:  # type: ignore[no-untyped-def]
    # A second loader's workers are still being born when the signals come.
    process, pids = trainer(
        """
heard = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: heard.append(number))
other = TrainLoader(dataset, order, config, micro_batch=4, accumulation=1, rank=0, world_size=1, start=0)
everyone = multiprocessing.active_children()
print("ready", flush=True)
while len(heard) < 3:
    time.sleep(0.01)
time.sleep(6)  # PyTorch's workers look every 5 s whether the process that forked them is still there
for _ in range(20):
    next(loader), next(other)
assert len(everyone) == 4 and set(multiprocessing.active_children()) == set(everyone)
child = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
child.start()
time.sleep(1)
child.terminate()  # the fork server is everybody's: processes that are no workers can still be ended
child.join()
assert child.exitcode == -signal.SIGTERM
loader.close()
other.close()
print("saved")
"""
    )
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("saved\n", "", 0)  # no warning of anything leaked, either
    wait_until_gone(pids)
