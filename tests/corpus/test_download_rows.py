from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.addresses import Guard
from scale_wsl.corpus.download_rows import count, digest, read_rows, reduce_row, table_files, write_rows
from scale_wsl.corpus.download_shard import ROWS
from scale_wsl.errors import UserError
from tests.corpus.sources.test_table import write_csv, write_jsonl, write_parquet

URL = "http://example.com/a.jpg"


def rows_of(path: Path, *columns: str, limit: int | None = None) -> list[dict[str, Any]]:
    return [reduce_row(row, Guard()) for row in read_rows([str(path)], list(columns or ("url", "hashtags")), limit)]


def one(tmp_path: Path, url: Any, hashtags: Any = "cat", group: Any = None) -> dict[str, Any]:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"url": url, "hashtags": hashtags, "group": group}))
    (row,) = rows_of(path, "url", "hashtags", "group")
    write_rows([row], tmp_path / "0")
    with pa.OSFile(str(tmp_path / "0" / ROWS)) as file:
        assert pa.ipc.open_file(file).read_all().to_pylist() == [row]
    return row


@pytest.mark.parametrize(
    ("hashtags", "group", "expected"),
    [
        ("a #b c", None, {"hashtags": ["b"], "caption": "a #b c", "group": None}),
        ("a, b", "g", {"hashtags": ["a", "b"], "caption": "a, b", "group": "g"}),
        (["a", "#b"], 7, {"hashtags": ["a", "#b"], "caption": None, "group": "7"}),
        (None, None, {"hashtags": [], "caption": None, "group": None}),
        ("\ud800 #x", "\ud800", {"hashtags": ["x"], "caption": "? #x", "group": "?"}),
    ],
)
def test_what_is_kept_of_a_row(tmp_path: Path, hashtags: Any, group: Any, expected: dict[str, Any]) -> None:
    assert one(tmp_path, URL, hashtags, group) == {"row": 0, "url": URL, "refused": None, **expected}


@pytest.mark.parametrize(
    ("url", "hashtags", "refused"),
    [
        (None, "cat", "no URL: "),
        (3, "cat", "no URL: int"),
        ({"a": 1}, "cat", "no URL: dict"),
        ("\ud800", "cat", "control characters: "),
        ("x" * 100_000, "cat", "too long a URL: 100,000"),
        ("file:///etc/passwd", "cat", "scheme: file"),
        ("http://10.0.0.1/", "cat", "private address: 10.0.0.1"),
        (URL, 3, "hashtags: "),
        (URL, {"a": "b"}, "hashtags: "),
        (URL, ["a", 3], "hashtags: "),
        (URL, "#a" * 40_000, "too much text: "),
        (URL, ["a"] * 40_000, "too much text: "),
    ],
)
def test_what_is_refused_of_a_row(tmp_path: Path, url: Any, hashtags: Any, refused: str) -> None:
    row = one(tmp_path, url, hashtags)
    assert row["refused"].startswith(refused)
    assert len(row["url"] or "") <= 2048
    assert row["hashtags"] is None


def test_rows_are_counted_over_all_files(tmp_path: Path) -> None:
    for name, number in (("b", 3), ("a", 2), ("_c", 1), (".d", 1)):
        write_parquet(tmp_path / f"{name}.parquet", [{"url": f"{name}{i}", "hashtags": "x"} for i in range(number)])
    files = table_files(str(tmp_path))
    assert [Path(path).name for path in files] == ["a.parquet", "b.parquet"]
    rows = list(read_rows(files, ["url", "hashtags"], None))
    assert rows == [(0, ["a0", "x"]), (1, ["a1", "x"]), (2, ["b0", "x"]), (3, ["b1", "x"]), (4, ["b2", "x"])]
    assert list(read_rows(files, ["url", "hashtags"], 3)) == rows[:3]
    assert (count(files, None), count(files, 3), count(files, 9)) == (5, 3, 5)
    write_csv(tmp_path / "c.csv", [{"url": "x", "hashtags": "y"}])
    assert count(table_files(str(tmp_path)), None) is None
    assert count(table_files(str(tmp_path)), 3) == 3
    (tmp_path / "e.parquet").write_bytes(b"no table")
    assert count([str(tmp_path / "e.parquet")], 3) == 3


def test_files_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    for posts, match in (
        (tmp_path / "a.xlsx", "whose name ends in"),
        (tmp_path, "whose name ends in"),
        (tmp_path / "*.csv", "there is no file at"),
    ):
        with pytest.raises(UserError, match=match):
            table_files(str(posts))
    write_csv(tmp_path / "a.csv", [{"link": "x", "hashtags": "y"}])
    with pytest.raises(UserError, match=r"has no column 'url' \(found: link, hashtags\)"):
        rows_of(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read the"):
        rows_of(tmp_path / "b.csv")


def test_the_digest_follows_the_contents_and_their_order(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "yz"), ("c", "xy"), ("d", "z")):
        (tmp_path / name).write_text(text)
    paths = {name: str(tmp_path / name) for name in "abcd"}
    lists = [["a", "b"], ["b", "a"], ["c", "d"], ["a"]]
    assert len({digest([paths[name] for name in names]) for names in lists}) == 4
    assert digest([paths["a"]]) == digest([paths["a"]])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "url": st.one_of(st.none(), st.text(max_size=30), st.just(URL), st.integers()),
                "hashtags": st.one_of(st.none(), st.text(max_size=20), st.lists(st.text(max_size=5)), st.floats()),
            }
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_row_is_kept_or_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows)
    found = rows_of(path)
    assert [row["row"] for row in found] == list(range(len(rows)))
    for row in found:
        assert (row["refused"] is None) == (row["hashtags"] is not None)
