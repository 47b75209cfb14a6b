from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.prepare import prepare
from scale_wsl.corpus.show import report as module
from scale_wsl.corpus.show.report import Report, Unplaced, read_report
from scale_wsl.errors import UserError
from tests.corpus.show.test_markup import ANY_TEXT
from tests.corpus.toy import CONFIG, ToySource

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


def prepared(report: Any = None, **more: Any) -> dict[str, Any]:
    return {"format": "scale_wsl preparation", "report": {} if report is None else report, **more}


def write(folder: Path, name: str, value: Any) -> Path:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_nothing_is_there(tmp_path: Path) -> None:
    assert read_report(tmp_path) == Report()


def test_what_prepare_leaves_is_read(tmp_path: Path) -> None:
    made = prepare(ToySource(), tmp_path / "out", CONFIG)
    report = read_report(tmp_path / "out")
    assert report.posts == made.report["posts"] > 100
    assert report.copies == made.report["copies"] == 6
    assert report.dropped == made.report["dropped"]
    assert report.examples["no hashtag"][0][0] == "nohashtag"
    assert report.dropped_tags == made.report["dropped_hashtags"]
    assert report.near_identical == made.report["near_identical"]
    assert report.unplaced["stop list"].distinct == 1
    assert report.settings["min_count"] == "2"
    assert json.loads(report.fingerprint) == {"images": 60, "version": 1}


def test_the_vocabularys_report_is_read_most_frequent_first(tmp_path: Path) -> None:
    write(tmp_path, "prepared.json", prepared({"vocabulary": {"dropped_hashtags": {"no noun synset": 900}}}))
    dropped = {"no noun synset": {"b": 3, "a": 3, "c": 9}, "below min_count": {}}
    coverage = {"images": 0.9, "of": {"pairs": 3}, "text": "x", "flag": True}
    write(
        tmp_path,
        "vocabulary.report.json",
        {"merged": {"cat": {"cat": 4, "cats": 2}}, "dropped": dropped, "coverage": coverage},
    )
    report = read_report(tmp_path)
    most = [("c", 9), ("a", 3), ("b", 3)]
    assert report.unplaced == {"no noun synset": Unplaced(900, most_frequent=most), "below min_count": Unplaced(0)}
    assert report.members == {"cat": {"cat": 4, "cats": 2}}
    assert report.coverage == {"images": 0.9, "of pairs": 3}


def test_a_vocabularys_report_that_lists_only_the_most_frequent(tmp_path: Path) -> None:
    told = {"hashtags": 70, "pairs": 500, "error": 2, "most_frequent": {"hashtags": 30, "error": 31}}
    write(tmp_path, "vocabulary.report.json", {"dropped": {"no noun synset": told}})
    most = [("error", 31), ("hashtags", 30)]
    assert read_report(tmp_path).unplaced == {"no noun synset": Unplaced(70, True, 500, most)}


def test_a_value_that_is_nested_as_deeply_as_can_be_parsed(tmp_path: Path) -> None:
    for depth in range(100, 1000, 10):
        value = '{"format": "scale_wsl preparation", "recipe": {"fingerprint": %s}}' % ("[" * depth + "]" * depth)
        write(tmp_path, "prepared.json", value)
        with contextlib.suppress(UserError):
            assert read_report(tmp_path).fingerprint


