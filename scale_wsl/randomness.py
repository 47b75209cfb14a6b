"""Random draws as pure functions of what they are for.

Nothing in the toolkit keeps generator state from one step to the next: every draw comes from a generator made from
(seed, purpose, counter). So a run resumes exactly without storing any generator's state, at any world size.
"""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["derived_seed", "generator"]


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order; the same on every machine and Python version."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, counter-based) for the draw that `parts` name."""
    return np.random.Generator(np.random.Philox(key=derived_seed(*parts)))
