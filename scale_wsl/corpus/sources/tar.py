"""Lists the members of a plain tar by its headers alone: name, offset, length.

Must never extract a member, follow a name or a link, or believe a header before its checksum and the file's end.

`tarfile` makes an object of thirty attributes for each member and reads forward through links; here a header is a slice
of a buffered window. Formats: ustar, and what GNU tar and pax (POSIX.1-2001) add to it for long names and large sizes.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Damage", "Member", "scan"]

_BLOCK = 512  # bytes: a header, and what contents are padded to
_WINDOW = 8192  # bytes read at a time: a sidecar and the headers around it
_LONGEST_EXTENSION = 1 << 20  # bytes of a pax header or a long name
_REGULAR = frozenset(b"0\0" + b"7")  # "7": contiguous, which is read like any other
_SPECIAL = {
    ord("1"): "link",
    ord("2"): "link",
    ord("3"): "device",
    ord("4"): "device",
    ord("6"): "device",  # a named pipe
    ord("S"): "sparse file",
}
_WITHOUT_CONTENTS = frozenset(b"123456")  # whatever size their headers give: links, devices, folders, pipes
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"(\xb5/\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_RECORD = re.compile(rb"([0-9]{1,8}) ([^=\n]+)=")
_LARGEST_OCTAL = 8**11  # the first size that a header has no room for


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file inside a tar, or another kind, which `kind` names and nobody may read."""

    number: int
    """Counted from 0; pax headers and folders are none."""
    name: bytes
    offset: int
    """Of its first byte in the tar."""
    size: int
    kind: str = ""
    """"" for a regular file, else "link", "device", "sparse file" or "damaged header"."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What keeps the rest of a tar from being read."""

    number: int
    reason: str
    """"compressed", "truncated" or "damaged"."""
    detail: str


