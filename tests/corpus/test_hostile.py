"""From hostile posts to a data set: nothing crashes, nothing escapes, and every reject is counted and named."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.prepare import PrepareConfig, Prepared, prepare
from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.sources import open_source
from tests.corpus.toy import noise
from tests.loading.fakes import encode

CONFIG = PrepareConfig(min_count=1, validation_share=0.3, max_pixels=1_000_000, max_bytes=5_000_000)
ALONE = Workers(count=1)


def animated() -> bytes:
    buffer = io.BytesIO()
    noise(901).save(buffer, "GIF", save_all=True, append_images=[noise(902), noise(903)])
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(904), "JPEG", exif=exif.tobytes())


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


ODD = {
    "animated.gif": animated(),
    "grey16.png": encode(Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 100)),
    "cmyk.jpg": encode(noise(905).convert("CMYK"), "JPEG"),
    "rotated.jpg": rotated(),
    "really-a-png.jpg": encode(noise(906)),
    "palette.png": encode(noise(907).convert("P")),
    "one-pixel.png": encode(noise(908, 1)),
}
"""Images that are fine, however odd."""
BAD = {
    "empty.png": (b"", "undecodable"),
    "truncated.png": (encode(noise(910))[:200], "undecodable"),
    "truncated.jpg": (encode(noise(911, 200), "JPEG")[:-900], "undecodable"),
    "text.jpg": (b"<html>404</html>", "undecodable"),
    "bomb.png": (bomb(), "too many pixels"),
    "heavy.png": (bytes(6_000_000), "too many bytes"),
    "tiff.png": (encode(noise(912), "TIFF"), "undecodable"),
    "gone.png": (None, "unreadable"),
}
TAGS = [
    "#cat\u202e",
    "c\u0000at",
    "#Cat😺",
    "\u200f#cat\u200f",
    "ca\u00adt",
    "🐈",
    "#\u0301cat",
    "x" * 5000,
    "\ufeffcat",
    "#CAT #cat",
]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check(prepared: Prepared, reasons: Counter[str]) -> None:
    """Every reject is counted in the manifests and the report, and named in the table."""
    rejects = pq.read_table(prepared.train.parent / "rejects.parquet").to_pylist()
    assert Counter(row["reason"] for row in rejects) == reasons
    assert all(row["key"] for row in rejects)
    for path in (prepared.train, prepared.validation):
        dataset = Dataset.open(path)
        dataset.verify()
        assert {reason: dataset.manifest["dropped"][reason] for reason in reasons} == dict(reasons)
        assert dataset.manifest["posts"] == prepared.report["posts"]
    kept = prepared.report["train"]["images"] + prepared.report["val"]["images"]
    dropped = sum(prepared.report["dropped"].values())
    assert kept + dropped + prepared.report["copies"] == prepared.report["posts"]


def images_of(prepared: Prepared) -> set[bytes]:
    sets = [Dataset.open(path) for path in (prepared.train, prepared.validation)]
    return {dataset.read(i) for dataset in sets for i in range(len(dataset))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good, odd and bad images, and a place outside."""
    images = tmp_path / "posts" / "images"
    images.mkdir(parents=True)
    for name, data in ODD.items():
        (images / name).write_bytes(data)
    for name, (content, _) in BAD.items():
        if content is not None:
            (images / name).write_bytes(content)
    for i in range(8):
        (images / f"good{i}.png").write_bytes(encode(noise(i)))
    (tmp_path / "secret.png").write_bytes(encode(noise(999)))
    return tmp_path


