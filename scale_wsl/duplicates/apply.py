"""From a report and what was judged in it to the `duplicates.json` of an evaluation set.

Must never count a pair that the report does not have, and never change an evaluation set itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scale_wsl.corpus.judgements import (
    Duplicates,
    Judgements,
    Pair,
    Verdicts,
    combined,
    read_duplicates,
    read_judgements,
)
from scale_wsl.duplicates.report import neighbours, read_report
from scale_wsl.duplicates.sets import open_images
from scale_wsl.errors import UserError

__all__ = ["apply", "show"]


def apply(
    report_folder: Path,
    files: Sequence[Path],
    *,
    accept_above: float | None = None,
    unsure: str = "duplicate",
    evaluation_folder: Path | None = None,
) -> tuple[Path, Duplicates]:
    """Write duplicates.json beside the evaluation set's manifest.

    What an earlier search of another training set, or by another method, found stays there.

    Args:
        report_folder: That `find` made.
        files: Judgements that its pages saved; they must not disagree.
        accept_above: Take pairs that nobody judged for duplicates from this similarity on; None: none.
        unsure: What an unsure pair counts as: "duplicate" or "not".
        evaluation_folder: Where the evaluation set is, if it was moved since.

    Returns:
        The file, and what it says.

    Raises:
        UserError: There is nothing to apply, a file is of another report or hostile, two files disagree, or the
            evaluation set is gone or has changed.
    """
    if not files and accept_above is None:
        raise UserError("there is nothing to apply: name files of judgements, or --accept-above a similarity")
    if accept_above is not None and not -1 <= accept_above <= 1:
        raise UserError(f"--accept-above is {accept_above:g}, but a similarity is between -1 and 1")
    report = read_report(report_folder)
    similarity = neighbours(report)
    judged = [(str(path), read_judgements(path)) for path in files]
    for where, judgements in judged:
        for what, theirs, ours in (
            ("training set", judgements.train.sha256, report.train.sha256),
            ("evaluation set", judgements.evaluation.sha256, report.evaluation.sha256),
            ("method", judgements.method, report.method),
        ):
            if theirs != ours:
                raise UserError(f"{where} was judged in a report of another {what} than {report_folder}")
    by_hand = combined(judged)
    if unknown := sorted(by_hand.keys() - similarity.keys()):
        evaluation, training = unknown[0]
        raise UserError(f"the report {report_folder} has no pair {evaluation} and {training}: it was judged in another")
    pairs = [
        Pair(evaluation, training, similarity[evaluation, training], pair.verdict, pair.how)
        for (evaluation, training), pair in by_hand.items()
    ]
    if accept_above is not None:
        pairs += [
            Pair(evaluation, training, value, "duplicate", "above threshold")
            for (evaluation, training), value in similarity.items()
            if value >= accept_above and (evaluation, training) not in by_hand
        ]
    folder = evaluation_folder or report.evaluation_folder
    images = open_images(folder, "val")
    if images.identity != report.evaluation.sha256:
        raise UserError(f"{folder} is another set of images than the report's {report.evaluation.name}, or was changed")
    there = read_duplicates(images.folder, images.identity) or Duplicates(report.evaluation, ())
    verdicts = Verdicts(Judgements(report.train, report.evaluation, report.method, tuple(pairs)), accept_above, unsure)
    duplicates = there.with_search(verdicts)
    return duplicates.save(images.folder), duplicates


def show(folder: Path) -> str:
    """What is known about the duplicates of an evaluation set, for the terminal.

    Raises:
        UserError: There is no such set, or its duplicates.json is damaged or another set's.
    """
    images = open_images(folder, "val")
    duplicates = read_duplicates(images.folder, images.identity)
    if duplicates is None:
        return (
            f"nothing is known about duplicates of {images.name}: search with scale-wsl duplicates find TRAIN "
            f"{folder}, judge, and apply"
        )
    share = len(duplicates.keys) / max(1, len(images))
    lines = [f"{duplicates.summary()}", f"that is {share:.2%} of {len(images):,} images"]
    for key in sorted(duplicates.keys)[:20]:
        pairs = [
            pair
            for search in duplicates.searches
            for pair in search.judgements.pairs
            if pair.evaluation == key and pair.verdict != "not"
        ]
        best = max(pairs, key=lambda pair: pair.similarity)
        lines.append(f"  {key}  {best.training}  {best.similarity:.4f}  {best.verdict}, {best.how}")
    if len(duplicates.keys) > 20:
        lines.append(f"  ... and {len(duplicates.keys) - 20:,} more")
    return "\n".join(lines)
