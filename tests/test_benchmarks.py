"""Every benchmark runs, at a small size, and prints its table; what it measures is for a quiet machine to say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NO_MEASUREMENT = {"launch.py", "synthetic.py"}  # what others share
# Arguments of a small run, and what must be printed.
SMALL = {
    "head.py": ("--vocabulary 300 --images 8 --features 64 --rounds 2 --ranks 2", r"300 +64 three reduces +[\d.]+"),
    "engine_overhead.py": (
        "--engines ddp zero2 --rounds 2 --steps 1 --micro 2 --image-size 32",
        r"(?s)ddp +\d+ .*zero2 +\d+ ",
    ),
    "capacity.py": (
        "--engines fsdp zero2 --widths 4 --depth 26 --limit-gib 12 --image-size 32",
        r"(?s)fsdp +26 32x4d .* (\d+\.\d{4} ?){3}.*zero2 +26 32x4d .* (\d+\.\d{4} ?){3}",
    ),
    "corpus.py": (
        "--posts 3000 6000 --rounds 1",
        r"(?s)6,000 ours .*6,000 DuckDB .*the same 4,\d\d\d labelled posts.* both +\d+\.\d\d .*to the power of \d\.\d",
    ),
    "checkpoint.py": ("--width 4 --saves 1 --step-seconds 0.1", r"stall / blocking save: median [\d.]+%"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_its_table(name: str) -> None:
    arguments, expected = SMALL[name]
    done = subprocess.run([sys.executable, BENCHMARKS / name, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout), done.stdout


def test_every_other_benchmark_says_how_it_is_called() -> None:
    """Those of the loader, the trainer and the demo need a corpus of photographs, or a whole run."""
    for path in sorted(BENCHMARKS.glob("*.py")):
        if path.name not in NO_MEASUREMENT | SMALL.keys():
            subprocess.run([sys.executable, path, "--help"], check=True, capture_output=True)
