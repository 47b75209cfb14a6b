"""The `scale-wsl` command: each subcommand reads its options, calls one function and prints what it returns.

scale-wsl prepare emoji
scale-wsl prepare photos/ --out data/photos prepare.min_count=20
scale-wsl download posts.csv --out data/posts
scale-wsl vocab build posts.parquet --rule noun:8500 --out vocab.json
scale-wsl vocab explain brownbear --vocabulary data/emoji
scale-wsl corpus show data/emoji
scale-wsl corpus subset data/emoji --images 400
scale-wsl corpus resample data/emoji --out epoch.png
scale-wsl duplicates find data/photos data/photos --weights resnet50.pth --out reports/photos
scale-wsl track replay runs/emoji
scale-wsl checkpoint export runs/emoji --out exported
"""

from __future__ import annotations

import argparse
import inspect
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from scale_wsl.commands import checkpoint, corpus, download, duplicates, nothing_else, vocab
from scale_wsl.commands.sources import source_recipe
from scale_wsl.recipe import describe
from scale_wsl.training.failure import exit_code_of

__all__ = ["main"]

_DESCRIPTION = """\
Prepare hashtagged images for pretraining: download them, build vocabularies, make and look at data sets, find images
that two sets share. Send what MLflow missed; look at, check and export checkpoints. Training is recipes/pretrain.py.

  scale-wsl prepare emoji
  scale-wsl prepare photos/ --out data/photos prepare.min_count=20
  scale-wsl download posts.csv --out data/posts
  scale-wsl vocab build posts.parquet --rule noun:8500 --out vocab.json
  scale-wsl vocab explain brownbear --vocabulary data/emoji
  scale-wsl corpus show data/emoji
  scale-wsl corpus subset data/emoji --images 400
  scale-wsl corpus resample data/emoji --out epoch.png
  scale-wsl duplicates find data/photos data/photos --weights resnet50.pth --out reports/photos
  scale-wsl track replay runs/emoji
  scale-wsl checkpoint export runs/emoji --out exported
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0 when it did what was asked, 2 after a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, _leave)
    arguments, extra = _parser().parse_known_args(argv)
    return exit_code_of(lambda: arguments.run(arguments, extra))


def _leave(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that what is half-made is taken away."""
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scale-wsl",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(commands)
    download.add(commands)
    vocab.add(commands)
    corpus.add(commands)
    duplicates.add(commands)
    _add_track(commands)
    checkpoint.add(commands)
    return parser


# --- prepare -----------------------------------------------------------------------------------------------------


class _PrepareHelp(argparse.Action):
    """Prints every setting of every source; they are gathered only when somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from scale_wsl.corpus.execution import Workers
        from scale_wsl.corpus.prepare import PrepareConfig
        from scale_wsl.corpus.sources import SOURCES

        parser.print_help()
        print(f"\n{describe(PrepareConfig, 'prepare.')}\n\n{describe(Workers, 'workers.')}")
        for name, source in SOURCES.items():
            print(f"\nsource {name}: {inspect.cleandoc(source.__doc__ or '')}")
            print(describe(source, "source."))
        parser.exit()


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn posts (images with hashtags) into labelled shards",
        description="Turn posts into a training and a validation data set without a common or near-identical image.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action=_PrepareHelp, nargs=0, help="show this, and every setting")
    parser.add_argument("source", help="emoji, openclipart, or the path of your own folder or table of images")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, listed below")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; default: data/<source's name>")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier preparation left there")
    parser.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace, extra: list[str]) -> None:
    options = [word for word in extra if word.startswith("-")]
    nothing_else(options)  # settings may follow options: argparse leaves those to `extra`
    from scale_wsl.corpus.execution import Workers
    from scale_wsl.corpus.prepare import PrepareConfig, prepare

    sections = {"prepare": PrepareConfig, "workers": Workers}
    recipe = source_recipe(arguments.source, sections, [*arguments.settings, *extra])
    out = arguments.out or Path("data") / recipe.source.name
    prepared = prepare(recipe.source, out, recipe.prepare, workers=recipe.workers, overwrite=arguments.overwrite)
    print(prepared.summary())
    if prepared.reused:
        print(f"{out} was prepared before: nothing to do")


# --- track -------------------------------------------------------------------------------------------------------


def _add_track(commands: Any) -> None:
    parser = commands.add_parser("track", help="what runs record in MLflow", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    replay = actions.add_parser(
        "replay",
        help="send what a run could not send",
        description="Send what waits in a run's spool, because MLflow did not answer while it ran.",
    )
    replay.add_argument("run_folder", type=Path)
    replay.add_argument("--uri", help="another MLflow than the run's own")
    replay.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.training.tracking import replay

    sent = replay(arguments.run_folder, arguments.uri)
    print(f"{sent.records:,} records sent to MLflow run {sent.run_id}")


if __name__ == "__main__":
    sys.exit(main())
