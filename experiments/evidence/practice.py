"""Rules by which a practitioner may choose a batch size, priced in loss, in steps and in runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.analysis.agreement import regret
from experiments.analysis.answers import answers_lost
from experiments.analysis.cells import Floats
from experiments.analysis.curves import Curve, Estimated, largest_within
from experiments.analysis.noise import measured
from experiments.analysis.resampling import DRAWS, interval
from experiments.bases.paths import parameters

DELTA = 0.01  # nats per token: what the largest harmless batch may cost
DEFAULTS = (16, 128)  # of QLoRA (arXiv:2305.14314) and of Alpaca-LoRA
BY_PROXY = "best batch of the smallest model at the lowest rank, same data"
BY_NOISE = "B_simple as it is read"
BY_FITTED = "k · B_simple, k from the other configurations"
SMALLEST = "smaller is better"
OF_CONSTANT = "B_max over B_simple of the whole run, and so about 1 × the steps by construction"


@dataclass(frozen=True)
class Price:
    """A rule over all configurations in which it gives an answer.

    Args:
        rule: in words.
        regret: test loss at its batch less that at the best one, both tuned, nats per token; the mean.
        worst: of the configurations.
        steps: optimizer steps over those of the largest batch within `DELTA` of the best; the geometric mean.
            Above 1: slower than need be; below 1: the batch is larger than that.
        batch: that it chose; the geometric mean, inside the grid.
        runs: spent on choosing, in words.
        used: configurations.
        of: all.
        answers: share of right answers at the best batch less that at its own; NaN where none were asked for.
        constant: k, where B_simple is multiplied by one; else NaN.
        smallest: what the smallest batch gives away in the same configurations; None where they are all.
    """

    rule: str
    regret: Estimated
    worst: float
    steps: Estimated
    batch: float
    runs: str
    used: int
    of: int
    answers: Estimated
    constant: float = math.nan
    smallest: Estimated | None = None

    @property
    def note(self) -> str:
        """What a reader must know of it; "" where there is nothing."""
        if math.isnan(self.constant):
            return ""
        return f"k = {self.constant:.2g}: {OF_CONSTANT}"


def prices(found: Sequence[Curve]) -> list[Price]:
    """Price every rule on the configurations of one schedule.

    A rule's answer between two batch sizes is read off a line, one beyond the grid at its edge. A rule
    without an answer in a configuration (no noise scale was found there, no smaller proxy was run) is not
    priced in it.
    """
    largest = [largest_within(each, DELTA) for each in found]
    logs = _harmless_over_noise(found, largest)
    choices: dict[str, tuple[list[float], str]] = {
        BY_PROXY: ([_by_proxy(found, each) for each in found], _grid_runs(found)),
        BY_NOISE: ([_noise(each) for each in found], "one"),
        BY_FITTED: (_fitted(found, logs), "one, once k is known"),
        SMALLEST: ([float(each.batches[0]) for each in found], "none"),
    }
    for batch in DEFAULTS:
        choices[f"{batch}, always"] = [float(batch)] * len(found), "none"
    made = []
    for rule, (chosen, runs) in choices.items():
        drawn = _refitted(found, logs) if rule == BY_FITTED else None
        priced = _priced(rule, found, largest, chosen, runs, drawn)
        if priced is not None:
            k = math.exp(np.nanmean(logs)) if rule == BY_FITTED else math.nan
            made.append(replace(priced, constant=k))
    return made


def _priced(
    rule: str,
    found: Sequence[Curve],
    largest: Sequence[Estimated],
    chosen: Sequence[float],
    runs: str,
    drawn: Sequence[Floats] | None = None,
) -> Price | None:
    """Price one rule where it has an answer, with replicates of it; None where it has none anywhere."""
    used = [i for i, batch in enumerate(chosen) if not math.isnan(batch)]
    if not used:
        return None
    curves, batches = [found[i] for i in used], [chosen[i] for i in used]
    others = None if drawn is None else [drawn[i] for i in used]
    mean, own = regret(curves, batches, others=others)
    inside = [_inside(each, b) for each, b in zip(curves, batches, strict=True)]
    batch = float(np.exp(np.mean(np.log(inside))))
    steps = _steps(curves, [largest[i] for i in used], inside, others)
    answers = answers_lost(curves, batches)
    smallest = None
    if len(used) < len(found) and rule != SMALLEST:
        smallest, _ = regret(curves, [float(each.batches[0]) for each in curves])
    return Price(rule, mean, max(own), steps, batch, runs, len(used), len(found), answers, smallest=smallest)


def _steps(
    found: Sequence[Curve],
    largest: Sequence[Estimated],
    batches: Sequence[float],
    others: Sequence[Floats] | None = None,
    seed: int = 0,
) -> Estimated:
    """Geometric mean of B_max(δ)/B, with replicates over configurations, seeds and the rule's choices."""
    own = np.array([_inside(c, at.value) / b for c, at, b in zip(found, largest, batches, strict=True)])
    random = np.random.default_rng(seed)
    draws = np.empty(DRAWS)
    for r in range(DRAWS):
        picked = random.integers(len(found), size=len(found))
        logs = []
        for k in picked:
            drawn = largest[k].draws
            at = drawn[random.integers(len(drawn))] if len(drawn) else largest[k].value
            to = batches[k] if others is None else _inside(found[k], random.choice(others[k]))
            logs.append(math.log(_inside(found[k], float(at)) / to))
        draws[r] = math.exp(np.mean(logs))
    note = ""
    if (open_ := sum(math.isinf(each.value) for each in largest)) > 0:
        note = f"at least, in {open_}: the largest batch that was tried costs nothing"
    return Estimated(float(np.exp(np.log(own).mean())), *interval(draws), note, draws)


