"""A new run starts from another run's weights: the trunk as it is, the head's rows by hashtag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from scale_wsl.checkpoint.layout import find
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.corpus.prepare import PrepareConfig, prepare
from scale_wsl.corpus.sources import open_source
from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.models.head import initial_rows
from tests.training.launching import TINY, Ranks
from tests.training.test_mistakes import mistake

STILL = ("optim.lr=1e-12", "optim.warm_up_from=0", "optim.weight_decay=0")  # so that the weights stay where they start


def _arguments(corpus: Path, run: Path, *more: str) -> list[str]:
    data = (f"data.train={corpus}", f"data.validation={corpus}", f"run.folder={run}", "tracking.enabled=false")
    return [*TINY, *data, "batch.micro=4", "schedule.length=2 steps", *more]


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape = torch.Size(checkpoint.tensors[name].shape)
    return checkpoint.read(name, shape, 0, shape.numel()).view(shape)


def test_rows_go_by_hashtag_into_another_vocabulary_and_another_engine(emoji_corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare(open_source("emoji", limit=300, pixels=48), other, PrepareConfig(min_count=4, records_per_shard=100))
    first = Ranks(["engine.name=ddp", *_arguments(emoji_corpus, tmp_path / "first")], 1, tmp_path / "a")
    assert first.wait() == [0], first.output()
    start = f"checkpoint.start_from={tmp_path / 'first'}"
    second = Ranks(["engine.name=fsdp", *_arguments(other, tmp_path / "second", start, *STILL)], 2, tmp_path / "b")
    assert second.wait() == [0, 0], second.output()
    assert "hashtags taken over" in second.output()

    old, new = (Checkpoint.open(find(tmp_path / run)) for run in ("first", "second"))
    vocabularies = [Vocabulary.load(checkpoint.vocabulary) for checkpoint in (old, new) if checkpoint.vocabulary]
    assert vocabularies[0].hash != vocabularies[1].hash
    rows = [vocabularies[0].index_of_synsets(entry.synsets) for entry in vocabularies[1].entries]
    for name in ("head.weight", "head.bias"):
        before, after = _tensor(old, name), _tensor(new, name)
        for row, place in enumerate(rows):
            torch.testing.assert_close(
                after[row],
                before[place]
                if place is not None
                else (initial_rows(0, range(row, row + 1), after.shape[1])[0] if after.ndim > 1 else after[row] * 0),
                rtol=0,
                atol=1e-9,
            )
    for name in old.tensors:
        if name.startswith("trunk.") and "running" not in name and "tracked" not in name:
            torch.testing.assert_close(_tensor(new, name), _tensor(old, name), rtol=0, atol=1e-9, msg=name)
    report = json.loads((tmp_path / "second" / "surgery.json").read_text())
    assert report["taken_over"] == sum(row is not None for row in rows)
    assert new.meta.step == 2  # counted from its own start


@pytest.fixture(scope="module")
def finished(emoji_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished")
    ranks = Ranks(_arguments(emoji_corpus, run, "model.width=2"), 1, run / "out")
    assert ranks.wait() == [0], ranks.output()
    return run


def test_another_network_is_refused(finished: Path, emoji_corpus: Path, tmp_path: Path) -> None:
    sentence = mistake(_arguments(emoji_corpus, tmp_path / "run", f"checkpoint.start_from={finished}"))
    assert "another network" in sentence


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["checkpoint.start_from=/nowhere"], "/nowhere"),
        (["checkpoint.take_ambiguous=true"], "not checkpoint.start_from"),
    ],
)
def test_nothing_to_start_from_is_a_users_mistake(
    settings: list[str], says: str, emoji_corpus: Path, tmp_path: Path
) -> None:
    assert says in mistake(_arguments(emoji_corpus, tmp_path / "run", *settings), 1)


def test_a_damaged_checkpoint_is_refused(finished: Path, emoji_corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(find(finished), copy)
    damaged = max((copy / "tensors").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    settings = (f"checkpoint.start_from={copy}", "model.width=2")
    assert "is damaged" in mistake(_arguments(emoji_corpus, tmp_path / "run", *settings))
