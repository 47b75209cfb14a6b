from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.sources.tar import Damage, Member, scan

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make(at: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, **pax: str) -> Path:
    """A tar of these files, each with these pax headers, which are written whatever they say."""
    with tarfile.open(at, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = dict(pax)
            tar.addfile(info, io.BytesIO(content))
    return at


def listed(path: Path) -> list[tuple[str, bytes]]:
    """Names and contents of what is scanned, which must all be regular."""
    found = list(scan(path))
    content = path.read_bytes()
    assert all(isinstance(member, Member) and not member.kind for member in found), found
    assert [member.number for member in found] == list(range(len(found)))
    return [
        (member.name.decode("utf-8", "surrogateescape"), content[member.offset : member.offset + member.size])
        for member in found
        if isinstance(member, Member)
    ]


def damage(path: Path) -> Damage:
    *members, last = scan(path)
    assert all(isinstance(member, Member) for member in members)
    assert isinstance(last, Damage)
    assert last.number == len(members)
    return last


FILES = [
    ("000.jpg", b"j" * 5000),
    ("000.json", b"{}"),
    ("empty.txt", b""),
    ("a/b/" + "n" * 90 + ".jpg", b"x" * 512),
    ("d" * 60 + "/" + "e" * 60 + "/f.png", b"y" * 513),
    ("z" * 98, b"z" * 20_000),
]
MORE = [("long" * 100 + ".jpg", b"1"), ("été-猫.jpg", b"22"), ("w" * 255 + ".png", b"3")]


@pytest.mark.parametrize("form", FORMATS)
def test_what_tarfile_writes_is_read(tmp_path: Path, form: str) -> None:
    files = FILES + (MORE if form != "ustar" else [])
    assert listed(make(tmp_path / "x.tar", files, FORMATS[form])) == files


def test_pax_headers_for_every_member_and_for_all(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    assert listed(make(path, FILES, mtime="123.456", comment="x" * 3000)) == FILES
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all of them"}) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert listed(path) == [("a.jpg", b"")]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "same.jpg"}) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert damage(path).detail == "a global pax header gives all members one name or size"


def test_folders_are_passed_over_and_links_and_devices_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("folder", tarfile.DIRTYPE),
            ("hard", tarfile.LNKTYPE),
            ("soft", tarfile.SYMTYPE),
            ("char", tarfile.CHRTYPE),
            ("block", tarfile.BLKTYPE),
            ("pipe", tarfile.FIFOTYPE),
            ("contiguous", tarfile.CONTTYPE),
            ("volume", b"V"),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last"))
    assert [(member.name, member.kind) for member in scan(path) if isinstance(member, Member)] == [
        (b"hard", "link"),
        (b"soft", "link"),
        (b"char", "device"),
        (b"block", "device"),
        (b"pipe", "device"),
        (b"contiguous", ""),
        (b"volume", "unknown kind"),
        (b"last", ""),
    ]


def header(**fields: object) -> bytearray:
    info = tarfile.TarInfo(str(fields.pop("name", "a.jpg")))
    for key, value in fields.items():
        setattr(info, key, value)
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


def summed(block: bytearray) -> bytes:
    """A header with its checksum put right."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)


def test_sparse_files_of_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    old = header(type=b"S", size=512)
    old[482] = 1  # the map goes on
    more, last = bytearray(512), bytearray(512)
    more[504] = 1
    path.write_bytes(summed(old) + more + last + bytes(512) + summed(header(name="b.jpg")) + END)
    assert [(m.name, m.kind) for m in scan(path) if isinstance(m, Member)] == [
        (b"a.jpg", "sparse file"),
        (b"b.jpg", ""),
    ]
    path.write_bytes(summed(old) + more)
    assert damage(path).reason == "truncated"
    make(path, [("a.jpg", b"x")], **{"GNU.sparse.major": "1", "GNU.sparse.name": "/etc/passwd"})
    assert [m.kind for m in scan(path) if isinstance(m, Member)] == ["sparse file"]


def test_large_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for size in (8**11, 1 << 40, (1 << 80) - 1):
        block = header()
        block[124:136] = b"\x80" + size.to_bytes(11, "big")
        path.write_bytes(summed(block) + bytes(4096))
        assert damage(path).reason == "truncated"
    block[124:136] = b"\xff" * 12  # negative
    path.write_bytes(summed(block) + bytes(4096))
    assert damage(path).detail == "the header at byte 0 has no size"
    # A hole of 9 GB on disk: a size that the header has no room for, in GNU's form and in pax's.
    size = 9_000_000_000
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("a.jpg")
        info.size = size
        start = info.tobuf(form)
        with open(path, "wb") as handle:
            handle.write(start)
            handle.truncate(len(start) + -(-size // 512) * 512)
            handle.seek(0, 2)
            handle.write(summed(header(name="b.jpg")) + END)
        assert [(m.name, m.size) for m in scan(path) if isinstance(m, Member)] == [(b"a.jpg", size), (b"b.jpg", 0)]


@pytest.mark.parametrize(
    ("size", "pax", "reason"),
    [
        (100, "100", None),
        (100, "10", "damaged"),
        (100, "1000000", "damaged"),
        (0, "10", "damaged"),
        (0, "99999999999", "truncated"),
        (100, "-1", "damaged"),
        (100, "1e3", "damaged"),
        (100, "9" * 21, "damaged"),
        (100, "", "damaged"),
    ],
)
def test_a_pax_header_that_gives_another_size(tmp_path: Path, size: int, pax: str, reason: str | None) -> None:
    path = make(tmp_path / "x.tar", [("a.jpg", b"x" * size)], size=pax)
    if reason is None:
        assert listed(path) == [("a.jpg", b"x" * size)]
    else:
        assert damage(path).reason == reason


@pytest.mark.parametrize(
    "content", [b"9999 path=b\n", b"x path=b\n", b"7 path=b\n", b"12 path=b.jpg", b"\0" * 10, b"3 =\n"]
)
def test_pax_records_that_do_not_fit(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    extended = header(name="pax", type=b"x", size=len(content))
    path.write_bytes(summed(extended) + content.ljust(512, b"\0") + summed(header()) + summed(header(name="b")) + END)
    assert [(m.name, m.kind) for m in scan(path) if isinstance(m, Member)] == [(b"a.jpg", "damaged header"), (b"b", "")]


def test_a_pax_header_that_is_too_large(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", [("a.jpg", b"x"), ("b.jpg", b"y")], comment="x" * (1 << 21))
    assert [m.kind for m in scan(path) if isinstance(m, Member)] == ["damaged header"] * 2


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", "truncated", "without the blocks"),
        (b"\x1f\x8b" + bytes(600), "compressed", "gzip"),
        (b"BZh9" + bytes(600), "compressed", "bzip2"),
        (b"PK\x03\x04" + bytes(600), "compressed", "zip"),
        (b"x" * 2000, "damaged", "no tar header at byte 0"),
        (summed(header()) + b"x" * 512, "damaged", "no tar header at byte 512"),
        (summed(header()), "truncated", "without the blocks"),
        (summed(header(size=600)) + bytes(599), "truncated", "has 600 bytes by its header, past the end"),
        (summed(header(type=b"x", size=600)) + bytes(599), "truncated", "extended header"),
    ],
)
def test_what_is_no_tar_or_not_whole(tmp_path: Path, content: bytes, reason: str, detail: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    found = damage(path)
    assert found.reason == reason
    assert detail in found.detail


def test_what_follows_the_end_is_not_read(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", FILES[:1])
    path.write_bytes(path.read_bytes() + summed(header(name="hidden.jpg")) + END)
    assert listed(path) == FILES[:1]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.text("abc/._é", min_size=1, max_size=120), st.binary(max_size=1200)), max_size=8),
)
def test_it_lists_what_tarfile_lists(tmp_path: Path, form: str, files: list[tuple[str, bytes]]) -> None:
    path = tmp_path / "x.tar"
    try:
        make(path, files, FORMATS[form])
    except ValueError:  # a name that ustar has no room for
        return
    with tarfile.open(path) as tar:
        theirs = [(info.name.rstrip("/"), info.offset_data, info.size) for info in tar if info.isfile()]
    ours = [(m.name.decode().rstrip("/"), m.offset, m.size) for m in scan(path) if isinstance(m, Member)]
    assert ours == theirs


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_listed_or_told_and_nothing_lies_outside(tmp_path: Path, data: st.DataObject) -> None:
    path = make(tmp_path / "x.tar", FILES[:4] + MORE[:1], FORMATS[data.draw(st.sampled_from(["gnu", "pax"]))])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # with a checksum that fits, so the damage is believed
            block = where // 512 * 512
            with contextlib.suppress(OverflowError):
                content[block : block + 512] = summed(content[block : block + 512])
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    size = path.stat().st_size
    for found in scan(path):
        assert isinstance(found, Damage) or 0 <= found.offset <= found.offset + found.size <= size


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    opened: Callable[[], object] = lambda: list(scan(tmp_path / "gone.tar"))  # noqa: E731
    with pytest.raises(FileNotFoundError):
        opened()