def _by_proxy(found: Sequence[Curve], of: Curve) -> float:
    """Give the batch that is best on validation data in the smallest proxy; NaN without a smaller one."""
    proxies = [each for each in found if _is_proxy(each.cell.fields, of.cell.fields)]
    if not proxies:
        return math.nan
    least = min(proxies, key=lambda each: (parameters(each.cell.fields["base"]), each.cell.fields["rank"]))
    return float(least.batches[int(least.validation.argmin())])


def _is_proxy(fields: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    """Whether a configuration is LoRA on the same data and recipe with a smaller model, or a lower rank."""
    free = {"base", "rank", "adapter", "alpha", "n_eval", "init"}
    same = {k: v for k, v in fields.items() if k not in free} == {
        k: v for k, v in of.items() if k not in free
    }
    own, other = parameters(fields["base"]), parameters(of["base"])
    smaller = own < other or (own == other and (of["adapter"] == "full" or fields["rank"] < of["rank"]))
    return same and smaller and fields["adapter"] == "lora"


def _noise(found: Curve) -> float:
    """B_simple of factor B, progress-weighted; NaN where none was found."""
    read = measured(found.cell)
    return math.nan if read is None or math.isinf(read.value) else read.value


def _harmless_over_noise(found: Sequence[Curve], largest: Sequence[Estimated]) -> Floats:
    """[K], log of B_max(δ) over B_simple of the whole run; NaN where one of the two was not found."""
    noise = np.array([_noise(each) for each in found])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.array([each.value for each in largest]) / noise)
    return np.where(np.isfinite(logs), logs, math.nan)


def _fitted(found: Sequence[Curve], logs: Floats) -> list[float]:
    """Give k · B_simple, k the geometric mean of B_max(δ)/B_simple over the others; NaN without two."""
    chosen = []
    for i, each in enumerate(found):
        others = np.delete(logs, i)
        fit = np.isfinite(others).sum() >= 2 and _noise(each) > 0
        chosen.append(float(_noise(each) * np.exp(np.nanmean(others))) if fit else math.nan)
    return chosen


def _refitted(found: Sequence[Curve], logs: Floats, seed: int = 0) -> list[Floats]:
    """[K] of [R], the same with k fitted to others drawn with replacement; empty where there are none."""
    random = np.random.default_rng(seed)
    made = []
    for i, each in enumerate(found):
        others = np.delete(logs, i)
        others = others[np.isfinite(others)]
        drawn = random.choice(others, (DRAWS, len(others))).mean(axis=1) if len(others) else np.empty(0)
        made.append(_noise(each) * np.exp(drawn))
    return made


def _grid_runs(found: Sequence[Curve]) -> str:
    """Runs that a proxy's grid takes, of one seed."""
    tried = [(~np.isnan(each.cell.validation[..., 0])).sum() for each in found]
    return f"about {np.mean(tried):.0f} of the proxy" if tried else "–"


def _inside(found: Curve, batch: float) -> float:
    """Nearest batch size inside the grid."""
    return min(max(batch, float(found.batches[0])), float(found.batches[-1]))
