"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from scale_wsl.corpus.prepare import PrepareConfig, prepare
from scale_wsl.corpus.sources import open_source

# Machines are slow now and then; that is no failure of a test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def emoji_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `scale-wsl prepare emoji` makes it, of 300 emoji at 48 pixels; read it, change nothing in it."""
    out = tmp_path_factory.mktemp("data") / "emoji"
    prepare(open_source("emoji", limit=300, pixels=48), out, PrepareConfig(min_count=2, records_per_shard=100))
    return out
