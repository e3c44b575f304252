"""`make bench`: everything that a CPU can tell, in under 15 minutes on two quiet cores, then the page.

`python -m experiments.overhead.bench --out experiments/results/overhead` writes rows, table, figures and page
there; by default into `runs/overhead`. Rows of an earlier run in that folder are replaced.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

from experiments.overhead import page
from experiments.overhead.__main__ import counts, preset, saver, sweep
from experiments.overhead.sweeps import SWEEPS

TIMING = 0.6  # of a sweep's time; the rest builds models and warms them


def bench(out: Path, *, pairs: int, sweep_pairs: int, minutes: float) -> None:
    """Run all parts, then write the page.

    Args:
        out: folder.
        pairs: timed steps an arm of the table.
        sweep_pairs: of a point of a sweep.
        minutes: for all of it: sweeps share what the table leaves, and never have fewer than 5 pairs.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "rows.partial"
    partial.unlink(missing_ok=True)
    save = saver(partial)
    begun = time.monotonic()

    def said(part: str) -> None:
        print(f"-- {part}: {time.monotonic() - begun:.0f} s in all", flush=True)

    counts(save, pairs=pairs)
    said("counts")
    preset("cpu", save, pairs=pairs)
    said("table")
    left = {name: len(each.points) * (1 + len(each.arms)) for name, each in SWEEPS.items()}
    for name in SWEEPS:
        share = (60 * minutes - (time.monotonic() - begun)) / sum(left.values())
        sweep(name, save, pairs=sweep_pairs, seconds=TIMING * share)
        left.pop(name)
        said(f"sweep {name}")
    partial.replace(out / "rows.jsonl")
    print("\n".join(map(str, page.write(out))))


def main() -> None:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sweep-pairs", type=int, default=12)
    parser.add_argument(
        "--minutes", type=float, default=14.0, help="for all of it, as far as sweeps can give"
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the peers
    bench(given.out, pairs=given.pairs, sweep_pairs=given.sweep_pairs, minutes=given.minutes)


if __name__ == "__main__":
    main()