def test_a_table(folder: Path) -> None:
    names = [*ODD, *BAD, *(f"good{i}.png" for i in range(8))]
    rows = [f"images/{name},cat".encode() for name in names]
    rows += [b"images/good0.png,\xff\xfecat", b"images/\xe9.png,cat", b'images/good1.png,"a "quote" inside"']
    rows += [b"images/good2.png," + b"x" * 10_000_000, b"one,two,three,four", b"../secret.png,cat", b"/etc/passwd,cat"]
    rows += [f"images/good{i % 8}.png,{tag}".encode() for i, tag in enumerate(TAGS)]
    (folder / "posts" / "posts.csv").write_bytes(b"image,hashtags\n" + b"\n".join(rows) + b"\n")
    before = tree(folder)
    prepared = prepare(open_source(str(folder / "posts" / "posts.csv")), folder / "out", CONFIG, workers=ALONE)
    reasons = Counter(reason for _, reason in BAD.values())
    reasons += Counter({"not UTF-8": 2, "malformed row": 2, "text too long": 1})
    reasons["image path that leads out of its folder, which needs anywhere=true"] = 1
    reasons["absolute image path, which needs anywhere=true"] = 1
    check(prepared, reasons)
    assert {path for path in tree(folder) - before if not path.startswith("out")} == {".out.lock"}
    kept = images_of(prepared)
    assert kept == set(ODD.values()) | {encode(noise(i)) for i in range(8)}
    assert encode(noise(999)) not in kept


def test_json_lines_with_hostile_tags(folder: Path) -> None:
    rows = [{"image": f"images/good{i % 8}.png", "hashtags": [tag, "cat"]} for i, tag in enumerate(TAGS)]
    rows += [{"image": f"images/good{i}.png", "hashtags": ["\ud800", "dog"]} for i in range(8)]
    (folder / "posts" / "posts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = prepare(open_source(str(folder / "posts" / "posts.jsonl")), folder / "out", CONFIG, workers=ALONE)
    check(prepared, Counter())
    dataset = Dataset.open(prepared.train)
    assert {entry.hashtag for entry in dataset.vocabulary.entries} == {"cat", "dog"}
    assert all(dataset.labels(i).tolist() == [0, 1] for i in range(len(dataset)))


def test_tars(folder: Path) -> None:
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as archive:

        def add(name: str, data: bytes = b"", **header: object) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in header.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))

        for number, (name, data) in enumerate(ODD.items()):
            add(f"{number}.{name.rpartition('.')[2]}", data)
            add(f"{number}.json", json.dumps({"hashtags": ["cat"], "group": f"\ud800{number}"}).encode())
        add("../outside.png", encode(noise(1)))
        add("/tmp/absolute.png", encode(noise(2)))
        add("link.png", type=tarfile.SYMTYPE, linkname="../../secret.png")
        add("hard.png", type=tarfile.LNKTYPE, linkname="0.gif")
        add("a/../../b.png", encode(noise(3)))
        add("device.png", type=tarfile.CHRTYPE)
        for number, (name, (content, _)) in enumerate(BAD.items(), 100):
            if content:
                add(f"{number}.{name.rpartition('.')[2]}", content)
                add(f"{number}.txt", b"#cat")
    before = tree(folder)
    prepared = prepare(open_source(str(folder / "tars")), folder / "out", CONFIG, workers=ALONE)
    reasons = Counter(reason for content, reason in BAD.values() if content)
    reasons += Counter({"unsafe name": 3, "link": 2, "device": 1})
    check(prepared, reasons)
    assert {path for path in tree(folder) - before if not path.startswith("out")} == {".out.lock"}
    assert images_of(prepared) == set(ODD.values())


def test_bytes_in_parquet(folder: Path) -> None:
    rows = [{"image": data, "hashtags": ["cat"]} for data in ODD.values()]
    rows += [{"image": content, "hashtags": ["cat"]} for content, _ in BAD.values() if content is not None]
    pq.write_table(__import__("pyarrow").Table.from_pylist(rows), folder / "posts" / "posts.parquet")
    prepared = prepare(open_source(str(folder / "posts" / "posts.parquet")), folder / "out", CONFIG, workers=ALONE)
    check(prepared, Counter(reason for content, reason in BAD.values() if content is not None))
    assert images_of(prepared) == set(ODD.values())


def test_odd_images_are_seen_as_they_are_meant(folder: Path) -> None:
    from scale_wsl.loading.decode import decode

    upright = np.asarray(decode(ODD["rotated.jpg"], 10**6))
    lying = np.asarray(Image.open(io.BytesIO(ODD["rotated.jpg"])).convert("RGB"))
    assert np.array_equal(upright, np.rot90(lying, -1))
    assert np.array_equal(np.asarray(decode(ODD["animated.gif"], 10**6)).shape, (24, 24, 3))
    for data in ODD.values():
        assert decode(data, 10**6).mode == "RGB"
