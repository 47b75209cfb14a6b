"""Figures of a data set, drawn without a display.

Must never take text that comes from data for a formula, and never draw what another equal call would draw otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scale_wsl.corpus.naming import format_count
from scale_wsl.corpus.resample import ExpectedEpoch
from scale_wsl.errors import UserError
from scale_wsl.files import published_file

__all__ = ["FORMATS", "check_format", "draw_epochs"]

FORMATS = (".png", ".svg")
_DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart; grey is what nothing was done to.
_COLOURS = {"natural": "#6e7781", "square-root": "#0072b2", "uniform": "#d55e00"}
_TEXT, _FAINT, _RULE = "#1f2328", "#57606a", "#e4e8ec"


def check_format(path: Path) -> None:
    """Refuse a figure that is no PNG and no SVG, before anything is computed for it.

    Raises:
        UserError: The path has another ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is no figure that can be drawn: its name must end in {' or '.join(FORMATS)}")


def draw_epochs(epochs: Sequence[ExpectedEpoch], title: str, paths: Iterable[Path]) -> None:
    """Draw how often hashtags come in an epoch under several resampling rules, over their rank, both logarithmic.

    To the left images of an epoch, to the right their share of it, which shows how even an epoch is, however long.
    Each rule's hashtags are in the order of their own frequency, so a line only falls; a hashtag may have another rank
    under another rule. Hashtags that no image carries are left out. Published by rename.

    Args:
        epochs: one of each rule, of the same images; where all but natural have one threshold, it is drawn.
        title: above all of it.
        paths: of the files, PNG or SVG by their ending.

    Raises:
        UserError: A file has another ending, or cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    for path in (paths := list(paths)):
        check_format(path)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(11.0, 4.8), dpi=_DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.008, ha="left", color=_TEXT, fontsize=12.5, fontweight="bold", parse_math=False)
    images, share = figure.subplots(1, 2)
    for epoch in epochs:
        falling = np.sort(epoch.hashtags[epoch.hashtags > 0])[::-1]
        style: dict[str, Any] = {"color": _COLOURS[epoch.mode], "solid_capstyle": "round", "label": _label(epoch)}
        style["linewidth"] = 1.6 if epoch.mode == "natural" else 2.2
        if len(falling) == 1:  # no line
            style["marker"] = "o"
        ranks = np.arange(1, len(falling) + 1)
        images.plot(ranks, falling, **style)
        share.plot(ranks, falling / epoch.length, **style)
    _style(images, "images of an epoch that carry it (expected)", _count)
    _style(share, "share of an epoch's images", lambda value: f"{100 * value:g} %")
    _draw_threshold(images, epochs)
    lines, labels = images.get_legend_handles_labels()
    figure.legend(
        lines,
        labels,
        loc="outside lower center",
        ncols=len(lines),
        frameon=False,
        labelcolor=_TEXT,
        fontsize=9.5,
        handlelength=1.6,
        columnspacing=2.5,
    )
    for path in paths:
        # Without these an SVG would hold the time and random identifiers.
        settings = {"svg.hashsalt": "scale_wsl", "svg.fonttype": "path"}
        form = path.suffix.lower()[1:]
        try:
            with matplotlib.rc_context(settings), published_file(path) as aside:
                figure.savefig(aside, format=form, metadata={"Date": None} if form == "svg" else None)
        except OSError as error:
            raise UserError(f"cannot write the figure {path}: {error.strerror}") from None


def _style(axes: Any, of: str, written: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("rank of the hashtag under each rule", color=_TEXT)
    axes.set_ylabel(of, color=_TEXT)
    for axis, form in ((axes.xaxis, _count), (axes.yaxis, written)):
        low, high = axis.get_view_interval()
        # Where there is hardly more than one power of ten, one label would say nothing of the scale.
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#afb8c1")


def _count(value: float) -> str:
    return format_count(round(value)) if value >= 1 else f"{value:g}"


def _label(epoch: ExpectedEpoch) -> str:
    rule = epoch.mode if epoch.threshold is None else f"{epoch.mode}, t = {epoch.threshold:.3g}"
    times = "" if epoch.threshold is None else f" ({epoch.length / epoch.images:.2f}×)"
    return f"{rule}: {_count(epoch.length)} images{times}, Gini {epoch.gini:.2f}"


def _draw_threshold(axes: Any, epochs: Sequence[ExpectedEpoch]) -> None:
    """A line at t images of the data set, below which hashtags are repeated, where there is only one such line."""
    levels = {epoch.threshold * epoch.images for epoch in epochs if epoch.threshold is not None}
    if len(levels) != 1:
        return
    (level,) = levels
    low, high = axes.get_ylim()
    if not low < level < high:
        return
    axes.axhline(level, color=_FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"repeated below t = {level:,.3g} images",
        (0.02, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        va="top",
        color=_FAINT,
        fontsize=8,
    )
