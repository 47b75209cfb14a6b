"""The other ways to prepare: near-identical images by validation, a vocabulary that is there, the posts' own order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scale_wsl.corpus.dedup import NEAR, Near, correlation_vectors
from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.images import look
from scale_wsl.corpus.posts import Post
from scale_wsl.corpus.prepare import PrepareConfig, Prepared, choose, prepare, work
from scale_wsl.corpus.shards import Dataset
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Vocabulary, VocabularyRule, WordNet
from tests.corpus.toy import CONFIG, TAGS, ToySource, noise
from tests.loading.fakes import encode

ALONE = Workers(count=1)


class TwoSplits(ToySource):
    """Enough for two processes."""

    def splits(self) -> list[int]:
        return [0, 1]


def config(**changes: Any) -> PrepareConfig:
    return PrepareConfig(**CONFIG.recorded() | changes)


def sides(prepared: Prepared) -> tuple[Dataset, Dataset]:
    return Dataset.open(prepared.train), Dataset.open(prepared.validation)


def subjects(dataset: Dataset) -> set[str]:
    return {key.removeprefix("near").removeprefix("a") for key in dataset.keys}


# --- near validation ----------------------------------------------------------------------------------------------


def test_training_images_near_a_validation_image_are_dropped(tmp_path: Path) -> None:
    prepared = prepare(ToySource(200), tmp_path / "out", config(near="validation"), workers=ALONE)
    train, validation = sides(prepared)
    assert not subjects(train) & subjects(validation)
    near = prepared.report["dropped"]["near a validation image"]
    assert near == prepared.report["near_identical"]["near_validation"] > 20
    assert 0.2 < len(validation) / 400 < 0.4  # the share is one of chances here
    assert len(train) + len(validation) + near == 400
    assert train.vocabulary == validation.vocabulary
    counts = np.bincount(train.label_ids, minlength=4)
    assert counts.tolist() == [entry.count for entry in train.vocabulary.entries]


def test_which_images_are_for_validation_hangs_on_the_image_and_the_seed(tmp_path: Path) -> None:
    drawn = [
        set(sides(prepare(source, tmp_path / f"{i}", config(near="validation", seed=seed), workers=ALONE))[1].keys)
        for i, (source, seed) in enumerate([(ToySource(60), 0), (ToySource(80), 0), (ToySource(60), 1)])
    ]
    assert drawn[0] == {key for key in drawn[1] if int(key.removeprefix("near").removeprefix("a")) < 60}
    assert drawn[0] != drawn[2]


def test_a_group_comes_to_one_side_also_through_copies(tmp_path: Path) -> None:
    class Grouped(ToySource):
        def posts(self, split: Any = None) -> Iterator[Post]:
            for i in range(60):
                images = [encode(noise(4 * i + j)) for j in range(3)]
                # b is a copy of a, so that its group g2 ties c to a, whose own group is another, or none.
                first = "g1" if i % 2 else None
                for name, image, group in (("a", 0, first), ("b", 0, "g2"), ("c", 1, "g2"), ("d", 2, first or "g2")):
                    own = group and f"{i}-{group}"
                    yield Post(f"{i}-{name}", lambda data=images[image]: data, ("cat",), own)  # type: ignore[misc]

    prepared = prepare(Grouped(), tmp_path / "out", config(near="validation"), workers=ALONE)
    found = [{key.split("-")[0] for key in dataset.keys.tolist()} for dataset in sides(prepared)]
    assert not found[0] & found[1]
    assert len(found[0] | found[1]) == 60
    assert 5 < len(found[1]) < 35


def test_near_is_the_rule_of_clusters() -> None:
    images = [noise(i // 2, 24 + 6 * (i % 2)) for i in range(60)]
    images[7] = images[6].transpose(0)  # mirrored
    thumbnails = np.stack([look(encode(image), 10**6).thumbnail for image in images])
    some, others = thumbnails[::2], thumbnails[1::2]
    a, b = correlation_vectors(others).astype(np.float64), correlation_vectors(some).astype(np.float64)
    c = correlation_vectors(some, mirrored=True).astype(np.float64)
    distance = np.minimum(*(((a[:, None] - x[None]) ** 2).sum(2) for x in (b, c)))
    expected = (1 - distance / 2 >= NEAR).any(1)
    assert expected.all()
    assert np.array_equal(Near(some).any_near(others), expected)
    assert np.array_equal(Near(some[:5]).any_near(others), (1 - distance[:, :5] / 2 >= NEAR).any(1))
    assert not Near(np.empty((0, 16, 16), np.uint8)).any_near(others).any()


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "from pathlib import Path\nfrom scale_wsl.corpus.execution import Workers\n"
        "from scale_wsl.corpus.prepare import prepare\nfrom tests.corpus.test_prepare_modes import TwoSplits\n"
        "from tests.corpus.toy import CONFIG\n"
        "prepare(TwoSplits(), Path(__file__).parent / 'out', CONFIG, workers=Workers(count=2))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "job.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "must do so under: if __name__ == '__main__'" in done.stderr
    assert "a worker process ended" in done.stderr


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    vocabulary, _ = Vocabulary.build([("dog", "cat"), ("dog",)], WordNet.load(), VocabularyRule("noun"))
    vocabulary.save(tmp_path / "vocab.json")
    options = {"vocabulary": str(tmp_path / "vocab.json"), "min_count": PrepareConfig.min_count}
    prepared = prepare(ToySource(), tmp_path / "out", config(**options), workers=ALONE)
    for dataset in sides(prepared):
        assert dataset.vocabulary == vocabulary
        assert {dataset.vocabulary.entries[i].hashtag for i in set(dataset.label_ids.tolist())} == {"cat", "dog"}
    kept = sum(map(len, sides(prepared)))
    assert 50 <= kept < 70  # cats, dogs, and what a copy made one
    assert prepared.report["dropped"]["no hashtag that could get a place"] > 40
    with pytest.raises(UserError, match="is taken as it is: leave out min_count"):
        config(**options | {"min_count": 3})
    with pytest.raises(UserError, match="leave out size"):
        config(**options, size=3)


def test_rules_and_stop_lists(tmp_path: Path) -> None:
    (tmp_path / "stop.txt").write_text("dog\n")
    prepared = prepare(ToySource(), tmp_path / "out", config(stop=str(tmp_path / "stop.txt")), workers=ALONE)
    names = {entry.hashtag for entry in sides(prepared)[0].vocabulary.entries}
    assert names == set(TAGS) - {"dog", "horse"}
    prepared = prepare(ToySource(), tmp_path / "under", config(under=("bird.n.01",)), workers=ALONE)
    assert [entry.hashtag for entry in sides(prepared)[0].vocabulary.entries] == ["bird"]


def test_the_posts_own_order(tmp_path: Path) -> None:
    prepared = prepare(ToySource(), tmp_path / "out", config(shuffle=False), workers=ALONE)
    places = {post.key: number for number, post in enumerate(ToySource().posts()) if isinstance(post, Post)}
    for dataset in sides(prepared):
        order = [places[key] for key in dataset.keys]
        assert order == sorted(order)


def test_copies_are_found_whatever_is_compared_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(ToySource(), tmp_path / "whole", CONFIG, workers=ALONE)
    monkeypatch.setattr(choose, "_AT_ONCE", 10)
    monkeypatch.setattr(work, "_SPAN", 40)
    parts = prepare(ToySource(), tmp_path / "parts", CONFIG, workers=ALONE)
    assert [dataset.manifest_hash for dataset in sides(parts)] == [dataset.manifest_hash for dataset in sides(whole)]
