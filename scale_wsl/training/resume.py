"""When a run saves, how many checkpoints it keeps, which one it goes on from, and what a new run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scale_wsl.checkpoint.layout import checkpoints, newest, read_meta
from scale_wsl.errors import UserError
from scale_wsl.recipe import setting
from scale_wsl.training.schedule import Duration

__all__ = ["CheckpointConfig", "resume_from"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Section `checkpoint`: how often to save, how many to keep, and where to resume from."""

    every: str = setting(
        "1 epoch",
        "how often to save ('500 steps', '1 epoch', '1e6 images', '5 %'); the end and a preemption are always saved",
    )
    asynchronous: bool = setting(
        True,
        "write while training goes on, for one more copy of each rank's share in host memory; false: training waits, "
        "as it does where state is offloaded to disk",
    )
    keep: int = setting(2, "how many checkpoints to keep, the newest")
    resume: str = setting(
        "",
        "'auto': from the newest whole checkpoint of run.folder, if any; or a checkpoint's folder; --resume sets it",
    )
    start_from: str = setting(
        "",
        "checkpoint (or run folder) of another run whose weights this one starts from: the trunk as it is, the head's "
        "rows by hashtag where the vocabulary is another; momentum, schedule and order of images start anew",
    )
    take_ambiguous: bool = setting(
        False, "start_from: a hashtag that stood for other synsets there takes its row all the same"
    )

    def __post_init__(self) -> None:
        """Check what one key cannot know of another.

        Raises:
            UserError: a number out of range, no duration, or a setting without the one that it is about.
        """
        if self.take_ambiguous and not self.start_from:
            raise UserError("checkpoint.take_ambiguous is set, but not checkpoint.start_from, whose head it is about")
        if self.keep < 1:
            raise UserError(f"checkpoint.keep is {self.keep}, but must be 1 or more")
        Duration.parse(self.every, "checkpoint.every")


def resume_from(config: CheckpointConfig, folder: Path, besides: frozenset[Path] = frozenset()) -> Path | None:
    """The checkpoint that this run goes on from; None to start afresh.

    A run never goes on from elsewhere, or from an older step, beside the checkpoints in its own folder: the newest of
    those would later be taken for its own.

    `besides` are checkpoints that are known to be damaged, which `auto` passes over.

    Raises:
        UserError: the run folder has checkpoints but the recipe does not say what to do, or names another one than the
            newest of them; or the named one is not whole, or none of them is.
    """
    if config.resume == "auto":
        found = newest(folder, besides)
        if found is None and checkpoints(folder):
            raise UserError(
                f"no checkpoint in {folder} is whole, so there is nothing to go on from: remove them to begin anew, "
                "or choose another run.folder"
            )
        return found
    if config.resume:
        named = Path(config.resume)
        read_meta(named)
        if checkpoints(folder):
            last = newest(folder)
            if last is None or last.resolve() != named.resolve():
                raise UserError(
                    f"cannot go on from {named}, because {folder} has other checkpoints: choose another run.folder, "
                    "pass --resume auto to go on from the newest, or remove them"
                )
        return named
    if checkpoints(folder):
        raise UserError(
            f"{folder} has checkpoints of an earlier run: pass --resume auto to go on from the newest, "
            "or choose another run.folder"
        )
    return None
