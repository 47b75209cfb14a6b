"""From the hashtags of an image to its labels: the distinct class indices of those that have a place in a vocabulary.

Must never invent a label, and never depend on the order or the repetition of the hashtags, or on which spellings of a
canonical hashtag the images had from which the vocabulary was built.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from scale_wsl.hashtags import Vocabulary, WordNet

__all__ = ["label_ids"]


def label_ids(hashtags: Iterable[str], vocabulary: Vocabulary, wordnet: WordNet) -> NDArray[np.int32]:
    """Class indices `[k]`, ascending and distinct, of *normalised* hashtags; empty when none has a place.

    The training target puts the mass 1/k on each of them (k-hot, Mahajan et al. 2018, section 2), so two spellings
    of one canonical hashtag are one label, not two. A spelling that the vocabulary never saw has the label of its
    synsets, unless it is on the stop list or outside the vocabulary's rule.
    """
    found = {index for hashtag in hashtags if (index := vocabulary.label(hashtag, wordnet)) is not None}
    return np.array(sorted(found), np.int32)
