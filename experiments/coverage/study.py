"""`python -m experiments.coverage`: how often the confidence sets hold the true noise scale, by simulation.

Without options: every cell at 200 repeats, a few minutes on one core, rows, figures and table in
`runs/coverage`. The study in the repository is

    OMP_NUM_THREADS=1 python -m experiments.coverage --repeats 2000 --out experiments/results/coverage

and `python -m experiments.coverage --figures` redraws it from its rows alone. Stopped at any point, the same
command goes on: a cell that is done is a row, and no row is computed twice.

A cell is (law of the noise, spectrum, n examples a step, direction of G, true B, K steps). Cells of one law,
spectrum and n share one noise and the K's are beginnings of one run, so that neighbouring points of a curve
are not independent. Steps do not drift here: the variance by successive differences, which `estimate` takes
in one such run in 500, is not simulated.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.coverage.noise import DIMENSIONS, DIRECTIONS, LAWS, SPECTRA, Noise, simulate
from experiments.coverage.sets import DECAY, METHODS, RESAMPLES, Sets, statuses
from experiments.rows import command, complete, provenance, row_of

RESULTS = Path(__file__).parent.parent / "results" / "coverage"
ROWS = "rows.jsonl.gz"
LEVELS = (0.80, 0.90, 0.95)
TRUE_B = (5, 50, 500, 5_000, 20_000)
EXAMPLES = (4, 16, 64)
STEPS = (10, 20, 50, 200)


@dataclass(frozen=True)
class Cell:
    """One cell of the study; its row is a function of this."""

    law: str
    spectrum: str
    n: int
    direction: str
    b_simple: int
    k: int
    repeats: int
    seed: int = 0

    @property
    def noise(self) -> tuple[str, str, int, int, int]:
        """What its noise depends on, the arguments of `simulate` but for the length and the seed's mixing."""
        return self.law, self.spectrum, self.n, self.repeats, self.seed

    @property
    def hash(self) -> str:
        """The key under which a finished row is found again."""
        fixed = {
            "levels": LEVELS,
            "d": DIMENSIONS,
            "decay": DECAY,
            "resamples": RESAMPLES,
            "steps": max(STEPS),
        }
        described = json.dumps([asdict(self), fixed], sort_keys=True).encode()
        return hashlib.sha256(described).hexdigest()[:16]


def cells(
    repeats: int,
    seed: int = 0,
    *,
    laws: Iterable[str] = tuple(LAWS),
    spectra: Iterable[str] = tuple(SPECTRA),
    examples: Iterable[int] = EXAMPLES,
) -> list[Cell]:
    """List the study's cells, those that share a noise next to each other.

    Args:
        repeats: simulated runs a cell.
        seed: of the study.
        laws: keys of `LAWS`.
        spectra: keys of `SPECTRA`.
        examples: examples a step.

    Returns:
        The cells.
    """
    axes = (laws, spectra, examples, DIRECTIONS, TRUE_B, STEPS)
    return [Cell(*values, repeats=repeats, seed=seed) for values in itertools.product(*axes)]


def tally(sets: Sets, truth: float) -> dict[str, list[Any]]:
    """Count what one method's sets did, a list over `LEVELS` under each name.

    Args:
        sets: of one method.
        truth: the true noise scale, in examples.

    Returns:
        `covered`: sets that hold it; `bounded`: with a finite upper end; `covered_bounded`: both;
        `high_miss`: sets that lie above it, `low_miss`: below it (other misses are empty sets); `width`,
        `width_bounded`: median of (high − low)/B, of all sets and of the bounded ones, None where infinite or
        without any; `low`: median of low/B.
    """
    inside = (sets.low <= truth) & (truth <= sets.high)
    bounded = np.isfinite(sets.high)
    with np.errstate(invalid="ignore"):
        width = (sets.high - sets.low) / truth
    return {
        "covered": inside.sum(1).tolist(),
        "bounded": bounded.sum(1).tolist(),
        "covered_bounded": (inside & bounded).sum(1).tolist(),
        "high_miss": (sets.low > truth).sum(1).tolist(),
        "low_miss": (sets.high < truth).sum(1).tolist(),
        "width": [_median(w) for w in width],
        "width_bounded": [_median(w[b]) for w, b in zip(width, bounded, strict=True)],
        "low": [_median(low / truth) for low in sets.low],
    }


