"""How a preparation is published: over what was there, beside what was not ours, and never by halves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from scale_wsl.corpus.posts import Post
from scale_wsl.corpus.prepare import PrepareConfig, prepare
from scale_wsl.corpus.shards import Dataset
from scale_wsl.errors import UserError
from tests.corpus.toy import CONFIG, ToySource


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "data")
    for overwrite in (False, True):
        prepared = prepare(ToySource(), tmp_path / "out", CONFIG, overwrite=overwrite)
        assert prepared.train.parent == tmp_path / "disk" / "data"
        assert not prepared.reused
    assert (tmp_path / "out").is_symlink()
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    with pytest.raises(UserError, match="links cannot be followed"):
        prepare(ToySource(), tmp_path / "ring", CONFIG)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc, where nobody can make a file")
def test_a_place_that_takes_no_file_is_named_at_once() -> None:
    with pytest.raises(UserError, match="cannot write into /proc"):
        prepare(ToySource(), "/proc/x", CONFIG)


def test_overwriting_replaces_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(ToySource(30), out, CONFIG)
    (out / "stray").write_text("x")
    replaced = prepare(ToySource(40), out, CONFIG, overwrite=True)
    assert not replaced.reused
    assert replaced.report["posts"] == 90
    assert sorted(path.name for path in out.iterdir()) == [
        "prepared.json",
        replaced.train.name,
        replaced.validation.name,
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for content in (None, "{}", "[]", '{"recipe": 1}', '{"format": "scale_wsl preparation", "version": 2}'):
        if content is not None:
            (tmp_path / "prepared.json").write_text(content)
        with pytest.raises(UserError, match="not made by scale-wsl prepare"):
            prepare(ToySource(), tmp_path, CONFIG, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert prepare(ToySource(), tmp_path / "empty", CONFIG).train.is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        prepare(ToySource(), tmp_path / "file", CONFIG)
    with pytest.raises(UserError, match="cannot write into"):
        prepare(ToySource(), tmp_path / "file" / "below", CONFIG)


def test_a_damaged_preparation_is_named_not_reused(tmp_path: Path) -> None:
    prepared = prepare(ToySource(), tmp_path / "out", CONFIG)
    (prepared.validation / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"000000\.tar is missing"):
        prepare(ToySource(), tmp_path / "out", CONFIG)
    assert not prepare(ToySource(), tmp_path / "out", CONFIG, overwrite=True).reused


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    class Failing(ToySource):
        def posts(self) -> Iterator[Post]:
            yield from list(super().posts())[:50]
            raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        prepare(Failing(), tmp_path / "out", CONFIG)
    with pytest.raises(UserError, match="no hashtag that WordNet knows is on 1000 of the"):
        prepare(ToySource(), tmp_path / "out", PrepareConfig(**CONFIG.recorded() | {"min_count": 1000}))
    with pytest.raises(UserError, match="no image is left for the val split"):
        prepare(ToySource(3), tmp_path / "out", PrepareConfig(**CONFIG.recorded() | {"validation_share": 0.01}))
    with pytest.raises(UserError, match=r"gave no usable image \(1 no hashtag, "):
        prepare(ToySource(0), tmp_path / "out", PrepareConfig(**CONFIG.recorded() | {"max_bytes": 10}))
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


# --- killed at any moment -------------------------------------------------------------------------------------------

_KILLED = """
import sys, time
from pathlib import Path
from scale_wsl.corpus import gather, prepare
from tests.corpus.toy import CONFIG, ToySource

stage, out = sys.argv[1], Path(sys.argv[2])

def stop():
    print("here", flush=True)
    time.sleep(600)

class Source(ToySource):
    def posts(self):
        for number, post in enumerate(super().posts()):
            if stage == "gathering" and number == 40:
                stop()
            yield post

reads = 0
read = gather.Gathered.read
def reading(self, record):
    global reads
    reads += 1
    if stage == "writing" and reads == 40 or stage == "writing the second" and reads == 100:
        stop()
    return read(self, record)
gather.Gathered.read = reading

if stage == "replacing":
    rename = prepare.os.rename
    def renaming(a, b):
        rename(a, b)
        if str(b).endswith(".old.part"):
            stop()
    prepare.os.rename = renaming
prepare.prepare(Source(), out, CONFIG, overwrite=stage == "replacing")
"""


@pytest.mark.parametrize("stage", ["gathering", "writing", "writing the second", "replacing"])
def test_kill_9_leaves_nothing_half_made(stage: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if stage == "replacing":
        prepare(ToySource(30), out, CONFIG)
    child = subprocess.Popen([sys.executable, "-c", _KILLED, stage, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "here\n"
        assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
        assert not out.exists()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not out.exists()
    unrelated = tmp_path / ".out.v2.0123abcd.part"  # another preparation's, perhaps at work
    unrelated.mkdir()

    prepared = prepare(ToySource(), out, CONFIG)
    assert prepared.reused is (stage == "replacing")  # then what was to be put in place was whole
    assert prepared.report["posts"] == 132
    for path in (prepared.train, prepared.validation):
        Dataset.open(path).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", unrelated.name, "out"]


def test_what_was_there_comes_back_where_its_replacement_was_not_ready(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(ToySource(), out, CONFIG)
    out.rename(tmp_path / ".out.old.part")
    assert prepare(ToySource(), out, CONFIG).reused
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_two_at_once_prepare_it_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from scale_wsl.corpus.prepare import prepare; "
        "from tests.corpus.toy import CONFIG, ToySource; "
        "print(prepare(ToySource(), Path(sys.argv[1]), CONFIG).reused)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with FileLock(tmp_path / ".out.lock"):
        children = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        for child in children:  # each says that it waits
            assert child.stderr is not None
            assert child.stderr.readline() == f"another process is preparing {tmp_path / 'out'}: waiting for it\n"
    outputs = sorted(child.communicate(timeout=120)[0].strip() for child in children)
    assert outputs == ["False", "True"]
