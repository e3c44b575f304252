"""`OMP_NUM_THREADS=1 python -m experiments.live`: how often a set shown at every step of a run is ever wrong.

Runs of 1,000 steps of Gaussian gradients; after every step each rule shows a set for B_simple. Counted are
the runs in which a rule ever shows one that misses the truth, at all and with status "measured". Three rules:

- single: the set of `gns.estimate`, made anew at every step: it holds at one look;
- live: `gns.statistics.live`, looks at 20, 25, 32, … steps, which share the error, and stand in between;
- sequence: an asymptotic confidence sequence (Waudby-Smith et al. 2024, Ann. Stat. 52:2613, eq. (12)), whose
  bound grows with the logarithm of the steps, narrowest at 300: anew at every step, too.

`--runs 50` takes seconds. Rows go to `experiments/results/live/` with the figure; they hold seed and
settings.
"""

import argparse
import csv
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import special, stats

import gns
from gns.statistics.live import bounds, looks
from gns.statistics.sets import MIN_STEPS

RESULTS = Path(__file__).parent / "results" / "live"
SPECTRA = {"1/j": 1 / np.arange(1, 65), "j^-2": 1 / np.arange(1, 65) ** 2.0}
RULES = ("single", "live", "sequence")
NARROWEST = 300  # steps, where the confidence sequence is tuned to be best
CHUNK = 100  # runs in memory at once


@dataclass(frozen=True)
class Config:
    """One cell: so many runs at one truth."""

    spectrum: str
    b_simple: float
    n: int = 16
    steps: int = 1_000
    runs: int = 4_000
    level: float = 0.95
    seed: int = 0


def normal_bounds(rule: str, steps: int, level: float) -> np.ndarray:
    """Two-sided normal quantile that a rule uses after each step; `inf` where it shows nothing yet.

    Args:
        rule: one of `RULES`.
        steps: of the run.
        level: coverage.

    Returns:
        [steps], of steps 1, 2, …

    Raises:
        ValueError: an unknown rule.
    """
    k = np.arange(1, steps + 1.0)
    if rule == "single":
        found = np.full(steps, stats.norm.ppf((1 + level) / 2))
    elif rule == "sequence":
        alpha = 1 - level
        rho_sq = (-special.lambertw(-(alpha**2) / math.e, -1).real - 1) / NARROWEST
        found = np.sqrt((k * rho_sq + 1) / (k * rho_sq) * 2 * np.log(np.sqrt(k * rho_sq + 1) / alpha))
    elif rule == "live":
        at = looks(steps)
        found = np.full(steps, math.inf)
        found[np.array(at, dtype=int) - 1] = bounds(level, len(at))
    else:
        raise ValueError(f"rule is {rule!r}; known: {', '.join(map(repr, RULES))}")
    found[: MIN_STEPS - 1] = math.inf
    return found


