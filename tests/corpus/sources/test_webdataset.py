from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.fetch import fetch
from scale_wsl.corpus.images import RefusedImage
from scale_wsl.corpus.posts import Post
from scale_wsl.corpus.prepare import prepare
from scale_wsl.corpus.rejects import RowReject
from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.sources import WebDatasetSource, open_source, source_class
from scale_wsl.corpus.sources.webdataset import Fields, read_tar
from scale_wsl.errors import UserError
from tests.corpus.sources.test_tar import make
from tests.corpus.toy import CONFIG, TAGS, noise
from tests.loading.fakes import encode


def read(path: Path, **fields: Any) -> tuple[list[Post], list[RowReject]]:
    found = list(read_tar(path, fields=Fields(**fields)))
    return [x for x in found if isinstance(x, Post)], [x for x in found if isinstance(x, RowReject)]


def posts_of(source: WebDatasetSource) -> list[Post]:
    return [found for found in source.posts() if isinstance(found, Post)]


def reasons(path: Path, **fields: Any) -> list[tuple[int, str]]:
    return [(reject.row, reject.reason) for reject in read(path, **fields)[1]]


def one(path: Path, members: dict[str, bytes], **fields: Any) -> Post:
    (post,), rejects = read(make(path, list(members.items())), **fields)
    assert rejects == []
    return post


def image_of(post: Post) -> bytes:
    assert isinstance(post.image, tuple)
    path, offset, length = post.image
    return fetch(os.fsencode(path), offset, length, 1 << 20)


def test_samples_of_a_tar(tmp_path: Path) -> None:
    path = make(
        tmp_path / "0.tar",
        [
            ("000.jpg", b"zero"),
            ("000.json", b'{"hashtags": ["#cat", "tabby cat"], "group": "g"}'),
            ("000.txt", b"not read #dog"),
            ("001.txt", "A #bear, ＃熊".encode()),
            ("001.seg.png", b"of no interest"),
            ("001.PNG", b"one"),
            ("002.webp", b"two"),
            ("in/a/folder.gif", b"three"),
        ],
    )
    posts, rejects = read(path)
    assert rejects == []
    assert [image_of(post) for post in posts] == [b"zero", b"one", b"two", b"three"]
    assert [post.hashtags for post in posts] == [("#cat", "tabby cat"), ("bear", "熊"), (), ()]
    assert [post.group for post in posts] == ["g", None, None, None]
    assert len({post.key for post in posts}) == 4
    assert posts[0].key.startswith("0_tar_000-")


@pytest.mark.parametrize(
    ("facts", "fields", "hashtags"),
    [
        ({"hashtags": ["a"], "tags": ["b"], "caption": "#c"}, {}, ("a",)),
        ({"hashtags": None, "tags": ["b"], "caption": "#c"}, {}, ("b",)),
        ({"caption": "d #c"}, {}, ("c",)),
        ({"caption": "no tag"}, {}, ()),
        ({"hashtags": "a, b c"}, {}, ("a", "b", "c")),
        ({"hashtags": "the #a https://x.y/#b"}, {}, ("a",)),
        ({"hashtags": "＃a b"}, {}, ("a",)),
        ({"hashtags": []}, {}, ()),
        ({"hashtags": [], "caption": "#c"}, {}, ()),
        ({"other": 1}, {}, ("txt",)),
        ({"hashtags": ["a"], "mine": ["m"]}, {"hashtags": "mine"}, ("m",)),
        ({"caption": "c #d"}, {"hashtags": "caption"}, ("d",)),
        ({"hashtags": ["a"]}, {"hashtags": "mine"}, ()),
    ],
)
def test_where_hashtags_are(
    tmp_path: Path, facts: dict[str, Any], fields: dict[str, Any], hashtags: tuple[str, ...]
) -> None:
    members = {"a.json": json.dumps(facts).encode(), "a.txt": b"#txt", "a.jpg": b"x"}
    assert one(tmp_path / "x.tar", members, **fields).hashtags == hashtags


@pytest.mark.parametrize(
    ("group", "field", "expected"),
    [("u1", "group", "u1"), (7, "group", "7"), (None, "group", None), ([1], "group", None), ("u1", None, None)],
)
def test_groups(tmp_path: Path, group: Any, field: str | None, expected: str | None) -> None:
    members = {"a.jpg": b"x", "a.json": json.dumps({"hashtags": ["a"], "group": group}).encode()}
    assert one(tmp_path / "x.tar", members, group=field).group == expected


