"""Noise-scale readings as a row keeps them: summaries to look at, and sums to estimate from again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.rowsfile import finite
from gns.estimate import Estimate
from gns.monitor import GNSMonitor
from gns.statistics.views import progress_weighted
from gns.sums import FACTORS, Layout, StepSums, from_rows

DIGITS = 9  # of a stored sum: |G|² is a difference of two, and keeps 7 digits where it is 1 % of them
KEPT = ("b_simple", "low", "high", "status", "trace_sigma", "grad_sq_norm", "detection_limit")
COUNTED = ("n_steps", "n_examples")
_FIXED = ("step", "n_examples", "n_tokens", "sum_sq_weights", "learning_rate", "m", "q")


def readings(monitor: GNSMonitor, remarks: Sequence[str] = ()) -> dict[str, Any]:
    """Give a row's "gns" from a monitor that has seen the whole run.

    Args:
        monitor: attached or not.
        remarks: what it warned of.

    Returns:
        `every`, `metric`, `unit`, `level`; `coverage`, the share of the trainable parameters in the sums;
        `summary` and `progress_weighted`, each with "joint" and the LoRA factors "A" and "B" where there are
        factors, null for what is not finite (as `high`: no upper end; a `progress_weighted` that cannot be
        resolved says why under "unresolved"); `columns` and `steps`, the sums of each usable step;
        `skipped`: steps that carry a reason; `remarks`.
    """
    steps, found = monitor.history, monitor.estimate()
    usable = [step for step in steps if step.usable]
    names = [name for name in (*FACTORS, "other") if any(name in step.groups for step in usable)]
    try:
        progress = _summary(progress_weighted(steps))
    except ValueError as error:
        progress = {"unresolved": str(error)}
    return {
        "every": monitor.every,
        "metric": monitor.metric,
        "unit": found.unit,
        "level": found.level,
        "coverage": monitor.coverage().share,
        "summary": _summary(found),
        "progress_weighted": progress,
        "columns": [*_FIXED, *(f"{letter}_{name}" for name in names for letter in "mq")],
        "steps": [_sums(step, names) for step in usable],
        "skipped": len(steps) - len(usable),
        "remarks": list(remarks),
    }


def steps_of(gns: Mapping[str, Any]) -> list[StepSums]:
    """Give back the steps of a row's "gns", for `gns.estimate.estimate` and `gns.statistics.views`.

    Groups are those of the row; single parameters and the spread over examples were not kept.
    """
    found, names = [], [column[2:] for column in gns["columns"] if column.startswith("m_")]
    # a name by which `gns.sums` tells the factor
    layout = Layout(tuple(f"lora_{name}" if name in FACTORS else name for name in names))
    for values in gns["steps"]:
        record = dict(zip(gns["columns"], values, strict=True))
        fields = {name: record[name] for name in _FIXED if name not in ("m", "q")} | {"metric": gns["metric"]}
        joint = {"mean_sq_norm": record["m"], "sq_norm_of_mean": record["q"]}
        if names:
            rows = np.array([[record[f"{letter}_{name}"] for letter in "mq"] for name in names])
            found.append(replace(from_rows(rows, layout, **fields), **joint))  # groups add up to 7 digits
        else:
            found.append(StepSums(**joint, **fields))
    return found


def _summary(found: Estimate) -> dict[str, dict[str, Any]]:
    return {name: _kept(part) for name, part in {"joint": found, **found.groups}.items()}


def _kept(found: Estimate) -> dict[str, Any]:
    return finite({name: getattr(found, name) for name in (*KEPT, *COUNTED)})


def _sums(step: StepSums, names: Sequence[str]) -> list[Any]:
    groups = step.groups
    sums = [step, *(groups[name] for name in names)]
    pairs = [value for part in sums for value in (part.mean_sq_norm, part.sq_norm_of_mean)]
    about = [step.step, step.n_examples, step.n_tokens, step.sum_sq_weights, step.learning_rate]
    return [*about, *(float(f"{value:.{DIGITS}g}") for value in pairs)]