def simulate(config: Config) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tr Σ, |G|²) of each step of some runs, [R, steps] each."""
    rng = np.random.default_rng(config.seed)
    spectrum, n = SPECTRA[config.spectrum], config.n
    mean = math.sqrt(spectrum.sum() / config.b_simple / len(spectrum))
    for start in range(0, config.runs, CHUNK):
        shape = (min(CHUNK, config.runs - start), config.steps, len(spectrum))
        centre = mean + rng.standard_normal(shape, dtype=np.float32) * np.sqrt(spectrum / n).astype(
            np.float32
        )
        q = np.square(centre).sum(2, dtype=np.float64)
        x = 2 * (rng.standard_gamma((n - 1) / 2, shape, dtype=np.float32) @ spectrum.astype(np.float32))
        x = x.astype(np.float64) / (n - 1)
        yield x, q - x / n


def statistics(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smaller and larger of Student's T and Hall's H of the first 1, 2, … steps of each run.

    Args:
        d: [R, steps], X − θY of each step.

    Returns:
        Two arrays like d; NaN at the first step.
    """
    k = np.arange(1, d.shape[1] + 1.0)
    shift = d.mean(axis=1, keepdims=True)  # keeps the differences of sums below exact
    one, two, three = (np.cumsum((d - shift) ** p, axis=1) / k for p in (1, 2, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        square = two - one**2
        t = np.sqrt(k - 1) * (one + shift) / np.sqrt(square)
        gamma = (three - 3 * one * two + 2 * one**3) / square**1.5
        w = t / np.sqrt(k)
        h = np.sqrt(k) * (w + gamma * w**2 / 3 + gamma**2 * w**3 / 27 + gamma / (6 * k))
    return np.fmin(t, h), np.fmax(t, h)


def critical(config: Config) -> dict[str, np.ndarray]:
    """Student quantile of each rule after each step, [steps]; `inf` where it makes no set."""
    df = np.maximum(np.arange(config.steps), 1)
    return {
        rule: stats.t.isf(stats.norm.sf(normal_bounds(rule, config.steps, config.level)), df)
        for rule in RULES
    }


def run(config: Config) -> dict:
    """Run one cell; give its row: settings, versions, and in what share of runs each rule was ever wrong."""
    wrong = {rule: [] for rule in RULES}
    wrong_measured = {rule: [] for rule in RULES}
    measured_at_end = {rule: [] for rule in RULES}
    for x, y in simulate(config):
        low, high = statistics(x - config.b_simple * y)
        infinity = statistics(-y)[1]
        for rule, t in critical(config).items():
            misses, measured = (low > t) | (high < -t), infinity < -t
            wrong[rule].append(misses.any(axis=1))
            wrong_measured[rule].append((misses & measured).any(axis=1))
            last = np.flatnonzero(np.isfinite(t))[-1]
            measured_at_end[rule].append(measured[:, last])
    row = dataclasses.asdict(config)
    row["hash"] = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]
    row |= {"gns": gns.__version__, "numpy": np.__version__, "status": "done"}
    for name, found in (
        ("ever_wrong", wrong),
        ("ever_wrong_measured", wrong_measured),
        ("measured_at_end", measured_at_end),
    ):
        row |= {f"{name}_{rule}": float(np.concatenate(found[rule]).mean()) for rule in RULES}
    return row


def widths(level: float = 0.95, upto: int = 10_000) -> dict[str, np.ndarray]:
    """Half-width of each rule's set over that of a single look, after each of 20 … `upto` steps.

    A set's half-width is about t·s/√K; that of `live` is of its last look.
    """
    k = np.arange(MIN_STEPS, upto + 1)
    single = stats.t.ppf((1 + level) / 2, k - 1)
    at = np.array(looks(upto))
    last = np.searchsorted(at, k, side="right") - 1
    by_rule = {"live": (np.array(bounds(level, len(at)))[last], at[last])}
    by_rule["sequence"] = (normal_bounds("sequence", upto, level)[MIN_STEPS - 1 :], k)
    found = {"steps": k.astype(float)}
    for rule, (bound, seen) in by_rule.items():
        found[rule] = stats.t.isf(stats.norm.sf(bound), seen - 1) * np.sqrt(k / seen) / single
    return found


def mean_width(rule: str, low: int = 20, high: int = 10_000) -> float:
    """Mean of `widths` over the logarithm of the steps."""
    found = widths(upto=high)
    here = found["steps"] >= low
    return float(np.average(found[rule][here], weights=1 / found["steps"][here]))


def write(rows: list[dict], folder: Path) -> None:
    """Write rows.csv, widths.json and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    spans = ((20, 10_000), (20, 100), (100, 1_000), (1_000, 10_000))
    summary = {r: {f"{a}-{b}": round(mean_width(r, a, b), 4) for a, b in spans} for r in ("live", "sequence")}
    (folder / "widths.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(rows, folder / "live.png")


def draw(rows: list[dict], path: Path) -> None:
    """Draw the chance of ever being wrong, and the price in width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    names = {"single": "single-look set at every step", "live": "live", "sequence": "confidence sequence"}
    colours = {"single": "#b3402a", "live": "#1f5fa8", "sequence": "#7a7a7a"}
    for i, rule in enumerate(RULES):
        heights = [100 * row[f"ever_wrong_{rule}"] for row in rows]
        at = np.arange(len(rows)) + (i - 1) * 0.27
        left.bar(at, heights, 0.25, color=colours[rule], label=names[rule])
    left.axhline(5, color="black", linewidth=0.8, linestyle="--")
    left.set_xticks(
        range(len(rows)), [f"{row['spectrum']}\nB = {row['b_simple']:,g}" for row in rows], fontsize=8
    )
    left.set_ylabel("runs with any wrong set (%)")
    left.set_title(f"{rows[0]['steps']:,} steps, {rows[0]['runs']:,} runs a cell, nominal 5 %", fontsize=10)
    left.set_ylim(0, 1.25 * left.get_ylim()[1])
    left.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    found = widths()
    for rule in ("sequence", "live"):
        right.plot(found["steps"], found[rule], color=colours[rule], label=names[rule], linewidth=1.2)
    right.set_xscale("log")
    right.set_xlabel("usable steps")
    right.set_ylabel("half-width / that of a single look")
    right.set_title("the price of looking at any time", fontsize=10)
    right.set_ylim(1, None)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Run all cells and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=Config("1/j", 20).runs)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for seed, (spectrum, b) in enumerate(itertools.product(SPECTRA, (20, 200, 2_000))):
        rows.append(run(Config(spectrum, b, runs=options.runs, seed=seed)))
        print(json.dumps(rows[-1]), flush=True)
    write(rows, options.out)


if __name__ == "__main__":
    main()
