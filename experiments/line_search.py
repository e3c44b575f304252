"""B_noise without any second derivative: the best step size against the batch size.

    python -m experiments.line_search            # measure (6 minutes on one core) and draw
    python -m experiments.line_search --draw     # draw from the rows that are there

At frozen weights a step ε along the gradient of B examples changes the held-out loss by
−ε|G|² + ½ε²(GᵀHG + tr(HΣ)/B) on average, so the step that is best *averaged over many batches* obeys

    1/ε(B) = 1/ε_max + (B_noise/ε_max)/B,    ε_max = |G|²/GᵀHG

and B_noise is slope over intercept. Source: McCandlish et al. 2018, arXiv:1812.06162, eq. (2.6), (2.7).
`gns.b_noise` measures the same at the same weights, on other examples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.figures.palette import BLUE, VERMILION
from experiments.rows import provenance, read, write
from gns.examples import IGNORED
from gns.finetuning.data import Collator, pad_id
from gns.finetuning.preparation import FinetuneConfig, prepare
from gns.hessian import b_noise

FOLDER = Path(__file__).parent / "results" / "line_search"
ROWS, FIGURE = FOLDER / "rows.jsonl.gz", FOLDER / "line_search.png"
SPAN = (0.5, 1.0, 1.5)  # of the step sizes looked at, around the best one of a first look
FIRST = 6  # batches of that first look


@dataclass(frozen=True)
class LineSearch:
    """What is run.

    Args:
        warm_up: optimizer steps (AdamW) before the weights are frozen.
        unit: examples of a unit gradient; larger batches are joined units.
        units: how many.
        sizes: batch sizes, multiples of `unit`.
        most: batches of one size at the most.
        held_out: examples that the loss is judged on.
        for_g: batches of 16 for g of the Hessian reading.
        max_length: tokens of an example at the most.
        seed: of adapters and data order.
    """

    warm_up: int = 40
    unit: int = 2
    units: int = 256
    sizes: tuple[int, ...] = (2, 4, 8, 32, 128)
    most: int = 40
    held_out: int = 48
    for_g: int = 32
    max_length: int = 128
    seed: int = 0


Vector = list[torch.Tensor]


class _Point:
    """The model at its frozen weights: gradients there, and losses along a direction."""

    def __init__(self, model: Any, held_out: dict[str, torch.Tensor]):
        self.model, self.held_out = model, held_out
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.kept = [p.detach().clone() for p in self.parameters]

    def gradient(self, batch: dict[str, torch.Tensor]) -> tuple[Vector, int]:
        """The gradient of a batch and its labelled tokens."""
        found = torch.autograd.grad(self.model(**batch).loss, self.parameters)
        return list(found), int((batch["labels"][:, 1:] != IGNORED).sum())

    @torch.no_grad()
    def loss(self, direction: Vector | None = None, step: float = 0.0) -> float:
        """The held-out loss at w − step · direction."""
        for i, (p, w) in enumerate(zip(self.parameters, self.kept, strict=True)):
            p.copy_(w if direction is None else w - step * direction[i])
        return float(self.model(**self.held_out).loss)


def joined(units: Sequence[tuple[Vector, int]]) -> Vector:
    """The gradient of several units as one batch, each weighing by its tokens."""
    total = sum(tokens for _, tokens in units)
    return [
        sum((g[i] * (tokens / total) for g, tokens in units), torch.zeros_like(units[0][0][i]))
        for i in range(len(units[0][0]))
    ]


def best_of(steps: np.ndarray, changes: np.ndarray) -> float:
    """Minimum of the parabola −aε + bε²/2 through mean changes of the loss; NaN where it has none.

    Args:
        steps: [E], step sizes.
        changes: [K, E], change of the held-out loss of each batch.
    """
    mean = changes.mean(0) if changes.ndim > 1 else changes
    design = np.stack([-steps, steps**2 / 2], 1)
    (a, b), *_ = np.linalg.lstsq(design, mean, rcond=None)
    return float(a / b) if a > 0 and b > 0 else float("nan")


def first_look(point: _Point, here: float, batches: Sequence[Vector], start: float) -> float:
    """Rough best step over a few batches, by doubling and halving from `start`."""

    def mean(step: float) -> float:
        return float(np.mean([point.loss(g, step) - here for g in batches]))

    step, value = start, mean(start)
    for factor in (2.0, 0.5):
        while (there := mean(step * factor)) < value:
            step, value = step * factor, there
    return step


def measured(config: LineSearch) -> list[dict[str, Any]]:
    """Run it: one row a batch size, and one of the Hessian reading."""
    chosen = FinetuneConfig(
        model="gns:base",
        data="gns:held-out",
        lr=1e-3,
        max_length=config.max_length,
        batch_size=16,
        steps=config.warm_up,
        held_out=config.held_out,
        seed=config.seed,
    )
    prepared = prepare(chosen)
    collate, model = Collator(pad_id(prepared.tokenizer)), prepared.model
    order = torch.randperm(len(prepared.train), generator=torch.Generator().manual_seed(config.seed)).tolist()

    def batch(n: int) -> dict[str, torch.Tensor]:
        taken, order[:] = order[:n], order[n:]
        return dict(collate([prepared.train[i] for i in taken]))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(config.warm_up):
        optimizer.zero_grad()
        model(**batch(16)).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    rows = [_hessian(model, [batch(16) for _ in range(config.for_g)], [batch(32) for _ in range(2)], config)]
    point = _Point(model, dict(collate(list(prepared.held_out))))
    units = [point.gradient(batch(config.unit)) for _ in range(config.units)]
    here, step = point.loss(), 1.0
    for size in reversed(config.sizes):
        started, per = time.monotonic(), size // config.unit
        count = min(config.most, len(units) // per)
        batches = [joined(units[i * per : (i + 1) * per]) for i in range(count)]
        step = first_look(point, here, batches[:FIRST], step)
        steps = step * np.array(SPAN)
        changes = np.array([[point.loss(g, float(s)) - here for s in steps] for g in batches])
        rows.append(
            {
                "status": "done",
                "kind": "line search",
                "size": size,
                "steps": steps.tolist(),
                "changes": changes.tolist(),
                "best": best_of(steps, changes),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        print(size, rows[-1]["best"], rows[-1]["seconds"], flush=True)
    point.loss()
    about = {"config": asdict(config), "torch": torch.__version__} | provenance()
    return [row | about for row in rows]


def _hessian(model: Any, for_g: list[Any], for_h: list[Any], config: LineSearch) -> dict[str, Any]:
    found = b_noise(model, for_g, hessian_batches=for_h, probes=16, parts=8, seed=config.seed)
    print(found, flush=True)
    names = (
        "b_noise",
        "low",
        "high",
        "level",
        "status",
        "g_h_g",
        "trace_h_sigma",
        "b_simple",
        "grad_sq_norm",
    )
    numbers = {name: getattr(found, name) for name in names}
    return {"status": "done", "kind": "hessian", **numbers, "in_words": str(found), "method": found.method}


@dataclass(frozen=True)
class Fit:
    """1/ε(B) = intercept + slope/B, and B_noise = slope/intercept with its bootstrap interval.

    Args:
        sizes: [S], batch sizes with a best step.
        best: [S], the best steps.
        low: [S], lower ends of their intervals.
        high: [S], upper ends.
        intercept: 1/ε_max.
        slope: B_noise/ε_max.
        b_noise: their ratio, in examples.
        interval: 95 %, percentiles over resampled batches.
    """

    sizes: np.ndarray
    best: np.ndarray
    low: np.ndarray
    high: np.ndarray
    intercept: float
    slope: float
    b_noise: float
    interval: tuple[float, float]


def fit(rows: Sequence[dict[str, Any]], *, draws: int = 2000, seed: int = 0) -> Fit:
    """Fit the law, batches resampled within each size; sizes weigh by how well their 1/ε is known.

    Args:
        rows: of `measured`.
        draws: bootstrap samples.
        seed: of them.

    Raises:
        ValueError: fewer than two batch sizes have a best step.
    """
    rng = np.random.default_rng(seed)
    found = sorted((r for r in rows if r["kind"] == "line search"), key=lambda r: r["size"])
    found = [r for r in found if np.isfinite(r["best"]) and len(r["changes"]) > 1]
    if len(found) < 2:
        raise ValueError(f"{len(found)} batch size(s) with a best step; at least 2 are needed for a line")
    sizes = np.array([r["size"] for r in found], dtype=float)
    drawn = np.array([_resampled(r, draws, rng) for r in found])
    inverse = 1 / drawn
    spread = np.nanstd(inverse, axis=1)
    weights = 1 / spread**2
    slope, intercept = _line(1 / sizes, 1 / np.array([r["best"] for r in found]), weights)
    lines = [_line(1 / sizes, inverse[:, k], weights) for k in range(draws)]
    ratios = np.array([s / i if i > 0 else np.inf for s, i in lines])
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=1)
    ends = np.percentile(ratios[~np.isnan(ratios)], [2.5, 97.5], method="nearest")
    best = np.array([r["best"] for r in found])
    return Fit(sizes, best, low, high, intercept, slope, slope / intercept, (float(ends[0]), float(ends[1])))


def _resampled(row: dict[str, Any], draws: int, rng: np.random.Generator) -> list[float]:
    steps, changes = np.array(row["steps"]), np.array(row["changes"])
    picks = rng.integers(len(changes), size=(draws, len(changes)))
    return [best_of(steps, changes[pick]) for pick in picks]


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    good = np.isfinite(y)
    x, y, w = x[good], y[good], weights[good]
    if len(x) < 2:
        return float("nan"), float("nan")
    mean_x, mean_y = np.average(x, weights=w), np.average(y, weights=w)
    slope = float((w * (x - mean_x) * (y - mean_y)).sum() / (w * (x - mean_x) ** 2).sum())
    return slope, float(mean_y - slope * mean_x)


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Best step sizes with the fitted law, beside the law of the Hessian reading."""
    found, reading = fit(rows), next(r for r in rows if r["kind"] == "hessian")
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    ax = figure.subplots()
    ax.errorbar(
        found.sizes,
        found.best,
        [found.best - found.low, found.high - found.best],
        fmt="o",
        color=BLUE,
        capsize=3,
        label="best step, averaged over batches (95 %)",
    )
    b = np.geomspace(found.sizes.min() / 1.5, found.sizes.max() * 1.5, 200)
    ends = f"{found.interval[0]:.3g} … {found.interval[1]:.3g}"
    ax.plot(
        b,
        1 / (found.intercept + found.slope / b),
        color=BLUE,
        label=f"law fitted to them: B_noise {found.b_noise:.3g} ({ends})",
    )
    largest = reading["grad_sq_norm"] / reading["g_h_g"]
    ax.plot(
        b,
        largest / (1 + reading["b_noise"] / b),
        "--",
        color=VERMILION,
        label=f"Hessian: B_noise {reading['b_noise']:.3g} ({reading['low']:.3g} … {reading['high']:.3g})",
    )
    ax.fill_between(
        b,
        largest / (1 + reading["high"] / b),
        largest / (1 + reading["low"] / b),
        color=VERMILION,
        alpha=0.15,
        linewidth=0,
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("batch size (examples)")
    ax.set_ylabel("best step size ε (parameter² / loss)")
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure unless only a drawing is asked for, then draw and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--draw", action="store_true", help="draw from the rows that are there")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of LineSearch as JSON")
    given = parser.parse_args(argv)
    if not given.draw:
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        write(ROWS, measured(LineSearch(**given.config)))
    rows = read(ROWS)
    found = fit(rows)
    draw(rows).savefig(FIGURE, dpi=150)
    print(
        f"line search: B_noise {found.b_noise:.3g} (95 %: {found.interval[0]:.3g} … {found.interval[1]:.3g})"
    )
    print(next(r for r in rows if r["kind"] == "hessian")["in_words"])


if __name__ == "__main__":
    main()
