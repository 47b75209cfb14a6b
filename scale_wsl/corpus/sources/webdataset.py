"""Tars of images with their hashtags beside them, as `webdataset` and `img2dataset` write them and ours are.

Must never extract a member: an image is bytes at an offset of the tar, whatever its member's name says.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.posts import Post, PostSource, Reject, key_of, split_hashtags
from scale_wsl.corpus.rejects import RowReject
from scale_wsl.corpus.sources.tar import Damage, Member, scan
from scale_wsl.errors import UserError
from scale_wsl.hashtags import find_hashtags
from scale_wsl.recipe import setting

__all__ = ["Fields", "WebDatasetSource", "is_webdataset", "read_tar"]

_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp"))
_LARGEST_SIDECAR = 1 << 20  # bytes
_WITH_CAPTION = "caption"  # the field of which only the #hashtags count
_LOOKED_FOR = ("hashtags", "tags", _WITH_CAPTION)
_UNFINISHED = "download.json"  # of `scale-wsl download`; see corpus/download.py


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where a sample's hashtags and group stand."""

    hashtags: str | None = None
    """A field of the .json; None: `hashtags`, else `tags`, else `caption`, else the .txt."""
    group: str | None = "group"
    """A field of the .json; None: there are no groups."""
    max_bytes: int = 64 << 20
    """Images of more are refused."""


@dataclass(frozen=True, kw_only=True)
class WebDatasetSource(PostSource):
    """Every image in plain tars, with the members of its sample: those whose names are alike up to the first dot.

    The hashtags of `000000012.jpg` are in `000000012.json`: its `hashtags`, else its `tags` (a list; or a text, of
    which the #hashtags count or, where it has none, what white space, commas or semicolons separate), else its
    `caption` (of which only the #hashtags count); without such a field, the #hashtags of `000000012.txt`. The members
    of a sample follow one another, in any order. Compressed tars are not read.
    """

    path: str = setting("", "A folder with tars in it, one tar, or a pattern such as 'part-*/*.tar'.")
    hashtags: str | None = setting(None, "Field of the .json with the hashtags; null: hashtags, tags, caption or .txt.")
    group: str | None = setting("group", "Field of the .json whose equal values must not be split; null: none.")
    max_bytes: int = setting(64 << 20, "Images of more bytes are dropped unread.")
    name: str = setting("webdataset", "The source's part of the data sets' names.")
    licence: str = setting("unknown", "Licence of the images and hashtags, for the manifest.")
    attribution: str = setting("", "Whom to name as their authors, for the manifest.")

    stop = ()
    compares_images = True

    def __post_init__(self) -> None:
        DatasetName("train", self.name, 0, 0)
        if not self.path:
            raise UserError("a webdataset source needs its path: path=FOLDER")
        if not 1 <= self.max_bytes <= 1 << 32:
            raise UserError(f"max_bytes is {self.max_bytes}, but must be between 1 and {1 << 32:,}")
        object.__setattr__(self, "path", os.path.abspath(self.path))  # whoever reads may be in another folder
        self.tars()
        _check_finished(Path(self.path))

    def tars(self) -> list[tuple[str, Path]]:
        """(label, path) of each tar, by path. Labels are unique: paths from the folder that all tars are in.

        Raises:
            UserError: There is none.
        """
        paths = sorted(_find(self.path))
        if not paths:
            raise UserError(
                f"there is no plain tar (*.tar) at {self.path}; compressed ones (.tar.gz, .tgz) must be unpacked first"
            )
        common = Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths]))
        return [(Path(os.path.abspath(path)).relative_to(common).as_posix(), path) for path in paths]

    @property
    def fields(self) -> Fields:
        """What `read_tar` needs to know."""
        return Fields(hashtags=self.hashtags, group=self.group, max_bytes=self.max_bytes)

    def fingerprint(self) -> Mapping[str, object]:
        """Names, sizes and times of change of all tars, and the options that decide what is read from them."""
        digest = hashlib.sha256()
        for label, path in self.tars():
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(f"cannot look at {path}: {error.strerror}") from None
            digest.update(f"{os.fsencode(label)!r} {status.st_size} {status.st_mtime_ns}\n".encode())
        return {"tars": digest.hexdigest(), "hashtags": self.hashtags, "group": self.group, "max_bytes": self.max_bytes}

    def splits(self) -> Sequence[tuple[str, Path]]:
        """A tar each."""
        return self.tars()

    def posts(self, split: Any = None) -> Iterator[Post | Reject]:
        """The samples of a tar, or of all by path, and what was refused."""
        for label, path in self.tars() if split is None else (split,):
            for found in read_tar(path, label, self.fields):
                if isinstance(found, Post):
                    yield found
                else:
                    yield Reject(f"{label}, member {found.row}", found.reason, found.detail)


