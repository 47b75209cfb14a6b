"""Pretraining, from the command line to the last checkpoint: what `recipes/pretrain.py` calls on every rank."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from scale_wsl.engines.world import agree, joined_world, same_everywhere
from scale_wsl.errors import UserError
from scale_wsl.recipe import describe, load_recipe
from scale_wsl.training.failure import first_failure_speaks
from scale_wsl.training.job import PretrainRecipe, prepare_job, with_intact_checkpoint
from scale_wsl.training.session import run

__all__ = ["main", "read_arguments"]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option as every other mistake is reported: on all ranks together, in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists what there is)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pretrain.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Pretrain a ResNeXt on hashtagged images. Start it with python (one rank), torchrun or deepspeed.",
        epilog="Every key of a recipe, with its default:\n\n" + describe(PretrainRecipe),
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that overrule the recipe's")
    parser.add_argument("--recipe", metavar="FILE", help="recipe (YAML); default: recipes/pretrain/emoji.yaml")
    parser.add_argument(
        "--ds_config", "--deepspeed_config", metavar="FILE", help="DeepSpeed's JSON file; sets engine.name=deepspeed"
    )
    parser.add_argument("--resume", metavar="auto|FOLDER", help="the same as checkpoint.resume=...")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser


def read_arguments(argv: Sequence[str], default_recipe: Path) -> PretrainRecipe:
    """The recipe that a command line means.

    Raises:
        UserError: an unknown option, or whatever `load_recipe` finds.
    """
    arguments, extra = _parser().parse_known_args(argv)
    unknown = [word for word in extra if word.startswith("-")]
    if unknown:
        raise UserError(f"there is no option {unknown[0]}; --help lists what there is")
    overrides = [*arguments.overrides, *extra]  # argparse leaves positionals that follow an option to `extra`
    if arguments.ds_config is not None:
        _no_second_answer("--ds_config", overrides, "engine.name=", "engine.ds_config=")
        overrides += ["engine.name=deepspeed", f"engine.ds_config={arguments.ds_config}"]
    if arguments.resume is not None:
        if not arguments.resume:
            raise UserError("--resume is empty, but must be auto or a checkpoint's folder")
        _no_second_answer("--resume", overrides, "checkpoint.resume=")
        overrides.append(f"checkpoint.resume={arguments.resume}")
    return load_recipe(PretrainRecipe, arguments.recipe or default_recipe, overrides)


def _no_second_answer(option: str, overrides: list[str], *keys: str) -> None:
    for override in overrides:
        if override.startswith(keys):
            raise UserError(f"{option} and {override} say the same thing twice: take one of them out")


def main(argv: Sequence[str], default_recipe: Path) -> int:
    """Run a pretraining job on this rank; returns the exit code: 0 done or preempted, 2 a user's mistake.

    Raises:
        SystemExit: an error while training, printed by the first rank that met it: 2 a user's mistake, 1 any other.
    """
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") == "0":
            _parser().print_help()
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with joined_world() as world:
            try:
                with agree(world):
                    job = prepare_job(read_arguments(argv, default_recipe), world)
                same_everywhere(world, job.facts())
                job = with_intact_checkpoint(job, world)
            except UserError as error:
                if world.is_main:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                dist.barrier()  # a launcher that sees one rank end stops the others: let the sentence out first
                return 2
            with first_failure_speaks(job.folder, world.rank, world.size):
                run(job, world)
    except UserError as error:  # no world to agree with
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
