"""A measured step whose values are on their way to the host, and what is concluded when they have arrived."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from gns.capture.host import HostValues
from gns.capture.plan import Entry
from gns.capture.pooling import Own, Pool
from gns.capture.ranks import Refused, Reply
from gns.capture.readings import Readings, empty
from gns.capture.selfcheck import tolerance
from gns.capture.spread import Spread
from gns.capture.tally import Tallies
from gns.reasons import AMBIGUOUS, LEFTOVER, NO_GRADIENT, NO_TAP, SILENT_TAP, SPLIT_USES
from gns.sums import Contributions, Layout, StepSums
from gns.taps import Tap

SPREAD_RTOL = {False: 1e-4, True: 1e-9}  # by whether all is in float64: the same sums in another order


class Closed(NamedTuple):
    """What a step came to.

    Args:
        sums: the record.
        excluded: parameters that turned out not to be measurable, name → reason.
        verified: parameters whose contributions summed to a non-zero gradient.
        fired: parameters that examples reached.
        stop: why nothing can be measured from here on, or None.
    """

    sums: StepSums
    excluded: dict[str, str]
    verified: frozenset[str]
    fired: frozenset[str]
    stop: str | None = None


@dataclass
class OpenStep:
    """Device values of one optimizer step.

    Args:
        step: number of the optimizer step.
        entries: measured parameters.
        tallies: of all taps.
        holding: taps with sums that no tally counted.
        n: examples in the calls that were run backward, or None where calls could not be watched.
        loss_scaled: gradients carry an unknown loss scale.
        learning_rate: of the optimizer.
        reason: why the step is not usable, if that is known already.
        misfits: name in a layer → why rows of it are not examples, if those rows count.
        without_gradient: parameters whose `.grad` is None.
        checked: parameters of the self-check.
        values: on their way to the host: `counted`, [2, C] a tally, sums of squared norms and rows; `sums`,
            [P + 1], the same of each tap that holds some itself; `each`, ‖cᵢ‖² [n] a call;
            `q`, ‖ḡ‖² an entry; `check`, one a checked parameter, ‖Σcᵢ − ḡ‖ in one process, else
            the projections of both, [2, K]; `totals` of tokens and weights; `leftover` gradient; loss
            `scale`. In a metric that weighs entries also `sums_in_metric`, [P] a tap, and `q_in_metric`;
            `each` is in it.
        seen_backward: whether any gradient was read.
        dtypes: parameter of the self-check → lowest precision on its way.
        pool: of the data-parallel ranks, or None for one process.
        local: ‖ḡ‖² is that of Σcᵢ of this rank's examples.
        metric: in which norms are taken.
        unready: parameter → why there is no metric for it in this step.
    """

    step: int
    entries: Sequence[Entry]
    tallies: Tallies
    holding: Sequence[Tap]
    n: int | None
    loss_scaled: bool
    learning_rate: float | None
    reason: str | None
    misfits: Mapping[str, str]
    without_gradient: Collection[str]
    checked: tuple[str, ...]
    values: HostValues
    seen_backward: bool
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    pool: Pool | None = None
    local: bool = False
    metric: str = "euclidean"
    unready: Mapping[str, str] = field(default_factory=dict)
    _reply: Reply | None = None

    def __post_init__(self) -> None:
        if self.pool is not None:
            self._reply = self.pool.send(lambda: self._own)

    def ready(self) -> bool:
        """Whether `close` would not wait."""
        return self.values.ready() if self._reply is None else self._reply.ready()

    @property
    def urgent(self) -> bool:
        """Whether ranks must conclude before the next step: what it checks depends on this one."""
        return self.pool is not None and bool(self.checked)

    def close(self, excluded: Collection[str], layout: Callable[[tuple[str, ...]], Layout]) -> Closed:
        """Wait for the values and conclude.

        Args:
            excluded: parameters left out already.
            layout: gives the layout for a tuple of names, the same object for the same names.
        """
        try:
            r = self._all()
        except Refused as error:
            return Closed(self._unseen(str(error)), {}, frozenset(), frozenset(), stop=str(error))
        if not r.read:
            return Closed(self._unseen(r.reason), {}, frozenset(), frozenset())
        out: dict[str, str] = {}
        verified: frozenset[str] = frozenset()
        if r.reason is None and r.finite:
            failed = self._failed(r)
            out = failed | self._misplaced(r)
            there = {e.name for e, norm in zip(self.entries, r.q, strict=True) if norm > 0}
            verified = frozenset(r.mismatch.keys() & there) - failed.keys()
        out = {name: why for name, why in out.items() if name not in excluded}
        keep = np.array([e.name not in out and e.name not in excluded for e in self.entries])
        fired = frozenset(e.name for e, rows in zip(self.entries, r.rows, strict=True) if rows > 0)
        verified -= out.keys() | set(excluded)
        return Closed(self._record(r, keep, layout), out, verified, fired)

    def _all(self) -> Readings:
        """The readings of all ranks."""
        if self.pool is None or self._reply is None:
            return self._own.readings
        return self.pool.conclude(self._reply.get(), self._own)

    @cached_property
    def _own(self) -> Own:
        """What this rank measured; waits for the device."""
        found = self.values.get()
        if not self.seen_backward:
            return Own(self.step, empty(len(self.entries), reason=self.reason), self.checked)
        own = zip(self.holding, found["sums"], strict=True)
        s, rows = self.tallies.by_entry(found["counted"], own)
        q, scale = np.array([float(v) for v in found["q"]]), float(found["scale"][0][0])
        reason = self.reason or (LEFTOVER if found["leftover"][0].max() > 0 else None)
        if reason is None and self.n is None and len(set(rows[rows > 0])) > 1:
            reason = AMBIGUOUS
        alone, each = self.pool is None, found["each"]
        mismatch = {k: float(v) / scale for k, v in zip(self.checked, found["check"], strict=True) if alone}
        readings = Readings(
            s=s / scale**2,
            q=q / scale**2,
            rows=rows,
            n=self.n if self.n is not None else int(rows.max()),
            call_seen=self.n is not None,
            totals=tuple(float(t) for t in found["totals"]) or (math.nan,) * 3,
            loss_scaled=self.loss_scaled,
            reason=reason,
            without_gradient=frozenset(self.without_gradient),
            misfits=self._misfits(),
            mismatch=mismatch,
            dtypes=self.dtypes,
            local=self.local,
            spread=Spread.of(np.concatenate(each)).scaled(1 / scale**2) if each else None,
            in_metric=self._in_metric(found, scale),
            unready=self.unready,
        )
        if alone or not self.checked:
            return Own(self.step, readings, self.checked)
        return Own(self.step, readings, self.checked, np.stack(found["check"]).astype(np.float64) / scale)

    def _in_metric(self, found: Mapping[str, list[np.ndarray]], scale: float) -> np.ndarray | None:
        """[P, 2], Σᵢ ‖cᵢ‖² and ‖ḡ‖² in a metric that weighs entries, or None."""
        if not found["sums_in_metric"]:
            return None
        by_tap = {
            id(tap): values for tap, values in zip(self.tallies.taps, found["sums_in_metric"], strict=True)
        }
        s = [_sum_of(entry, by_tap) for entry in self.entries]
        return np.stack([s, [float(v) for v in found["q_in_metric"]]], axis=1) / scale**2

    def _misfits(self) -> dict[str, str]:
        """Parameter → why rows of it are not examples."""
        out = {}
        for entry in self.entries:
            names = [tap.full_name(local) for tap, local in entry.sites]
            first = next((self.misfits[name] for name in names if name in self.misfits), None)
            if first is not None:
                out[entry.name] = first
        return out

    def _unseen(self, reason: str | None) -> StepSums:
        nan = math.nan
        about = {"learning_rate": self.learning_rate, "reason": reason, "metric": self.metric}
        return StepSums(self.step, 0, nan, nan, **about)

    def _misplaced(self, r: Readings) -> dict[str, str]:
        """Find parameters whose rows are not this step's examples."""
        out = {}
        for entry, sq, norm, seen in zip(self.entries, r.s, r.q, r.rows, strict=True):
            if sq > 0 and entry.name in r.without_gradient:
                out[entry.name] = NO_GRADIENT
            elif seen > 0 and entry.name in r.misfits:
                out[entry.name] = r.misfits[entry.name]
            elif norm > 0 and seen == 0:
                out[entry.name] = r.misfits.get(entry.name, SPLIT_USES if entry.gathered else NO_TAP)
            elif norm > 0 and sq == 0:
                out[entry.name] = SPLIT_USES if entry.gathered else SILENT_TAP
            elif seen > r.n and not entry.gathered:
                out[entry.name] = f"its tap saw {seen:.0f} rows in a step of {r.n} examples"
        return out

    def _failed(self, r: Readings) -> dict[str, str]:
        """Find parameters whose contributions do not sum to their gradient."""
        out, whole = {}, math.sqrt(r.q.sum())
        for entry, sq, norm in zip(self.entries, r.s, r.q, strict=True):
            if entry.name not in r.mismatch:
                continue
            dtype, off = r.dtypes.get(entry.name, torch.bfloat16), r.mismatch[entry.name]
            if off > r.slack * tolerance(dtype, math.sqrt(norm), math.sqrt(r.n * sq), whole):
                off = off / math.sqrt(norm) if norm > 0 else math.inf
                out[entry.name] = (
                    f"self-check failed: its examples' gradients sum to {100 * off:.3g} % off `.grad` "
                    "(weight also used outside its module, an auxiliary loss, or an engine that scales it)"
                )
        return out

    def _record(self, r: Readings, keep: np.ndarray, layout: Callable[[tuple[str, ...]], Layout]) -> StepSums:
        tokens, w, ww = r.totals
        if math.isnan(w):
            w, ww = float(r.n), float(r.n)
        names = tuple(e.name for e, k in zip(self.entries, keep, strict=True) if k)
        reached = {e.name for e, s, q in zip(self.entries, r.s, r.q, strict=True) if s > 0 or q > 0}
        unready = next((r.unready[name] for name in names if name in r.unready and name in reached), None)
        reason = r.reason or unready
        s, q = (r.s, r.q) if r.in_metric is None else r.in_metric.T
        if not names and reason is None:
            reason = "no trainable parameter could be measured in this step; `monitor.coverage()` says why"
        part = Contributions(s[keep], r.n, w, ww, None if math.isnan(tokens) else round(tokens))
        about = {
            "step": self.step,
            "learning_rate": self.learning_rate,
            "loss_scaled": r.loss_scaled,
            "call_seen": r.call_seen,
            "local": r.local,
            "metric": self.metric,
        }
        dtypes = {e.parameter.dtype for e in self.entries}
        wide, exact = torch.float64 in dtypes, dtypes == {torch.float64}
        if unready is None and r.spread is not None and r.spread.fits(s[keep].sum(), SPREAD_RTOL[exact]):
            about |= r.spread.fields(r.n)
        sums = part.close(q[keep], layout(names), reason=reason, **about)
        if unready is not None:  # what there is, is not in this metric
            nan = math.nan
            return replace(sums, mean_sq_norm=nan, sq_norm_of_mean=nan, finite=False, rows=None, layout=None)
        if sums.rows is not None and not wide:  # joint sums are taken in float64 first
            object.__setattr__(sums, "rows", sums.rows.astype(np.float32))
        return sums


def _sum_of(entry: Entry, by_tap: Mapping[int, np.ndarray]) -> float:
    tap, local = entry.sites[0]
    return float(by_tap[id(tap)][tap.parameters.index(local)])