def is_webdataset(path: str) -> bool:
    """Whether a user's path means tars: a folder with some, one, or a pattern for some."""
    return path.endswith(".tar") or (os.path.isdir(path) and next(_in_folder(path), None) is not None)


def read_tar(path: Path, label: str | None = None, fields: Fields | None = None) -> Iterator[Post | RowReject]:
    """The samples of one tar in order, and what was refused.

    Takes some 100 bytes of memory for each sample of the tar: their names, of which none may come twice.

    Args:
        path: The tar.
        label: What tells its keys from those of other tars; its name when None.
        fields: Where hashtags and groups stand.

    Returns:
        For each sample a `Post`, or a `RowReject` whose row is the number of a member. The reasons: "compressed",
        "truncated" and "damaged" (the tar, from there on), "link", "device", "sparse file", "unknown kind", "damaged
        header", "unsafe name", "no sample" (a name without a dot, or hidden), "duplicate member" (the first is kept),
        "second image" (the first is kept), "duplicate sample" (its name came before, not right before), "no image",
        "empty image", "too many bytes", "sidecar" (no JSON object, no UTF-8, or larger than 1 MiB), "hashtags" (of no
        form that they have).

    Raises:
        UserError: The tar cannot be read at all.
    """
    label = path.name if label is None else label
    fields = fields or Fields()
    sample: _Sample | None = None
    seen: set[bytes] = set()
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep its reader waiting for ever
            raise UserError(f"the tar {path} cannot be read: it is no regular file")
        with open(path, "rb", buffering=0) as handle:
            for found in scan(path):
                if isinstance(found, Damage):
                    yield RowReject(found.number, found.reason, found.detail)
                    continue
                refused = _refused(found)
                if refused is not None:
                    yield refused
                    continue
                base, suffix = _split(found.name)
                if sample is None or base != sample.base:
                    if sample is not None:
                        yield sample.finish(handle.fileno(), label, fields)
                    sample = None
                    if base in seen:
                        yield _reject(found, "duplicate sample")
                        continue
                    seen.add(base)
                    sample = _Sample(path, base, found.number)
                if (refused := sample.add(found, suffix)) is not None:
                    yield refused
            if sample is not None:
                yield sample.finish(handle.fileno(), label, fields)
    except OSError as error:
        raise UserError(f"cannot read the tar {path}: {error.strerror}") from None


