from __future__ import annotations

import contextlib
import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.posts import Reject, key_of
from scale_wsl.corpus.sources import FolderSource, TableSource, open_source, source_class
from scale_wsl.corpus.sources import rows as rows_module
from scale_wsl.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "hashtags": "cat, dog"},
    {"image": "b/c.png", "hashtags": "My #BrownBear in the #zoo,#Sunday!"},
    {"image": "./a.png", "hashtags": ""},
]
HASHTAGS = [("cat", "dog"), ("BrownBear", "zoo", "Sunday"), ()]


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


class Post(NamedTuple):
    key: str
    image: Path | bytes
    hashtags: tuple[str, ...]
    group: str | None


def batches(path: Path | str, **options: Any) -> tuple[list[Post], list[Reject]]:
    source = TableSource(path=str(path), **options)
    posts, rejects = [], []
    for split in source.splits():
        for batch in source.read(split, images=True):
            rejects += batch.rejects
            for row in batch.posts.to_pylist():
                image = row["data"] if row["path"] is None else Path(os.fsdecode(row["path"]))
                posts.append(Post(row["key"], image, tuple(row["hashtags"] or ()), row["group"]))
    return posts, rejects


def read(path: Path | str, **options: Any) -> list[Post]:
    posts, rejects = batches(path, **options)
    assert not rejects
    return posts


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_table(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    WRITERS[kind](path, ROWS)
    posts = read(path)
    rows = ["1", "2", "3"] if kind != "jsonl" else ["1", "3", "5"]  # a line each, of which every other one is empty
    assert [post.key.lstrip("0") for post in posts] == rows
    assert [post.image for post in posts] == [tmp_path / "a.png", tmp_path / "b" / "c.png", tmp_path / "a.png"]
    assert [post.hashtags for post in posts] == HASHTAGS
    assert TableSource(path=str(path)).count() == (3 if kind == "parquet" else None)


@pytest.mark.parametrize("kind", WRITERS)
def test_counting_needs_no_image(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    WRITERS[kind](path, [{"hashtags": "cat"}])
    source = TableSource(path=str(path))
    (split,) = source.splits()
    (batch,) = source.read(split, images=False)
    assert batch.posts.column_names == ["key", "hashtags", "group"]
    with pytest.raises(UserError, match="has no column 'image'"):
        list(source.read(split, images=True))


@pytest.mark.parametrize("kind", WRITERS)
def test_other_columns_and_another_root(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    (tmp_path / "pictures").mkdir()
    WRITERS[kind](path, [{"file": "x.png", "tags": "cat", "user": "u1", "id": "i/1", "more": "1"}])
    options = {"image": "file", "hashtags": "tags", "group": "user", "key": "id", "root": str(tmp_path / "pictures")}
    (post,) = read(path, **options)
    assert (post.image, post.hashtags, post.group) == (tmp_path / "pictures" / "x.png", ("cat",), "u1")
    assert post.key == key_of("i/1")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_caption_gives_its_hashtags_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    captions = ["a cat on a mat", "see https://x.example/#top #cat#dog", "#été #東京 #"]
    WRITERS[kind](path, [{"image": "x.png", "text": caption} for caption in captions])
    assert [post.hashtags for post in read(path, caption="text")] == [(), ("cat", "dog"), ("été", "東京")]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_column_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"posts.{kind}"
    WRITERS[kind](path, [{"image": "x.png", "tags": "cat"}])
    with pytest.raises(UserError, match=r"has no column 'hashtags' \(found: image, tags\)"):
        read(path)


# --- many files ------------------------------------------------------------------------------------------------------


def test_a_folder_and_a_pattern_of_tables(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_csv(tmp_path / "b.csv", [{"image": "1.png", "hashtags": "cat"}, {"image": "2.png", "hashtags": "dog"}])
    write_parquet(tmp_path / "deep" / "a.parquet", [{"image": "3.png", "hashtags": ["fish"]}])
    for ignored in (".hidden.csv", "_SUCCESS", "notes.txt"):
        (tmp_path / ignored).write_text("x")
    posts = read(tmp_path)
    assert [(post.key, post.hashtags) for post in posts] == [
        ("00000_000000001", ("cat",)),
        ("00000_000000002", ("dog",)),
        ("00001_000000001", ("fish",)),
    ]
    assert {post.image for post in posts} == {tmp_path / f"{i}.png" for i in (1, 2, 3)}  # from the folder itself
    (only,) = read(str(tmp_path / "*" / "*.parquet"))
    assert only.image == tmp_path / "3.png"
    assert TableSource(path=str(tmp_path / "deep")).count() == 1
    with pytest.raises(UserError, match=r"whose name ends in \.csv, \.jsonl, \.parquet \(1 others\)"):
        TableSource(path=str(tmp_path / "*.txt"))


def test_a_large_parquet_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": f"{i}.png", "hashtags": [f"tag{i}"]} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=64)
    whole = read(tmp_path / "a.parquet")
    monkeypatch.setattr(rows_module, "_ROW_GROUPS", 128)
    assert len(TableSource(path=str(tmp_path / "a.parquet")).splits()) == 8
    assert read(tmp_path / "a.parquet") == whole
    assert [post.key for post in whole] == [f"{i:09d}" for i in range(1, 1001)]


@pytest.mark.parametrize("where", ["tables", "tables/*.csv", "tables/a.csv", "s3://bucket/posts/"])
def test_a_users_path_of_tables_is_known(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tables").mkdir()
    write_csv(tmp_path / "tables" / "a.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    assert source_class(where) is TableSource
    if "://" not in where:
        source = open_source(where)
        monkeypatch.chdir("/")  # as a worker of another machine
        (batch,) = source.read(source.splits()[0], images=True)  # type: ignore[attr-defined]
        assert batch.posts.column("path")[0].as_py() == os.fsencode(tmp_path / "tables" / "a.png")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.csv").write_text("x")
    (tmp_path / "mixed" / "a.png").write_text("x")
    assert source_class(str(tmp_path / "mixed")) is FolderSource


def test_times_that_python_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([2**55, 1], pa.timestamp("ms"))
    table = pa.table({"image": ["a.png", "b.png"], "hashtags": ["cat", "dog"], "user": times})
    pq.write_table(table, path)
    assert [post.hashtags for post in read(path, group="user")] == [("cat",), ("dog",)]


# --- hostile input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        (kind, image)
        for kind in WRITERS
        for image in ("../x.png", "a/../../x.png", "link/x.png", "/etc/x.png", "a\0b", "", "https://x.example/a.png")
    ],
)
def test_no_image_outside_the_tables_folder(kind: str, image: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    path = inside / f"posts.{kind}"
    WRITERS[kind](path, [{"image": image, "hashtags": "cat"}, {"image": "good.png", "hashtags": "cat"}])
    posts, (reject,) = batches(path)
    assert [post.image for post in posts] == [inside / "good.png"]
    assert re.match("absolute image path|image path that leads out|no image|image by URL", reject.reason)
    if image not in ("", "a\0b") and "://" not in image:
        assert read(path, anywhere=True)[0].image == inside / image


def test_lists_of_hashtags_and_images_in_the_table(tmp_path: Path) -> None:
    path = tmp_path / "posts.parquet"
    write_parquet(path, [{"image": bytes([i]) * i, "hashtags": ["brown bear", "#x"]} for i in range(200)])
    posts = read(path)
    assert len(posts) == 200
    assert [post.image for post in posts] == [bytes([i]) * i for i in range(200)]
    assert posts[7].hashtags == ("brown bear", "#x")
    write_parquet(path, [{"image": {"bytes": b"x", "path": "a.png"}, "hashtags": None}])
    (post,) = read(path)
    assert (post.image, post.hashtags) == (b"x", ())
    write_parquet(path, [{"image": {"bytes": None, "path": "a.png"}, "hashtags": []}])
    assert read(path)[0].image == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": 3, "hashtags": "a"}, "no image"),
        ({"image": None, "hashtags": "a"}, "no image"),
        ({"image": {"bytes": None}, "hashtags": "a"}, "no image"),
        ({"image": {}, "hashtags": "a"}, "no image"),
        ({"image": {"bytes": "a.png"}, "hashtags": "a"}, "no image"),
        ({"image": "\ud800.png", "hashtags": "a"}, "no image"),
        ({"image": "a.png", "hashtags": 3}, "no hashtags"),
        ({"image": "a.png", "hashtags": [3]}, "no hashtags"),
        ({"image": "a.png", "hashtags": {"a": "b"}}, "no hashtags"),
        ({"image": "a.png", "hashtags": "x" * 2_000_000}, "text too long"),
        ({"image": "a.png", "hashtags": ["x" * 2_000_000]}, "text too long"),
        ({"image": "a/" * 100_000, "hashtags": "a"}, "no image"),
    ],
)
def test_cells_of_another_type(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "posts.jsonl"
    write_jsonl(path, [{"image": "a.png", "hashtags": "cat"}, row, {"image": "b.png", "hashtags": ["dog"]}])
    posts, (reject,) = batches(path)
    assert [post.hashtags for post in posts] == [("cat",), ("dog",)]
    assert (reject.key, reject.reason) == ("000000003", reason)
    assert len(reject.detail) < 200


GOOD_CSV = b"image,hashtags\na.png,cat\n"


@pytest.mark.parametrize(
    ("name", "content", "reasons"),
    [
        ("a.csv", b"\xff\xfe.png,dog\n", ["not UTF-8"]),
        ("a.csv", b'b.png,"dog\xc3"\n', ["not UTF-8"]),
        ("a.csv", b"only one\n", ["malformed row"]),
        ("a.csv", b"a,b,c\n\n\n", ["malformed row"]),
        ("a.csv", b'a.png,"dog" and\n', ["malformed row"]),
        ("a.csv", b"b.png," + b"d" * 10_000_000 + b"\n", ["text too long"]),
        ("a.csv", b"b" * 10_000_000 + b".png,dog\n", ["no image"]),
        ("a.csv", b'b.png,"dog' + b"\nx" * 2_000, ["malformed row"]),
        ("a.jsonl", b"[1]\n", ["malformed row"]),
        ("a.jsonl", b"[" * 100_000 + b"\n", ["malformed row"]),
        ("a.jsonl", b'{"image": "\xff", "hashtags": "b"}\n', ["not UTF-8"]),
        ("a.jsonl", b'{"hashtags": "b"}\n', ["no image"]),
        ("a.jsonl", b'{"image": 1e999, "hashtags": NaN}\nnull\n{}\n', ["no hashtags", "malformed row", "no image"]),
    ],
)
def test_a_bad_row_is_told_and_the_next_one_is_read(
    name: str, content: bytes, reasons: list[str], tmp_path: Path
) -> None:
    good = GOOD_CSV if name == "a.csv" else b'{"image": "a.png", "hashtags": "cat"}\n'
    row = good.split(b"\n")[-2] + b"\n"
    (tmp_path / name).write_bytes(good + content + (b"" if b"\nx" in content else row))
    posts, rejects = batches(tmp_path / name)
    assert sorted(reject.reason for reject in rejects) == sorted(reasons)
    good_posts = [post for post in posts if post.hashtags == ("cat",)]
    assert len(good_posts) == (1 if b"\nx" in content else 2)


def test_a_list_of_one_enormous_hashtag(tmp_path: Path) -> None:
    tags = [["cat"], ["x" * 10_000_000], ["dog"]]
    write_parquet(tmp_path / "a.parquet", [{"image": f"{i}.png", "hashtags": row} for i, row in enumerate(tags)])
    posts, (reject,) = batches(tmp_path / "a.parquet")
    assert [post.hashtags for post in posts] == [("cat",), ("dog",)]
    assert (reject.key, reject.reason) == ("000000002", "text too long")


def test_text_in_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    bad = pa.array([b"cat", b"d\xff", b"dog"], pa.binary()).view(pa.string())
    lists = pa.ListArray.from_arrays([0, 1, 3, 3], bad)
    images = pa.array(["a.png", "b.png", "c.png"])
    pq.write_table(pa.table({"image": images, "hashtags": bad}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"image": images, "hashtags": lists}), tmp_path / "lists.parquet")
    posts, (reject,) = batches(tmp_path / "text.parquet")
    assert [post.hashtags for post in posts] == [("cat",), ("dog",)]
    assert (reject.key, reject.reason) == ("000000002", "not UTF-8")
    posts, (reject,) = batches(tmp_path / "lists.parquet")
    assert [post.hashtags for post in posts] == [("cat",), ()]
    assert (reject.key, reject.reason) == ("000000002", "not UTF-8")
    pq.write_table(pa.table({"image": bad, "hashtags": images}), tmp_path / "image.parquet")
    posts, (reject,) = batches(tmp_path / "image.parquet")
    assert (len(posts), reject.reason) == (2, "not UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"", "has no column 'hashtags'"),
        ("a.csv", b'image,"hashtags', "cannot read the header of"),
        ("a.csv", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("a.parquet", b"PAR1", "cannot read the table"),
        ("a.parquet", b"", "cannot read the table"),
    ],
)
def test_tables_that_cannot_be_read(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        read(tmp_path / name)


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"image": f"{i}", "hashtags": ["cat"]} for i in range(10_000)])
    content = bytearray(path.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the table"):
        read(path)


@pytest.mark.parametrize("row", ["a" * 600, "a,b\n" + '"\n",' * 300, '"a' + "\n" * 600 + '",b'])
def test_a_row_of_csv_that_is_too_long(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LONGEST_ROW", 500)
    path = tmp_path / "a.csv"
    path.write_text("image,hashtags\n" + "a.png,cat\n" * 200)  # the limit is a row's, not the table's
    assert len(read(path)) == 200
    path.write_text("image,hashtags\n" + "a.png,cat\n" * 3 + row + "\n")
    posts, rejects = batches(path)
    assert [post.image for post in posts[:3]] == [tmp_path / "a.png"] * 3
    assert "row too long" in {reject.reason for reject in rejects}


def test_a_table_that_may_not_be_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    source = TableSource(path=str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").unlink()
    with pytest.raises(UserError, match="there is no file at"):
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
        ({"path": str(tmp_path / "b.csv")}, "there is no file at"),
        ({"path": str(tmp_path / "a.xlsx")}, "whose name ends in"),
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
        posts, rejects = batches(path)
        assert all(post.key and isinstance(post.image, Path | bytes) for post in posts)
        assert all(reject.reason for reject in rejects)
