"""How a preparation is published: over what was there, beside what was not ours, and never by halves."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.posts import Post, Reject
from scale_wsl.corpus.prepare import PrepareConfig, deal, look, prepare, write
from scale_wsl.corpus.prepare.publish import Place
from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.sources import open_source
from scale_wsl.errors import UserError
from tests.corpus.toy import CONFIG, ToySource, noise
from tests.loading.fakes import encode


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
        "rejects.parquet",
        replaced.train.name,
        replaced.validation.name,
        "vocabulary.report.json",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for content in (None, "{}", "[]", '{"recipe": 1}', '{"format": "scale_wsl preparation", "version": 3}'):
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


def test_an_error_leaves_nothing_but_what_the_next_try_can_use(tmp_path: Path) -> None:
    class Failing(ToySource):
        def posts(self, split: Any = None) -> Iterator[Post | Reject]:
            yield from list(super().posts())[:50]
            raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        prepare(Failing(), tmp_path / "out", CONFIG, workers=Workers(count=1))
    with pytest.raises(UserError, match="no hashtag that the rule noun takes is on 1000 of the"):
        prepare(ToySource(), tmp_path / "out", PrepareConfig(**CONFIG.recorded() | {"min_count": 1000}))
    with pytest.raises(UserError, match="no image is left for the val split"):
        prepare(ToySource(3), tmp_path / "out", PrepareConfig(**CONFIG.recorded() | {"validation_share": 0.01}))
    with pytest.raises(UserError, match=r"gave no usable image \(1 no hashtag, "):
        prepare(ToySource(0), tmp_path / "out", PrepareConfig(**CONFIG.recorded() | {"max_bytes": 10}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.work"]
    prepare(ToySource(), tmp_path / "out", CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


# --- killed at any moment -------------------------------------------------------------------------------------------

_KILLED = """
import sys, time
from pathlib import Path
from scale_wsl.corpus import prepare
from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.prepare import choose, deal, look, publish, scan, write
from tests.corpus.toy import CONFIG, ToySource

stage, out = sys.argv[1], Path(sys.argv[2])

def stop():
    print("here", flush=True)
    time.sleep(600)

