from __future__ import annotations

import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from scale_wsl.corpus import prepare as prepare_module
from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.labels import label_ids
from scale_wsl.corpus.posts import Post, key_of
from scale_wsl.corpus.prepare import PrepareConfig, Prepared, prepare
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.corpus.sources import open_source
from scale_wsl.errors import UserError
from scale_wsl.hashtags import WordNet, normalize_all
from scale_wsl.recipe import load_recipe
from tests.corpus.toy import CONFIG, ToySource, noise
from tests.loading.fakes import encode

ALONE = Workers(count=1)
"""Nothing is sent to another process, so a source need not be picklable."""
FILES = ["prepared.json", "rejects.parquet", "vocabulary.report.json"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(ToySource(), tmp_path_factory.mktemp("toy") / "deep" / "out", CONFIG)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def jsons(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    extracted = archive.extractfile(member)
                    assert extracted is not None
                    found[member.name.removesuffix(".json")] = json.load(extracted)
    return found


def test_every_post_is_accounted_for(toy: Prepared) -> None:
    report = toy.report
    assert not toy.reused
    assert report["posts"] == 132
    assert report["copies"] == 6
    assert report["dropped"] == {
        "no hashtag": 1,
        "no hashtag that could get a place": 1,
        "undecodable": 1,
        "too many pixels": 1,
        "too many bytes": 1,
        "unreadable": 1,
    }
    assert report["examples"]["no hashtag"] == ["nohashtag"]
    assert report["train"]["images"] + report["val"]["images"] == 132 - 6 - 6
    assert report["dropped_hashtags"] == {"no letter": 1, "empty": 1}
    assert report["vocabulary"]["dropped_hashtags"]["stop list"] == 1
    assert report["near_identical"]["clusters"] == 60
    assert report["near_identical"]["largest"] == 2
    assert all(word in toy.summary() for word in ("132 posts", "6 exact copies", "4 labels", toy.train.name))


def test_the_folder_holds_two_whole_data_sets(toy: Prepared) -> None:
    out = toy.train.parent
    assert sorted(path.name for path in out.iterdir()) == [*FILES[:2], toy.train.name, toy.validation.name, FILES[2]]
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    assert [row["key"] for row in rejects] == ["broken", "large", "heavy", "gone"]
    assert {row["reason"] for row in rejects} == {"undecodable", "too many pixels", "too many bytes", "unreadable"}
    for dataset in (toy.train, toy.validation):
        assert Dataset.open(dataset).manifest["dropped"] == toy.report["dropped"]
    assert find_dataset(out, "train") == toy.train
    assert find_dataset(out, "val") == toy.validation
    for path, role in ((toy.train, "train"), (toy.validation, "val")):
        dataset = Dataset.open(path)
        dataset.verify()
        assert path.name == str(dataset.name)
        assert (dataset.name.role, dataset.name.source, dataset.name.labels) == (role, "toy", 4)
        assert {key: dataset.manifest[key] for key in ("licence", "attribution")} == {
            "licence": "none",
            "attribution": "nobody",
        }
        k = np.bincount(np.diff(dataset.label_start))
        assert dataset.manifest["labels_per_image"] == {str(i): int(n) for i, n in enumerate(k) if n}


def test_no_image_and_no_near_identical_one_is_on_both_sides(toy: Prepared) -> None:
    train, validation = Dataset.open(toy.train), Dataset.open(toy.validation)
    subjects = [{key.removeprefix("near").removeprefix("a") for key in side.keys} for side in (train, validation)]
    assert not subjects[0] & subjects[1]
    assert 33 <= len(validation) <= 36
    contents = [{side.read(i) for i in range(len(side))} for side in (train, validation)]
    assert not contents[0] & contents[1]
    assert len(contents[0]) + len(contents[1]) == len(train) + len(validation)


def test_labels_are_those_of_the_hashtags_and_images_are_untouched(toy: Prepared) -> None:
    source = {post.key: post for post in ToySource().posts()}
    wordnet = WordNet.load()
    for path in (toy.train, toy.validation):
        dataset, facts = Dataset.open(path), jsons(path)
        for i, key in enumerate(dataset.keys):
            post = source[key]
            assert callable(post.image)
            assert dataset.read(i) == post.image()
            hashtags = list(post.hashtags)
            if (copy := source.get(f"copy{key[1:]}")) is not None and key.startswith("a"):
                hashtags += copy.hashtags  # of an exact copy
            assert facts[key]["hashtags"] == hashtags
            expected = label_ids(normalize_all(hashtags)[0], dataset.vocabulary, wordnet)
            assert dataset.labels(i).tolist() == facts[key]["labels"] == expected.tolist()


def test_the_vocabulary_is_that_of_the_training_split_alone(toy: Prepared) -> None:
    train, validation = Dataset.open(toy.train), Dataset.open(toy.validation)
    assert train.vocabulary == validation.vocabulary
    counts = np.bincount(train.label_ids, minlength=4)
    assert counts.tolist() == [entry.count for entry in train.vocabulary.entries]
    assert train.vocabulary.stop == ("horse",)


def test_the_records_are_shuffled(toy: Prepared) -> None:
    keys = [str(key) for key in Dataset.open(toy.train).keys]
    assert keys != sorted(keys)
    ends = [key.startswith("near") for key in keys]
    assert 0.2 < np.mean(ends[: len(ends) // 2]) < 0.8


def test_the_same_input_gives_the_same_bytes(toy: Prepared, tmp_path: Path) -> None:
    again = prepare(ToySource(), tmp_path / "again", CONFIG, workers=Workers(count=2))
    assert hashes(again.train) == hashes(toy.train)
    assert hashes(again.validation) == hashes(toy.validation)


def test_the_seed_changes_the_split(toy: Prepared, tmp_path: Path) -> None:
    other = prepare(ToySource(), tmp_path / "other", PrepareConfig(**CONFIG.recorded() | {"seed": 1}))
    assert set(Dataset.open(other.validation).keys) != set(Dataset.open(toy.validation).keys)


def test_repeating_does_nothing(toy: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    out = toy.train.parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(ToySource, "posts", None)
    again = prepare(ToySource(), out, CONFIG, workers=Workers(count=7))
    assert again.reused
    assert (again.train, again.validation, again.report) == (toy.train, toy.validation, toy.report)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_preparation_in_the_same_folder_is_refused(toy: Prepared) -> None:
    out = toy.train.parent
    with pytest.raises(
        UserError, match=r"different: fingerprint\.version, settings\.min_count\): choose .* --overwrite"
    ):
        prepare(ToySource(version=2), out, PrepareConfig(**CONFIG.recorded() | {"min_count": 3}))


@pytest.mark.parametrize(
    ("attribute", "value"), [("licence", "CC0-1.0"), ("attribution", "somebody"), ("stop", ("horse", "cat"))]
)
def test_licence_attribution_and_stop_list_are_part_of_the_recipe(
    toy: Prepared, attribute: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToySource, attribute, value)
    named = {"stop": r"rule\.stop"}.get(attribute, attribute)
    with pytest.raises(UserError, match=rf"different: {named}\)"):
        prepare(ToySource(), toy.train.parent, CONFIG)


def test_reused_images_that_were_not_compared_are_told(toy: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "the image files were not compared"
    assert told not in prepare(ToySource(), toy.train.parent, CONFIG).summary()
    monkeypatch.setattr(ToySource, "compares_images", False)
    assert told in prepare(ToySource(), toy.train.parent, CONFIG).summary()


@pytest.mark.parametrize("version", [2, 99])
def test_a_preparation_of_another_version_is_named_and_can_be_overwritten(tmp_path: Path, version: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepared.json").write_text(json.dumps({"format": "scale_wsl preparation", "version": version}))
    with pytest.raises(UserError, match=f"of version {version}, where this release makes 3.* --overwrite"):
        prepare(ToySource(), tmp_path / "out", CONFIG)
    assert prepare(ToySource(), tmp_path / "out", CONFIG, overwrite=True).train.is_dir()


def test_the_filters_of_warnings_are_left_as_they_were(tmp_path: Path) -> None:
    before = list(warnings.filters)
    prepare(ToySource(), tmp_path / "out", CONFIG, workers=ALONE)
    assert warnings.filters == before


def test_a_copy_keeps_the_groups_of_all(tmp_path: Path) -> None:
    class Grouped(ToySource):
        def posts(self, split: Any = None) -> Iterator[Post]:
            for i in range(40):
                images = encode(noise(4 * i)), encode(noise(4 * i + 1))
                # b is a copy of a, so that its group g2 ties c to a, whose own group is another.
                for name, image, group in (("a", images[0], "g1"), ("b", images[0], "g2"), ("c", images[1], "g2")):
                    yield Post(f"{i}-{name}", lambda image=image: image, ("cat",), f"{i}-{group}")  # type: ignore[misc]

    prepared = prepare(Grouped(), tmp_path / "out", CONFIG, workers=ALONE)
    sides = [
        {key.split("-")[0] for key in Dataset.open(path).keys.tolist()}
        for path in (prepared.train, prepared.validation)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    source = tmp_path / "images"
    (source / "cat").mkdir(parents=True)
    for i in range(4):
        (source / "cat" / f"{i}.png").write_bytes(encode(noise(i)))
    os.mkfifo(source / "cat" / "x.png")
    prepared = prepare(open_source(str(source)), tmp_path / "out", CONFIG, workers=ALONE)
    assert prepared.report["dropped"] == {"unreadable": 1}
    assert prepared.report["examples"] == {"unreadable": [f"{key_of('cat/x.png')}: it is no regular file"]}


@pytest.mark.parametrize("name", ["../escaped", "a-b", "", "9"])
def test_a_source_of_no_proper_name_is_refused_before_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToySource, "name", name)
    monkeypatch.setattr(ToySource, "posts", None)
    with pytest.raises(UserError, match="the source of a data set is"):
        prepare(ToySource(), tmp_path / "out", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_key_comes_once(tmp_path: Path) -> None:
    class Twice(ToySource):
        def posts(self, split: Any = None) -> Iterator[Post]:
            yield from super().posts()
            yield from super().posts()

    with pytest.raises(UserError, match="same key, a0"):
        prepare(Twice(), tmp_path / "out", CONFIG, workers=ALONE)


@pytest.mark.parametrize(("change", "match"), [("other", "was changed"), ("gone", "any more")])
def test_an_image_that_changes_meanwhile_is_noticed(
    change: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "images" / "cat" / f"{i}.png").write_bytes(encode(noise(i)))
    real = prepare_module.shard_tasks

    def changing(*arguments: Any) -> Any:
        path = tmp_path / "images" / "cat" / "1.png"
        path.write_bytes(encode(noise(9))) if change == "other" else path.unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(prepare_module, "shard_tasks", changing)
    with pytest.raises(UserError, match=match):
        prepare(open_source(str(tmp_path / "images")), tmp_path / "out", CONFIG, workers=ALONE)
    assert not (tmp_path / "out").exists()


def test_few_images_are_in_memory_at_a_time(tmp_path: Path) -> None:
    class Counting(ToySource):
        def posts(self, split: Any = None) -> Iterator[Post]:
            for i in range(3000):
                yield Post(f"k{i}", lambda: bytes(60_000), ("cat",))

    sizes = [len(batch.posts) for batch in Counting().read(None, images=True)]
    assert sum(sizes) == 3000
    assert max(sizes) * 60_000 < 34e6
    assert [len(batch.posts) for batch in Counting().read(None, images=False)] == [1024, 1024, 952]


@pytest.mark.parametrize(
    ("key", "value"),
    [("min_count", 0), ("size", 0), ("validation_share", 0.0), ("validation_share", 1.0), ("near", "x"), ("seed", -1)],
)
def test_settings_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} is {value}, but must be"):
        PrepareConfig(**{key: value})


def test_settings_come_from_the_command_line() -> None:
    assert load_recipe(PrepareConfig, None, ["min_count=3", "size=100"]) == PrepareConfig(min_count=3, size=100)


# --- a real corpus --------------------------------------------------------------------------------------------------


def test_the_emoji_corpus(emoji_corpus: Path) -> None:
    train, validation = (Dataset.open(find_dataset(emoji_corpus, role)) for role in ("train", "val"))
    for dataset in (train, validation):
        dataset.verify()
        assert "CC-BY-SA-4.0" in dataset.manifest["licence"]
        assert "OpenMoji" in dataset.manifest["attribution"]
    assert not set(train.keys) & set(validation.keys)
    assert 200 < len(train) < 300
    assert 25 < len(validation) < 60
    assert len(train.vocabulary) > 100
    names = {entry.hashtag for entry in train.vocabulary.entries}
    assert {"animal", "food", "face"} <= names
    assert train.labels(0).tolist() == sorted(set(train.labels(0).tolist()))
