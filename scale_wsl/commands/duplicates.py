"""`scale-wsl duplicates`: find images of an evaluation set that a training set has too, and keep account of them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from scale_wsl.commands import nothing_else
from scale_wsl.errors import UserError

__all__ = ["add"]

_EVAL = "a prepared data set, what prepare has made, or a folder of images"


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "duplicates", help="find images that a training and an evaluation set share", allow_abbrev=False
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    find = actions.add_parser(
        "find",
        help="write a report of each evaluation image's nearest training images",
        description="Find the nearest training images of every evaluation image, exactly, and write a folder of pages "
        "to judge them by. A search that was stopped goes on where it was. The paper searched 21 neighbours by R-MAC "
        "of a ResNet-50 and judged all of them by hand.",
        allow_abbrev=False,
    )
    find.add_argument("train", type=Path, metavar="TRAIN", help=_EVAL)
    find.add_argument("evaluation", type=Path, metavar="EVAL", help=_EVAL)
    find.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the report's folder, to be made")
    find.add_argument(
        "--method",
        choices=("rmac", "thumbnail"),
        default="rmac",
        help="rmac (default): finds crops and other edits, needs a network; thumbnail: nearly exact copies",
    )
    find.add_argument("--neighbours", type=int, default=21, metavar="K", help="of each evaluation image; default: 21")
    find.add_argument(
        "--show-above", type=float, metavar="S", help="only images with a neighbour so similar; default: all"
    )
    find.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="where features are kept, for this search and later ones; default: FOLDER.features beside the report",
    )
    find.add_argument("--part", default="0/1", metavar="I/N", help="this process's share of N, 0/N to N-1/N")
    find.add_argument("--workers", type=int, default=0, help="threads that decode; default: one for each core")
    network = find.add_argument_group("the network (--method rmac)")
    network.add_argument(
        "--network", metavar="NAME", help="a torchvision ResNet, or efficientnet-lite0; default: resnet50"
    )
    network.add_argument(
        "--weights",
        metavar="FILE|FOLDER",
        help=".pth or .safetensors; or what checkpoint export made, without --network; or random, to try things out",
    )
    network.add_argument(
        "--side", type=int, metavar="PIXELS", help="images have about side x side pixels; default: 224"
    )
    network.add_argument("--whiten", type=int, metavar="N", help="whiten by PCA, learned on N training images")
    network.add_argument("--dimensions", type=int, metavar="D", help="that whitening keeps; default: all")
    network.add_argument("--batch", type=int, metavar="N", help="images at a time; default: 16, on a GPU 64")
    network.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1; default: a GPU if there is one")
    find.add_argument("--faiss", action="store_true", help="let faiss choose candidates on the CPU; same result")
    find.set_defaults(run=_find)

    apply = actions.add_parser(
        "apply",
        help="write what was judged beside the evaluation set",
        description="Write duplicates.json beside the evaluation set, which changes nothing in it; every evaluation "
        "then gives a lower bound that counts duplicates as wrong.",
        allow_abbrev=False,
    )
    apply.add_argument("report", type=Path, metavar="REPORT", help="the folder that find made")
    apply.add_argument("judgements", type=Path, nargs="*", metavar="JUDGEMENTS", help="files that its pages saved")
    apply.add_argument(
        "--accept-above",
        type=float,
        metavar="S",
        help="pairs that nobody judged are duplicates from here on; default: none",
    )
    apply.add_argument(
        "--unsure",
        choices=("duplicate", "not"),
        default="duplicate",
        help="what an unsure pair counts as; default: duplicate, so that a lower bound stays one",
    )
    apply.add_argument("--evaluation", type=Path, metavar="EVAL", help="where the evaluation set is, if it was moved")
    apply.set_defaults(run=_apply)

    show = actions.add_parser("show", help="say what is known about an evaluation set", allow_abbrev=False)
    show.add_argument("evaluation", type=Path, metavar="EVAL", help=_EVAL)
    show.set_defaults(run=_show)


def _find(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.duplicates.find import FindConfig, find
    from scale_wsl.duplicates.sets import open_images

    part, parts = _part(arguments.part)
    device = _device(arguments.device or ("cpu" if arguments.faiss or arguments.method == "thumbnail" else None))
    config = FindConfig(
        neighbours=arguments.neighbours,
        part=part,
        parts=parts,
        workers=arguments.workers,
        faiss=arguments.faiss,
        show_above=arguments.show_above,
        batch=arguments.batch or (16 if device.type == "cpu" else 64),
    )
    if not arguments.out.name:
        raise UserError(f"--out is {arguments.out}, but must name a folder to be made")
    features = arguments.features or arguments.out.with_name(f"{arguments.out.name}.features")
    if arguments.batch is not None and arguments.batch < 1:
        raise UserError(f"--batch is {arguments.batch}, but must be 1 or more")
    if arguments.method == "thumbnail":
        _refuse_network(arguments)
    else:
        network = _network(arguments)  # before anything is read that takes long
    train, evaluation = open_images(arguments.train, "train"), open_images(arguments.evaluation, "val")
    method = (
        _thumbnails() if arguments.method == "thumbnail" else _rmac(arguments, network, train, features, device, config)
    )
    found = find(train, evaluation, method, arguments.out, features, config, device=device)
    if found.report is None:
        print(
            f"part {arguments.part} is done; {found.missing} of {parts} are not yet, and the last one writes the report"
        )
        return
    print(found.report.summary())
    print(f"features are kept in {features}, for later searches: remove them when there are none")
    if found.reused:
        print(f"{arguments.out} was there already: nothing to do")


def _thumbnails() -> Any:
    from scale_wsl.duplicates.methods import ThumbnailMethod

    return ThumbnailMethod()


def _network(arguments: argparse.Namespace) -> Any:
    from scale_wsl.duplicates.network import open_network

    if arguments.dimensions is not None and (arguments.whiten is None or arguments.dimensions < 1):
        raise UserError("--dimensions is 1 or more, and needs --whiten: only whitening chooses dimensions")
    return open_network(arguments.network, arguments.weights)


def _rmac(arguments: argparse.Namespace, network: Any, train: Any, features: Path, device: Any, config: Any) -> Any:
    from scale_wsl.duplicates.find import with_whitening
    from scale_wsl.duplicates.methods import RmacMethod

    side = {} if arguments.side is None else {"side": arguments.side}
    method = RmacMethod(network, device=device, **side)
    if arguments.whiten is None:
        return method
    return with_whitening(
        method,
        train,
        arguments.whiten,
        arguments.dimensions,
        features,
        workers=config.workers,
        batch=config.batch,
    )


def _refuse_network(arguments: argparse.Namespace) -> None:
    for option in ("network", "weights", "side", "whiten", "dimensions", "batch", "device"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} is for --method rmac: thumbnails need no network")


def _part(text: str) -> tuple[int, int]:
    if (match := re.fullmatch(r"(\d{1,5})/(\d{1,5})", text, re.ASCII)) is None:
        raise UserError(f"--part is {text!r}, but must be of the form 0/8, 1/8, ... 7/8")
    return int(match[1]), int(match[2])


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name, re.ASCII)
    if match is None:
        raise UserError(f"--device is {name!r}, but must be cpu, cuda, or cuda and a number: cuda:1")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name}, but there are {torch.cuda.device_count()} GPUs here")
    return torch.device(name)


def _apply(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.duplicates.apply import apply

    path, duplicates = apply(
        arguments.report,
        arguments.judgements,
        accept_above=arguments.accept_above,
        unsure=arguments.unsure,
        evaluation_folder=arguments.evaluation,
    )
    print(duplicates.summary())
    print(path)


def _show(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.duplicates.apply import show

    print(show(arguments.evaluation))
