"""A measured step whose values are on their way to the host, and what is concluded when they have arrived."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from gns.host import HostCopy
from gns.plan import Entry
from gns.reasons import AMBIGUOUS, LEFTOVER, NO_GRADIENT, NO_TAP, SILENT_TAP, SPLIT_USES
from gns.selfcheck import tolerance
from gns.sums import Contributions, Layout, StepSums
from gns.taps import Tap


class Closed(NamedTuple):
    """What a step came to.

    Args:
        sums: the record.
        excluded: parameters that turned out not to be measurable, name → reason.
        verified: parameters whose contributions summed to a non-zero gradient.
        fired: parameters that examples reached.
    """

    sums: StepSums
    excluded: dict[str, str]
    verified: frozenset[str]
    fired: frozenset[str]


@dataclass
class OpenStep:
    """Device values of one optimizer step, in the order of `copy`.

    Args:
        step: number of the optimizer step.
        entries: measured parameters.
        taps: all taps; `copy` begins with one array [P + 1] a tap: sums of squared norms, rows.
        n: examples in the calls that were run backward, or None where calls could not be watched.
        loss_scaled: gradients carry an unknown loss scale.
        learning_rate: of the optimizer.
        reason: why the step is not usable, if that is known already.
        misfits: parameter → why rows of it are not examples, if those rows count.
        without_gradient: parameters whose `.grad` is None.
        checked: parameters of the self-check.
        copy: after the taps: ‖ḡ‖² an entry, ‖Σcᵢ − ḡ‖ a checked parameter, token and weight totals, leftover
            gradient, loss scale.
        seen_backward: whether any gradient was read.
    """

    step: int
    entries: Sequence[Entry]
    taps: Sequence[Tap]
    n: int | None
    loss_scaled: bool
    learning_rate: float | None
    reason: str | None
    misfits: Mapping[str, str]
    without_gradient: Collection[str]
    checked: tuple[str, ...]
    copy: HostCopy
    seen_backward: bool
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def close(self, excluded: Collection[str], layout: Callable[[tuple[str, ...]], Layout]) -> Closed:
        """Wait for the values and conclude.

        Args:
            excluded: parameters left out already.
            layout: gives the layout for a tuple of names, the same object for the same names.
        """
        values = self.copy.get()
        by_tap = {id(tap): values[i] for i, tap in enumerate(self.taps)}
        values = values[len(self.taps) :]
        count = len(self.entries) if self.seen_backward else 0
        q, values = np.array([float(v) for v in values[:count]]), values[count:]
        mismatch = dict(zip(self.checked, map(float, values), strict=False))
        totals, leftover, scale = (
            values[len(self.checked) : -2],
            float(values[-2].max()),
            float(values[-1][0]),
        )
        if not self.seen_backward:
            return self._unseen()
        s = np.array([_sum_of(entry, by_tap) for entry in self.entries])
        rows = np.array([max(by_tap[id(tap)][-1] for tap, _ in entry.sites) for entry in self.entries])
        n = self.n if self.n is not None else int(rows.max())
        finite = bool(np.isfinite(s).all() and np.isfinite(q).all())
        reason = self.reason or (LEFTOVER if leftover > 0 else None)
        if reason is None and self.n is None and len(set(rows[rows > 0])) > 1:
            reason = AMBIGUOUS
        out: dict[str, str] = {}
        verified: frozenset[str] = frozenset()
        if reason is None and finite:
            failed = self._failed(s, q, mismatch, n)
            out = failed | self._misplaced(s, q, rows, n)
            verified = (
                frozenset(
                    e.name for e, norm in zip(self.entries, q, strict=True) if e.name in mismatch and norm > 0
                )
                - failed.keys()
            )
        out = {name: why for name, why in out.items() if name not in excluded}
        keep = np.array([e.name not in out and e.name not in excluded for e in self.entries])
        sums = self._record(s / scale**2, q / scale**2, keep, n, totals, reason, layout)
        fired = frozenset(e.name for e, r in zip(self.entries, rows, strict=True) if r > 0)
        return Closed(sums, out, verified - out.keys(), fired)

    def _unseen(self) -> Closed:
        sums = StepSums(
            self.step, 0, math.nan, math.nan, learning_rate=self.learning_rate, reason=self.reason
        )
        return Closed(sums, {}, frozenset(), frozenset())

    def _misplaced(self, s: np.ndarray, q: np.ndarray, rows: np.ndarray, n: int) -> dict[str, str]:
        """Find parameters whose rows are not this step's examples."""
        out = {}
        for entry, sq, norm, seen in zip(self.entries, s, q, rows, strict=True):
            misfit = any(tap.full_name(local) in self.misfits for tap, local in entry.sites)
            if sq > 0 and entry.name in self.without_gradient:
                out[entry.name] = NO_GRADIENT
            elif misfit and seen != n and not entry.gathered:
                tap, local = next(p for p in entry.sites if p[0].full_name(p[1]) in self.misfits)
                out[entry.name] = self.misfits[tap.full_name(local)]
            elif norm > 0 and seen == 0:
                out[entry.name] = NO_TAP
            elif norm > 0 and sq == 0:
                out[entry.name] = SPLIT_USES if entry.gathered else SILENT_TAP
            elif seen > n and not entry.gathered:
                out[entry.name] = f"its tap saw {seen:.0f} rows in a step of {n} examples"
        return out

    def _failed(self, s: np.ndarray, q: np.ndarray, mismatch: Mapping[str, float], n: int) -> dict[str, str]:
        """Find parameters whose contributions do not sum to their gradient."""
        out = {}
        for entry, sq, norm in zip(self.entries, s, q, strict=True):
            if entry.name not in mismatch:
                continue
            dtype = self.dtypes.get(entry.name, torch.bfloat16)
            if mismatch[entry.name] > tolerance(dtype, math.sqrt(norm), math.sqrt(n * sq)):
                off = mismatch[entry.name] / math.sqrt(norm) if norm > 0 else math.inf
                out[entry.name] = (
                    f"self-check failed: its examples' gradients sum to {100 * off:.3g} % off `.grad` "
                    "(weight also used outside its module, an auxiliary loss, or an engine that scales it)"
                )
        return out

    def _record(
        self,
        s: np.ndarray,
        q: np.ndarray,
        keep: np.ndarray,
        n: int,
        totals: Sequence[np.ndarray],
        reason: str | None,
        layout: Callable[[tuple[str, ...]], Layout],
    ) -> StepSums:
        tokens, w, ww = (float(t) for t in totals) if len(totals) else (math.nan,) * 3
        if math.isnan(w):
            w, ww = float(n), float(n)
        names = tuple(e.name for e, k in zip(self.entries, keep, strict=True) if k)
        if not names and reason is None:
            reason = "no trainable parameter could be measured in this step; `monitor.coverage()` says why"
        part = Contributions(s[keep], n, w, ww, None if math.isnan(tokens) else round(tokens))
        about = {
            "step": self.step,
            "learning_rate": self.learning_rate,
            "loss_scaled": self.loss_scaled,
            "call_seen": self.n is not None,
        }
        wide = any(e.parameter.dtype is torch.float64 for e in self.entries)
        sums = part.close(q[keep], layout(names), reason=reason, **about)
        if sums.rows is not None and not wide:  # joint sums are taken in float64 first
            object.__setattr__(sums, "rows", sums.rows.astype(np.float32))
        return sums


def _sum_of(entry: Entry, by_tap: Mapping[int, np.ndarray]) -> float:
    tap, local = entry.sites[0]
    return float(by_tap[id(tap)][tap.parameters.index(local)])