def _split(name: bytes) -> tuple[bytes, bytes]:
    """A member's name up to the first dot of its last part, and what is behind that dot."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, suffix = file.partition(b".")
    return folder + slash + stem, suffix.lower()


def _reject(member: Member, reason: str) -> RowReject:
    return RowReject(member.number, reason, member.name[:200].decode("utf-8", "replace"))


def _refused(member: Member) -> RowReject | None:
    """Why a member is no part of a sample, from its header alone."""
    if member.kind:
        return _reject(member, member.kind)
    name = member.name
    if name[:2] == b"./":  # as `tar c .` writes all of them
        name = name[2:]
    if not name or name[0] == ord("/") or b"\\" in name or b"\0" in name or b".." in name.split(b"/"):
        return _reject(member, "unsafe name")
    stem, _, suffix = name.rpartition(b"/")[2].partition(b".")
    return None if stem and suffix else _reject(member, "no sample")


class _Sample:
    """The members of a sample that came so far."""

    def __init__(self, tar: Path, base: bytes, number: int) -> None:
        self.base = base
        self._tar = tar
        self._number = number
        self._suffixes: set[bytes] = set()
        self._image: Member | None = None
        self._sidecars: dict[bytes, Member] = {}

    def add(self, member: Member, suffix: bytes) -> RowReject | None:
        if suffix in self._suffixes:
            return _reject(member, "duplicate member")
        self._suffixes.add(suffix)
        if suffix in (b"json", b"txt"):
            self._sidecars[suffix] = member
        elif suffix.decode("ascii", "replace") in _SUFFIXES:
            if self._image is not None:
                return _reject(member, "second image")
            self._image = member
        return None  # what else there is in the sample is another's

    def finish(self, descriptor: int, label: str, fields: Fields) -> Post | RowReject:
        base = os.fsdecode(self.base)
        image = self._image
        if image is None:
            return RowReject(self._number, "no image", base)
        if not image.size:
            return _reject(image, "empty image")
        if image.size > fields.max_bytes:
            return RowReject(image.number, "too many bytes", f"{base}: {image.size:,}")
        try:
            hashtags, group = self._read(descriptor, fields)
        except _Unusable as error:
            return RowReject(image.number, error.args[0], f"{base}: {error.args[1]}")
        # No other sample has this text: a tar's label cannot be the folder that another's begins with.
        return Post(key_of(f"{label}/{base}"), (self._tar, image.offset, image.size), hashtags, group)

    def _read(self, descriptor: int, fields: Fields) -> tuple[tuple[str, ...], str | None]:
        group = None
        if (sidecar := self._sidecars.get(b"json")) is not None:
            facts = _json(_contents(descriptor, sidecar))
            if fields.group is not None and isinstance(value := facts.get(fields.group), str | int):
                group = str(value)
            for field in _LOOKED_FOR if fields.hashtags is None else (fields.hashtags,):
                if facts.get(field) is not None:
                    return _hashtags(facts[field], field), group
        if fields.hashtags is None and (sidecar := self._sidecars.get(b"txt")) is not None:
            return tuple(find_hashtags(_text(_contents(descriptor, sidecar), ".txt"))), group
        return (), group


class _Unusable(Exception):  # noqa: N818 - it says what the sample is
    """A sample's sidecar is of no use: reason, detail."""


def _contents(descriptor: int, member: Member) -> bytes:
    if member.size > _LARGEST_SIDECAR:
        raise _Unusable("sidecar", f"{member.size:,} bytes, where no sidecar has more than {_LARGEST_SIDECAR:,}")
    return os.pread(descriptor, member.size, member.offset)


def _text(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unusable("sidecar", f"the {what} is not UTF-8 text") from None


def _json(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(_text(content, ".json"))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise _Unusable("sidecar", "the .json is no JSON object")
    return facts


def _hashtags(value: Any, field: str) -> tuple[str, ...]:
    if isinstance(value, str):
        if field == _WITH_CAPTION or "#" in value or "＃" in value:
            return tuple(find_hashtags(value))
        return split_hashtags(value)
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return tuple(value)
    raise _Unusable("hashtags", f"its {field} is neither a text nor a list of texts")


# --- which tars ----------------------------------------------------------------------------------------------------


def _find(path: str) -> Iterator[Path]:
    if os.path.isdir(path):  # unlike Path's, no error where a folder above may not be searched
        yield from _in_folder(path)
    elif os.path.isfile(path):
        yield Path(path)
    else:
        yield from (Path(found) for found in glob.iglob(path, recursive=True) if os.path.isfile(found))


def _in_folder(path: str) -> Iterator[Path]:
    try:
        with os.scandir(path) as entries:
            yield from (Path(entry.path) for entry in entries if entry.name.endswith(".tar") and entry.is_file())
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}") from None


def _check_finished(folder: Path) -> None:
    """Refuse the folder of a download that has not ended, of which the tars so far would be taken for all."""
    try:
        with open(folder / _UNFINISHED, "rb") as handle:
            facts = json.loads(handle.read(_LARGEST_SIDECAR))
        unfinished = facts["format"] == "scale_wsl download" and facts["report"] is None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # no such folder, or not ours
    if unfinished:
        raise UserError(
            f"the download into {folder} has not ended: run the same scale-wsl download again, or name the tars that "
            f"are there as '{folder}/*.tar'"
        )
