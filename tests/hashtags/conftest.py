from __future__ import annotations

import pytest

from scale_wsl.hashtags.wordnet import WordNet


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    """WordNet unpacked into a fresh cache, so that no test sees or touches the user's own."""
    return WordNet.load(tmp_path_factory.mktemp("cache"))
