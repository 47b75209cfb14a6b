"""Where a new run's weights come from when they are another run's: the trunk as it is, the head's rows by hashtag."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from scale_wsl.checkpoint.layout import find
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.corpus.views import Images
from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.models.surgery import OperatedSource, SurgeryReport, match_rows

__all__ = ["Start"]


@dataclass(frozen=True)
class Start:
    """A checkpoint of another run, and its head as it is over this run's vocabulary."""

    checkpoint: Checkpoint
    source: OperatedSource
    report: SurgeryReport

    @classmethod
    def open(cls, path: str, train: Images, *, seed: int, bias: bool, take_ambiguous: bool) -> Start:
        """Open what `checkpoint.start_from` names: a step's folder, or a run's (its newest whole checkpoint).

        Raises:
            UserError: there is no whole checkpoint, or it does not say which hashtags its head's rows are, or only one
                of the two heads has a `bias`.
        """
        checkpoint = Checkpoint.open(find(Path(path)))
        if ("head.bias" in checkpoint.tensors) != bias:
            found, ours, theirs = ("no bias", "true", "false") if bias else ("a bias", "false", "true")
            raise UserError(
                f"the head in {checkpoint.path} has {found}, but head.bias is {ours}: set head.bias={theirs}"
            )
        if checkpoint.vocabulary is None:
            raise UserError(f"{checkpoint.path} has no vocabulary.json, so its head's rows cannot be told apart")
        old = Vocabulary.load(checkpoint.vocabulary)
        rows, report = match_rows(old, train.vocabulary, take_ambiguous=take_ambiguous)
        return cls(checkpoint, OperatedSource(checkpoint, rows, len(old), seed), report)

    def write_report(self, folder: Path) -> None:
        """Write what became of every hashtag to `surgery.json`."""
        with published_file(folder / "surgery.json") as aside:
            aside.write_text(
                json.dumps(dataclasses.asdict(self.report), indent=1, ensure_ascii=False), encoding="utf-8"
            )
