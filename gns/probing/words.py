"""A frozen probe in words, for a terminal. No figure is made here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gns.estimate import MIN_STEPS, Estimate, format_count
from gns.probing.result import FrozenEstimate

SEEN = 0.05  # p-value of the sign-flip test from which on a gradient is said to show


def verdict(found: FrozenEstimate) -> list[str]:
    """Say what is known of the noise scale at these weights, and how sure that is, in two or three lines.

    Raises:
        ValueError: the status is unknown.
    """
    low, sure = format_count(found.low), f"{100 * found.level:g} % sure"
    ends = f"{low} … {format_count(found.high)} examples"
    if found.status == "collecting":
        known = "" if math.isnan(found.low) else f" So far the data allow {ends}."
        return [
            "Too early to tell.",
            f"{found.n_steps} usable batches; {MIN_STEPS} of equal size are needed.{known}",
        ]
    if found.status == "measured":
        about = (
            f" about {format_count(found.b_simple)} examples" if found.b_simple > 0 else " resolved roughly"
        )
        return [f"At these weights the noise scale is{about}.", f"{sure}: {ends}.", signal(found)]
    if found.status in ("lower bound", "not detectable"):
        shown = ""  # where X < 0 there is no limit to name
        if not math.isnan(found.detection_limit):
            shown = f"; these batches show no noise scale above {format_count(found.detection_limit)}"
        at_least = f"At these weights the noise scale is at least {low} examples."
        return [at_least, f"{sure}{shown}.", signal(found)]
    raise ValueError(f"status is {found.status!r}; one of gns.estimate.STATUSES is needed")


def signal(found: FrozenEstimate) -> str:
    """Say whether there is any gradient to be seen."""
    p = f"sign-flip test, p = {found.p_value:.2g}"
    if found.p_value >= SEEN:
        return f"The batches' gradients share no direction that could be told from chance ({p})."
    more = "" if math.isfinite(found.high) else ", but not well enough for an upper end"
    return f"The batches' gradients share a direction{more} ({p})."


def _factor(group: Estimate) -> str:
    return str(group) if group.trace_sigma or group.grad_sq_norm else "no gradient at these weights"


def render(found: FrozenEstimate, remarks: Sequence[str] = ()) -> str:
    """Write a probe's result for a terminal, without a newline at the end; remarks go with its warnings."""
    lines = verdict(found)
    each = format_count(found.examples_per_step)
    left = f", {found.n_skipped} left out" if found.n_skipped else ""
    lines.append(
        f"Measured over {found.n_steps:,} batches × {each} {found.unit}{left}; gradients {found.gradients}."
    )
    if found.stopped is not None:
        lines.append(f"Ended early: {found.stopped}.")
    lines += [f"  factor {name}: {_factor(group)}" for name, group in found.groups.items()]
    if found.dropout is not None and found.trace_sigma > 0:
        share = found.dropout.dropout / found.trace_sigma
        data = format_count(found.b_simple_data)
        lines.append(
            f"Dropout makes {100 * share:.2g} % of the noise; that of the data alone: {data} examples."
        )
    lines += [f"  ! {warning}" for warning in (*remarks, *found.warnings)]
    if found.largest:
        lines += ["", "Largest gradients:", *(f"  {example}" for example in found.largest)]
    return "\n".join(lines)
