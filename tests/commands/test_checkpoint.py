from __future__ import annotations

import re
from pathlib import Path

import pytest

from scale_wsl import cli
from scale_wsl.checkpoint.reader import Checkpoint
from tests.checkpoint import states
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_ranks(states.save_steps, 2, folder / "checkpoints", [3, 12])
    return folder


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^step +12 ", text, re.MULTILINE)
    assert re.search(r"^images +96$", text, re.MULTILINE)
    assert re.search(r"^written by +ddp on 2 ranks, format 2$", text, re.MULTILINE)
    assert re.search(r"^head +2 +25 +100 +float32 +\d+$", text, re.MULTILINE)
    assert re.search(r"^exp_avg_sq\.head +1 +20 +80 +float32 +\d+$", text, re.MULTILINE)
    assert "conv1" not in text
    assert cli.main(["checkpoint", "inspect", str(run / "checkpoints" / "step-00000003"), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^trunk\.conv1\.weight +6x3x5x5 +450 +1,800 +float32 +\d+$", text, re.MULTILINE)
    assert re.search(r"^trunk\.bn1\.num_batches_tracked +one number +1 +8 +int64 +1$", text, re.MULTILINE)


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    text = capsys.readouterr().out
    assert "step-00000003: all 4,8" in text
    assert "step-00000012: all 4,8" in text

    older = run / "checkpoints" / "step-00000003"
    stored = Checkpoint.open(older).tensors["head.weight"].chunks[-1]
    file = older / "tensors" / stored.file
    content = file.read_bytes()
    file.write_bytes(content[: stored.position] + b"?" + content[stored.position + 1 :])
    try:
        assert cli.main(["checkpoint", "verify", str(run)]) == 2
        captured = capsys.readouterr()
        assert "step-00000012: all" in captured.out
        assert f"step-00000003 is damaged: tensors/{stored.file} has other bytes of head.weight" in captured.err
        assert cli.main(["checkpoint", "verify", str(run / "checkpoints" / "step-00000012")]) == 0
    finally:
        file.write_bytes(content)


def test_torchs_own_index_is_part_of_the_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints" / "step-00000003" / "tensors" / ".metadata"
    content = file.read_bytes()
    try:
        for damaged, says in (
            (content[:-1], "'tensors/.metadata' is missing or does not have its"),
            (content[:-1] + b"?", "tensors/.metadata is not as it was saved"),
        ):
            file.write_bytes(damaged)
            assert cli.main(["checkpoint", "verify", str(run)]) == 2
            assert says in capsys.readouterr().err
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_what_is_no_checkpoint(tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    for path, says in ((tmp_path / "nowhere", "not a whole checkpoint"), (tmp_path, "there is no checkpoint in")):
        assert cli.main(["checkpoint", action, str(path)]) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["checkpoint", action, str(run), "--more"]) == 2
    assert "--more means nothing here" in capsys.readouterr().err
