"""One self-contained HTML page of a run: verdict first, evidence below. Foreign text is escaped."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from gns._version import __version__
from gns.advice import Advice, Row
from gns.coverage import Coverage
from gns.drift import Drift
from gns.estimate import Estimate, format_count
from gns.report.text import basis, label_of, verdict
from gns.sums import StepSums
from gns.wording import LAWS_CAVEAT

CAPTIONS = {
    "noise_scale": "The noise scale along the run. Each band is a confidence set of its point alone; where "
    "it lies under arrows it has no upper end. A drift of the orange line: the noise scale itself moves.",
    "trade_off": "What a batch size costs: every doubling saves optimizer steps and spends examples. Inside "
    "the green span neither is wasted much.",
    "signal_and_noise": "The two parts of the ratio. One step alone says little, and |G|² may fall below "
    "zero by chance; only the averages count.",
    "factors": "The two LoRA factors apart. The joint number depends on how the adapter's scale is split "
    "between A and B; the single ones do not.",
}
_WORDS = """
Example: One row of the data that reaches the loss: one sequence, with all its tokens.
Noise scale, B_simple: tr Σ / |G|², the batch whose averaged gradient is half signal, half noise.
|G|²: Squared length of the true gradient, the mean over all data: the signal. Estimates may be negative.
tr Σ: How far the gradients of single examples scatter around that mean: the noise.
Confidence interval: Values the data do not contradict. At 95 %, one in twenty misses the truth.
Critical batch size, B_crit: It takes twice the fewest steps and examples. The noise scale stands in for it.
S / S_min, E / E_min: Optimizer steps and examples to reach a loss, relative to the fewest possible.
Detection limit: The largest noise scale that this many steps and examples can give an upper end to.
LoRA factors A and B: The two thin matrices whose product is added to a frozen weight.
"""
GLOSSARY = tuple(tuple(line.split(": ", 1)) for line in _WORDS.strip().splitlines())


def _table_row(row: Row) -> dict[str, Any]:
    def band(pair: tuple[float, float]) -> str:
        low, high = (format_count(x) for x in pair)
        return low if low == high else f"{low} … {high}"

    def rate(pair: tuple[float, float]) -> str:
        low, high = (f"{x:.2g}" for x in pair)
        return low if low == high else f"{low} … {high}"

    rates = {name: rate(pair) for name, pair in row.learning_rates.items()}
    return {
        "batch": row.batch_size,
        "steps": band(row.steps),
        "examples": band(row.examples),
        "rates": rates,
    } | {
        "epoch": None if row.steps_per_epoch is None else f"{row.steps_per_epoch:,}",
    }


def _factor_row(name: str, result: Estimate) -> dict[str, str]:
    def figure(x: float) -> str:
        return "?" if math.isnan(x) else f"{x:.3g}"

    resolved = math.isfinite(result.high) and math.isfinite(result.b_simple)

    return {
        "name": label_of(name),
        "value": format_count(result.b_simple) if resolved else "not resolved",
        "interval": f"{format_count(result.low)} … {format_count(result.high)}",
        "status": result.status,
        "limit": format_count(result.detection_limit),
        "trace_sigma": figure(result.trace_sigma),
        "grad_sq_norm": figure(result.grad_sq_norm),
    }


def _left_out(steps: Sequence[StepSums]) -> list[dict[str, Any]]:
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


def _status(result: Estimate, change: Drift | None) -> str:
    moved = change is not None and change.moved and result.status != "collecting"
    return "no data" if not result.n_steps else f"{result.status}, but moving" if moved else result.status


def _each_once(settings: Mapping[str, Any], batch_size: int | None) -> dict[str, Any]:
    """Leave out what the table shows under another name with the same value."""
    shown = {
        "batch_size": batch_size,
        "lr": settings.get("learning_rate"),
        "steps": settings.get("steps_made"),
    }
    return {k: v for k, v in settings.items() if v is None or k not in shown or v != shown[k]}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings to dotted names and texts."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            pairs.append((name, ", ".join(map(str, value))))
        else:
            pairs.append(
                (name, "—" if value is None else f"{value:g}" if isinstance(value, float) else str(value))
            )
    return pairs


def _coverage(coverage: Coverage | None) -> dict[str, Any] | None:
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


def _inline(name: str, image: bytes, result: Estimate) -> dict[str, str]:
    data = base64.b64encode(image).decode()
    return {"name": name, "data": data, "caption": CAPTIONS[name], "alt": f"{CAPTIONS[name]} {result}"}


def html(
    name: str,
    steps: Sequence[StepSums],
    result: Estimate,
    *,
    advice: Advice | None,
    images: Mapping[str, bytes],
    change: Drift | None = None,
    coverage: Coverage | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Write the page.

    Args:
        name: of the run.
        steps: all records of the run, usable or not.
        result: the estimate over them.
        advice: what follows from it, or None where nothing was measured.
        images: name of a figure → PNG.
        change: how the noise scale moved along the run.
        coverage: which parameters are in the sums.
        settings: of the run.
        batch_size: in use, examples a step.
        notes: what the reader must know of the records, e.g. that they were damaged.

    Returns:
        The text of the page; it needs no other file and no network.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("gns.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        name=name,
        version=__version__,
        verdict=verdict(result, change),
        result=result,
        basis=basis(result),
        status=_status(result, change),
        laws_caveat=LAWS_CAVEAT,
        span=f", for {advice.span}" if advice and advice.span else "",
        advice=advice,
        notes=notes,
        batch_size=batch_size,
        limit=format_count(result.detection_limit),
        table=[_table_row(row) for row in advice.table] if advice else [],
        factors=[_factor_row(*named) for named in [("all", result), *result.groups.items()]],
        figures=[_inline(key, image, result) for key, image in images.items()],
        coverage=_coverage(coverage),
        left_out=_left_out(steps),
        n_recorded=len(steps),
        settings=_flat(_each_once(settings or {}, batch_size)),
        glossary=GLOSSARY,
    )