@pytest.mark.parametrize(
    ("json_text", "reason"),
    [
        (b"{", "sidecar"),
        (b"[]", "sidecar"),
        (b"[" * 100_000, "sidecar"),
        (b"\xff", "sidecar"),
        (b" " * (1 << 20) + b"{}", "sidecar"),
        (b"1" * 5000, "sidecar"),
        (b'{"hashtags": 3}', "hashtags"),
        (b'{"hashtags": [3]}', "hashtags"),
        (b'{"hashtags": {"a": "b"}}', "hashtags"),
    ],
)
def test_sidecars_that_cannot_be_read(tmp_path: Path, json_text: bytes, reason: str) -> None:
    path = make(tmp_path / "x.tar", [("a.json", json_text), ("a.jpg", b"x"), ("b.jpg", b"y")])
    posts, rejects = read(path)
    assert [image_of(post) for post in posts] == [b"y"]
    assert [(reject.row, reject.reason) for reject in rejects] == [(1, reason)]
    assert rejects[0].detail.startswith("a: ")


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    assert reasons(make(tmp_path / "x.tar", [("a.txt", b"\xff"), ("a.jpg", b"x")])) == [(1, "sidecar")]


def test_what_hostile_tars_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    names = {
        "../up.jpg": "unsafe name",
        "a/../../up.jpg": "unsafe name",
        "/etc/passwd.jpg": "unsafe name",
        "a\\b.jpg": "unsafe name",
        "a/..": "unsafe name",
        ".hidden.jpg": "no sample",
        "nodot": "no sample",
        "dot.": "no sample",
    }
    make(path, [(name, b"x") for name in names])
    assert reasons(path) == list(enumerate(names.values()))
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert reasons(path) == [(0, "link"), (1, "link"), (2, "device")]
    make(path, [("a.jpg", b"x")], path="../../etc/passwd.jpg")  # what the pax header says
    assert reasons(path) == [(0, "unsafe name")]


def test_members_that_come_twice_or_apart(tmp_path: Path) -> None:
    path = make(
        tmp_path / "x.tar",
        [
            ("a.jpg", b"first"),
            ("a.jpg", b"second"),
            ("a.png", b"third"),
            ("a.txt", b"#x"),
            ("b.txt", b"#y"),
            ("a.json", b"{}"),
            ("c.jpg", b""),
            ("d.npy", b"x"),
            ("./b.jpg", b"apart"),
        ],
    )
    posts, rejects = read(path)
    assert [(image_of(post), post.hashtags) for post in posts] == [(b"first", ("x",)), (b"apart", ())]
    assert sorted((reject.row, reject.reason) for reject in rejects) == [
        (1, "duplicate member"),
        (2, "second image"),
        (4, "no image"),
        (5, "duplicate sample"),
        (6, "empty image"),
        (7, "no image"),
    ]


