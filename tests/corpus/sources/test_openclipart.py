from __future__ import annotations

import contextlib
import io
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.sources import OpenclipartSource, openclipart
from scale_wsl.corpus.sources.openclipart import subjects
from scale_wsl.errors import UserError

FOLDER = "./usr/share/openclipart"
SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 20010904//EN" "http://www.w3.org/TR/2001/REC-SVG-20010904/DTD/svg10.dtd"{dtd}>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
     xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <metadata><rdf:RDF><dc:title><rdf:li>not a tag</rdf:li></dc:title>
    <dc:subject><rdf:Bag>{tags}</rdf:Bag></dc:subject><dc:x><rdf:li>nor this</rdf:li></dc:x></rdf:RDF></metadata>
  <path d="M 1,1"/></svg>"""


def svg(*tags: str, dtd: str = "") -> bytes:
    return SVG.format(tags="".join(f"<rdf:li>{tag}</rdf:li>" for tag in tags), dtd=dtd).encode()


def deb(path: Path, members: dict[str, bytes | str], compression: str = "xz") -> None:
    """A package whose data member holds files (bytes) and symbolic links (text)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    with open(path, "wb") as handle:
        handle.write(b"!<arch>\n")
        for name, part in parts.items():
            handle.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode())
            handle.write(part + b"\n" * (len(part) % 2))


@pytest.fixture
def debs(tmp_path: Path) -> Path:
    bomb = '[<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]'
    deb(
        tmp_path / "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        {
            "svg/animals/bear.svg": svg("#Brown Bear", "", " animal\n x "),
            "svg/animals/link.svg": "bear.svg",
            "svg/other.svg": svg("other"),
            "svg/bomb.svg": svg("&b;", dtd=bomb),
            "svg/broken.svg": svg("a")[:-20],
            "svg/large.svg": svg("large"),
            "doc/readme.txt": b"x",
        },
    )
    deb(
        tmp_path / "openclipart-png_1%3a0.18+dfsg-19_all.deb",
        {
            "png/alias.png": "animals/bear.png",
            "png/animals/bear.png": b"bear",
            "png/animals/link.png": "bear.png",
            "png/other.png": "animals/../alias.png",
            "png/bomb.png": b"bomb",
            "png/broken.png": b"broken",
            "png/ring.png": "ring.png",
            "png/outside.png": "../../../../../etc/passwd",
            "png/../../../../../tmp/escaped.png": b"x",
            "png/large.png": bytes(2000),
        },
    )
    return tmp_path


def test_images_come_with_their_users_tags(debs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openclipart, "_LARGEST_MEMBER", 1500)
    source = OpenclipartSource(debs=str(debs))
    posts = {post.key.rpartition("-")[0] or post.key: post for post in source.posts()}
    images = {key: post.image() for key, post in posts.items() if not isinstance(post.image, Path)}
    assert images == {
        "alias": b"bear",
        "animals_bear": b"bear",
        "animals_link": b"bear",
        "other": b"bear",
        "bomb": b"bomb",
        "broken": b"broken",
    }
    assert posts["animals_bear"].hashtags == posts["animals_link"].hashtags == ("#Brown Bear", "animal x")
    assert posts["other"].hashtags == ("other",)
    assert posts["bomb"].hashtags == posts["broken"].hashtags == posts["alias"].hashtags == ()
    assert list(source.posts()) != []
    assert source.fingerprint() == {"release": "0.18"}


def test_packages_in_other_compressions(debs: Path) -> None:
    for compression in ("gz", "bz2"):
        deb(debs / "openclipart-svg_1%3a0.18+dfsg-19_all.deb", {"svg/a.svg": svg("cat")}, compression)
        deb(debs / "openclipart-png_1%3a0.18+dfsg-19_all.deb", {"png/a.png": b"a"}, compression)
        assert [post.hashtags for post in OpenclipartSource(debs=str(debs)).posts()] == [("cat",)]


def test_entities_are_taken_only_where_they_cannot_grow() -> None:
    assert subjects(svg("a &x; b", dtd='[<!ENTITY x "and">]')) == ("a and b",)
    for dtd in (
        '[<!ENTITY x SYSTEM "file:///etc/passwd">]',
        '[<!ENTITY y "z"><!ENTITY x "&y;&y;">]',
        f'[<!ENTITY x "{"z" * 201}">]',
        '[<!ENTITY % p SYSTEM "http://example.com/x.dtd"> %p;]',
    ):
        with pytest.raises(ValueError, match="entity"):
            subjects(svg("&x;", dtd=dtd))


