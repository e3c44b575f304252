"""`make bench`: everything that a CPU can tell, in under 15 minutes on two quiet cores, then the page.

`python -m experiments.overhead.bench --out experiments/results/overhead` writes rows, table, figures and page
there; by default into `runs/overhead`. Rows of an earlier run in that folder are replaced.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from experiments.overhead import page
from experiments.overhead.__main__ import counts, preset, saver, sweep
from experiments.overhead.sweeps import SWEEPS


def bench(out: Path, *, pairs: int, sweep_pairs: int, seconds: float) -> None:
    """Run all parts, then write the page.

    Args:
        out: folder.
        pairs: timed steps an arm of the table.
        sweep_pairs: of a point of a sweep.
        seconds: of timing an arm at a point of a sweep.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "rows.partial"
    partial.unlink(missing_ok=True)
    save = saver(partial)
    parts: list[tuple[str, Callable[[], None]]] = [("counts", lambda: counts(save, pairs=pairs))]
    parts.append(("table", lambda: preset("cpu", save, pairs=pairs)))
    for name in SWEEPS:
        parts.append(
            (f"sweep {name}", lambda name=name: sweep(name, save, pairs=sweep_pairs, seconds=seconds))
        )
    begun = time.monotonic()
    for name, run in parts:
        run()
        print(f"-- {name}: {time.monotonic() - begun:.0f} s in all", flush=True)
    partial.replace(out / "rows.jsonl")
    print("\n".join(map(str, page.write(out))))


def main() -> None:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sweep-pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing an arm at a point of a sweep")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the peers
    bench(given.out, pairs=given.pairs, sweep_pairs=given.sweep_pairs, seconds=given.seconds)


if __name__ == "__main__":
    main()
