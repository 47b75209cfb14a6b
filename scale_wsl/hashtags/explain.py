"""Says in plain words why a hashtag is where it is; what `scale-wsl vocab explain` prints.

Must never decide anything: it only tells what normalising, WordNet and the vocabulary decided.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from scale_wsl.errors import UserError
from scale_wsl.hashtags.normalize import examine, normalize

if TYPE_CHECKING:
    from scale_wsl.hashtags.rules import Candidates
    from scale_wsl.hashtags.vocabulary import Vocabulary
    from scale_wsl.hashtags.wordnet import Reading, WordNet

__all__ = ["explain"]


def explain(
    text: str, wordnet: WordNet, vocabulary: Vocabulary | None = None, candidates: Candidates | None = None
) -> str:
    """Normal form, how WordNet reads it, its synsets, what it merges with, a rule's verdict, and its place.

    Args:
        text: Whatever the user typed; shown with its control characters escaped.
        wordnet: What leads it to its synsets.
        vocabulary: What to look for its place in, if anything.
        candidates: What to ask for a verdict; when None, those of the vocabulary's rule, if its list is at hand.

    Returns:
        Lines of text without a final newline.
    """
    hashtag, reason = examine(text)
    if hashtag is None:
        return f"{_shown(text)} is not a hashtag: {reason}"
    if candidates is None and vocabulary is not None:
        with contextlib.suppress(UserError):  # the list is gone, or timm is
            candidates = vocabulary.rule.candidates(wordnet)
    reading = wordnet.read(hashtag)
    lines = [f"{_shown(text)} -> {hashtag}", *_wordnet_lines(reading, wordnet)]
    if candidates is not None:
        lines.append(f"rule        {_rule(candidates)}: {candidates.verdict(hashtag)}")
    if vocabulary is not None:
        lines.append(f"vocabulary  {_place(reading, wordnet, vocabulary, candidates)}")
    return "\n".join(lines)


def _wordnet_lines(reading: Reading, wordnet: WordNet) -> list[str]:
    if reading.how == "unknown":
        return ["WordNet     no noun: neither a lemma nor a form of one, so it has no canonical form and is dropped"]
    number = len(reading.synsets)
    if reading.how == "lemma":
        found = "a lemma, written " + ", ".join(map(_words, wordnet.spellings(reading.hashtag)))
    else:
        found = f"an {reading.how} of {' and '.join(reading.bases)}"
    senses = "one sense" if number == 1 else f"ambiguous: {number} senses, and it stands for all of them"
    lines = [f"WordNet     {found}; {senses}"]
    merging: set[str] = set()
    for wnid in sorted(reading.synsets):
        lemmas = wordnet.lemmas(wnid)
        above = ", ".join(_words(wordnet.lemmas(hypernym)[0]) for hypernym in wordnet.hypernyms(wnid))
        lines.append(f"  {wnid} {', '.join(map(_words, lemmas))}" + (f"  (a kind of {above})" if above else ""))
        merging |= {form for lemma in lemmas if (form := normalize(lemma)) is not None}
    same = sorted(form for form in merging - {reading.hashtag} if wordnet.synsets(form) == reading.synsets)
    lines.append(f"merges with {', '.join(same) if same else 'no other lemma'} (exactly the same senses)")
    return lines


def _rule(candidates: Candidates) -> str:
    rule = candidates.rule
    return f"{rule.spec} under {', '.join(rule.under)}" if rule.under else rule.spec


def _place(reading: Reading, wordnet: WordNet, vocabulary: Vocabulary, candidates: Candidates | None) -> str:
    hashtag = reading.hashtag
    if (index := vocabulary.index(hashtag)) is not None:
        entry = vocabulary.entries[index]
        merged = f"; merged there: {', '.join(entry.raw)}" if len(entry.raw) > 1 else ""
        return f"#{entry.hashtag}, index {index} of {len(vocabulary)}, on {_images(entry.count)}{merged}"
    if hashtag in vocabulary.stop:
        return "no place: it is on the stop list"
    if (index := vocabulary.label(hashtag, wordnet)) is not None:
        entry = vocabulary.entries[index]
        return f"no place: no image had it in this spelling; the same senses are #{entry.hashtag}, index {index}"
    if candidates is not None and (reason := candidates.reason(hashtag)):
        return f"no place: {reason}"
    if candidates is None:
        return "no place: it is outside the rule, or was cut; the rule's list, which could tell, is not at hand"
    if vocabulary.size is not None and len(vocabulary) == vocabulary.size:
        last = vocabulary.entries[-1]
        return (
            f"no place: it ranks below the last of the {len(vocabulary)} hashtags kept, "
            f"#{last.hashtag} on {_images(last.count)}"
        )
    if vocabulary.min_count == 1:
        return "no place: no image has it"
    return f"no place: it is on fewer than {_images(vocabulary.min_count)} (min_count)"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _words(lemma: str) -> str:
    return lemma.replace("_", " ")


def _shown(text: str) -> str:
    """`text` in quotes, cut short, with nothing in it that a terminal would obey."""
    return repr(text if len(text) <= 120 else text[:117] + "...")
