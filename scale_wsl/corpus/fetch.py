"""Reads the bytes of an image from where a post says they are.

Must never read more than the limit, and never wait for what is no regular file.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from scale_wsl.corpus.images import RefusedImage
from scale_wsl.corpus.sources.files import filesystem, is_remote
from scale_wsl.errors import UserError

__all__ = ["fetch"]

_ITS_OWN = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_ITS_ERRORS = frozenset((errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EIO, errno.EINVAL))
_TRIES = 4  # of an object store, after 1, 2 and 4 seconds


def fetch(path: bytes, offset: int | None, length: int | None, max_bytes: int) -> bytes:
    """The bytes of an image.

    Args:
        path: A file (`os.fsencode`), or an address in an object store.
        offset: Where in it the image begins; None where it is the whole file.
        length: The image's bytes; None where it is the whole file.
        max_bytes: The most that an image may have.

    Raises:
        RefusedImage: It cannot be read ("unreadable"), or is too large ("too many bytes").
        UserError: The machine or the object store does not let anything be read.
    """
    too_many = RefusedImage("too many bytes", f"more than the limit of {max_bytes:,}")
    if length is not None and length > max_bytes:
        raise too_many
    try:
        if is_remote(address := os.fsdecode(path)):
            data = _fetch_remote(address, offset, length, max_bytes)
        else:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep its reader waiting for ever
                raise RefusedImage("unreadable", "it is no regular file")
            with open(path, "rb", buffering=0) as handle:
                handle.seek(offset or 0)
                left = max(os.fstat(handle.fileno()).st_size - (offset or 0), 0)
                left = min(max_bytes + 1 if length is None else length, left)
                parts = []
                while left and (part := handle.read(left)):  # one call gives 2 GiB at most
                    parts.append(part)
                    left -= len(part)
                data = b"".join(parts)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or " ".join(str(error).split())[:200]
        if isinstance(error, OSError) and not isinstance(error, _ITS_OWN) and error.errno not in _ITS_ERRORS:
            # The machine's or the network's state, not the file's: what is read now would be missing for ever.
            raise UserError(f"cannot read {os.fsdecode(path)}: {reason}; run it again, what is done is kept") from None
        raise RefusedImage("unreadable", reason) from None
    if len(data) > max_bytes:
        raise too_many
    if length is not None and len(data) < length:
        raise RefusedImage("unreadable", "its file has become shorter")
    return data


def _fetch_remote(address: str, offset: int | None, length: int | None, max_bytes: int) -> bytes:
    store, inside = filesystem(address)
    for attempt in range(_TRIES):
        try:
            with store.open_input_file(inside) as handle:
                size = handle.size() if length is None else length
                return bytes(handle.read_at(min(size, max_bytes + 1), offset or 0))
        except _ITS_OWN:
            raise
        except OSError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError
