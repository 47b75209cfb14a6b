from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Vocabulary, WordNet
from tests.corpus.writing import write_dataset

POSTS = [("cat", "dog"), ("cat",), ("cat", "fish", "dog"), ("bird",), ("bird", "cat")]
VOCABULARY, _ = Vocabulary.build(POSTS, WordNet.load())
RECORDS = [
    (
        f"key-{i}",
        ("png", "jpg", "webp")[i % 3],
        bytes([i]) * (i * 300 + 1),
        (f"#Tag {i}", "Katze ü"),
        sorted({i % 4, i % 3}),
    )
    for i in range(11)
]


def write(folder: Path, records_per_shard: int = 4) -> Path:
    name = write_dataset(folder, RECORDS, VOCABULARY, records_per_shard=records_per_shard)
    assert str(name) == "train-toy-11-4"
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_everything_comes_back(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert len(dataset) == len(RECORDS)
    assert (dataset.name.images, dataset.name.labels, dataset.max_labels) == (11, 4, 2)
    assert dataset.vocabulary_hash == VOCABULARY.hash == dataset.manifest["vocabulary_hash"]
    assert dataset.manifest_hash == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    for i, (key, extension, image, _, labels) in enumerate(RECORDS):
        assert dataset.read(i) == image
        assert (dataset.keys[i], dataset.extensions[i], dataset.labels(i).tolist()) == (key, extension, labels)
    kinds = [getattr(dataset, name).dtype for name in ("shard", "offset", "length", "label_ids", "label_start")]
    assert kinds == [np.int32, np.int64, np.int64, np.int32, np.int64]
    assert dataset.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    dataset.verify()


def test_shards_are_plain_tars_in_webdatasets_layout(folder: Path) -> None:
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
                extracted = archive.extractfile(member)
                assert extracted is not None
                members[member.name] = extracted.read()
    names = [name for key, extension, *_ in RECORDS for name in (f"{key}.{extension}", f"{key}.json")]
    assert list(members) == names
    for key, extension, image, hashtags, labels in RECORDS:
        assert members[f"{key}.{extension}"] == image
        facts = json.loads(members[f"{key}.json"])
        named = [VOCABULARY.entries[label].hashtag for label in labels]
        assert facts == {"hashtags": list(hashtags), "labels": labels, "label_names": named}


def test_equal_contents_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    assert contents(write(tmp_path / "else" / "where")) == contents(folder)


def test_a_pickled_copy_is_small_and_reads_in_another_process(folder: Path) -> None:
    dataset = Dataset.open(folder)
    dataset.read(3)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 500
    script = "import pickle,sys; d = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(d.read(10))"
    done = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True)
    assert done.stdout == RECORDS[10][2]
    edit_manifest(folder, licence="other")
    with pytest.raises(UserError, match="replaced"):
        pickle.loads(pickled)  # noqa: S301 - our own


def test_threads_share_one_and_handles_are_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale_wsl.corpus.shards._MOST_HANDLES", 1)
    dataset = Dataset.open(folder)
    order = np.random.default_rng(0).integers(0, len(RECORDS), 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.read, order)) == [RECORDS[i][2] for i in order]
    assert len(dataset._handles) == 1
    dataset.close()
    assert dataset.read(0) == RECORDS[0][2]


@pytest.mark.parametrize("file", ["000001.tar", "000002.parquet", "vocabulary.json"])
def test_a_missing_or_cut_file_is_named(folder: Path, file: str) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{file} has .* bytes where the manifest says"):
        Dataset.open(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"{file} is missing"):
        Dataset.open(folder)


def test_no_data_set_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="there is no data set in"):
            Dataset.open(path)


def test_another_version_or_format_is_refused(folder: Path) -> None:
    edit_manifest(folder, version=2)
    with pytest.raises(UserError, match="version 2 of the data set format, where this release reads 1"):
        Dataset.open(folder)
    edit_manifest(folder, format="something else")
    with pytest.raises(UserError, match="no data set's manifest"):
        Dataset.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Dataset.open(folder)


