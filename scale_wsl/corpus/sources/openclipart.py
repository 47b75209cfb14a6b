"""The `openclipart` corpus: Debian's openclipart-png, with the tags that its users typed into openclipart-svg.

Must never unpack a package's members to their own paths, and never expand an XML entity of another's: archives and
drawings come from outside. A .deb is an `ar` archive with a tar in it, and is read here without dpkg.
"""

from __future__ import annotations

import functools
import io
import lzma
import os
import posixpath
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self
from xml.parsers import expat

from tqdm import tqdm

from scale_wsl.corpus.posts import Post, PostSource, key_of
from scale_wsl.errors import UserError
from scale_wsl.files import published_folder
from scale_wsl.hashtags.wordnet import cache_folder
from scale_wsl.recipe import setting

__all__ = ["OpenclipartSource", "subjects"]

_RELEASE = "0.18"
_PACKAGES = ("openclipart-svg", "openclipart-png")
_FOLDER = "usr/share/openclipart"
_LARGEST_MEMBER = 32 << 20  # bytes; the largest of 0.18 has 4.3 MB
_MOST_BYTES = 8 << 30  # unpacked; 0.18 has 0.5 GB
_DUBLIN_CORE = "http://purl.org/dc/elements/1.1/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_LONGEST_TEXT = 1 << 16  # characters of all tags of a drawing
_LONGEST_NAME = 1 << 12  # bytes of a member's name
_LONGEST_ENTITY = 200  # characters; six drawings declare namespaces this way


@dataclass(frozen=True, kw_only=True)
class OpenclipartSource(PostSource):
    """8,121 drawings, 6,900 of them distinct files, with 4 tags each in their SVG's dc:subject."""

    debs: str | None = setting(
        None, "Folder with openclipart-svg_*.deb and openclipart-png_*.deb; null: fetched by `apt-get download`."
    )

    name = "openclipart"
    licence = "public domain (Creative Commons Public Domain Dedication)"
    attribution = "Open Clip Art Library, release 0.18, as packaged by Debian (openclipart-svg, openclipart-png)"
    stop = ("hash", "magick")
    """No user's words: "hash" is on 1,924 drawings, most of them mass-imported icons, and on none that shows one;
    "magick" is on the 1,375 stars that a program drew, and on nothing else."""

    compares_images = True

    def fingerprint(self) -> Mapping[str, object]:
        """The release, whichever folder its packages come from."""
        return {"release": _RELEASE}

    def count(self) -> int | None:
        """As many as release 0.18 has."""
        return 8121

    def posts(self, split: Any = None) -> Iterator[Post]:
        """Every PNG with the tags of the SVG of the same name, in the order of the package.

        A link to a PNG is a post of its own: Debian links equal files, whose SVGs may well have other tags.
        """
        svg_deb, png_deb = self._packages()
        hashtags = _read_tags(svg_deb)
        aliases: defaultdict[str, list[str]] = defaultdict(list)
        links = {name: target for name, target, _ in _members(png_deb, "png") if target is not None}
        for name in links:
            aliases[_followed(name, links)].append(name)
        for name, _, content in _members(png_deb, "png"):
            if content is None:
                continue
            fetch = functools.partial(bytes, content.read())
            for alias in (name, *aliases[name]):
                yield Post(key_of(alias), fetch, hashtags.get(alias, ()))

    def _packages(self) -> tuple[Path, Path]:
        return _packages(_download() if self.debs is None else Path(self.debs))


