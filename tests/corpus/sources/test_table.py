from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.posts import Post
from scale_wsl.corpus.sources import TableSource, table
from scale_wsl.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "hashtags": "cat, dog"},
    {"image": "b/c.png", "hashtags": "My #BrownBear in the #zoo,#Sunday!"},
    {"image": "./a.png", "hashtags": ""},
]
HASHTAGS = [("cat", "dog"), ("BrownBear", "zoo", "Sunday!"), ()]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n\n".join(map(json.dumps, rows)))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def read(path: Path, **options: Any) -> list[Post]:
    return list(TableSource(path=str(path), **options).posts())


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_table(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    WRITERS[kind](path, ROWS)
    posts = read(path)
    assert [post.key for post in posts] == ["000000001", "000000002", "000000003"]
    assert [post.image for post in posts] == [tmp_path / "a.png", tmp_path / "b" / "c.png", tmp_path / "a.png"]
    assert [post.hashtags for post in posts] == HASHTAGS
    assert TableSource(path=str(path)).count() == (3 if kind == "parquet" else None)


@pytest.mark.parametrize("kind", WRITERS)
def test_other_columns_and_another_root(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    (tmp_path / "pictures").mkdir()
    WRITERS[kind](path, [{"file": "x.png", "tags": "cat", "user": "u1", "more": "1"}])
    (post,) = read(path, image="file", hashtags="tags", group="user", root=str(tmp_path / "pictures"))
    assert (post.image, post.hashtags, post.group) == (tmp_path / "pictures" / "x.png", ("cat",), "u1")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_column_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    WRITERS[kind](path, [{"image": "x.png", "tags": "cat"}])
    with pytest.raises(UserError, match=r"has no column 'hashtags' \(found: image, tags\)"):
        read(path)


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        (kind, image)
        for kind in WRITERS
        for image in ("../x.png", "a/../../x.png", "link/x.png", "/etc/x.png", "a\0b", "")
        if (kind, image) != ("csv", "a\0b")  # CSV has no NUL
    ],
)
def test_no_image_outside_the_tables_folder(kind: str, image: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    path = inside / f"posts.{kind}"
    WRITERS[kind](path, [{"image": image, "hashtags": "cat"}])
    with pytest.raises(UserError, match=r"row 1 of .* (is absolute|leads out of|no path)|in row 1 of"):
        read(path)
    if image not in ("", "a\0b"):
        assert read(path, anywhere=True)[0].image == inside / image


def test_lists_of_hashtags_and_images_in_the_table(tmp_path: Path) -> None:
    path = tmp_path / "posts.parquet"
    write_parquet(path, [{"image": bytes([i]) * i, "hashtags": ["brown bear", "#x"]} for i in range(200)])
    posts = read(path)
    assert len(posts) == 200
    assert all(not isinstance(post.image, Path) and post.image() == bytes([i]) * i for i, post in enumerate(posts))
    assert posts[7].hashtags == ("brown bear", "#x")
    write_parquet(path, [{"image": {"bytes": b"x", "path": "a.png"}, "hashtags": None}])
    (post,) = read(path)
    assert not isinstance(post.image, Path)
    assert (post.image(), post.hashtags) == (b"x", ())
    write_parquet(path, [{"image": {"bytes": None, "path": "a.png"}, "hashtags": []}])
    assert read(path)[0].image == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"image": 3, "hashtags": "a"}, "column image in row 1"),
        ({"image": None, "hashtags": "a"}, "column image in row 1"),
        ({"image": {"bytes": None}, "hashtags": "a"}, "column image in row 1"),
        ({"image": {}, "hashtags": "a"}, "column image in row 1"),
        ({"image": {"bytes": "a.png"}, "hashtags": "a"}, "column image in row 1"),
        ({"image": "\ud800.png", "hashtags": "a"}, "column image in row 1"),
        ({"image": "a.png", "hashtags": 3}, "column hashtags in row 1"),
        ({"image": "a.png", "hashtags": [3]}, "column hashtags in row 1"),
        ({"image": "a.png", "hashtags": {"a": "b"}}, "column hashtags in row 1"),
    ],
)
def test_cells_of_another_type(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = tmp_path / "posts.jsonl"
    write_jsonl(path, [row])
    with pytest.raises(UserError, match=match):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"", "has no column 'image'"),
        ("a.csv", b"image,hashtags\n", "has no rows"),
        ("a.csv", b"\xff\xfe\x00", "cannot read the table"),
        ("a.csv", b'image,hashtags\n"a', "cannot read the table"),
        ("a.csv", b"image,hashtags\na.png," + b"a" * 200_000, "cannot read the table"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b'{"image": "a", "hashtags": "b"}\n[1]', "line 2 of .* is no JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* is no JSON object"),
        ("a.jsonl", b"\xff", "cannot read the table"),
        ("a.parquet", b"PAR1", "cannot read the table"),
        ("a.parquet", b"", "cannot read the table"),
    ],
)
def test_tables_that_cannot_be_read(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        read(tmp_path / name)


@pytest.mark.parametrize("row", ["a" * 600, "a,b\n" + '"\n",' * 300, '"a' + "\n" * 600 + '",b'])
def test_a_row_of_csv_that_is_too_long(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_LONGEST_LINE", 500)
    path = tmp_path / "a.csv"
    path.write_text("image,hashtags\n" + "a.png,cat\n" * 200)  # the limit is a row's, not the table's
    assert len(read(path)) == 200
    path.write_text("image,hashtags\n" + row)
    with pytest.raises(UserError, match="a row is longer than 500 characters"):
        read(path)


def test_a_table_that_may_not_be_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    source = TableSource(path=str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").unlink()
    with pytest.raises(UserError, match="cannot read the table"):
        source.fingerprint()


def test_a_name_that_is_none_of_a_data_set(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(UserError, match="the source of a data set is"):
        TableSource(path=str(tmp_path / "a.csv"), name="../mine")


def test_no_table_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    (tmp_path / "a.csv").write_bytes(b"x")
    for options, match in (
        ({}, "needs its path"),
        ({"path": str(tmp_path / "b.csv")}, "is not there"),
        ({"path": str(tmp_path / "a.xlsx")}, "of no known kind"),
        ({"path": str(tmp_path / "a.csv"), "root": str(tmp_path / "x")}, "folder of the images"),
    ):
        with pytest.raises(UserError, match=match):
            TableSource(**options)


def test_the_fingerprint_follows_the_contents_and_the_options(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, ROWS)
    prints = [TableSource(path=str(path)).fingerprint(), TableSource(path=str(path), hashtags="x").fingerprint()]
    write_csv(path, ROWS[:1])
    prints.append(TableSource(path=str(path)).fingerprint())
    write_csv(path, ROWS)
    assert TableSource(path=str(path)).fingerprint() == prints[0]
    assert len({json.dumps(p) for p in prints}) == 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(WRITERS)), st.binary(max_size=80), st.booleans())
def test_any_bytes_are_posts_or_a_users_mistake(tmp_path: Path, kind: str, content: bytes, header: bool) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes((b"image,hashtags\n" if header and kind == "csv" else b"") + content)
    with contextlib.suppress(UserError):
        assert all(isinstance(post, Post) for post in read(path))
