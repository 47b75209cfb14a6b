"""Writes files of pieces, and, once all ranks have written theirs, what turns them into a checkpoint.

Nothing here talks to another rank or gives a checkpoint its final name: see `saver` and `layout`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

from scale_wsl.checkpoint import index
from scale_wsl.checkpoint.layout import INDEX, TENSORS, Meta, write_meta
from scale_wsl.checkpoint.pieces import Box, Piece
from scale_wsl.checkpoint.stream import write_stream
from scale_wsl.files import sync_folder

__all__ = ["complete", "write_pieces"]


def write_pieces(folder: Path, name: str, pieces: Iterable[tuple[Piece, Box]]) -> index.Report:
    """Write pieces to the new file `name` and flush it to disk; no file where there are no pieces.

    Raises:
        OSError: the disk is full, for one.
    """
    report = index.Report()
    pieces = iter(pieces)
    first = next(pieces, None)
    if first is None:
        return report
    with open(folder / name, "xb") as file:
        while first is not None:
            piece, (_, sizes) = first
            stream = write_stream(file, piece.values, sizes)
            chunk = index.Chunk(name, stream.position, piece.start, piece.values.numel(), stream.crc)
            report.written.append(index.Written(piece.name, chunk, stream))
            first = next(pieces, None)
        file.flush()
        os.fsync(file.fileno())
        report.files[name] = file.tell()
    return report


def complete(aside: Path, reports: Iterable[index.Report], meta: Meta, files: Mapping[str, bytes]) -> Meta:
    """Write what stands beside the ranks' files, and flush the folders to disk: the checkpoint is whole then.

    Args:
        aside: the checkpoint's folder, not published yet.
        reports: of all ranks.
        meta: without `files` and `hashes`.
        files: contents of small files that go along, by name.

    Returns:
        The meta that was written.

    Raises:
        OSError: the disk is full, for one.
        ValueError: the reports contradict each other.
    """
    tensors, sizes, written = index.merge(reports)
    for_torch = pickle.dumps(index.torch_metadata(tensors, written))  # our own tools never unpickle it
    small = {INDEX: index.dump(tensors), f"{TENSORS}/.metadata": for_torch, **files}
    for name, content in small.items():
        with open(aside / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    meta = dataclasses.replace(
        meta,
        files={f"{TENSORS}/{name}": size for name, size in sorted(sizes.items())}
        | {name: len(content) for name, content in small.items()},
        hashes={name: hashlib.sha256(content).hexdigest() for name, content in small.items()},
    )
    write_meta(aside, meta)
    sync_folder(aside / TENSORS)
    sync_folder(aside)
    return meta
