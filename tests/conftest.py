"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from scale_wsl.corpus.prepare import PrepareConfig, prepare
from scale_wsl.corpus.sources import open_source

# Machines are slow now and then; that is no failure of a test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_configure() -> None:
    """Give each of several test processes, and the ranks that it starts, CPUs of its own.

    Gloo's collectives here are a few bytes, and a rank that waits wakes up two to three times as fast on the same CPU.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: count]
        if own:
            os.sched_setaffinity(0, own)


@pytest.fixture(scope="session")
def emoji_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `scale-wsl prepare emoji` makes it, of 300 emoji at 48 pixels; read it, change nothing in it."""
    out = tmp_path_factory.mktemp("data") / "emoji"
    prepare(open_source("emoji", limit=300, pixels=48), out, PrepareConfig(min_count=2, records_per_shard=100))
    return out
