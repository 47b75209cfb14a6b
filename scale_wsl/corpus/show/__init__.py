"""A page that shows a data set: images, hashtags and their frequency, pairs, merges, and what was left out.

Must never change the data set, and never run anything that it holds.
"""

from __future__ import annotations

from scale_wsl.corpus.show.page import write_page

__all__ = ["write_page"]