def scan(path: str | os.PathLike[str]) -> Iterator[Member | Damage]:
    """The members of a tar in order; a `Damage` comes last.

    Links and devices are listed, not followed. The list ends at the first block of zeros, as other readers' does.

    Raises:
        OSError: The file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))  # a pipe is no reason to wait
    try:
        yield from _Scan(descriptor).members()
    finally:
        os.close(descriptor)


class _Stop(Exception):  # noqa: N818 - it is no error of ours
    """The rest cannot be read: reason, detail."""


class _Scan:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = os.fstat(descriptor).st_size
        self._start = 0  # of the window
        self._window = b""
        # What extended headers said of the next member.
        self._name: bytes | None = None
        self._size: int | None = None
        self._kind = ""

    def members(self) -> Iterator[Member | Damage]:
        number = 0
        offset = 0
        try:
            while True:
                header = self._read(offset, _BLOCK)
                if offset == 0:
                    _refuse_compressed(header)
                if len(header) < _BLOCK:
                    raise _Stop("truncated", "it ends without the blocks that end a tar")
                if not header[0] and header.count(0) == _BLOCK:
                    return
                self._check(header, offset)
                size = self._number(header[124:136], offset)
                kind = header[156]
                offset += _BLOCK
                if kind in b"xgLK":
                    self._extend(kind, offset, size)
                else:
                    name = self._name if self._name is not None else _name(header)
                    if self._size is not None:
                        size = self._contradicted(size, offset)
                    if kind in _WITHOUT_CONTENTS:
                        size = 0
                    elif kind == ord("S"):
                        offset = self._after_map(header, offset)
                    if offset + size > self._end:
                        raise _Stop("truncated", f"{_shown(name)} has {size:,} bytes by its header, past the end")
                    special = self._kind or _SPECIAL.get(kind, "" if kind in _REGULAR else "unknown kind")
                    self._name = self._size = None
                    self._kind = ""
                    is_folder = kind == ord("5") or (kind == 0 and name.endswith(b"/"))  # the latter before POSIX
                    if not is_folder:
                        yield Member(number, name, offset, size, special)
                        number += 1
                offset += -(-size // _BLOCK) * _BLOCK
        except _Stop as stop:
            yield Damage(number, *stop.args)

    def _read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, fewer at its end."""
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            self._window = os.pread(self._descriptor, max(length, _WINDOW), offset)
            self._start = offset
            at = 0
        return self._window[at : at + length]

    def _check(self, header: bytes, offset: int) -> None:
        """The header's checksum: the sum of its bytes, those of the checksum itself taken for spaces."""
        stored = _OCTAL.fullmatch(header, 148, 156)
        # The low half of Adler-32 is one more than the sum of all bytes, modulo 65,521, and is much sooner there than a
        # sum; a header whose sum is off by just that modulus does not come about by damage.
        blanked = header[:148] + b"        " + header[156:]
        if stored is None or not stored[1] or (int(stored[1], 8) + 1) % 65521 != zlib.adler32(blanked) & 0xFFFF:
            raise _Stop("damaged", f"there is no tar header at byte {offset:,}")

    def _number(self, field: bytes, offset: int) -> int:
        octal = _OCTAL.fullmatch(field)
        if octal is not None:
            return int(octal[1] or b"0", 8)
        if field[0] == 0x80:  # GNU's form for what is larger
            return int.from_bytes(field[1:], "big")
        raise _Stop("damaged", f"the header at byte {offset:,} has no size")

    def _extend(self, kind: int, offset: int, size: int) -> None:
        """Take in a header that is about the next one, or about all that follow."""
        if offset + size > self._end:
            raise _Stop("truncated", f"an extended header of {size:,} bytes goes past the end")
        if size > _LONGEST_EXTENSION:
            self._kind = "damaged header"
            return
        content = self._read(offset, size)
        if len(content) < size:
            raise _Stop("truncated", "it was shortened while it was read")
        if kind == ord("L"):
            self._name = content.split(b"\0", 1)[0]
        elif kind != ord("K"):
            records = _pax_records(content)
            if kind == ord("g"):
                # Nobody writes these for all members at once, so there is no need to know what is meant.
                if records is None or any(key in (b"path", b"size") or key.startswith(b"GNU.") for key in records):
                    raise _Stop("damaged", "a global pax header gives all members one name or size")
            elif records is None:
                self._kind = "damaged header"
            else:
                self._take(records)

    def _take(self, records: dict[bytes, bytes]) -> None:
        if (name := records.get(b"path")) is not None:
            self._name = name
        if (size := records.get(b"size")) is not None:
            if not size.isdigit() or len(size) > 20:
                raise _Stop("damaged", "a pax header gives a size that is no number")
            self._size = int(size)
        if any(key.startswith(b"GNU.sparse.") for key in records):
            self._kind = "sparse file"

    def _after_map(self, header: bytes, offset: int) -> int:
        """Where the contents of a sparse file of GNU's old form begin: behind the blocks that continue its map."""
        continued = header[482]
        while continued:
            block = self._read(offset, _BLOCK)
            if len(block) < _BLOCK:
                raise _Stop("truncated", "it ends in the map of a sparse file")
            continued = block[504]
            offset += _BLOCK
        return offset

    def _contradicted(self, size: int, offset: int) -> int:
        """The size in a pax header, which may only repeat the header's, or say what the header has no room for."""
        assert self._size is not None
        if self._size != size and (size != 0 or self._size < _LARGEST_OCTAL):
            raise _Stop("damaged", f"the sizes of the member at byte {offset:,}, {size:,} and {self._size:,}, differ")
        return self._size


def _refuse_compressed(start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise _Stop("compressed", f"it is a {name} file; only plain tars are read, so unpack it")


def _name(header: bytes) -> bytes:
    name = header[: header.find(0, 0, 100)] if 0 in header[:100] else header[:100]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax_records(content: bytes) -> dict[bytes, bytes] | None:
    """Keyword and value of each `length keyword=value\\n`; None where the lengths do not fit."""
    records = {}
    at = 0
    while at < len(content):
        record = _PAX_RECORD.match(content, at)
        if record is None:
            return None
        end = at + int(record[1])
        if not record.end() < end <= len(content) or content[end - 1] != ord("\n"):
            return None
        records[record[2]] = content[record.end() : end - 1]
        at = end
    return records


def _shown(name: bytes) -> str:
    return ascii(name[:100].decode("utf-8", "replace"))
