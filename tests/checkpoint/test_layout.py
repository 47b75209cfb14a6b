from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from scale_wsl.checkpoint import layout
from scale_wsl.errors import UserError
from tests.checkpoint import states
from tests.ranks import run_ranks


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_only_the_newest_are_kept_and_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run_ranks(states.save_steps, 1, tmp_path, [1, 2, 10, 10], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    found = layout.newest(tmp_path)
    assert found is not None
    assert dataclasses.replace(layout.read_meta(found), files={}, hashes={}) == states.meta(10)


def test_what_has_just_been_saved_is_kept_beside_later_steps(tmp_path: Path) -> None:
    run_ranks(states.save_steps, 1, tmp_path, [40, 50, 10, 20, 30], 2)
    assert _steps(tmp_path) == [20, 30, 40, 50]
    run_ranks(states.save_steps, 1, tmp_path, [60], 1)
    assert _steps(tmp_path) == [60]


def test_leftovers_of_a_run_that_died_while_saving_are_no_checkpoint_and_go_at_the_next_save(tmp_path: Path) -> None:
    run_ranks(states.save_steps, 1, tmp_path, [1], 2)
    whole = tmp_path / "step-00000001"
    for name in (".step-00000007.part", ".step-00000002.part", ".step-00000003.old", ".step-00000004.old.old"):
        shutil.copytree(whole, tmp_path / name)
    shutil.copytree(whole, tmp_path / ".step-mine.part")
    whole.rename(tmp_path / ".step-00000001.part")
    assert layout.newest(tmp_path) is None
    run_ranks(states.save_steps, 1, tmp_path, [7], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-mine.part", "step-00000007"]


def test_a_step_that_was_being_replaced_when_the_run_died_is_whole(tmp_path: Path) -> None:
    run_ranks(states.save_steps, 1, tmp_path, [7], 2)
    replaced = (tmp_path / "step-00000007").rename(tmp_path / "step-00000007.old")
    assert layout.newest(tmp_path) == replaced
    run_ranks(states.save_steps, 1, tmp_path, [8], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007.old", "step-00000008"]


def test_a_run_its_checkpoints_and_a_step_all_name_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    run_ranks(states.save_steps, 1, folder, [1, 2], 2)
    assert layout.find(tmp_path / "run") == layout.find(folder) == layout.find(folder / "step-00000002")
    assert layout.find(folder / "step-00000001") == folder / "step-00000001"
    (folder / "step-00000002" / "index.json").unlink()
    assert layout.find(folder) == folder / "step-00000001"
    with pytest.raises(UserError, match=r"'index\.json' is missing"):
        layout.find(folder / "step-00000002")
    for nothing in (tmp_path / "nowhere", tmp_path, Path("a" * 300), Path("a\0b")):
        with pytest.raises(UserError, match="checkpoint"):
            layout.find(nothing)


def test_the_format_before_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"format": 1, "step": 3, "files": {}}))
    with pytest.raises(UserError, match=r"has checkpoint format 1, but this version reads format 2: .*\n*$"):
        layout.read_meta(tmp_path)


def test_a_seed_may_be_negative_but_no_count(tmp_path: Path) -> None:
    layout.write_meta(tmp_path, dataclasses.replace(states.meta(1), seed=-1))
    with pytest.raises(UserError, match=r"no hash of index\.json"):  # that is, all before it was fine
        layout.read_meta(tmp_path)
    layout.write_meta(tmp_path, dataclasses.replace(states.meta(1), samples=-1))
    with pytest.raises(UserError, match="samples is missing or of a wrong type"):
        layout.read_meta(tmp_path)
