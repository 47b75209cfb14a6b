"""Tables for the terminal about data sets, their views and their epochs.

Must never print, or show text from data that could be anything but a hashtag in normal form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scale_wsl.corpus.resample import ExpectedEpoch
from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.views import Images, View

__all__ = ["epoch_table", "subset_table"]

_NAMED = 8  # hashtags that a line names


def subset_table(subsets: Sequence[Images], dataset: Dataset, below: int) -> str:
    """What subsets hold, a line each, and which of the data set's hashtags each has lost.

    Args:
        subsets: views on `dataset`, or itself.
        dataset: the whole.
        below: a hashtag on fewer images, but on some, counts as rare.
    """
    whole = np.bincount(dataset.label_ids, minlength=len(dataset.vocabulary))
    rows = [["name", "images", "share", "labels/image", "hashtags", "lost", f"rare (< {below:,})"]]
    lines = []
    for subset in subsets:
        counts = np.bincount(subset.label_ids, minlength=len(whole))
        lost = np.flatnonzero((counts == 0) & (whole > 0))  # in the vocabulary's order: the most frequent first
        rows.append(
            [
                str(subset.name),
                f"{len(subset):,}",
                f"{len(subset) / len(dataset):.2%}",
                f"{len(subset.label_ids) / len(subset):.2f}",
                f"{np.count_nonzero(counts):,}",
                f"{len(lost):,}",
                f"{np.count_nonzero((counts > 0) & (counts < below)):,}",
            ]
        )
        if len(lost):
            names = ", ".join(dataset.vocabulary.entries[label].hashtag for label in lost[:_NAMED].tolist())
            lines.append(f"{subset.name} has lost {names}{', ...' if len(lost) > _NAMED else ''}")
        if isinstance(subset, View) and subset.noise:
            lines.append(f"{subset.name}, label noise {subset.spec.label_noise:g}: {subset.noise.summary()}")
    return "\n".join([_aligned(rows), *lines])


def epoch_table(epochs: Sequence[ExpectedEpoch]) -> str:
    """What an epoch holds under several resampling rules, a line each."""
    rows = [
        [
            "resampling",
            "threshold",
            "epoch length",
            "x images",
            "most frequent",
            "Gini",
            "perplexity",
            "images repeated",
            "largest factor",
        ]
    ]
    rows += [
        [
            epoch.mode,
            "-" if epoch.threshold is None else f"{epoch.threshold:.6g}",
            f"{epoch.length:,.0f}",
            f"{epoch.length / epoch.images:.3f}",
            f"{epoch.top_share:.2%}",
            f"{epoch.gini:.3f}",
            f"{epoch.perplexity:,.1f}",
            f"{epoch.repeated:,} ({epoch.repeated / epoch.images:.1%})",
            f"{epoch.largest:.3g}",
        ]
        for epoch in epochs
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