def _median(values: np.ndarray) -> float | None:
    """Median to four digits; None where it is infinite, or there is nothing."""
    values = values[~np.isnan(values)]
    found = float(np.median(values)) if len(values) else np.inf
    return float(f"{found:.4g}") if np.isfinite(found) else None


def measure(cell: Cell, noise: Noise) -> dict[str, Any]:
    """Apply every method to one cell.

    Args:
        cell: which.
        noise: of all cells with this `Cell.noise`, at least `cell.k` steps long.

    Returns:
        `methods`: name → `tally`, with `point`, the median of the printed number over B; `statuses`: a list
        over `LEVELS` of how many of the toolkit's sets had which status.
    """
    x, y = (v[:, : cell.k] for v in noise.unbiased(cell.b_simple, cell.direction))
    methods = {}
    counted: list[dict[str, int]] = []
    for name, method in METHODS.items():
        sets = method(x, y, LEVELS)
        methods[name] = tally(sets, cell.b_simple) | {"point": _median(sets.point / cell.b_simple)}
        if name == "toolkit":
            found = (np.unique(row, return_counts=True) for row in statuses(sets, cell.k))
            counted = [dict(zip(names.tolist(), counts.tolist(), strict=True)) for names, counts in found]
    return {"methods": methods, "statuses": counted}


def run(wanted: Sequence[Cell], path: Path) -> list[dict[str, Any]]:
    """Compute the cells that have no row yet.

    Args:
        wanted: cells, those that share a noise next to each other.
        path: file of the rows.

    Returns:
        All rows of the file.
    """
    return complete(wanted, path, computed)


def computed(todo: Sequence[Cell], bar: tqdm) -> Iterator[dict[str, Any]]:
    """Yield the row of each cell; one noise is alive at a time."""
    about = provenance()
    for shared, group in itertools.groupby(todo, key=lambda cell: cell.noise):
        law, spectrum, n, repeats, _ = shared
        bar.set_description(f"{law} {spectrum} n={n}: noise")
        noise = simulate(law, spectrum, n, repeats, max(STEPS), noise_seed(*shared))
        for cell in group:
            bar.set_description(f"{law} {spectrum} n={n} B={cell.b_simple} K={cell.k}")
            yield row_of(cell, partial(measure, cell, noise)) | about


def noise_seed(law: str, spectrum: str, n: int, repeats: int, seed: int) -> int:
    """Seed of one noise: other words for the same study seed give unrelated streams."""
    return int.from_bytes(
        hashlib.sha256(repr((law, spectrum, n, repeats, seed)).encode()).digest()[:8], "big"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, compute what is missing, draw."""
    from experiments.coverage.page import report  # matplotlib is needed for this alone

    asked = argparse.ArgumentParser(
        prog="python -m experiments.coverage", description="Coverage by simulation."
    )
    asked.add_argument("--law", choices=LAWS, action="append", help="only this law; may be repeated")
    asked.add_argument("--spectrum", choices=SPECTRA, action="append", help="only this spectrum")
    asked.add_argument("--examples", type=int, choices=EXAMPLES, action="append", help="only this n")

    def make(chosen: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
        axes = {"laws": chosen.law, "spectra": chosen.spectrum, "examples": chosen.examples}
        limits = {name: values for name, values in axes.items() if values}
        return run(cells(chosen.repeats, chosen.seed, **limits), path)

    command(asked, arguments, RESULTS / ROWS, make, report)


if __name__ == "__main__":
    main()
