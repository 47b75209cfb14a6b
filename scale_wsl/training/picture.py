"""A contact sheet of validation images with predicted and true hashtags: what the figures mean, at a glance.

Must never fail because of what is drawn: a hashtag may be in any script, of any length, and look like markup.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from scale_wsl.files import published_file

__all__ = ["prediction_sheet"]

_COLUMNS, _MOST_LINES, _DPI = 6, 3, 110
_SIDE, _GAP, _MARGIN, _GUESS_LINE, _TRUE_LINE = 1.95, 0.22, 0.25, 0.185, 0.17  # inches
_RIGHT, _WRONG, _TRUE, _FAINT, _RULE = "#1a7f37", "#57606a", "#1f2328", "#8c959f", "#d0d7de"
_TEXT: dict[str, Any] = {"parse_math": False, "va": "top"}  # the hashtag "$a$" is no formula
# Families tried, in order, for letters that the first one lacks; those that are not installed are passed over.
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Unifont",
)


def prediction_sheet(
    images: ArrayLike,
    true: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[tuple[str, float]]],
    path: str | Path,
    title: str = "",
) -> None:
    """Draw images, the hashtags predicted for each (green: it has them), and the true ones; published by rename.

    Letters that no installed font has are drawn as the font's replacement box.

    Args:
        images: uint8 `[n, 3, H, W]`, n >= 1; up to about 24 stay readable.
        true: each image's hashtags.
        predicted: each image's (hashtag, probability), best first.
        path: of the PNG.
        title: above all of it.

    Raises:
        ValueError: the three do not have the same length, or there is no image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    pixels = np.asarray(images)
    count = len(pixels)
    if not count or pixels.ndim != 4 or len(true) != count or len(predicted) != count:
        raise ValueError(f"{pixels.shape} images, {len(true)} lists of true and {len(predicted)} of predicted hashtags")
    true = [[_one_line(hashtag) for hashtag in hashtags] for hashtags in true]
    predicted = [[(_one_line(hashtag), share) for hashtag, share in guesses] for guesses in predicted]
    rows = math.ceil(count / _COLUMNS)
    columns = math.ceil(count / rows)  # no nearly empty last row
    ruler = _Ruler()
    truths = [_true_lines(hashtags, ruler) for hashtags in true]
    title = ruler.fit(_one_line(title), 20.0, 11, "bold")
    head = 0.5 if title else 0.15
    below = _GUESS_LINE * max(map(len, predicted)) + _TRUE_LINE * max(map(len, truths)) + 0.2
    width = max(columns * (_SIDE + _GAP) - _GAP, ruler.width(title, 11, "bold")) + 2 * _MARGIN
    height = head + rows * (_SIDE + below + _GAP)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, color: str, **style: Any) -> None:
        figure.text(x / width, y / height, text, fontsize=size, color=color, **_TEXT, family=ruler.families, **style)

    if title:
        write(_MARGIN, height - 0.17, title, 11, _TRUE, weight="bold")
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = _MARGIN + column * (_SIDE + _GAP), height - head - row * (_SIDE + below + _GAP) - _SIDE
        axes = figure.add_axes((x / width, y / height, _SIDE / width, _SIDE / height))
        axes.imshow(pixels[index].transpose(1, 2, 0), interpolation="antialiased", aspect="equal")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=_RULE, linewidth=0.8)
        y -= 0.07
        for hashtag, probability in predicted[index]:
            right = hashtag in true[index]
            color, weight = (_RIGHT, "bold") if right else (_WRONG, "normal")
            write(x, y, ruler.fit(f"#{hashtag}", _SIDE - 0.48, 8.5, weight), 8.5, color, weight=weight)
            write(x + _SIDE, y, _percent(probability), 8.5, color, weight=weight, ha="right")
            y -= _GUESS_LINE
        ends = [x / width, (x + _SIDE) / width]
        figure.add_artist(Line2D(ends, [(y - 0.02) / height] * 2, color=_RULE, linewidth=0.8))
        y -= 0.06
        for line in truths[index]:
            write(x, y, line, 8, _TRUE if true[index] else _FAINT)
            y -= _TRUE_LINE
    with _any_script(), published_file(path) as aside:
        figure.savefig(aside, format="png")


@contextmanager
def _any_script() -> Iterator[None]:
    """No warning for a hashtag in a script that no installed font has: it is drawn as boxes, and that is no defect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        yield


class _Ruler:
    """Measures text as it will be drawn."""

    def __init__(self) -> None:
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import RendererAgg

        known = set(font_manager.get_font_names())  # naming others would log a line for every text
        self.families = [family for family in _FAMILIES if family in known] or ["sans-serif"]
        self._renderer = RendererAgg(16, 16, _DPI)

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        """Inches."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family=self.families, size=size, weight=weight)
        with _any_script():
            return float(self._renderer.get_text_width_height_descent(text, font, ismath=False)[0]) / _DPI

    def fit(self, text: str, room: float, size: float, weight: str = "normal") -> str:
        """`text`, cut to `room` inches."""
        if self.width(text, size, weight) <= room:
            return text
        length = len(text) - 1
        while length > 0 and self.width(text[:length] + "…", size, weight) > room:
            length -= max(1, length // 20)
        return text[:length] + "…"


def _one_line(text: str) -> str:
    """`text` without what cannot be drawn (line ends, control characters, surrogates), and no longer than a page."""
    undrawable = ("Cc", "Cs", "Zl", "Zp")
    return "".join(" " if unicodedata.category(letter) in undrawable else letter for letter in text[:400])


def _percent(probability: float) -> str:
    if not math.isfinite(probability):
        return "-"
    return f"{probability:.0%}" if probability >= 0.095 else f"{probability:.1%}"


def _true_lines(hashtags: Sequence[str], ruler: _Ruler) -> list[str]:
    """The true hashtags, packed into a few lines; how many did not fit."""
    if not hashtags:
        return ["no hashtag"]
    lines: list[str] = []
    for number, hashtag in enumerate(hashtags):
        more = f" +{len(hashtags) - number - 1}" if number + 1 < len(hashtags) else ""
        tight = more if len(lines) == _MOST_LINES else ""  # the last line may have to say how many are left out
        if lines and ruler.width(f"{lines[-1]} #{hashtag}{tight}", 8) <= _SIDE:
            lines[-1] += f" #{ruler.fit(hashtag, _SIDE, 8)}"
        elif len(lines) < _MOST_LINES:
            lines.append(ruler.fit(f"#{hashtag}", _SIDE - 0.25, 8))
        else:
            lines[-1] += f" +{len(hashtags) - number}"
            break
    return lines
