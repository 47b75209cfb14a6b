"""`scale-wsl checkpoint`: look into a checkpoint, check it, and turn it into files that others load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scale_wsl.commands import nothing_else
from scale_wsl.errors import UserError

__all__ = ["add"]

_PATH = "a step's folder, or a run's (its newest whole checkpoint)"


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("checkpoint", help="look at, check and export checkpoints", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    inspect = actions.add_parser(
        "inspect",
        help="say what is in it",
        description="Say what is in a checkpoint: where training stood, and its tensors by group.",
        allow_abbrev=False,
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help=_PATH)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.set_defaults(run=_inspect)

    verify = actions.add_parser(
        "verify",
        help="compare it with what was saved",
        description="Compare every element of every tensor, and every other file, with its checksum; exit code 2, with "
        "the file and the tensor, where one is not as it was saved.",
        allow_abbrev=False,
    )
    verify.add_argument("path", type=Path, metavar="PATH", help="a step's folder, or a run's (all its checkpoints)")
    verify.set_defaults(run=_verify)

    export = actions.add_parser(
        "export",
        help="write files that torchvision and others load",
        description="Write the network as files that others load: model.safetensors under torchvision's names, with "
        "the head as its fc; head.safetensors and vocabulary.json; config.json and recipe.yaml. Memory does not grow "
        "with the network.",
        allow_abbrev=False,
    )
    export.add_argument("path", type=Path, metavar="PATH", help=_PATH)
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; must not be there yet")
    export.add_argument("--without-head", action="store_true", help="the trunk alone: no fc, head or vocabulary")
    export.add_argument(
        "--format",
        choices=("safetensors", "torch", "deepspeed"),
        default="safetensors",
        help="torch: pytorch_model.bin by torch.save, as zero_to_fp32.py writes it; deepspeed: a ZeRO checkpoint, as "
        "zero_to_fp32.py reads it; both need memory for the whole network",
    )
    export.set_defaults(run=_export)


def _inspect(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.checkpoint.describe import describe
    from scale_wsl.checkpoint.layout import find
    from scale_wsl.checkpoint.reader import Checkpoint

    print(describe(Checkpoint.open(find(arguments.path)), each=arguments.tensors))


def _verify(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.checkpoint.layout import candidates
    from scale_wsl.checkpoint.reader import Checkpoint

    damaged = []
    for path in candidates(arguments.path):
        try:
            checkpoint = Checkpoint.open(path)
            total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
            with tqdm(total=total, desc=path.name, unit="B", unit_scale=True) as bar:
                checkpoint.verify(progress=bar.update)
        except UserError as error:  # the others are looked at all the same
            damaged.append(str(error))
        else:
            print(f"{path}: all {total:,} bytes of {len(checkpoint.tensors):,} tensors are as they were saved")
    if damaged:
        raise UserError("; ".join(damaged))


def _export(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.checkpoint.export import export, exported_bytes
    from scale_wsl.checkpoint.layout import find
    from scale_wsl.checkpoint.reader import Checkpoint
    from scale_wsl.loading.decode import MEAN, STD

    checkpoint, head = Checkpoint.open(find(arguments.path)), not arguments.without_head
    with tqdm(total=exported_bytes(checkpoint, head), desc="exporting", unit="B", unit_scale=True) as bar:
        files = export(
            checkpoint, arguments.out, form=arguments.format, head=head, mean=MEAN, std=STD, progress=bar.update
        )
    for path in files:
        print(f"{path.stat().st_size:>16,}  {path}")
