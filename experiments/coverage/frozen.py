"""`python -m experiments.coverage.frozen`: coverage and reach of the frozen probe, by simulation.

800 examples as 50 batches of 16 at one parameter point, all pairs pooled, against the same 800 as 50 training
steps. Without options 200 repeats a cell into `runs/coverage_frozen`; the study in the repository is

    OMP_NUM_THREADS=1 python -m experiments.coverage.frozen --repeats 2000 --out experiments/results/coverage

and `--figures` redraws it from its rows alone. Noise, directions and counting are those of
`experiments.coverage`; both methods of a cell see the same noise.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.coverage.noise import DIMENSIONS, DIRECTIONS, LAWS, SPECTRA, Pooled, simulate_pooled
from experiments.coverage.sets import Sets, hull, hull_of, moments_of, statuses
from experiments.coverage.study import LEVELS, RESULTS, noise_seed, tally
from experiments.rows import command, complete, provenance, row_of
from gns.estimate import Moments
from gns.statistics.pairspread import ScoreMoments

ROWS = "frozen.jsonl.gz"
BATCH, BATCHES = 16, 50
TRUE_B = (5, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 20_000)
FLIPS = 1_999  # sign patterns of a test; at a size of 5 % the test is as sharp as with the probe's 9,999
SIZE = 0.05


@dataclass(frozen=True)
class FrozenCell:
    """One cell of the study; its row is a function of this."""

    law: str
    spectrum: str
    direction: str
    b_simple: int
    repeats: int
    seed: int = 0
    n: int = BATCH
    k: int = BATCHES

    @property
    def noise(self) -> tuple[str, str, int, int, int, int]:
        """What its noise depends on."""
        return self.law, self.spectrum, self.n, self.repeats, self.seed, self.k

    @property
    def hash(self) -> str:
        """The key under which a finished row is found again."""
        fixed = {"levels": LEVELS, "d": DIMENSIONS, "flips": FLIPS, "what": "frozen, score and flips"}
        return hashlib.sha256(json.dumps([asdict(self), fixed], sort_keys=True).encode()).hexdigest()[:16]


def cells(repeats: int, seed: int = 0) -> list[FrozenCell]:
    """List the study's cells, those that share a noise next to each other."""
    axes = (LAWS, SPECTRA, DIRECTIONS, TRUE_B)
    return [FrozenCell(*values, repeats=repeats, seed=seed) for values in itertools.product(*axes)]


def jackknifed(noise: Pooled, b_simple: float, direction: str) -> Moments:
    """Pool over all pairs, with the spread of the delete-one-batch jackknife, probe by probe in array fields.

    Args:
        noise: of many probes.
        b_simple: true noise scale, in examples.
        direction: of G.

    Returns:
        The moments, [repeats] in each field.

    Slow twin: `gns.statistics.pairs.jackknife`, probe by probe, in tests/experiments/coverage/test_frozen.py.
    """
    x, y = noise.whole(b_simple, direction)
    return replace(moments_of(*noise.jackknife(b_simple, direction)), x=x, y=y)  # type: ignore[arg-type]


def scored(plain: Moments, noise: Pooled) -> ScoreMoments:
    """Give the spread under the noise scale that is tested, `pairspread.score` of `gns`, probe by probe.

    Args:
        plain: of the jackknife.
        noise: of the probes.

    Returns:
        The moments, [repeats] in each field.
    """
    trace_sq, top = noise.spectrum
    a = 1 / (noise.n * noise.mean_sq.shape[1])
    share, plugin = plain.x * a, plain.y + plain.x * a
    seen = plain.second[2] * plain.k / (plain.k - 1) / (4 * a * plugin)
    along = np.maximum(seen, seen + np.clip(share / plugin, 0, 1) * (top - seen))
    fields = (plain.x, plain.y, plain.second, plain.third, plain.k)
    return ScoreMoments(*fields, linear=4 * a * along, null=2 * trace_sq * a * a / (1 - a))  # type: ignore


