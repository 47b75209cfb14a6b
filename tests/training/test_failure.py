from __future__ import annotations

from pathlib import Path

import pytest

from scale_wsl.errors import UserError
from scale_wsl.training.failure import clear, exit_code_of, first_failure_speaks


def test_only_the_first_rank_to_fail_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, first_failure_speaks(tmp_path, 1, 2):
        raise ValueError("the cause")
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert "rank 1 of 2 failed" in printed
    assert printed.rstrip().endswith("ValueError: the cause")
    with pytest.raises(SystemExit) as stopped, first_failure_speaks(tmp_path, 0, 2):
        raise RuntimeError("Connection closed by peer")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ""
    clear(tmp_path)
    with pytest.raises(SystemExit) as stopped, first_failure_speaks(tmp_path, 0, 2):
        raise UserError("mend this")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: mend this\n"
    with pytest.raises(SystemExit) as stopped, first_failure_speaks(tmp_path, 1, 2):
        raise RuntimeError("Connection closed by peer")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""
    clear(tmp_path)
    with pytest.raises(SystemExit), first_failure_speaks(tmp_path, 0, 2):
        raise ValueError("another run's")
    assert "another run's" in capsys.readouterr().err


def test_an_end_that_was_asked_for_is_no_failure(tmp_path: Path) -> None:
    for kind in (SystemExit, KeyboardInterrupt):
        with pytest.raises(kind), first_failure_speaks(tmp_path, 0, 1):
            raise kind
    assert not list(tmp_path.iterdir())


def test_without_a_folder_the_error_is_printed_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), first_failure_speaks(tmp_path / "gone", 0, 1):
        raise ValueError("the cause")
    assert "the cause" in capsys.readouterr().err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> None:
        raise UserError("mend this")

    assert exit_code_of(lambda: None) == 0
    assert exit_code_of(mistaken) == 2
    assert capsys.readouterr().err == "error: mend this\n"
