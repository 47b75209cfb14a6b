from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scale_wsl.corpus.posts import Post
from scale_wsl.corpus.sources import FolderSource, open_source, source_class
from scale_wsl.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "brown bear" / "young").mkdir(parents=True)
    for name in (
        "top.jpg",
        "brown bear/a.PNG",
        "brown bear/young/b.webp",
        "c.gif",
        "d.bmp",
        "e.jpeg",
        "note.md",
        "x.txt",
    ):
        (images / name).write_bytes(name.encode())
    (images / "c.txt").write_text("#cat, #Tabby_Cat\ndog", "utf-8-sig")
    (images / "c.json").write_text('{"hashtags": ["not read"]}')
    (images / "d.json").write_text(json.dumps({"hashtags": ["tabby cat", "#dog"], "other": 1}))
    return images


def by_name(source: FolderSource) -> dict[str, Post]:
    posts = list(source.posts())
    assert len({post.key for post in posts}) == len(posts) == source.count()
    return {post.image.name: post for post in posts if isinstance(post.image, Path)}


def test_hashtags_come_from_beside_or_above(folder: Path) -> None:
    posts = by_name(FolderSource(path=str(folder)))
    assert {name: post.hashtags for name, post in posts.items()} == {
        "top.jpg": (),
        "a.PNG": ("brown bear",),
        "b.webp": ("brown bear", "young"),
        "c.gif": ("#cat", "#Tabby_Cat", "dog"),
        "d.bmp": ("tabby cat", "#dog"),
        "e.jpeg": (),
    }


def test_the_order_and_the_keys_do_not_depend_on_where_it_is(folder: Path) -> None:
    before = [post.key for post in FolderSource(path=str(folder)).posts()]
    moved = folder.rename(folder.with_name("moved"))
    assert [post.key for post in FolderSource(path=str(moved)).posts()] == before


def test_the_fingerprint_sees_images_and_sidecars(folder: Path) -> None:
    prints = [FolderSource(path=str(folder)).fingerprint()]
    assert FolderSource(path=str(folder)).fingerprint() == prints[0]
    (folder / "note.md").write_text("changed")
    assert FolderSource(path=str(folder)).fingerprint() == prints[0]
    for change in ("top.jpg", "c.txt", "new.png"):
        (folder / change).write_bytes(b"changed")
        prints.append(FolderSource(path=str(folder)).fingerprint())
    os.symlink("nowhere", folder / "dangling.png")
    prints.append(FolderSource(path=str(folder)).fingerprint())
    assert len({json.dumps(p) for p in prints}) == 5


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("top.json", b"{", "must be of the form"),
        ("top.json", b'["cat"]', "must be of the form"),
        ("top.json", b'{"hashtags": "cat"}', "must be of the form"),
        ("top.json", b'{"hashtags": [1]}', "must be of the form"),
        ("top.json", b"[" * 100_000, "must be of the form"),
        ("top.txt", b"\xff\xfe", "not UTF-8 text"),
        ("top.txt", b"a" * (1 << 20) + b"a", "more than 1 MiB"),
    ],
)
def test_sidecars_that_cannot_be_read(folder: Path, name: str, content: bytes, match: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        list(FolderSource(path=str(folder)).posts())


def test_no_folder_or_no_image(folder: Path, tmp_path: Path) -> None:
    for path, match in (
        ("", "needs its path"),
        (str(tmp_path / "no"), "is not there"),
        (str(folder / "c.gif"), "no folder"),
    ):
        with pytest.raises(UserError, match=match):
            open_source("folder", path=path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no image"):
        open_source(str(tmp_path / "empty"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read(folder: Path) -> None:
    (folder / "brown bear").chmod(0)
    try:
        with pytest.raises(UserError, match="cannot read the image folder"):
            list(open_source("folder", path=str(folder)).posts())
    finally:
        (folder / "brown bear").chmod(0o755)


def test_an_unreadable_folder_is_an_error_and_no_empty_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(top: str, onerror: object) -> list[object]:
        assert callable(onerror)
        onerror(PermissionError(13, "Permission denied", top))
        return []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match=r"cannot read the image folder .*: Permission denied"):
        FolderSource(path=str(folder))


def test_a_folder_that_may_be_read_but_not_searched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(path=str(folder))
    real = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.name == "b.webp":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match=r"cannot look at .*b\.webp: Permission denied"):
        source.fingerprint()


def test_a_pipe_is_no_sidecar(folder: Path) -> None:
    os.mkfifo(folder / "top.txt")
    with pytest.raises(UserError, match=r"top\.txt cannot be read: it is no regular file"):
        list(FolderSource(path=str(folder)).posts())


def test_a_name_that_is_none_of_a_data_set(folder: Path) -> None:
    with pytest.raises(UserError, match="the source of a data set is"):
        FolderSource(path=str(folder), name="../mine")


def test_a_source_is_found_by_name_or_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "posts.CSV").write_text("image,hashtags\n")
    (tmp_path / "posts.txt").write_text("")
    assert source_class(str(folder)) is FolderSource
    assert source_class(str(tmp_path / "posts.CSV")).__name__ == "TableSource"
    with pytest.raises(UserError, match="no table"):
        source_class(str(tmp_path / "posts.txt"))
    with pytest.raises(
        UserError, match="'imagenet' is no source: it must be emoji, openclipart, folder, table, webdataset, or"
    ):
        open_source("imagenet")
    with pytest.raises(UserError, match="has no option licenc; did you mean licence"):
        open_source(str(folder), licenc="x")
    assert open_source(str(folder), name="mine", licence="CC0").licence == "CC0"
