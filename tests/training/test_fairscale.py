"""What a user of the legacy engine is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from scale_wsl.engines.fairscale import require_fairscale
from scale_wsl.errors import UserError
from tests.training.launching import TINY, Ranks


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairscale.nn.data_parallel", None)
    with pytest.raises(UserError, match=r"pip install 'scale-wsl\[fairscale\]', or set engine\.name=fsdp"):
        require_fairscale(torch.device("cpu"))


@pytest.mark.slow
def test_a_run_says_that_it_is_a_legacy_engine(emoji_corpus: Path, tmp_path: Path) -> None:
    data = (f"data.train={emoji_corpus}", f"data.validation={emoji_corpus}", f"run.folder={tmp_path / 'run'}")
    more = ("engine.name=fairscale", "batch.micro=4", "schedule.length=1 steps", "tracking.enabled=false")
    ranks = Ranks([*TINY, *data, *more], 1, tmp_path)
    assert ranks.wait() == [0], ranks.output()
    assert "fairscale (a legacy engine, kept for comparison: engine.name=fsdp is its successor)" in ranks.output()
