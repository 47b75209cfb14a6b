"""`scale-wsl corpus`: look at data sets."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from scale_wsl.commands import nothing_else

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("corpus", help="look at data sets", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_show(actions)


# --- show --------------------------------------------------------------------------------------------------------


def _add_show(actions: Any) -> None:
    show = actions.add_parser(
        "show",
        help="make a page that shows a data set",
        description="Make one HTML file that shows a data set: sample images, how frequent hashtags are, which of them "
        "are on the same images, what was merged, what is ambiguous and what was left out. It needs no network and no "
        "other file, and by default stays below about 5 MB however large the data set is.",
        allow_abbrev=False,
    )
    show.add_argument("data", type=Path, metavar="DATA", help="what prepare has made, or one data set in it")
    show.add_argument("--out", type=Path, metavar="FILE", help="the page; default: <DATA>.html beside DATA")
    show.add_argument("--samples", type=int, default=48, metavar="N", help="images drawn from each data set (48)")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (0)")
    show.add_argument("--open", action="store_true", help="open the page in the browser")
    show.set_defaults(run=_show)


def _show(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.corpus.show import write_page

    data = Path(os.path.abspath(arguments.data))
    out = arguments.out or data.parent / f"{data.name or 'page'}.html"
    page = write_page(arguments.data, out, samples=arguments.samples, seed=arguments.seed)
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    if arguments.open:
        import webbrowser

        if not webbrowser.open(page.absolute().as_uri()):
            print("no browser was found: open the file yourself")
