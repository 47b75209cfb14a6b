"""The command as users type it: what it prints, its exit code, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def scale_wsl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scale_wsl.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


def mistake(*arguments: str, cwd: Path) -> str:
    done = scale_wsl(*arguments, cwd=cwd)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_prepare_once_and_again_with_settings_before_and_after_options(tmp_path: Path) -> None:
    settings = ["source.limit=60", "source.pixels=32", "--out", "here", "prepare.min_count=1"]
    first = scale_wsl("prepare", "emoji", *settings, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "60 posts" in first.stdout
    assert len(list((tmp_path / "here").glob("*-emoji-*/manifest.json"))) == 2
    again = scale_wsl("prepare", "emoji", *settings, cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    other = [setting.replace("limit=60", "limit=50") for setting in settings]
    assert "--overwrite" in mistake("prepare", "emoji", *other, cwd=tmp_path)
    explained = scale_wsl("vocab", "explain", "smile", "brownbear", "--vocabulary", "here", cwd=tmp_path)
    assert explained.returncode == 0, explained.stderr
    assert "n02132136" in explained.stdout


def test_explain_needs_no_vocabulary(tmp_path: Path) -> None:
    explained = scale_wsl("vocab", "explain", "#BrownBears", cwd=tmp_path)
    assert explained.returncode == 0, explained.stderr
    assert "brownbear" in explained.stdout
    assert "n02132136" in explained.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prepare", "nowhere"], "no source"),
        (["prepare", "text.txt"], "no table"),
        (["prepare", "empty"], "no image"),
        (["prepare", "broken.csv"], "hashtags"),
        (["prepare", "emoji", "source.limt=3"], "source.limit"),
        (["prepare", "emoji", "prepare.min_count=0"], "min_count"),
        (["prepare", "emoji", "--overwite"], "--overwite"),
        (["vocab", "explain", "bear", "--vocabulary", "empty"], "vocabularies"),
        (["track", "replay", "empty"], "spool"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no table")
    (tmp_path / "broken.csv").write_text("image,tags\na.png,cat\n")
    assert says in mistake(*arguments, cwd=tmp_path)


def test_help_lists_every_setting_of_every_source(tmp_path: Path) -> None:
    shown = scale_wsl("prepare", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    for key in ("prepare.min_count=5", "source.pixels=160", "source.debs=", "source.path=", "source.anywhere=false"):
        assert key in shown.stdout
    assert "scale-wsl prepare emoji" in scale_wsl("--help", cwd=tmp_path).stdout
