"""Tables and tiles of a report, as texts. No number is made here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gns.advice import Advice, Row
from gns.advising.wording import priced
from gns.coverage import Coverage
from gns.estimate import Estimate, format_count
from gns.report.text import WIDTH, label_of, signal
from gns.statistics.drift import Drift
from gns.sums import StepSums


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page, with what it is and what it rests on."""

    name: str
    value: str
    note: str


def tiles(result: Estimate, advice: Advice | None, change: Drift | None) -> list[Tile]:
    """Give the numbers a reader takes home, the one to go by first; none before there is a set."""
    if result.n_steps < 2 or math.isnan(result.low):
        return []
    found = [_noise_scale("Noise scale (examples)", result)]
    if change is not None and change.moved:
        found = [
            _noise_scale("Noise scale, last third", change.last),
            _noise_scale("Over the whole run", result),
        ]
    pays = worth(advice)
    if advice is not None and pays is not None:
        price = priced(advice.ranges[-1].price)
        condition = f"{price[0].lower()}{price[1:]} and this is the critical batch size"
        note = f"{condition}; {advice.batch_size} in use"
        found.append(Tile("Batch that pays", pays, note))
    found.append(Tile("Any signal at all?", signal(result.p_value), "chance of this much, were there none"))
    moved = change is not None and change.moved
    more = (change.last if change is not None and moved else result).more_examples(WIDTH)
    if math.isfinite(more) and result.status != "collecting":
        value = f"{format_count(more)} more" if more else "nothing more"
        name = f"For ±{100 * WIDTH:g} %{', last third' if moved else ''}"
        found.append(Tile(name, value, "examples at this batch size" if more else "needed"))
    return found


def _noise_scale(name: str, result: Estimate) -> Tile:
    return Tile(name, value_of(result), f"{span_of(result)} ({100 * result.level:g} %)")


def worth(advice: Advice | None) -> str | None:
    """Write the batches that pay where time and examples are priced; None while it is too early."""
    if advice is None or not advice.ranges:
        return None
    near = advice.ranges[-1]
    if math.isinf(near.high):
        return f"≥ {_whole(near.low)}"
    return f"{_whole(near.low)} … {_whole(near.high)}"


def _whole(batch: float) -> str:
    """Write a batch size: no less than 1 exists."""
    return format_count(max(1.0, float(round(batch))))


def value_of(result: Estimate) -> str:
    """Write B_simple, or the bound where that is all there is."""
    if math.isfinite(result.high):
        return f"≤ {format_count(result.high)}" if math.isnan(result.point) else format_count(result.point)
    return f"≥ {format_count(result.low)}" if result.low > 0 else "?"


def span_of(result: Estimate) -> str:
    """Write the interval."""
    return f"{format_count(result.low)} … {format_count(result.high)}"


def cost_row(row: Row) -> dict[str, Any]:
    """Give a batch size of the trade-off table."""

    def band(pair: tuple[float, float]) -> str:
        low, high = (format_count(x) for x in pair)
        return low if low == high else f"{low} … {high}"

    def rate(pair: tuple[float, float]) -> str:
        low, high = (f"{x:.2g}" for x in pair)
        return low if low == high else f"{low} … {high}"

    return {
        "batch": row.batch_size,
        "steps": band(row.steps),
        "examples": band(row.examples),
        "rates": {name: rate(pair) for name, pair in row.learning_rates.items()},
        "epoch": None if row.steps_per_epoch is None else f"{row.steps_per_epoch:,}",
    }


def factor_row(name: str, result: Estimate) -> dict[str, str]:
    """Give a group of parameters."""

    def figure(x: float) -> str:
        return "?" if math.isnan(x) else f"{x:.3g}"

    resolved = math.isfinite(result.high) and math.isfinite(result.point)
    return {
        "name": label_of(name),
        "value": format_count(result.point) if resolved else "not resolved",
        "interval": span_of(result),
        "status": result.status,
        "limit": format_count(result.detection_limit),
        "signal": signal(result.p_value),
        "trace_sigma": figure(result.trace_sigma),
        "grad_sq_norm": figure(result.grad_sq_norm),
    }


def averages(result: Estimate, progress: Estimate | None) -> list[dict[str, str]]:
    """Give the two averages over a run, each by its name and with what it is for."""
    named = [(result, "what the page is about"), (progress, "for comparison with a critical batch size")]
    return [
        {
            "name": r.view,
            "value": value_of(r),
            "interval": span_of(r),
            "status": r.status,
            "use": use,
        }
        for r, use in named
        if r is not None and r.n_steps > 1 and not math.isnan(r.low)
    ]


def left_out(steps: Sequence[StepSums]) -> list[dict[str, Any]]:
    """Group the steps that were not used by their reason."""
    by_reason: dict[str, list[int]] = defaultdict(list)
    for step in steps:
        if step.reason is not None:
            by_reason[step.reason].append(step.step)
    return [
        {
            "reason": reason,
            "count": len(at),
            "at": ", ".join(map(str, at[:8])) + (" …" if len(at) > 8 else ""),
        }
        for reason, at in by_reason.items()
    ]


def status_of(result: Estimate, change: Drift | None) -> str:
    """Name the status, and whether the noise scale moved meanwhile."""
    moved = change is not None and change.moved and result.status != "collecting"
    return "no data" if not result.n_steps else f"{result.status}, but moving" if moved else result.status


def each_once(settings: Mapping[str, Any], batch_size: int | None) -> dict[str, Any]:
    """Leave out what the table shows under another name with the same value."""
    shown = {
        "batch_size": batch_size,
        "lr": settings.get("learning_rate"),
        "steps": settings.get("steps_made"),
    }
    return {k: v for k, v in settings.items() if v is None or k not in shown or v != shown[k]}


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings to dotted names and texts."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            pairs.append((name, ", ".join(map(str, value))))
        else:
            pairs.append(
                (name, "—" if value is None else f"{value:g}" if isinstance(value, float) else str(value))
            )
    return pairs


def covered(coverage: Coverage | None) -> dict[str, Any] | None:
    """Say which parameters are in the sums, and why others are not."""
    if coverage is None:
        return None
    return {
        "measured": len(coverage.measured),
        "total": len(coverage.measured) + len(coverage.unmeasured),
        "share": f"{100 * coverage.share:.4g} %",
        "verified": len(coverage.verified),
        "missing": [
            (name, size, coverage.reasons.get(name, "?")) for name, size in coverage.unmeasured.items()
        ],
    }
