"""`scale-wsl corpus`: look at prepared data sets and plan what to train on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_wsl.commands import nothing_else
from scale_wsl.errors import UserError

if TYPE_CHECKING:
    from scale_wsl.corpus.shards import Dataset
    from scale_wsl.corpus.views import Images

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("corpus", help="look at data sets, plan what to train on", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_show(actions)
    _add_label(actions)
    _add_subset(actions)
    _add_resample(actions)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="a data set's folder, or what prepare has made")


def _opened(path: Path) -> Dataset:
    """The data set in a folder, or the training set of a preparation."""
    from scale_wsl.corpus.shards import Dataset, find_dataset

    try:
        return Dataset.open(path if (path / "manifest.json").is_file() else find_dataset(path, "train"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _add_view(parser: argparse.ArgumentParser) -> None:
    """Options that say what of a data set is taken, as section `data` of a recipe does."""
    parser.add_argument("--subset-seed", type=int, default=0, metavar="N", help="which subset, as data.subset_seed")
    parser.add_argument(
        "--label-noise", type=float, default=0.0, metavar="P", help="share of hashtags to replace, as data.label_noise"
    )
    parser.add_argument("--noise-seed", type=int, default=0, metavar="N", help="which of them, as data.noise_seed")


def _view(arguments: argparse.Namespace, dataset: Dataset, images: str | None) -> Images:
    from scale_wsl.corpus.views import ViewSpec, view_of

    spec = ViewSpec(
        images=images,
        subset_seed=arguments.subset_seed,
        label_noise=arguments.label_noise,
        noise_seed=arguments.noise_seed,
    )
    return view_of(dataset, spec, progress=True)


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


# --- label ---------------------------------------------------------------------------------------------------------


def _add_label(actions: Any) -> None:
    parser = actions.add_parser(
        "label",
        help="write the posts of a table that have a label",
        description="Write the posts of a table that have a label in a vocabulary, as Parquet, without a look at any "
        "image: what scale-wsl download then fetches. A run that was killed goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("posts", metavar="POSTS", help="a table: a file, a folder, a pattern, or an address of one")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="source.* and workers.*, as of scale-wsl prepare"
    )
    parser.add_argument("--vocabulary", type=Path, required=True, metavar="FILE", help="as vocab build has made it")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to")
    parser.add_argument("--overwrite", action="store_true", help="replace the posts of another table or vocabulary")
    parser.set_defaults(run=_label)


def _label(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else([word for word in extra if word.startswith("-")])
    from scale_wsl.commands.sources import source_and_workers
    from scale_wsl.corpus.counting import label_posts
    from scale_wsl.corpus.sources import TableSource

    source, workers = source_and_workers(arguments.posts, [*arguments.settings, *extra])
    if not isinstance(source, TableSource):
        raise UserError(f"{arguments.posts} is no table, whose posts could be labelled without a look at the images")
    figures = label_posts(source, arguments.vocabulary, arguments.out, workers=workers, overwrite=arguments.overwrite)
    share = figures["kept"] / max(figures["posts"], 1)
    print(
        f"{figures['posts']:,} posts, {figures['rejected']:,} of them rejected; "
        f"{figures['kept']:,} ({share:.1%}) have a label: {arguments.out}"
    )


# --- subset ------------------------------------------------------------------------------------------------------


def _add_subset(actions: Any) -> None:
    parser = actions.add_parser(
        "subset",
        help="say what subsets would hold",
        description="Say what nested subsets would hold: images, hashtags, and how many hashtags are lost or become "
        "rare. Nothing is written: data.images takes the subset when training.",
        allow_abbrev=False,
    )
    _add_data(parser)
    parser.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="N",
        help="sizes: 35000, 35k, 3.5M, or shares of the images (0.1, '10 %%')",
    )
    parser.add_argument(
        "--below", type=int, metavar="N", help="images below which a hashtag counts as rare; default: prepare.min_count"
    )
    _add_view(parser)
    parser.set_defaults(run=_subset)


def _subset(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.corpus.tables import subset_table

    dataset = _opened(arguments.data)
    below = dataset.vocabulary.min_count if arguments.below is None else arguments.below
    if below < 1:
        raise UserError(f"--below is {below}, but must be at least 1")
    print(subset_table([_view(arguments, dataset, images) for images in arguments.images], dataset, below))


# --- resample ----------------------------------------------------------------------------------------------------


def _add_resample(actions: Any) -> None:
    parser = actions.add_parser(
        "resample",
        help="say how often hashtags come in an epoch",
        description="Compare natural, square-root and uniform resampling (Mahajan et al. 2018, section 3): how long an "
        "epoch is and how evenly it holds the hashtags, as a table and, with --out, as a figure.",
        allow_abbrev=False,
    )
    _add_data(parser)
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="share of images below which a hashtag is repeated; default: 0.001"
    )
    parser.add_argument(
        "--epoch-length", metavar="N", help="instead: choose each rule's threshold so that an epoch has N images (5M)"
    )
    parser.add_argument("--images", metavar="N", help="of a subset of so many images, as data.images")
    _add_view(parser)
    parser.add_argument(
        "--out", type=Path, action="append", default=[], metavar="FILE", help="figure, .png or .svg; may be repeated"
    )
    parser.set_defaults(run=_resample)


def _resample(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.corpus.figures import check_format, draw_epochs
    from scale_wsl.corpus.naming import wanted_count
    from scale_wsl.corpus.resample import expected_epochs
    from scale_wsl.corpus.tables import epoch_table

    threshold, stated = arguments.threshold, arguments.epoch_length
    if threshold is not None and stated is not None:
        raise UserError("--threshold and --epoch-length say the same thing twice: take one of them out")
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(f"--threshold is {threshold}, but must be above 0 and at most 1")
    length = None if stated is None else wanted_count(stated, "--epoch-length")
    for path in arguments.out:
        check_format(path)
    images = _view(arguments, _opened(arguments.data), arguments.images)
    epochs = expected_epochs(
        images.label_ids, images.label_start, len(images.vocabulary), threshold=threshold, length=length
    )
    print(f"{images.name}: {len(images):,} images, {len(images.vocabulary):,} hashtags\n{epoch_table(epochs)}")
    if arguments.out:
        draw_epochs(epochs, f"Hashtags in an epoch of {images.name}", arguments.out)
        print("\n".join(f"figure  {path}" for path in arguments.out))