def at_call(owner, name, number, after=False):
    real, calls = getattr(owner, name), 0
    def stopping(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            stop()
        result = real(*arguments, **options)
        if calls == number and after:
            stop()
        return result
    setattr(owner, name, stopping)

places = {
    "scanning": (ToySource, "_at", 70),
    "looking": (look, "look", 90),
    "comparing": (choose, "split", 1),
    "choosing": (choose, "published_file", 1),
    "counting": (deal.SpanCounter, "__call__", 1),
    "dealing": (deal.Dealer, "__call__", 2),
    "writing": (write, "fetch", 40),
    "writing the second": (write, "fetch", 100),
    "naming": (Path, "rename", 1),
    "replacing": (publish.os, "rename", 5),  # after those of the scan and the names
}
at_call(*places[stage], after=stage in ("naming", "replacing"))
prepare.prepare(ToySource(), out, CONFIG, workers=Workers(count=1), overwrite=stage == "replacing")
"""


def contents(folder: Path) -> dict[str, str]:
    """Checksums of every file but the one that says when it was made."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "prepared.json"
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(ToySource(), out, CONFIG)
    return contents(out)


@pytest.mark.parametrize(
    "stage",
    [
        "scanning",
        "looking",
        "comparing",
        "choosing",
        "counting",
        "dealing",
        "writing",
        "writing the second",
        "naming",
        "replacing",
    ],
)
def test_kill_9_leaves_nothing_half_made(stage: str, tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    out = tmp_path / "out"
    if stage == "replacing":
        prepare(ToySource(30), out, CONFIG)
    child = subprocess.Popen([sys.executable, "-c", _KILLED, stage, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "here\n"
        assert (tmp_path / ".out.work").is_dir()
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
    assert contents(out) == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", unrelated.name, "out"]


@pytest.mark.parametrize("rename", [1, 2, 3, 4])
def test_an_end_between_the_renames_loses_nothing(
    rename: int, tmp_path: Path, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare(ToySource(30), out, CONFIG, workers=Workers(count=1))
    before = contents(out)

    class Ended(Exception):  # noqa: N818
        pass

    def ending(*arguments: object) -> None:
        real = Place.publish.__globals__["os"].rename
        calls = 0

        def renaming(a: object, b: object) -> None:
            nonlocal calls
            calls += 1
            if calls == rename:
                raise Ended
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr("scale_wsl.corpus.prepare.publish.os.rename", renaming)
            publish(*arguments)

    publish = Place.publish
    with monkeypatch.context() as patch:
        patch.setattr(Place, "publish", ending)
        with pytest.raises(Ended):
            prepare(ToySource(), out, CONFIG, workers=Workers(count=1), overwrite=True)
    assert not out.exists() or contents(out) in (before, uninterrupted)
    for again in range(2):
        prepared = prepare(ToySource(), out, CONFIG, workers=Workers(count=1), overwrite=again == 0)
        Dataset.open(prepared.train).verify()
        assert contents(out) == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_images_that_changed_are_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    rows = ["image,hashtags"]
    for i in range(20):
        (tmp_path / "images" / f"{i}.png").write_bytes(encode(noise(i)))
        rows.append(f"{i}.png,cat")
    (tmp_path / "images" / "posts.csv").write_text("\n".join(rows))
    source = open_source(str(tmp_path / "images" / "posts.csv"))
    with monkeypatch.context() as patch:
        patch.setattr(write.Writer, "__call__", None)
        with pytest.raises(TypeError):
            prepare(source, tmp_path / "out", CONFIG, workers=Workers(count=1))
    for i in range(20):
        (tmp_path / "images" / f"{i}.png").write_bytes(encode(noise(100 + i)))
    with pytest.raises(UserError, match="was changed while the data set was being prepared: prepare it again"):
        prepare(source, tmp_path / "out", CONFIG, workers=Workers(count=1))
    assert prepare(source, tmp_path / "out", CONFIG, workers=Workers(count=1)).report["train"]["images"] == 14


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(write.Writer, "__call__", None)
        with pytest.raises(TypeError):
            prepare(ToySource(), out, CONFIG, workers=Workers(count=1))
    parts = [path for path in (tmp_path / ".out.work").rglob("*.*") if path.parent.name != "choice"]
    done = {path: path.stat().st_mtime_ns for path in parts if path.suffix in (".parquet", ".arrow")}
    assert len(done) > 5
    for again in (ToySource, look.Looker, deal.SpanCounter, deal.Dealer):
        monkeypatch.setattr(again, "posts" if again is ToySource else "__call__", None)
    monkeypatch.setattr(Place, "publish", lambda *_: None)  # which would take the work away
    with pytest.raises(AssertionError):
        prepare(ToySource(), out, CONFIG, workers=Workers(count=1))
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_other_settings_keep_the_images_that_were_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = PrepareConfig(**CONFIG.recorded() | {"min_count": 1000})
    with pytest.raises(UserError, match="min_count"):
        prepare(ToySource(), tmp_path / "out", strict, workers=Workers(count=1))
    monkeypatch.setattr(ToySource, "posts", None)
    monkeypatch.setattr(look.Looker, "__call__", None)
    assert not prepare(ToySource(), tmp_path / "out", CONFIG, workers=Workers(count=1)).reused


@pytest.mark.slow
def test_kill_9_at_any_moment_of_many_processes(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    script = (
        "import sys; from pathlib import Path; from scale_wsl.corpus.execution import Workers; "
        "from scale_wsl.corpus.prepare import prepare; from tests.corpus.toy import CONFIG, ToySource\n"
        "if __name__ == '__main__': prepare(ToySource(), Path(sys.argv[1]), CONFIG, workers=Workers(count=2))"
    )
    (tmp_path / "job.py").write_text(script)
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    kills = 0
    for patience in itertools.count(1):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        try:
            child.wait(timeout=1.7 * patience)
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
    assert child.returncode == 0
    assert kills
    assert contents(tmp_path / "out") == uninterrupted


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
