"""What the demo claims, read from what its run has recorded: it predicts hashtags far better than their frequencies do.

    python benchmarks/demo_claim.py                 the newest demo's run
    python benchmarks/demo_claim.py runs/ci

Prints the model's figures beside those of the frequency baseline, and exits with 1 unless the macro mean average
precision is at least 3 times the baseline's and the top-5 hit rate is above it by more than the 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scale_wsl.training.spool import Spool


def main() -> int:
    """Print the table; 0 if the claim holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="the run's folder")
    run = parser.parse_args().run or max(Path("runs").glob("demo-*"), key=lambda path: path.name, default=None)
    if run is None:
        print("there is no demo's run yet: make demo")
        return 0
    last: dict[str, float] = {}
    for event, _ in Spool(run / "spool").read():
        if event.get("kind") == "metrics" and "validation/macro_ap_ratio" in event["values"]:
            last = {key.removeprefix("validation/"): float(value) for key, value in event["values"].items()}
    if not last:
        print(f"{run} has no evaluation")
        return 1
    print(f"{run}\n{'':32}{'model':>10}{'baseline':>10}{'claim':>32}")
    ratio, gain = last["macro_ap_ratio"], last["top5_gain_low"]
    claim = f"ratio {ratio:.2f}, at least 3"
    print(f"{'macro mean average precision':32}{last['macro_ap']:10.4f}{last['macro_ap_baseline']:10.4f}{claim:>32}")
    claim = f"gain {last['top5_gain']:+.3f}, low {gain:+.3f} > 0"
    print(f"{'top-5 hit rate':32}{last['top5']:10.4f}{last['top5_baseline']:10.4f}{claim:>32}")
    holds = ratio >= 3 and gain > 0
    print("the claim holds" if holds else "THE CLAIM DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