@given(st.lists(st.text(alphabet=st.characters(min_codepoint=32, exclude_characters="<&>", exclude_categories=["Cs"]))))
def test_any_tag_comes_back(tags: list[str]) -> None:
    assert subjects(svg(*tags)) == tuple(spaced for tag in tags if (spaced := " ".join(tag.split())))


@given(st.binary(max_size=200), st.integers(0, 500))
def test_any_bytes_give_tags_or_a_value_error(noise: bytes, at: int) -> None:
    whole = svg("cat", "dog")
    with contextlib.suppress(ValueError):
        assert all(subjects(whole[:at] + noise + whole[at + len(noise) :]))


def test_an_unknown_encoding_and_endless_text_are_value_errors() -> None:
    assert subjects(svg("x" * 60_000)) == ("x" * 60_000,)
    for drawing in (
        svg("cat").replace(b'version="1.0"', b'version="1.0" encoding="bogus"'),
        svg("x" * 70_000),
        svg(*["x" * 100] * 700),
        svg("&x;" * 700, dtd=f'[<!ENTITY x "{"z" * 100}">]'),
    ):
        with pytest.raises(ValueError, match=r"encoding|too long"):
            subjects(drawing)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_headers_that_would_fill_the_memory_are_refused(
    debs: Path, kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(f"{FOLDER}/png/{'long' * 50}.png"))  # a long name of the usual kind
        info = tarfile.TarInfo("bomb")
        info.type, info.size = kind, 1 << 20
        archive.addfile(info, io.BytesIO(bytes(1 << 20)))
    monkeypatch.setattr(openclipart, "_data_member", lambda *_: io.BytesIO(data.getvalue()))
    with pytest.raises(UserError, match="no Debian package that can be read: a member"):
        list(openclipart._members(debs / "openclipart-png_1%3a0.18+dfsg-19_all.deb", "png"))


def test_another_release_is_not_kept(debs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALE_WSL_CACHE", str(tmp_path / "cache"))
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\ntouch openclipart-svg_0.20_all.deb openclipart-png_0.20_all.deb\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"delivered .*svg_0\.20_all\.deb, where release 0\.18 is needed: download"):
        list(OpenclipartSource().posts())
    assert not (tmp_path / "cache" / "openclipart-0.18").exists()


def test_damaged_packages_are_named(debs: Path) -> None:
    path = debs / "openclipart-png_1%3a0.18+dfsg-19_all.deb"
    whole = path.read_bytes()
    zstd = whole.replace(b"data.tar.xz ", b"data.tar.zst")
    for content, match in (
        (b"", "no Debian package"),
        (whole[:200], "cut short"),
        (whole[:-100], "cut short"),
        (whole[:-100] + b"x" * 100, "no Debian package|cut short"),
        (b"!<arch>\n" + b"x" * 60, "no Debian package"),
        (zstd, "compressed with zstd"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            list(OpenclipartSource(debs=str(debs)).posts())


def test_a_package_that_never_ends(debs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openclipart, "_MOST_BYTES", 1000)
    with pytest.raises(UserError, match="unpacks to more than"):
        list(OpenclipartSource(debs=str(debs)).posts())


def test_the_right_packages_must_be_there(debs: Path) -> None:
    shutil.copy(debs / "openclipart-png_1%3a0.18+dfsg-19_all.deb", debs / "openclipart-png_1%3a0.18+dfsg-20_all.deb")
    with pytest.raises(UserError, match=r"more than one openclipart-png_\*0\.18\*\.deb"):
        list(OpenclipartSource(debs=str(debs)).posts())
    with pytest.raises(UserError, match=r"is no openclipart-svg_\*0\.18\*\.deb in"):
        list(OpenclipartSource(debs=str(debs / "nowhere")).posts())


def test_without_apt_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALE_WSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no apt-get here: download .* give their folder as debs=FOLDER"):
        list(OpenclipartSource().posts())

    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho E: Unable to locate package >&2\nexit 100\n")
    apt.chmod(0o755)
    with pytest.raises(UserError, match=r"could not download .* \(E: Unable to locate package\)"):
        list(OpenclipartSource().posts())
    assert not (tmp_path / "cache" / "openclipart-0.18").exists()


def test_apt_is_asked_once(
    debs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALE_WSL_CACHE", str(tmp_path / "cache"))
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(f'#!/bin/sh\n[ "$*" = "download openclipart-svg openclipart-png" ] && cp {debs}/*.deb .\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:/usr/bin:/bin")
    assert len(list(OpenclipartSource().posts())) == 7
    assert capsys.readouterr().err.count("with apt-get (156 MB)\n") == 1
    apt.unlink()
    monkeypatch.setenv("PATH", str(apt.parent))
    assert len(list(OpenclipartSource().posts())) == 7
