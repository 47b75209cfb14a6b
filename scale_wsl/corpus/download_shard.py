"""The process that fetches one shard of a download after another, by `img2dataset`'s own downloader.

Must never let anything but the guarded opener reach the network, and never leave a part of a shard under a final name.

img2dataset brings the threads, the retries, the respect for `X-Robots-Tag` and the statistics. Its `download()` is not
called: that reads each table whole, waits for ever for a worker that was killed, takes a shard for done once its
statistics are begun, and names every file .jpg. What it is made of takes other parts: an opener (`opener.py`), a
resizer and a writer, which are here. Its logger imports `wandb`, which would be a second way to the network: a module
without contents stands in its place, in this process alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import queue
import sys
import tarfile
import threading
import traceback
import types
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from scale_wsl.corpus.addresses import Guard
from scale_wsl.corpus.images import EXTENSIONS, RefusedImage, opened
from scale_wsl.corpus.opener import Budget, Opener
from scale_wsl.files import sync_folder

__all__ = ["ROWS", "Settings", "files_of", "main"]

ROWS = "rows.arrow"
"""What a shard's folder holds when this process is told to fetch it: an Arrow file of what `read_rows` gives."""

_BUDGET = 256 << 20  # bytes of bodies that are held at a time, see opener.Budget
_DIGITS = 6  # of a shard's number
_QUALITY = 95  # of a JPEG that is made smaller, as img2dataset's default
_AGENT = "scale_wsl"
_OPT_OUTS = ["noai", "noimageai", "noindex", "noimageindex"]  # img2dataset's default


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the process needs to know, as JSON on its first line of input."""

    out: str
    staging: str
    images_per_shard: int
    threads: int
    timeout: float
    retries: int
    size: int | None
    max_bytes: int
    max_pixels: int
    allow_private: bool


def files_of(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """The tar, the table and the statistics of a shard, named as img2dataset names them; the last completes it."""
    name = f"{number:0{_DIGITS}d}"
    return folder / f"{name}.tar", folder / f"{name}.parquet", folder / f"{name}_stats.json"


def main() -> None:
    """Fetch the shards whose numbers come line by line, and answer each with a line of JSON.

    Ends at once when the input does: then whoever asked is gone, and what is half-done is nobody's.
    """
    warnings.simplefilter("ignore")  # bombs and damaged metadata are judged here
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # img2dataset prints
        settings = Settings(**json.loads(sys.stdin.readline()))
        numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(numbers,), daemon=True).start()
        try:
            fetch = _fetcher(settings)
        except ImportError as error:
            fetch = functools.partial(_cannot, f"img2dataset cannot be imported ({error})")
        except TypeError as error:
            fetch = functools.partial(_cannot, f"this release of img2dataset is not known here ({error})")
        while True:
            number = numbers.get()
            try:
                answer = fetch(number)
            except OSError as error:
                answer = {"mistake": f"cannot write into {settings.out}: {error.strerror or error}"}
            except Exception:
                answer = {"defect": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


def _listen(numbers: queue.SimpleQueue[int]) -> None:
    for line in sys.stdin:
        numbers.put(int(line))
    os._exit(0)


def _cannot(why: str, number: int) -> dict[str, Any]:
    return {"mistake": f"{why}: install what fits by pip install 'scale-wsl[download]'"}


def _fetcher(settings: Settings) -> Callable[[int], dict[str, Any]]:
    """What fetches a shard.

    Raises:
        ImportError: img2dataset is not there, or something that it needs.
        TypeError: It is another release, with another downloader.
    """
    downloader_class = _img2dataset()
    guard = Guard(allow_private=settings.allow_private)
    opener = Opener(guard, max_bytes=settings.max_bytes, budget=max(_BUDGET, settings.max_bytes))
    urllib.request.install_opener(opener)
    downloader = downloader_class(
        sample_writer_class=None,  # each shard's own
        resizer=_Resizer(settings, opener.budget),
        thread_count=settings.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=None,
        column_list=["row", "hashtags", "caption", "group", "url"],
        timeout=settings.timeout,
        number_sample_per_shard=settings.images_per_shard,
        oom_shard_count=_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=settings.retries,
        user_agent_token=_AGENT,
        disallowed_header_directives=_OPT_OUTS,
    )
    return functools.partial(_fetch_shard, settings, downloader)


def _img2dataset() -> Any:
    """img2dataset's `Downloader`, without what the package's own `__init__` loads: OpenCV, albumentations (which asks
    a package index for its newest version), pandas, and Ray where it is installed."""
    specification = importlib.util.find_spec("img2dataset")
    if specification is None or specification.submodule_search_locations is None:
        raise ImportError("it is not installed")
    package = types.ModuleType("img2dataset")
    package.__path__ = list(specification.submodule_search_locations)
    sys.modules["img2dataset"] = package
    sys.modules["wandb"] = types.ModuleType("wandb")
    return importlib.import_module("img2dataset.downloader").Downloader


def _fetch_shard(settings: Settings, downloader: Any, number: int) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    staging = Path(settings.staging, str(number))
    with pa.OSFile(str(staging / ROWS)) as file:
        rows = pa.ipc.open_file(file).read_all()
    asked = rows.filter(pc.is_null(rows["refused"])).select(downloader.column_list)
    urls = staging / "urls.arrow"
    with pa.OSFile(str(urls), "wb") as file, pa.ipc.new_file(file, asked.schema) as writer:
        writer.write_table(asked)
    downloader.output_folder = str(staging)
    downloader.sample_writer_class = functools.partial(_Writer, rows.to_pylist())
    downloader.download_shard((number, str(urls)))

    tar, table, stats = files_of(staging, number)
    facts = json.loads(stats.read_bytes())
    facts |= {"rows": len(rows), "refused": len(rows) - len(asked)}
    facts["files"] = {path.name: path.stat().st_size for path in (tar, table)}
    stats.write_text(json.dumps(facts, indent=4) + "\n", "utf-8")
    for path in (tar, table, stats):
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())
    out = Path(settings.out)
    for path, final in zip((tar, table, stats), files_of(out, number), strict=True):
        os.replace(path, final)
        sync_folder(out)  # or a power cut could leave the statistics without the rest
    return {"images": facts["successes"]}


# --- the parts that img2dataset calls ------------------------------------------------------------------------------


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """An image whose header was read.

    Raises:
        RefusedImage: It has none, or more pixels than the limit.
    """
    try:
        return opened(data, max_pixels)
    except RefusedImage:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedImage("too many pixels", str(error)) from None
    except Exception as error:  # whatever Pillow's readers run into
        raise RefusedImage("undecodable", f"{type(error).__name__}, {len(data):,} bytes") from None


class _Resizer:
    """Called as img2dataset's resizer is: looks at an image's header and, where a size is asked for, shrinks it.

    img2dataset's own would make a JPEG of whatever it touches, and lose which way up it is.
    """

    def __init__(self, settings: Settings, budget: Budget) -> None:
        self._size = settings.size
        self._max_pixels = settings.max_pixels
        self._budget = budget

    def __call__(self, stream: io.BytesIO, boxes: object = None) -> tuple[Any, ...]:
        """(bytes, width, height, original width, original height, None), or five None and why."""
        data = stream.read()
        self._budget.give_back(len(data))  # one at a time is here, and no more
        try:
            image = _open(data, self._max_pixels)
            width, height = image.size
            if self._size is not None and min(width, height) > self._size:
                small, size = _shrunk(image, self._size)
                return small, *size, width, height, None
            return data, width, height, width, height, None
        except RefusedImage as refused:
            return None, None, None, None, None, f"{refused.reason}: {refused.detail}"


def _shrunk(image: Image.Image, size: int) -> tuple[bytes, tuple[int, int]]:
    """A JPEG, upright and over white, whose shorter side has `size` pixels; and its width and height."""
    scale = size / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    try:
        image.draft("RGB", (width, height))  # decodes a JPEG at an eighth, fourth or half where that is enough
        colours: Image.Image = image
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips instead of scaling
            colours = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        elif image.has_transparency_data:
            colours = image.convert("RGBA")
        small = colours.convert(colours.mode if colours.mode in ("L", "RGBA") else "RGB")
        small = small.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        if small.mode == "RGBA":
            white = Image.new("RGB", small.size, "white")
            white.paste(small, mask=small)
            small = white
        if "exif" in image.info:
            small.info["exif"] = image.info["exif"]
            with contextlib.suppress(Exception):  # metadata that cannot be read says nothing
                small = ImageOps.exif_transpose(small)
        small.info.clear()  # the turn was made, and what else is there goes
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue(), small.size
    except MemoryError:
        raise
    except Exception as error:
        raise RefusedImage("undecodable", f"{type(error).__name__}: {error}") from None


class _Writer:
    """Called as img2dataset's sample writer is: a tar of what was fetched and a table of all rows, both by row.

    Images come in the order in which servers answer, and wait in a file beside the tar for their order.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], number: int, folder: str, *_: object) -> None:
        self._rows = rows
        self._tar, self._table, _stats = files_of(Path(folder), number)
        self._spool = open(Path(folder, "spool"), "w+b")  # noqa: SIM115
        self._written: dict[int, dict[str, Any]] = {}
        self._failure: OSError | None = None

    def write(self, image: bytes | None, key: str, caption: object, facts: dict[str, Any]) -> None:
        """Take an image, or why there is none."""
        facts = dict(facts, offset=None)
        if image is not None:
            try:
                facts["offset"] = self._spool.tell()
                facts["length"] = self._spool.write(image)
            except OSError as error:  # img2dataset would go on with the next
                self._failure = self._failure or error
        self._written[facts["row"]] = facts

    def close(self) -> None:
        """Write both files.

        Raises:
            OSError: The disk is full, or the like.
        """
        if self._failure is not None:
            raise self._failure
        with self._spool, tarfile.open(self._tar, "w", format=tarfile.USTAR_FORMAT) as tar:
            table = [self._finish(row, tar) for row in self._rows]
        _write_table(table, self._table)

    def _finish(self, row: dict[str, Any], tar: tarfile.TarFile) -> dict[str, Any]:
        """A line of the table; the image is put into the tar."""
        key = f"{row['row']:09d}"
        line = {"row": row["row"], "key": key, **{name: row[name] for name in ("url", "hashtags", "caption", "group")}}
        if row["refused"] is not None:
            return line | {"status": "refused", "error_message": row["refused"]}
        facts = self._written.get(row["row"])
        if facts is None:
            return line | {"status": "failed_to_download", "error_message": "lost: img2dataset failed on it"}
        names = ("status", "error_message", "width", "height", "original_width", "original_height", "sha256")
        line |= {name: facts[name] for name in names}
        if facts["offset"] is not None:
            self._spool.seek(facts["offset"])
            image = self._spool.read(facts["length"])
            extension = EXTENSIONS[Image.open(io.BytesIO(image), formats=tuple(EXTENSIONS)).format or ""]
            _add(tar, f"{key}.{extension}", image)
            known = {name: value for name, value in line.items() if value is not None and name != "status"}
            _add(tar, f"{key}.json", json.dumps(known, ensure_ascii=False).encode())
        return line


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, owner 0: nothing that varies
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_table(lines: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {name: pa.string() for name in ("url", "caption", "group", "status", "error_message", "sha256")}
    numbers = {name: pa.int32() for name in ("width", "height", "original_width", "original_height")}
    first = {"row": pa.int64(), "key": pa.string(), "hashtags": pa.list_(pa.string())}
    schema = pa.schema([*first.items(), *texts.items(), *numbers.items()])
    pq.write_table(pa.Table.from_pylist(lines, schema), path, compression="zstd")


if __name__ == "__main__":
    main()