def subjects(svg: bytes) -> tuple[str, ...]:
    """The tags in an SVG's metadata: the text of each rdf:li within a dc:subject.

    Raises:
        ValueError: It is no well-formed XML, its tags are longer than any user's, or it declares an entity that could
            grow or is not in the file.
    """
    tags: list[str] = []
    text: list[str] = []
    collected = 0  # characters
    inside = 0  # open elements from dc:subject on

    def start(name: str, _: object) -> None:
        nonlocal inside
        if inside or name == f"{_DUBLIN_CORE} subject":
            inside += 1
        if name == f"{_RDF} li":
            text.clear()

    def end(name: str) -> None:
        nonlocal inside
        if inside and name == f"{_RDF} li":
            tags.append(" ".join("".join(text).split()))
        inside -= inside > 0

    def characters(data: str) -> None:
        nonlocal collected
        if inside:
            collected += len(data)
            if collected > _LONGEST_TEXT:
                raise ValueError("its tags are too long")
            text.append(data)

    def declare_entity(name: str, _: bool, value: str | None, *__: object) -> None:
        if value is None or "&" in value or "%" in value or len(value) > _LONGEST_ENTITY:
            raise ValueError(f"the entity {name} is not taken")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    parser.EntityDeclHandler = declare_entity
    try:
        parser.Parse(svg, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: of an encoding that there is not
        raise ValueError(str(error)) from None
    return tuple(tag for tag in tags if tag)


def _packages(folder: Path) -> tuple[Path, Path]:
    """The two packages in a folder, which must hold each once."""
    found = []
    for package in _PACKAGES:
        matching = sorted(folder.glob(f"{package}_*{_RELEASE}*.deb"))
        if len(matching) != 1:
            problem = "is no" if not matching else "is more than one"
            raise UserError(f"there {problem} {package}_*{_RELEASE}*.deb in {folder}, which must hold exactly one")
        found.append(matching[0])
    return found[0], found[1]


def _read_tags(svg_deb: Path) -> dict[str, tuple[str, ...]]:
    tags: dict[str, tuple[str, ...]] = {}
    links: dict[str, str] = {}
    for name, target, content in tqdm(_members(svg_deb, "svg"), "tags", 8121, unit=" drawings", disable=None):
        if target is not None:
            links[name] = target
        elif content is not None:
            try:
                tags[name] = subjects(content.read())
            except ValueError:
                tags[name] = ()
    return tags | {name: tags.get(_followed(name, links), ()) for name in links}


def _followed(name: str, links: Mapping[str, str]) -> str:
    for _ in range(8):  # as many links after one another as there may be; a ring ends here too
        if name not in links:
            break
        name = links[name]
    return name


def _members(deb: Path, kind: str) -> Iterator[tuple[str, str | None, IO[bytes] | None]]:
    """(name, target of a link or None, file or None) of each .svg or .png of a package, without folder and suffix.

    A file must be read before the next one is asked for: the archive is unpacked as a stream.
    """
    prefix, suffix = f"{_FOLDER}/{kind}/", f".{kind}"
    total = 0
    try:
        with open(deb, "rb") as handle, _open_tar(_data_member(handle, deb)) as archive:
            for member in archive:
                path = posixpath.normpath(member.name)
                total += member.size
                if total > _MOST_BYTES:
                    raise UserError(f"{deb} unpacks to more than {_MOST_BYTES >> 30} GiB, which openclipart does not")
                if not (path.startswith(prefix) and path.endswith(suffix)):
                    continue
                name = path.removeprefix(prefix).removesuffix(suffix)
                if member.issym():
                    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
                    yield name, target.removeprefix(prefix).removesuffix(suffix), None
                elif member.isreg() and member.size <= _LARGEST_MEMBER:
                    yield name, None, archive.extractfile(member)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, RecursionError) as error:
        raise UserError(f"{deb} is no Debian package that can be read: {error}") from None


class _Header(tarfile.TarInfo):
    """A member's header, refused where deb(5) has none such: these would be read into memory whatever their size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if header.size > _LONGEST_NAME:
                raise tarfile.ReadError(f"a member's name has {header.size:,} bytes")
        elif header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            raise tarfile.ReadError(f"a member is of the type {header.type!r}, which no Debian package holds")
        return header


def _open_tar(data: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=data, mode="r|*", tarinfo=_Header)


class _Part(io.RawIOBase):
    """The next `size` bytes of a file as a file of their own."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self._handle = handle
        self._left = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._handle.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _data_member(handle: IO[bytes], deb: Path) -> IO[bytes]:
    """The `data.tar.*` of a package (deb(5)): ar's magic, then members of a 60-byte header and even length."""
    if handle.read(8) == b"!<arch>\n":
        while len(header := handle.read(60)) == 60 and header.endswith(b"`\n") and header[48:58].strip().isdigit():
            size = int(header[48:58])
            if header.startswith(b"data.tar.zst"):
                raise UserError(f"{deb} is compressed with zstd, which is not read here; take Debian's package")
            if os.fstat(handle.fileno()).st_size < handle.tell() + size:
                raise UserError(f"{deb} is cut short: fetch it again")
            if header.startswith(b"data.tar"):
                return _Part(handle, size)  # type: ignore[return-value]  # all that tarfile needs is `read`
            handle.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{deb} is no Debian package")


def _download() -> Path:
    """Debian's two packages in the cache folder, fetched where they are missing."""
    folder = cache_folder() / f"openclipart-{_RELEASE}"
    if folder.is_dir():
        return folder
    packages = list(_PACKAGES)
    instead = f"download {' and '.join(packages)} {_RELEASE} from Debian by hand and give their folder as debs=FOLDER"
    apt = shutil.which("apt-get")
    if apt is None:
        raise UserError(f"openclipart comes from Debian, and there is no apt-get here: {instead}")
    try:
        with published_folder(folder) as aside:
            aside.chmod(0o755)
            print(f"fetching {' and '.join(packages)} from Debian with apt-get (156 MB)", file=sys.stderr)
            done = subprocess.run([apt, "download", *packages], cwd=aside, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise UserError(f"apt-get could not download {' and '.join(packages)} ({reason}): {instead}")
            try:
                _packages(aside)
            except UserError:
                got = ", ".join(sorted(path.name for path in aside.iterdir())) or "nothing"
                raise UserError(f"apt-get delivered {got}, where release {_RELEASE} is needed: {instead}") from None
    except FileExistsError:  # another process was faster
        pass
    return folder