def test_an_image_that_is_too_large_is_never_read(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", [("a.jpg", b"x" * 100), ("b.jpg", b"x" * 101)])
    assert reasons(path, max_bytes=100) == [(1, "too many bytes")]


def test_the_last_sample_of_a_truncated_tar(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", [("a.jpg", b"x" * 600), ("a.json", b"{}"), ("b.jpg", b"y" * 600)])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"y" * 600) + 100])
    posts, rejects = read(path)
    assert [image_of(post) for post in posts] == [b"x" * 600]
    assert [(reject.row, reject.reason) for reject in rejects] == [(2, "truncated")]


def test_compressed_tars_are_told_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    (reject,) = read(tmp_path / "x.tar")[1]
    assert (reject.reason, "unpack it" in reject.detail) == ("compressed", True)
    os.rename(tmp_path / "x.tar", tmp_path / "x.tar.gz")
    with pytest.raises(UserError, match=r"no plain tar \(\*\.tar\) at .* must be unpacked first"):
        WebDatasetSource(path=str(tmp_path))


def test_tars_that_change_or_cannot_be_read(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", [("a.jpg", b"x" * 2000)])
    (post,), _ = read(path)
    os.truncate(path, 1000)
    with pytest.raises(RefusedImage, match="has become shorter"):
        image_of(post)
    path.unlink()
    with pytest.raises(RefusedImage, match="No such file"):
        image_of(post)
    with pytest.raises(UserError, match="cannot read the tar"):
        read(path)
    os.mkfifo(path)
    with pytest.raises(UserError, match="is no regular file"):
        read(path)


def test_keys_of_several_tars_do_not_collide(tmp_path: Path) -> None:
    for place in ("a/0.tar", "a/1.tar", "b/0.tar", "0.tar"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        make(tmp_path / place, [("000.jpg", place.encode()), ("x/000.jpg", b"")])
    posts = posts_of(WebDatasetSource(path=str(tmp_path / "**" / "*.tar")))
    assert [image_of(post) for post in posts] == [b"0.tar", b"a/0.tar", b"a/1.tar", b"b/0.tar"]
    assert len({post.key for post in posts}) == 4
    (moved := tmp_path.with_name(tmp_path.name + "-moved")).mkdir()
    for entry in list(tmp_path.iterdir()):
        entry.rename(moved / entry.name)
    assert [p.key for p in posts_of(WebDatasetSource(path=f"{moved}/**/*.tar"))] == [p.key for p in posts]
    assert len(posts_of(WebDatasetSource(path=str(moved)))) == 1
    assert len(posts_of(WebDatasetSource(path=str(moved / "a" / "0.tar")))) == 1


def test_a_users_path_of_tars_is_known(tmp_path: Path) -> None:
    make(tmp_path / "0.tar", [("a.jpg", b"x")])
    for path in (str(tmp_path), f"{tmp_path}/0.tar", f"{tmp_path}/*.tar"):
        assert source_class(path) is WebDatasetSource
        assert len(list(open_source(path, name="mine").posts())) == 1
    assert source_class("webdataset") is WebDatasetSource
    for path, match in (
        ("", "needs its path"),
        (f"{tmp_path}/1.tar", "no plain tar"),
        (f"{tmp_path}/a*.tar", "no plain"),
    ):
        with pytest.raises(UserError, match=match):
            open_source("webdataset", path=path)
    with pytest.raises(UserError, match="max_bytes is 0"):
        open_source(str(tmp_path), max_bytes=0)


def test_the_fingerprint_sees_every_tar(tmp_path: Path) -> None:
    make(tmp_path / "0.tar", [("a.jpg", b"x")])
    source = WebDatasetSource(path=str(tmp_path))
    prints = [source.fingerprint(), WebDatasetSource(path=str(tmp_path), hashtags="x").fingerprint()]
    assert source.fingerprint() == prints[0]
    os.utime(tmp_path / "0.tar", ns=(1, 1))
    prints.append(source.fingerprint())
    make(tmp_path / "1.tar", [])
    prints.append(source.fingerprint())
    assert len({json.dumps(p) for p in prints}) == 4
    assert source.count() is None


def test_what_is_refused_says_where(tmp_path: Path) -> None:
    for number in range(3):
        make(tmp_path / f"{number}.tar", [("../a.jpg", b"x"), ("b.txt", b"x"), ("c.txt", b"x"), ("d.jpg", b"x")])
    source = WebDatasetSource(path=str(tmp_path))
    assert [label for label, _ in source.splits()] == ["0.tar", "1.tar", "2.tar"]
    for split in source.splits():
        (batch,) = source.read(split, images=True)
        assert len(batch.posts) == 1
        where = [f"{split[0]}, member {number}" for number in (0, 1, 2)]
        assert [(reject.key, reject.reason) for reject in batch.rejects] == list(
            zip(where, ("unsafe name", "no image", "no image"), strict=True)
        )


def test_an_unfinished_download_is_refused_and_its_tars_are_not(tmp_path: Path) -> None:
    make(tmp_path / "0.tar", [("a.jpg", b"x")])
    for text, refused in (
        ('{"format": "scale_wsl download", "report": null}', True),
        ('{"format": "scale_wsl download", "report": {}}', False),
        ('{"format": "else", "report": null}', False),
        ("[", False),
        ("[]", False),
    ):
        (tmp_path / "download.json").write_text(text)
        if refused:
            with pytest.raises(UserError, match="has not ended"):
                open_source(str(tmp_path))
        else:
            open_source(str(tmp_path))
        open_source(f"{tmp_path}/*.tar")


def test_tars_are_prepared_and_the_result_is_tars_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for shard in range(3):
        files = []
        for i in range(shard * 30, shard * 30 + 30):
            files.append((f"{i:09d}.png", encode(noise(i))))
            files.append((f"{i:09d}.json", json.dumps({"caption": f"my #{TAGS[i % 3]}"}).encode()))
        make(tmp_path / "in" / f"{shard:05d}.tar", files)
    prepared = prepare(open_source(str(tmp_path / "in")), tmp_path / "out", CONFIG)
    assert prepared.report["posts"] == 90
    assert prepared.report["dropped"] == {}
    with_labels = Dataset.open(prepared.train)
    again = list(open_source(str(prepared.train)).posts())
    assert [image_of(post) for post in again] == [with_labels.read(i) for i in range(len(with_labels))]
    assert {post.hashtags for post in again} == {(tag,) for tag in TAGS[:3]}
    with_labels.close()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text("ab./\\é\0", min_size=1, max_size=12), st.binary(max_size=30)), max_size=10))
def test_any_names_are_posts_or_rejects(tmp_path: Path, files: list[tuple[str, bytes]]) -> None:
    path = make(tmp_path / "x.tar", [(name + suffix, x) for name, x in files for suffix in ("", ".jpg", ".json")])
    posts, rejects = read(path)
    assert len({post.key for post in posts}) == len(posts)
    assert all(image_of(post) for post in posts)
    assert len(posts) + len(rejects) <= 3 * len(files)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2000))
def test_any_bytes_are_posts_or_rejects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert all(isinstance(found, Post | RowReject) for found in read_tar(tmp_path / "x.tar"))
