"""`scale-wsl vocab`: build a vocabulary from posts, look at one, compare two, and say why a hashtag is where it is."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from scale_wsl.commands import nothing_else
from scale_wsl.commands.sources import source_and_workers
from scale_wsl.errors import UserError
from scale_wsl.files import discard

__all__ = ["add"]

_VOCABULARY = "a vocabulary's file, a data set, or what prepare has made"
_RULE = (
    "which hashtags may have a place: noun, noun:8500 (the most frequent ones), in1k (first sense is a class of "
    "ImageNet-1k), in1k:any (any sense is), in12k, in21k and others that come with timm, wnids:FILE, list:FILE; see "
    "docs/vocabularies.md"
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("vocab", help="build, look at and compare vocabularies", allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    build = actions.add_parser(
        "build",
        help="count the hashtags of posts and make a vocabulary of them",
        description="Count the hashtags of posts, without looking at an image, and publish the vocabulary of those "
        "that have a place, and a report beside it. Settings of the source, such as source.hashtags=COLUMN, are those "
        "that scale-wsl prepare --help lists.",
        allow_abbrev=False,
    )
    build.add_argument("posts", help="a table or a folder of your own, emoji, or openclipart")
    build.add_argument("settings", nargs="*", metavar="key=value", help="source.* and workers.*, as of prepare")
    _add_rule(build)
    build.add_argument("--stop", type=Path, metavar="FILE", help="hashtags to leave out, one a line, # comments")
    build.add_argument("--min-count", type=int, default=5, metavar="N", help="posts that a label needs; default: 5")
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to, such as vocab.json")
    build.add_argument("--overwrite", action="store_true", help="replace a vocabulary that is there")
    build.add_argument(
        "--one-pass",
        action="store_true",
        help="do not read the posts once more to count those that keep a label: the report gives a range",
    )
    build.set_defaults(run=_build)

    show = actions.add_parser(
        "show",
        help="say what is in one",
        description="Say what is in a vocabulary: sizes, coverage (where its report is beside it), the labels that are "
        "most frequent, most merged and most ambiguous.",
        allow_abbrev=False,
    )
    show.add_argument("vocabulary", type=Path, metavar="VOCAB", help=_VOCABULARY)
    show.add_argument("--all", action="store_true", help="every label instead, as tab-separated values")
    show.add_argument("--top", type=int, default=10, metavar="N", help="labels of each kind; default: 10")
    show.set_defaults(run=_show)

    explain = actions.add_parser(
        "explain",
        help="say why a hashtag is where it is",
        description="Say why a hashtag is where it is.",
        allow_abbrev=False,
    )
    explain.add_argument("hashtag", nargs="+")
    explain.add_argument("--vocabulary", type=Path, metavar="FILE|FOLDER", help=_VOCABULARY)
    _add_rule(explain, "; without a vocabulary, which has its own")
    explain.set_defaults(run=_explain)

    diff = actions.add_parser(
        "diff",
        help="compare two",
        description="Say what is different between two vocabularies: labels added and removed, of other synsets, "
        "renamed, moved in rank, counted differently or with other spellings.",
        allow_abbrev=False,
    )
    diff.add_argument("first", type=Path, metavar="A", help=_VOCABULARY)
    diff.add_argument("second", type=Path, metavar="B")
    diff.set_defaults(run=_diff)

    rules = actions.add_parser(
        "rules",
        help="say how large vocabularies can get",
        description="Say how many hashtags each rule gives a place, before any post is counted: lemmas of WordNet and "
        "the user's own, without inflected forms; and how many labels they merge into.",
        allow_abbrev=False,
    )
    rules.add_argument("rule", nargs="+", metavar="RULE", help="such as in1k in1k:any noun list:FILE")
    _add_under(rules)
    rules.set_defaults(run=_rules)


def _add_rule(parser: argparse.ArgumentParser, more: str = "; default: noun") -> None:
    parser.add_argument("--rule", metavar="RULE", help=_RULE + more)
    _add_under(parser)


def _add_under(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--under",
        action="append",
        default=[],
        metavar="SYNSET",
        help="only hashtags with a sense at or below this synset, such as animal.n.01 or n00015388; may be repeated",
    )


def _build(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else([word for word in extra if word.startswith("-")])  # settings may follow options
    from scale_wsl.corpus.counting import count_covered, count_posts
    from scale_wsl.hashtags import Vocabulary, VocabularyRule, WordNet
    from scale_wsl.hashtags.lists import read_hashtags
    from scale_wsl.hashtags.report import report_path

    if arguments.out.is_dir():
        raise UserError(f"{arguments.out} is a folder: name the file to make, such as {arguments.out / 'vocab.json'}")
    report_file = report_path(arguments.out)
    if not arguments.overwrite and (taken := next((p for p in (arguments.out, report_file) if p.exists()), None)):
        raise UserError(f"{taken} is there already: choose another name, or replace it with --overwrite")
    source, workers = source_and_workers(arguments.posts, [*arguments.settings, *extra])
    stop = read_hashtags(arguments.stop, "stop list") if arguments.stop else ()
    rule = VocabularyRule(arguments.rule or "noun", tuple(arguments.under), (*source.stop, *stop))
    if arguments.min_count < 1:
        raise UserError(f"--min-count is {arguments.min_count}; a label is kept from 1 post upwards")

    rule.candidates(WordNet.load())  # what it names is there, or the work need not begin
    work = arguments.out.with_name(f".{arguments.out.name}.work")  # where a run that was killed goes on
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {arguments.out}: {error.strerror}") from None
    counts = count_posts(source, rule, workers=workers, work=work)
    vocabulary, report = Vocabulary.of_counts(counts, rule, min_count=arguments.min_count)
    if not vocabulary.entries:
        raise UserError(
            f"no hashtag that has a place is on {arguments.min_count} of the {counts.posts:,} posts or more "
            "(--min-count); what was counted is kept for another try"
        )
    if report.coverage.covered_least < report.coverage.covered_most and not arguments.one_pass:
        coverage = report.coverage.counted(count_covered(source, vocabulary, workers=workers, work=work))
        report = dataclasses.replace(report, coverage=coverage)
    try:
        report.save(report_file, vocabulary.hash)
        vocabulary.save(arguments.out)
    except OSError as error:
        raise UserError(f"cannot write {arguments.out}: {error.strerror}") from None
    discard(work)
    print(report.summary())
    print(f"{arguments.out}: {len(vocabulary):,} labels, {vocabulary.hash[:12]}; the rest is in {report_file}")


def _show(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.hashtags import Vocabulary
    from scale_wsl.hashtags.describe import describe, table
    from scale_wsl.hashtags.report import VocabularyReport, report_path

    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}; it lists 1 label or more")
    path = _vocabulary_file(arguments.vocabulary)
    vocabulary = Vocabulary.load(path)
    if arguments.all:
        print(table(vocabulary), end="")
        return
    beside, coverage = report_path(path), None
    if beside.exists():
        try:
            coverage = VocabularyReport.load_coverage(beside, vocabulary.hash)
        except UserError as error:  # the vocabulary can be shown all the same
            print(error, file=sys.stderr)
    print(describe(vocabulary, coverage, arguments.top))


def _explain(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.hashtags import Vocabulary, VocabularyRule, WordNet, explain

    if arguments.vocabulary and (arguments.rule or arguments.under):
        raise UserError("a vocabulary has a rule of its own: leave out --rule and --under, or --vocabulary")
    wordnet = WordNet.load()
    if arguments.vocabulary:
        vocabulary = Vocabulary.load(_vocabulary_file(arguments.vocabulary))
        texts = [vocabulary.explain(text, wordnet) for text in arguments.hashtag]
    else:
        asked = arguments.rule or arguments.under
        rule = VocabularyRule(arguments.rule or "noun", tuple(arguments.under)) if asked else None
        candidates = rule.candidates(wordnet) if rule else None
        texts = [explain(text, wordnet, None, candidates) for text in arguments.hashtag]
    print("\n\n".join(texts))


def _diff(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.hashtags import Vocabulary
    from scale_wsl.hashtags.compare import compare

    first, second = (Vocabulary.load(_vocabulary_file(path)) for path in (arguments.first, arguments.second))
    print(compare(first, second).summary())


def _rules(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.hashtags import VocabularyRule, WordNet
    from scale_wsl.hashtags.describe import rule_sizes

    wordnet = WordNet.load()
    rules = [VocabularyRule(spec, tuple(arguments.under)) for spec in arguments.rule]
    print(rule_sizes([rule.candidates(wordnet) for rule in rules]))


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
