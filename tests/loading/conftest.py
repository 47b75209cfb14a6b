from __future__ import annotations

from multiprocessing import forkserver

import pytest

import tests.ranks  # noqa: F401 - its preload is what the fork server of this process shall start with


@pytest.fixture(autouse=True, scope="module")
def _one_fork_server() -> None:
    forkserver.ensure_running()