def test_rejects_give_examples_of_each_reason(tmp_path: Path) -> None:
    write(
        tmp_path, "prepared.json", prepared({"dropped": {"a": 30, "b": 1}, "examples": {"a": ["old"], "c": ["x: y"]}})
    )
    table = {
        "key": [f"k{i}" for i in range(31)],
        "reason": ["a"] * 30 + ["b"],
        "detail": [None] * 30 + ["why"],
        "more": [1] * 31,
    }
    pq.write_table(pa.table(table), tmp_path / "rejects.parquet")
    report = read_report(tmp_path)
    assert report.examples == {"a": [(f"k{i}", "") for i in range(12)], "b": [("k30", "why")], "c": [("x", "y")]}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("prepared.json", "{", "not valid JSON"),
        ("prepared.json", "[" * 100_000, "not valid JSON"),
        ("prepared.json", '{"format": NaN}', "not valid JSON"),
        ("prepared.json", [], "must be an object"),
        ("prepared.json", {"format": "other"}, "format must be"),
        ("prepared.json", prepared([]), "report must be an object"),
        ("prepared.json", prepared({"posts": -1}), "report.posts must be a count"),
        ("prepared.json", prepared({"posts": True}), "report.posts must be a count"),
        ("prepared.json", prepared({"copies": 10**30}), "report.copies must be a count"),
        ("prepared.json", prepared({"dropped": {"a": "3"}}), "report.dropped.a must be a count"),
        ("prepared.json", prepared({"examples": {"a": [1]}}), "report.examples.a must be a list of texts"),
        ("prepared.json", prepared(recipe=[]), "recipe must be an object"),
        ("vocabulary.report.json", {"merged": {"a": 3}}, "merged.a must be an object"),
        ("vocabulary.report.json", {"merged": {"a": {"b": 0.5}}}, "merged.a.b must be a count"),
        ("vocabulary.report.json", {"dropped": {"a": ["b"]}}, "dropped.a must be an object"),
        ("vocabulary.report.json", {"dropped": {"a": {"most_frequent": {"b": -1}}}}, "most_frequent.b must be a count"),
        ("vocabulary.report.json", {"dropped": {"a": {"most_frequent": {}, "pairs": "x"}}}, "pairs must be a count"),
        ("vocabulary.report.json", {"coverage": 1}, "coverage must be an object"),
        ("rejects.parquet", "PAR1", "no Parquet file"),
        ("rejects.parquet", "", "no Parquet file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        read_report(write(tmp_path, name, value))
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("columns", [{"key": ["a"]}, {"key": ["a"], "reason": ["b"], "detail": [3]}, {"reason": ["a"]}])
def test_rejects_with_other_columns_are_refused(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "rejects.parquet")
    with pytest.raises(UserError, match="must have the columns key, reason and detail"):
        read_report(tmp_path)


@pytest.mark.parametrize("name", ["prepared.json", "vocabulary.report.json", "rejects.parquet"])
def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._LARGEST, name, 1 << 20)
    (tmp_path / name).write_bytes(b"[" * ((1 << 20) + 1))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_report(tmp_path)


def test_rejects_that_would_unpack_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_UNPACKED", 10)
    pq.write_table(pa.table({"key": ["a"], "reason": ["b"], "detail": ["c"]}), tmp_path / "rejects.parquet")
    with pytest.raises(UserError, match="holds more than"):
        read_report(tmp_path)


def test_text_in_rejects_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    binary = pa.table({"key": [b"\xff"], "reason": [b"a"], "detail": [b"b"]})
    text = binary.cast(pa.schema([(name, pa.string()) for name in binary.column_names]), safe=False)
    pq.write_table(text, tmp_path / "rejects.parquet")
    with pytest.raises(UserError, match=r"rejects\.parquet"):
        read_report(tmp_path)


def test_a_long_text_that_comes_often_is_in_memory_once(tmp_path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), ["x" * (1 << 20)])  # 5 GB, written out
    pq.write_table(pa.table({"key": text, "reason": text, "detail": text}), tmp_path / "rejects.parquet")
    before = pa.default_memory_pool().max_memory()
    assert len(next(iter(read_report(tmp_path).examples.values()))) == 12
    assert pa.default_memory_pool().max_memory() <= max(before, 1 << 27)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON, JSON, JSON)
def test_any_json_is_a_report_or_a_mistake(tmp_path: Path, report: Any, recipe: Any, vocabulary: Any) -> None:
    write(tmp_path, "prepared.json", prepared(report, recipe=recipe))
    write(tmp_path, "vocabulary.report.json", vocabulary)
    try:
        read_report(tmp_path)
    except UserError as error:
        str(error).encode()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_damaged_rejects_are_a_report_or_a_mistake(tmp_path: Path, data: st.DataObject) -> None:
    table = pa.table({name: [f"{name}{i % 3}" for i in range(20)] for name in ("key", "reason", "detail")})
    pq.write_table(table, tmp_path / "rejects.parquet")
    content = bytearray((tmp_path / "rejects.parquet").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "rejects.parquet").write_bytes(content)
    try:
        read_report(tmp_path)
    except UserError as error:
        str(error).encode()
