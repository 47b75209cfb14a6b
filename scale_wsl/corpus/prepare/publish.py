"""The folder that a preparation makes: one process at a time works on it, and it appears at once or not at all.

Must never replace or remove what is not a preparation's own.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scale_wsl.corpus.shards import Dataset
from scale_wsl.errors import UserError
from scale_wsl.files import discard, sync_folder

__all__ = ["FORMAT", "VERSION", "Place", "Prepared"]

FORMAT = "scale_wsl preparation"
VERSION = 3


@dataclass(frozen=True)
class Prepared:
    """Two data sets, and how they came about."""

    train: Path
    validation: Path
    reused: bool
    """They were there already."""
    report: Mapping[str, Any]
    """Counts of everything that was read, kept, merged and dropped, as in prepared.json."""
    images_compared: bool = True
    """That they are reused means that no image file was changed either."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        report = self.report
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in report["dropped"].items())
        near = report["near_identical"]
        lines = [f"{report['posts']:,} posts; dropped: {dropped or 'none'}; {report['copies']:,} exact copies merged"]
        if "clusters" in near:
            lines.append(
                f"{near['images']:,} images are near-identical to others, or variants, in {near['clusters']:,} clusters"
                + (f", the largest of {near['largest']:,}" if near["clusters"] else "")
            )
        vocabulary = report["vocabulary"]
        lines.append(
            f"{vocabulary['entries']:,} labels, {vocabulary['ambiguous']:,} of them ambiguous; the most frequent: "
            f"{', '.join(vocabulary['most_frequent'][:8])}"
        )
        for path, role in ((self.train, "train"), (self.validation, "val")):
            side = report[role]
            lines.append(f"{path}: {side['images']:,} images, {side['labels_per_image']:.2f} labels each")
        if self.reused and not self.images_compared:
            lines.append("the image files were not compared with those of then: --overwrite prepares them anew")
        return "\n".join(lines)


class Place:
    """The folder `out`, locked from entering to leaving; of several processes one goes on, and the others wait.

    Raises:
        UserError: It is no place for a folder, or cannot be written.
    """

    def __init__(self, out: str | Path) -> None:
        try:
            # Where links lead: they stay, and the folder that they name is what is made, locked and replaced.
            self.out = Path(out).resolve()
        except (OSError, RuntimeError):  # RuntimeError: links in a ring
            raise UserError(f"{out} is no place for a folder: its links cannot be followed") from None
        self.work = self._beside("work")
        """Where a preparation keeps what it has done so far."""
        self._old, self._new = self._beside("old.part"), self._beside("new.part")

    def _beside(self, what: str) -> Path:
        return self.out.with_name(f".{self.out.name}.{what}")

    def __enter__(self) -> Place:
        self._lock = self._locked()
        self._recover()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _locked(self) -> FileLock:
        path = self._beside("lock")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))  # FileLock would wait for some errors to pass
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"another process is preparing {self.out}: waiting for it", file=sys.stderr, flush=True)
                lock.acquire()
        except OSError as error:
            raise UserError(f"cannot write into {self.out.parent}: {error.strerror}") from None
        return lock

    def _recover(self) -> None:
        """Finish what a dead run was about to do; holding the lock says that none is at work.

        A crash between the renames of `publish` left a whole replacement: it takes its place.
        """
        if self._new.exists():
            if self.out.exists():
                discard(self._old)
                os.rename(self.out, self._old)
            os.rename(self._new, self.out)
        elif self._old.exists() and not self.out.exists():
            os.rename(self._old, self.out)
        sync_folder(self.out.parent)
        discard(self._old)

    def publish(self, whole: Path) -> None:
        """Rename `whole`, which is on the same disk, to `out`, over what is there; the work is done then."""
        if self.out.exists():
            os.rename(whole, self._new)
            os.rename(self.out, self._old)
            os.rename(self._new, self.out)
        else:
            os.rename(whole, self.out)
        sync_folder(self.out.parent)
        discard(self._old)
        self.remove_work()

    def remove_work(self) -> None:
        """Take away what was kept for another try."""
        discard(self.work)

    def existing(self, recipe: Mapping[str, Any], *, overwrite: bool) -> Prepared | None:
        """What `out` holds, if it is this preparation whole; None where it is free to be written.

        Raises:
            UserError: It holds something else, or is damaged.
        """
        out = self.out
        if not out.exists():
            return None
        if not out.is_dir():
            raise UserError(f"{out} is a file: choose another folder")
        if not any(out.iterdir()):
            out.rmdir()
            return None
        try:
            prepared = json.loads((out / "prepared.json").read_bytes())
            is_ours, version = prepared["format"] == FORMAT, prepared["version"]
            if is_ours and version == VERSION:
                same = {key: prepared["recipe"].get(key) for key in recipe}
                train, validation = out / prepared["train"], out / prepared["validation"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise UserError(f"{out} is not empty and was not made by scale-wsl prepare: choose another folder")
        if overwrite:
            return None
        if version != VERSION:
            raise UserError(
                f"{out} holds a preparation of version {version!r}, where this release makes {VERSION}: "
                "choose another folder, or replace it with --overwrite"
            )
        if same != recipe:
            changed = ", ".join(_differences(same, recipe))
            raise UserError(
                f"{out} holds another preparation (different: {changed}): choose another folder, or replace it "
                "with --overwrite"
            )
        for path in (train, validation):
            Dataset.open(path).close()
        return Prepared(train, validation, True, prepared["report"])


def _differences(there: Any, wanted: Any, prefix: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        keys = sorted(there.keys() | wanted.keys())
        return [found for key in keys for found in _differences(there.get(key), wanted.get(key), f"{prefix}.{key}")]
    return [] if there == wanted else [re.sub(r"^\.", "", prefix)]
