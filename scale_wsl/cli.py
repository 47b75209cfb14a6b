"""The `scale-wsl` command: each subcommand reads its options, calls one function and prints what it returns.

scale-wsl prepare emoji
scale-wsl prepare photos/ --out data/photos prepare.min_count=20
scale-wsl vocab explain brownbear --vocabulary data/emoji
scale-wsl track replay runs/emoji
scale-wsl checkpoint export runs/emoji --out exported
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from scale_wsl.commands import checkpoint, duplicates, nothing_else
from scale_wsl.errors import UserError
from scale_wsl.recipe import describe, load_recipe, section
from scale_wsl.training.failure import exit_code_of

__all__ = ["main"]

_DESCRIPTION = """\
Prepare hashtagged images for pretraining, look at vocabularies, send what MLflow missed, look at, check and export
checkpoints. Training itself is recipes/pretrain.py.

  scale-wsl prepare emoji
  scale-wsl prepare photos/ --out data/photos prepare.min_count=20
  scale-wsl vocab explain brownbear --vocabulary data/emoji
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
    _add_vocab(commands)
    _add_track(commands)
    checkpoint.add(commands)
    duplicates.add(commands)
    return parser


# --- prepare -----------------------------------------------------------------------------------------------------


def _prepare_recipe(source: type[Any]) -> type[Any]:
    """The recipe of a preparation: the options of that source beside those of `prepare`."""
    from scale_wsl.corpus.prepare import PrepareConfig

    fields = [("source", source, section(source)), ("prepare", PrepareConfig, section(PrepareConfig))]
    return dataclasses.make_dataclass("PrepareRecipe", fields, frozen=True, kw_only=True)


class _PrepareHelp(argparse.Action):
    """Prints every setting of every source; they are gathered only when somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from scale_wsl.corpus.prepare import PrepareConfig
        from scale_wsl.corpus.sources import SOURCES

        parser.print_help()
        print(f"\n{describe(PrepareConfig, 'prepare.')}")
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
    from scale_wsl.corpus.prepare import prepare
    from scale_wsl.corpus.sources import SOURCES, source_class

    cls = source_class(arguments.source)
    path = [] if arguments.source in SOURCES else [f"source.path={arguments.source}"]
    recipe = load_recipe(_prepare_recipe(cls), overrides=[*path, *arguments.settings, *extra])
    out = arguments.out or Path("data") / recipe.source.name
    prepared = prepare(recipe.source, out, recipe.prepare, overwrite=arguments.overwrite)
    print(prepared.summary())
    if prepared.reused:
        print(f"{out} was prepared before: nothing to do")


# --- vocab -------------------------------------------------------------------------------------------------------


def _add_vocab(commands: Any) -> None:
    parser = commands.add_parser("vocab", help="look at vocabularies", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    explain = actions.add_parser(
        "explain", help="say why a hashtag is where it is", description="Say why a hashtag is where it is."
    )
    explain.add_argument("hashtag", nargs="+")
    explain.add_argument(
        "--vocabulary", type=Path, metavar="FILE|FOLDER", help="a vocabulary.json, a data set, or what prepare has made"
    )
    explain.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.hashtags.explain import explain
    from scale_wsl.hashtags.vocabulary import Vocabulary
    from scale_wsl.hashtags.wordnet import WordNet

    vocabulary = Vocabulary.load(_vocabulary_file(arguments.vocabulary)) if arguments.vocabulary else None
    wordnet = WordNet.load()
    print("\n\n".join(explain(text, wordnet, vocabulary) for text in arguments.hashtag))


def _vocabulary_file(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        found = sorted(path.glob("vocabulary.json")) or sorted(path.glob("train-*/vocabulary.json"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(found) != 1:
        raise UserError(
            f"there are {len(found)} vocabularies in {path}, not one: name a vocabulary.json, a data set, or what "
            "prepare has made"
        )
    return found[0]


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
