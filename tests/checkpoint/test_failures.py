"""A rank dies or the disk is full in the middle of a save: the checkpoint before stays, and nobody takes half a one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from scale_wsl.checkpoint import layout, saver, writer
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.errors import UserError
from tests.checkpoint import states
from tests.ranks import free_port, run_ranks

ROOT = Path(__file__).parents[2]

# Saves step 1 whole; in step 2, rank 1 says so in the middle of its file and stays there until it is killed.
KILLED = """
    import sys, time
    from pathlib import Path
    import torch.distributed as dist
    from scale_wsl.checkpoint import stream, writer
    from scale_wsl.checkpoint.saver import Saver
    from tests.checkpoint import states

    folder, asynchronous = Path(sys.argv[1]), sys.argv[2] == "asynchronous"
    dist.init_process_group("gloo")
    states.save(folder, 1)
    written = 0

    def half(file, values, sizes, write=stream.write_stream):
        global written
        written += 1
        if written == 3 and dist.get_rank() == 1:
            file.write(b"half")
            file.flush()
            print("in the middle", flush=True)
            time.sleep(600)
        return write(file, values, sizes)

    writer.write_stream = half
    with Saver(folder, keep=2, asynchronous=asynchronous) as saver:
        saver.start(states.shards("flat", states.tensors(2)), states.meta(2))
        saver.wait_staged()
        print("training goes on", flush=True)
        while not saver.failed:
            time.sleep(0.02)
        saver.raise_failure()
"""


@pytest.mark.parametrize("mode", ["asynchronous", "blocking"])
def test_a_rank_that_is_killed_in_the_middle_of_a_save(tmp_path: Path, mode: str) -> None:
    port, ranks = str(free_port()), []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), mode]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        assert ranks[1].stdout is not None
        said = [ranks[1].stdout.readline().strip() for _ in range(2 if mode == "asynchronous" else 1)]
        assert "in the middle" in said
        ranks[1].send_signal(signal.SIGKILL)
        out, errors = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1, errors
    assert "cannot save" in errors
    assert "another rank was lost meanwhile" in errors
    assert ("training goes on" in out) == (mode == "asynchronous")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", ".step-00000002.part"}
    whole = layout.find(tmp_path)
    assert Checkpoint.open(whole).verify() > 0
    assert states.differing(states.contents(whole), states.tensors(1)) == []

    run_ranks(states.save_steps, 2, tmp_path, [2])  # the run that goes on clears away what is left
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB: room for two checkpoints of the made-up state, not for a third beside them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        reason = mounted.stderr.strip()
    except FileNotFoundError as error:
        mounted, reason = None, str(error)
    if mounted is None or mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {reason}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _until_full(folder: Path, asynchronous: bool) -> tuple[list[int], str, bool]:
    """Steps saved; then what the first step that does not fit says, and whether it was known by then."""
    with saver.Saver(folder, keep=5, asynchronous=asynchronous) as saving:
        for step in (1, 2):
            saving.start(states.shards("mixed", states.tensors(step)), states.meta(step))
            saving.wait()
        known = False
        try:
            saving.start(states.shards("mixed", states.tensors(3)), states.meta(3))
            saving.wait_staged()
            while not known:  # the trainer's steps, with the all-reduce that they have anyway
                votes: list[bool] = [False] * dist.get_world_size()
                dist.all_gather_object(votes, saving.failed)
                known = any(votes)
                time.sleep(0.01)
            saving.raise_failure()
        except UserError as error:
            return sorted(int(path.name[-8:]) for path in folder.glob("step-*")), str(error), known
    return [], "nothing was raised", known


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])
def test_a_full_disk_is_told_to_all_ranks_alike_and_leaves_nothing_half(small_disk: Path, asynchronous: bool) -> None:
    results = run_ranks(_until_full, 2, small_disk, asynchronous)
    steps, sentence, known = results[0]
    assert results[1] == results[0]
    assert known == asynchronous
    assert steps == [1, 2]
    assert sentence.startswith(f"cannot save {small_disk}/step-00000003: No space left on device (rank ")
    assert [path for path in small_disk.iterdir() if path.name.startswith(".")] == []
    for step in steps:
        path = small_disk / f"step-{step:08d}"
        Checkpoint.open(path).verify()
        assert states.differing(states.contents(path), states.tensors(step)) == []


def _fail_at(folder: Path, asynchronous: bool, where: str) -> str:
    """The disk refuses one kind of write; what each rank is told."""

    def refuse(*_: object, **__: object) -> None:
        if where != "pieces" or dist.get_rank() == 1:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    states.save(folder, 1)
    match where:
        case "folder":
            saver._open = refuse  # type: ignore[assignment]
        case "pieces":
            write = writer.write_stream

            def writing(*arguments: object) -> object:
                refuse()
                return write(*arguments)  # type: ignore[arg-type]

            writer.write_stream = writing  # type: ignore[assignment]
        case "meta":
            writer.write_meta = refuse  # type: ignore[assignment]
        case "name":
            os.rename = refuse  # type: ignore[assignment]
    try:
        states.save(folder, 2, asynchronous=asynchronous)
    except UserError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])
@pytest.mark.parametrize("where", ["folder", "pieces", "meta", "name"])
def test_whatever_cannot_be_written_all_ranks_say_so(tmp_path: Path, where: str, asynchronous: bool) -> None:
    first, second = run_ranks(_fail_at, 2, tmp_path, asynchronous, where)
    rank = 1 if where == "pieces" else 0
    assert first == second == f"cannot save {tmp_path}/step-00000002: Disk quota exceeded (rank {rank})"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    Checkpoint.open(tmp_path / "step-00000001").verify()


def _leave_by_an_error(folder: Path) -> list[str]:
    """A mistake elsewhere ends training while a save is in flight: it is finished, and the mistake is what is told."""
    try:
        with saver.Saver(folder, keep=1) as saving:
            saving.start(states.shards("rows", states.tensors(1)), states.meta(1))
            raise UserError("something else")
    except UserError as error:
        return [str(error), *sorted(path.name for path in folder.iterdir())]


def test_a_run_that_ends_by_an_error_finishes_what_is_in_flight(tmp_path: Path) -> None:
    assert run_ranks(_leave_by_an_error, 2, tmp_path) == [["something else", "step-00000001"]] * 2
