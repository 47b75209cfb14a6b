"""The user's own posts as a table: CSV, JSON lines or Parquet, a row an image, in one file or in any number of them.

Must never read an image outside the table's folder unless the user allows it, and never hold more than a few rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.posts import IS_KEY, Batch, Reject, Source, key_of, posts_schema, split_hashtags
from scale_wsl.corpus.sources.cells import NotText, cells_of, is_list_of_text, is_utf8
from scale_wsl.corpus.sources.files import find_files, is_remote
from scale_wsl.corpus.sources.rows import READERS, Rows, TableSplit, open_parquet, parquet_splits, unreadable
from scale_wsl.errors import UserError
from scale_wsl.hashtags import find_hashtags_in
from scale_wsl.recipe import setting

__all__ = ["SUFFIXES", "TableSource", "is_table"]

SUFFIXES = tuple(READERS)
"""How the name of a table file ends."""

_LONGEST_TEXT = 1 << 20  # characters of a post's hashtags or caption
_LONGEST_PATH = 4096  # characters, as no file system takes more
_HASHED = 1 << 30  # bytes of a table up to which the fingerprint is of its contents


@dataclass(frozen=True, kw_only=True)
class TableSource(Source):
    """A post for each row of a table: a .csv, .jsonl or .parquet file, a folder of them, a pattern, or such an address
    in an object store (s3://, gs://, abfss://). A Parquet column may hold the images' bytes instead of their paths.

    Hashtags are a list of texts, or one text: with a # in it, a caption of which the #hashtags are read; without one,
    hashtags separated by white space, commas or semicolons. Of a `caption`, only the #hashtags are read.
    """

    path: str = setting("", "The table: a file, a folder, a pattern such as 'posts/*.parquet', or an address of one.")
    image: str = setting("image", "Column of the image: a path relative to `root`, or in Parquet the file's bytes.")
    hashtags: str = setting("hashtags", "Column of the hashtags.")
    caption: str | None = setting(None, "Column of captions, whose #hashtags are read instead of `hashtags`.")
    key: str | None = setting(None, "Column that names each post, unique; null: the number of the row.")
    group: str | None = setting(None, "Column whose equal values mark variants that must not be split; null: none.")
    root: str | None = setting(None, "Folder or address that image paths start from; null: the table's own folder.")
    anywhere: bool = setting(False, "Allow absolute image paths, and such as leave `root`.")
    name: str = setting("table", "The source's part of the data sets' names.")
    licence: str = setting("unknown", "Licence of the images and hashtags, for the manifest.")
    attribution: str = setting("", "Whom to name as their authors, for the manifest.")

    stop = ()
    compares_images = False

    def __post_init__(self) -> None:
        DatasetName("train", self.name, 0, 0)
        if not self.path:
            raise UserError("a table source needs its path: path=FILE")
        for field in ("path", "root"):  # whoever reads may be in another folder
            value = getattr(self, field)
            if value is not None and not is_remote(value):
                object.__setattr__(self, field, os.path.abspath(value))
        find_files(self.path, SUFFIXES)
        if not is_remote(self._root) and not os.path.isdir(self._root):
            raise UserError(f"the folder of the images, {self._root}, is not there")

    @property
    def tags(self) -> str:
        """The column that hashtags are read from."""
        return self.hashtags if self.caption is None else self.caption

    @property
    def _root(self) -> str:
        if self.root is not None:
            return self.root
        if is_remote(self.path) or os.path.isdir(self.path):
            return self.path
        folder = self.path
        while True:  # of a pattern, the last folder that is no pattern itself
            folder = os.path.dirname(folder)
            if not any(sign in folder for sign in "*?[") or os.path.isdir(folder):
                return folder or "."

    def fingerprint(self) -> Mapping[str, object]:
        """The files' contents (up to 1 GiB in all; beyond, or in an object store, their sizes and times of change), and
        the options. The image files themselves are not looked at: there may be billions."""
        files = find_files(self.path, SUFFIXES)
        whole = not is_remote(self.path) and sum(file.size for file in files) <= _HASHED
        digest = hashlib.sha256()
        for file in files:
            facts = _sha256(file.path) if whole else f"{os.path.basename(file.path)} {file.size} {file.changed}"
            digest.update(f"{facts}\n".encode("utf-8", "surrogateescape"))
        columns = {key: getattr(self, key) for key in ("image", "hashtags", "caption", "key", "group")}
        root = self._root if is_remote(self._root) else str(Path(self._root).resolve())
        return {"sha256": digest.hexdigest(), **columns, "root": root, "anywhere": self.anywhere}

    def count(self) -> int | None:
        """Known for Parquet alone."""
        files = find_files(self.path, SUFFIXES)
        if any(file.suffix != ".parquet" for file in files):
            return None
        total = 0
        for number, file in enumerate(files):
            with open_parquet(TableSplit(self.path, file.path, number, 0)) as opened:
                total += opened.metadata.num_rows
        return total

    def splits(self) -> Sequence[TableSplit]:
        """A file each; of Parquet, about a million rows."""
        parts: list[TableSplit] = []
        files = find_files(self.path, SUFFIXES)
        for number, file in enumerate(files):
            whole = TableSplit(self.path, file.path, number if len(files) > 1 else None, 0)
            parts += parquet_splits(whole) if file.suffix == ".parquet" else [whole]
        return parts

    def read(self, split: TableSplit, *, images: bool) -> Iterator[Batch]:
        """Every row, in order."""
        posts = _Posts(self, images)
        for rows in self._rows(split, images):
            yield posts.batch(split, rows)[0]

    def references(self, split: TableSplit) -> Iterator[tuple[Batch, list[str | None]]]:
        """Every row, with what the column of the image says, which is not looked at: a path or a URL."""
        posts = _Posts(self, images=False)
        for rows in self._rows(split, images=True):
            batch, kept = posts.batch(split, rows)
            cells = cells_of(rows.columns[self.image])
            yield batch, [_reference(cells[i]) for i in kept]

    def _rows(self, split: TableSplit, images: bool) -> Iterator[Rows]:
        named = [column for column in (self.key, self.group) if column is not None]
        columns = [self.tags, *named, *[self.image] * images]
        suffix = os.path.splitext(split.path)[1].lower()
        yield from READERS[suffix](split, list(dict.fromkeys(columns)), images)


def is_table(path: str) -> bool:
    """Whether a user's path means tables: an address in an object store, a pattern for some, or a folder of nothing but
    tables."""
    if is_remote(path):
        return True
    if os.path.isdir(path):
        try:
            names = [entry.name for entry in os.scandir(path) if not entry.name.startswith((".", "_"))]
        except OSError:  # told by whoever reads it
            return False
        return bool(names) and all(os.path.splitext(name)[1].lower() in SUFFIXES for name in names)
    return any(sign in path for sign in "*?[") and path.lower().endswith(SUFFIXES)


class _Posts:
    """Turns rows into posts."""

    def __init__(self, source: TableSource, images: bool) -> None:
        self.source = source
        self.images = images
        self.root = source._root
        self.real_root = "" if is_remote(self.root) else os.path.realpath(self.root)

    def batch(self, split: TableSplit, rows: Rows) -> tuple[Batch, list[int]]:
        """The posts of some rows, and which of the rows they are."""
        import pyarrow as pa

        source = self.source
        keys, key_column = self._keys(split, rows)
        tags = _Tags(rows.columns[source.tags], source.caption is not None)
        bad = dict(tags.bad)
        places: list[tuple[str, bytes]] = [("", b"")] * len(keys)
        for i, cell in enumerate(cells_of(rows.columns[source.image]) if self.images else ()):
            if i not in bad:
                place = self._place(cell)
                if isinstance(place, str):
                    bad[i] = place
                else:
                    places[i] = place
        keep = [i for i in range(len(keys)) if i not in bad]
        groups = None if source.group is None else cells_of(rows.columns[source.group])
        columns = [key_column, tags.lists]
        if len(keep) < len(keys):
            columns = [column.take(pa.array(keep, pa.int64())) for column in columns]
        variants = pa.nulls(len(keep), pa.string())
        columns.append(pa.array([_group(groups[i]) for i in keep], pa.string()) if groups else variants)
        if self.images:
            unknown = pa.nulls(len(keep), pa.int64())  # all of the file
            kinds = [[places[i][1] if places[i][0] == kind else None for i in keep] for kind in ("path", "data")]
            columns += [pa.array(kinds[0], pa.binary()), unknown, unknown, pa.array(kinds[1], pa.large_binary())]
        reasons = [(str(keys[i]), *reason.partition(": ")[::2]) for i, reason in sorted(bad.items())]
        rejects = [*rows.rejects, *(Reject(*reason) for reason in reasons)]
        return Batch(pa.RecordBatch.from_arrays(columns, schema=posts_schema(images=self.images)), rejects), keep

    def _keys(self, split: TableSplit, rows: Rows) -> tuple[Sequence[Any], Any]:
        """The key of each row, as a sequence and as an Arrow array."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.source.key is None:
            before = "" if split.file is None else f"{split.file:05d}_"
            keys = [f"{before}{number:09d}" for number in rows.numbers]
            return keys, pa.array(keys, pa.string())
        column = rows.columns[self.source.key]
        is_text = not isinstance(column, list) and pa.types.is_string(column.type) and not column.null_count
        if is_text and is_utf8(column) and pc.all(pc.match_substring_regex(column, IS_KEY)).as_py():
            return column, column
        keys = [key_of("" if cell is None else _whole(str(cell))) for cell in cells_of(column)]
        return keys, pa.array(keys, pa.string())

    def _place(self, value: Any) -> tuple[str, bytes] | str:
        """("path" or "data", it), or why there is none."""
        if isinstance(value, dict):  # as the `datasets` library stores images
            value = content if isinstance(content := value.get("bytes"), bytes) else value.get("path")
        if isinstance(value, NotText):
            return "not UTF-8"
        if isinstance(value, bytes):
            return "data", value
        if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_PATH or "\0" in value or not _is_path(value):
            return f"no image: {_brief(value)}"
        if value.startswith(("http://", "https://")):
            return "image by URL, which scale-wsl download fetches"
        if is_remote(value) or is_remote(self.root):
            return self._address(value)
        path = os.path.join(self.root, value)
        if not self.source.anywhere:
            if os.path.isabs(value):
                return f"absolute image path, which needs anywhere=true: {_brief(value)}"
            if not os.path.realpath(path).startswith(os.path.join(self.real_root, "")):
                return f"image path that leads out of its folder, which needs anywhere=true: {_brief(value)}"
        return "path", os.fsencode(path)

    def _address(self, value: str) -> tuple[str, bytes] | str:
        address = value if is_remote(value) else f"{self.root.partition('?')[0].rstrip('/')}/{value}"
        inside = f"{self.root.partition('?')[0].rstrip('/')}/"
        if not self.source.anywhere and (not address.startswith(inside) or ".." in address.split("/")):
            return f"image path that leads out of its folder, which needs anywhere=true: {_brief(value)}"
        options = self.root.partition("?")[2]
        return "path", (f"{address}?{options}" if options and "?" not in address else address).encode()


class _Tags:
    """A column of hashtags as a list array, and which of its cells are none."""

    def __init__(self, column: Any, is_caption: bool) -> None:
        import pyarrow as pa

        self.bad: dict[int, str] = {}
        strings = pa.list_(pa.string())
        if isinstance(column, pa.Array) and is_list_of_text(column.type) and not is_caption:
            lists = column.cast(strings)
            if is_utf8(values := lists.flatten()) and values.nbytes <= _LONGEST_TEXT * max(1, len(lists) // 64):
                self.lists = lists
                return
        self.lists = pa.array(self._parsed(cells_of(column), is_caption), strings)

    def _parsed(self, cells: Sequence[Any], is_caption: bool) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = [()] * len(cells)
        captions: list[int] = []
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            if isinstance(cell, NotText):
                self.bad[i] = "not UTF-8"
            elif isinstance(cell, str):
                if len(cell) > _LONGEST_TEXT:
                    self.bad[i] = f"text too long: {len(cell):,} characters, where {_LONGEST_TEXT:,} are allowed"
                elif is_caption or "#" in cell or "＃" in cell:
                    captions.append(i)
                else:
                    found[i] = tuple(map(_whole, split_hashtags(cell)))
            elif not is_caption and isinstance(cell, list) and all(isinstance(tag, str) for tag in cell):
                if sum(map(len, cell)) > _LONGEST_TEXT:
                    self.bad[i] = f"text too long: more than {_LONGEST_TEXT:,} characters of hashtags"
                else:
                    found[i] = tuple(map(_whole, cell))
            else:
                self.bad[i] = f"no hashtags: {_brief(cell)}"
        tags, offsets = find_hashtags_in([cells[i] for i in captions])
        for number, i in enumerate(captions):
            found[i] = tuple(map(_whole, tags[offsets[number] : offsets[number + 1]]))
        return found


def _group(cell: Any) -> str | None:
    return None if cell is None else _whole(str(cell))


def _whole(tag: str) -> str:
    return tag.encode("utf-8", "replace").decode()  # half of a surrogate pair, as JSON may hold


def _reference(cell: Any) -> str | None:
    if isinstance(cell, dict):
        cell = cell.get("path")
    return _whole(cell) if isinstance(cell, str) else None


def _is_path(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None