class SignFlips:
    """The sign-flip test of |G|² = 0 on many probes, prepared once for every true B.

    The statistic Σ_{k≠l} εₖεₗ ḡₖ·ḡₗ is |G|²(S² − K) + 2|G|(S Σεₖpₖ − Σpₖ) + Σ_{k≠l} εₖεₗ ēₖ·ēₗ with S = Σεₖ.
    Every probe sees the same patterns, the data's own (ε = 1) first.
    """

    def __init__(self, noise: Pooled, patterns: int = FLIPS, seed: int = 0):
        k = noise.mean_sq.shape[1]
        drawn = np.random.default_rng(seed).choice([-1.0, 1.0], (patterns, k))
        self.signs = np.concatenate([np.ones((1, k)), drawn])
        self.along = noise.along
        own = np.einsum("rkk->r", noise.gram)
        self.products = np.stack([((self.signs @ g) * self.signs).sum(1) for g in noise.gram]) - own[:, None]

    def p_values(self, b_simple: float, direction: str) -> np.ndarray:
        """[repeats], one-sided: (patterns at or above the data + 1)/(patterns + 1)."""
        p, total = self.along[direction], self.signs.sum(1)
        mixed = total * (p @ self.signs.T) - p.sum(1, keepdims=True)
        found = (total**2 - p.shape[1]) / b_simple + 2 / np.sqrt(b_simple) * mixed + self.products
        seen = found[:, :1]
        return np.mean(found >= seen - 1e-12 * np.abs(seen), axis=1)


def seen(sets: Sets, p: np.ndarray) -> Sets:
    """Take the upper end of sets where the sign-flip test sees no gradient, as `SignFlip.upper_end` does.

    Args:
        sets: at `LEVELS`.
        p: [repeats], of the sign-flip test.
    """
    least = 1 / (FLIPS + 1)
    size = np.maximum((1 - np.asarray(LEVELS)) / 2, least)[:, None] * (1 + 1e-9)
    return replace(sets, high=np.where(p <= size, sets.high, np.inf))


def measure(cell: FrozenCell, noise: Pooled, flips: SignFlips) -> dict[str, Any]:
    """Apply the probe, and the set of the same batches as training steps, to one cell.

    Args:
        cell: which.
        noise: of all cells of this law, spectrum, repeats and seed.
        flips: of that noise.

    Returns:
        `methods`: "score", with the sign-flip test's say, and "jackknife", both of all pairs, and "steps" →
        `tally`; `statuses`: a list over `LEVELS` of the score set's; `flips`: how many sign-flip tests reject
        |G|² = 0 at `SIZE`.
    """
    plain = jackknifed(noise, cell.b_simple, cell.direction)
    p = flips.p_values(cell.b_simple, cell.direction)
    found = {
        "score": seen(hull_of(scored(plain, noise), LEVELS), p),
        "jackknife": hull_of(plain, LEVELS),
        "steps": hull(*noise.steps.unbiased(cell.b_simple, cell.direction), LEVELS),
    }
    counted = [np.unique(row, return_counts=True) for row in statuses(found["score"], cell.k)]
    return {
        "methods": {name: tally(sets, cell.b_simple) for name, sets in found.items()},
        "statuses": [dict(zip(names.tolist(), counts.tolist(), strict=True)) for names, counts in counted],
        "flips": int((p <= SIZE).sum()),
    }


def computed(todo: Sequence[FrozenCell], bar: tqdm) -> Iterator[dict[str, Any]]:
    """Yield the row of each cell; one noise is alive at a time."""
    about = provenance()
    for shared, group in itertools.groupby(todo, key=lambda cell: cell.noise):
        law, spectrum, n, repeats, seed, k = shared
        bar.set_description(f"frozen {law} {spectrum}: noise")
        # not the noise of the study of steps, so that the two do not err together
        own = noise_seed(f"frozen {law}", spectrum, n, repeats, seed)
        noise = simulate_pooled(law, spectrum, n, repeats, k, own)
        flips = SignFlips(noise)
        for cell in group:
            bar.set_description(f"frozen {law} {spectrum} B={cell.b_simple}")
            yield row_of(cell, partial(measure, cell, noise, flips)) | about


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, compute what is missing, draw."""
    from experiments.coverage.frozen_page import report

    def make(chosen: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
        return complete(cells(chosen.repeats, chosen.seed), path, computed)

    asked = argparse.ArgumentParser(prog="python -m experiments.coverage.frozen")
    command(asked, arguments, RESULTS / ROWS, make, report)


if __name__ == "__main__":
    main()