def test_another_vocabulary_is_refused(folder: Path) -> None:
    other, _ = Vocabulary.build([*POSTS, ("horse",)], WordNet.load())
    other.save(folder / "vocabulary.json")
    entry = {"file": "vocabulary.json", "bytes": (folder / "vocabulary.json").stat().st_size, "sha256": "0"}
    edit_manifest(folder, vocabulary=entry)
    with pytest.raises(UserError, match="is another vocabulary"):
        Dataset.open(folder)


def test_verify_finds_a_flipped_bit(folder: Path) -> None:
    dataset = Dataset.open(folder)
    data = bytearray((folder / "000001.tar").read_bytes())
    data[700] ^= 1
    (folder / "000001.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"000001\.tar is damaged"):
        dataset.verify()


def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    dataset = Dataset.open(folder)
    (folder / "000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="become shorter"):
        dataset.read(0)
    (folder / "000002.tar").unlink()
    with pytest.raises(UserError, match="cannot read the shard"):
        dataset.read(10)


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        ("offset", 0, 511),
        ("offset", 3, 1 << 40),
        ("offset", 3, (1 << 63) - 1),
        ("length", 1, -1),
        ("length", 2, 1 << 40),
        ("labels", 0, [4]),
        ("labels", 0, [-1]),
        ("labels", 0, []),
        ("labels", 3, []),
        ("labels", 1, [1, 0]),
        ("labels", 1, [1, 1]),
        ("labels", 1, None),
        ("labels", 1, [None]),
        ("key", 1, None),
    ],
)
def test_an_index_that_lies_is_refused(folder: Path, column: str, row: int, value: Any) -> None:
    path = folder / "000000.parquet"
    table = pq.read_table(path)
    cells = table.column(column).to_pylist()
    cells[row] = value
    at = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(at, table.schema.field(column), pa.array(cells, table.schema.field(column).type)), path
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["index"]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged"):
        Dataset.open(folder)


def test_an_index_that_claims_more_rows_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "000000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table] * 50), path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["index"]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    with pytest.raises(UserError, match="another number of rows"):
        Dataset.open(folder)


def test_an_index_of_other_columns_is_refused(folder: Path) -> None:
    path = folder / "000000.parquet"
    manifest = json.loads((folder / "manifest.json").read_text())
    for table, match in ((pa.table({"key": ["a"]}), "no index of this data set"), (None, "no index that can be read")):
        path.write_bytes(b"PAR1 no") if table is None else pq.write_table(table, path)
        manifest["shards"][0]["index"]["bytes"] = path.stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=match):
            Dataset.open(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_manifest_of_any_content_is_opened_or_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / "manifest.json"
    whole = path.read_text()
    manifest = json.loads(whole)
    place = manifest
    for _ in range(data.draw(st.integers(0, 3))):  # descend some levels, then put anything there
        below = list(place if isinstance(place, dict) else range(len(place)))
        inner = place[data.draw(st.sampled_from(below))]
        if not isinstance(inner, dict | list) or not inner:
            break
        place = inner
    key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
    place[key] = data.draw(JSON)
    try:
        path.write_text(json.dumps(manifest))
        dataset = Dataset.open(folder)
        assert [dataset.read(i) for i in range(len(dataset))] == [record[2] for record in RECORDS]
    except UserError:
        pass
    finally:
        path.write_text(whole)


def test_finding_a_data_set_by_its_role(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out / "train-toy-11-4")
    assert find_dataset(out, "train") == out / "train-toy-11-4"
    with pytest.raises(UserError, match="no data set of the role val"):
        find_dataset(out, "val")
    shutil.copytree(folder, out / "train-toy-12-4")
    with pytest.raises(UserError, match="2 data sets of the role train"):
        find_dataset(out, "train")
