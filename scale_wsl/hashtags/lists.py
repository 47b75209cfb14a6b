"""Lists that a vocabulary's rule may name: classes of ImageNet, shipped or timm's, and the user's own files.

Must never take a line for something that the user may not have meant: what is unclear is refused with its line number.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import stat
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from scale_wsl.errors import UserError
from scale_wsl.hashtags.normalize import examine

__all__ = ["CLASS_LISTS", "digest", "imagenet_classes", "read_classes", "read_hashtags"]

CLASS_LISTS = {
    "in1k": None,
    "in12k": "imagenet12k_synsets.txt",
    "in21k": "imagenet21k_goog_synsets.txt",
    "in22k": "imagenet22k_synsets.txt",
    "in22k-ms": "imagenet22k_ms_synsets.txt",
    "in21k-miil": "imagenet21k_miil_synsets.txt",
    "in21k-miil-w21": "imagenet21k_miil_w21_synsets.txt",
}
"""Lists of ImageNet classes by name: timm's file in `timm/data/_info`, None for the one shipped with this package.

1,000 classes, 11,821 (timm's own choice of frequent ones), 21,843 (Google's, the largest), 21,841 (fall11.tar), 21,842
(Microsoft's), 11,221 and 10,450 (of Ridnik et al., *ImageNet-21K Pretraining for the Masses*, 2021). The paper's IN-5k
and IN-9k are in no package that is known here: `wnids:FILE` takes them.
"""

_LARGEST_FILE = 64 << 20  # bytes; all of WordNet's noun lemmas are 2 MB
_WNID = re.compile(r"n[0-9]{8}", re.ASCII)


def imagenet_classes(name: str) -> tuple[str, ...]:
    """The WNIDs of a list of `CLASS_LISTS`, in its own order.

    Raises:
        UserError: timm, which has it, is not installed, or has it no more.
    """
    file = CLASS_LISTS[name]
    if file is None:
        shipped = resources.files("scale_wsl.hashtags") / "data" / "imagenet1k.txt"
        return _classes(shipped.read_text("ascii").splitlines(), "the installed file data/imagenet1k.txt")
    spec = importlib.util.find_spec("timm")  # located, not imported, which would take seconds
    if spec is None or spec.origin is None:
        raise UserError(f"the classes of {name} come with timm, which is missing: pip install scale-wsl[imagenet]")
    path = Path(spec.origin).parent / "data" / "_info" / file
    if not path.is_file():
        raise UserError(f"the installed timm has no {path}: install timm 1.0, or name a file of WNIDs by wnids:FILE")
    return read_classes(path)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The WNIDs of a file with one a line, in its order; text after a WNID (as in LOC_synset_mapping.txt) is ignored.

    Empty lines and lines that begin with # are ignored too.

    Raises:
        UserError: The file cannot be read, is empty, or a line does not begin with a WNID.
    """
    return _classes(_lines(path, "class list"), str(path))


def read_hashtags(path: str | Path, what: str = "list of hashtags") -> tuple[str, ...]:
    """The normal forms of a file's hashtags, one a line without its #, sorted and each once.

    Empty lines are ignored, and comments: a # with a space after it, up to the end of the line. A line such as `#cat`
    could be either and is refused.

    Raises:
        UserError: The file cannot be read or holds no hashtag, or a line is unclear or no hashtag.
    """
    found: dict[str, None] = {}
    for number, line in enumerate(_lines(path, what), 1):
        text = re.sub(r"(^|\s)#(\s.*|$)", "", line).strip()
        if not text:
            continue
        if unclear := re.search(r"(?:^|\s)#+(\S+)", text):
            raise UserError(
                f"line {number} of {path} has a # without a space after it: write {unclear[1][:60]!r} for a hashtag, "
                "or a space after the # for a comment"
            )
        hashtag, reason = examine(text)
        if hashtag is None:
            raise UserError(f"line {number} of {path}, {text[:60]!r}, is not a hashtag: {reason}")
        found[hashtag] = None
    if not found:
        raise UserError(f"the {what} {path} holds no hashtag; write one a line")
    return tuple(sorted(found))


def digest(items: Iterable[str]) -> str:
    """SHA-256 (hex) of what a list holds, whatever its order, comments and repetitions."""
    return hashlib.sha256("".join(f"{item}\n" for item in sorted(set(items))).encode()).hexdigest()


def _classes(lines: Iterable[str], where: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not _WNID.fullmatch(wnid := line.split(maxsplit=1)[0].rstrip(",")):
            raise UserError(f"line {number} of {where} begins with {wnid[:40]!r}, which is no WNID such as n02132136")
        found[wnid] = None
    if not found:
        raise UserError(f"{where} holds no class; write a WNID such as n02132136 a line")
    return tuple(found)


def _lines(path: str | Path, what: str) -> Iterator[str]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep its reader waiting for ever
            raise UserError(f"cannot read the {what} {path}: it is no regular file")
        with open(path, "rb") as handle:
            content = handle.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"cannot read the {what} {str(path)!r}: that is no path") from None
    if len(content) > _LARGEST_FILE:
        raise UserError(f"the {what} {path} is larger than {_LARGEST_FILE >> 20} MiB, which no list of words is")
    try:
        return iter(content.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError:
        raise UserError(f"the {what} {path} is not UTF-8 text") from None
