"""What ranks tell one another of a step, in one vector that is summed, and the readings out of that sum.

Contributions are what each example adds to the gradient that the optimizer sees. Engines multiply what a
rank has in backward by a factor f of their own (DDP: 1/ranks), so Σ‖cᵢ‖² = f² Σ over ranks of what the taps
saw. f is not assumed: the self-check finds it from random projections (`gns/capture/projections.py`), and
parameters that disagree leave the sums.

The vector has the same length in every step, on every rank: summing vectors of two lengths would end the
process. A second one, of the largest norms of single examples, has a length that the first one's sum tells.
Whether ranks sent the same step is seen from sums of squares, which agree only if all values are
equal.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gns.capture import localstats
from gns.capture.plan import Entry
from gns.capture.projections import SLACK, K, copies, factor, is_sharded
from gns.capture.ranks import Ranks, Refused, Reply, world_size
from gns.capture.readings import Readings, empty
from gns.capture.selfcheck import tolerance
from gns.capture.spread import Spread, kept
from gns.reasons import (
    APART,
    DIFFERENT_GRADIENTS,
    EMPTIED,
    IDLE_RANK,
    MISFIT_ELSEWHERE,
    NO_FACTOR,
    NO_STATE,
    OLD_FSDP,
    OTHER_MESH,
    POOLED,
    REASON_ELSEWHERE,
)

_SPREAD = 1e-4  # relative, of ‖ḡ‖² over ranks: reduced gradients are equal bit by bit
_HEAD = ("ranks", "step", "step²", "checked", "checked²", "read", "n", "unseen", "tokens", "tokens?")
_HEAD += ("w", "ww", "w?", "loss_scaled", "reason?", "local", "pairs", "free", "spread", "fourth", "spread?")
_EACH = ("s", "q", "q²", "rows", "without_gradient", "misfit", "precision")
_EACH += ("s in metric", "q in metric", "unready")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the coarsest is last
MOST_LARGEST = 2**16  # of the examples' norms exchanged in a step; beyond it only their sums are
_DIGIT = 12  # bits for the number of ranks with a dtype


@dataclass(frozen=True)
class Own:
    """What this rank sends of a step.

    Args:
        step: number of the optimizer step.
        readings: its own.
        checked: parameters of the self-check.
        projections: [checked, 2, K], of Σcᵢ and of this rank's part of ḡ.
    """

    step: int
    readings: Readings
    checked: tuple[str, ...] = ()
    projections: np.ndarray | None = None


class Pool:
    """Sums the readings of all ranks.

    Args:
        entries: measured parameters.
        about: what else must be the same on all ranks.
        weighs: whether sums are taken in a metric that weighs entries too.
    """

    def __init__(self, entries: Sequence[Entry], about: str, *, weighs: bool = False):
        self.entries, self._weighs = entries, weighs
        self.factor: float | None = None  # what the engine multiplies a rank's sums by
        names = [f"{e.name} {tuple(e.parameter.shape)}" for e in entries]
        self._ranks = Ranks(f"{about}: {len(names)} {zlib.crc32(repr(names).encode())}")
        self._size = self._ranks.size
        self._sharded = np.array([is_sharded(e.parameter) for e in entries])
        self._copies = np.array([copies(e.parameter, self._size) for e in entries])

    def send(self, own: Callable[[], Own]) -> Reply:
        """Send this rank's part of a step; `own` is called on a thread, where it may wait for a device."""
        return self._ranks.send(lambda: self._vector(own()), lambda total: self._largest(total, own()))

    def close(self) -> None:
        """Leave the group."""
        self._ranks.close()

    def _vector(self, own: Own) -> np.ndarray:
        r, mark = own.readings, zlib.crc32(repr(own.checked).encode()) % 2**20  # squares stay exact
        tokens, w, ww = r.totals
        known = not (math.isnan(w) or math.isnan(ww))
        head = [1, own.step, own.step**2, mark, mark**2, r.read, r.n, not r.call_seen]
        head += [0 if math.isnan(tokens) else tokens, math.isnan(tokens)]
        head += [w if known else 0, ww if known else 0, not known, r.loss_scaled]
        alone = localstats.parts(r) if r.local else None
        head += [r.reason is not None and r.reason not in POOLED, r.local]
        head += [alone.pairs, alone.free] if alone else [0, 0]
        head += [r.spread.total, r.spread.fourth, 0] if r.spread else [0, 0, 1]
        head += [r.reason == text for text in POOLED]
        each = np.zeros((len(self.entries), len(_EACH) + 2 * K))
        without = [e.name in r.without_gradient for e in self.entries]
        misfit = [e.name in r.misfits for e in self.entries]
        coarse = [_digit(r.dtypes.get(e.name)) for e in self.entries]
        in_metric = np.zeros((len(self.entries), 2)) if r.in_metric is None else r.in_metric
        unready = [e.name in r.unready for e in self.entries]
        with np.errstate(over="ignore", invalid="ignore"):
            sums = [alone.trace, alone.grad, 0 * r.q] if alone else [r.s, r.q, r.q**2]
            columns = [*sums, r.rows, without, misfit, coarse, *in_metric.T, unready]
        each[:, : len(_EACH)] = np.stack(columns, axis=1)
        if own.projections is not None:
            rows = [row for _, row in self._rows(own.checked)]
            each[rows, len(_EACH) :] = own.projections.reshape(len(rows), 2 * K)
        return np.concatenate([np.array(head, dtype=np.float64), each.ravel()])

    def _largest(self, total: np.ndarray, own: Own) -> np.ndarray | None:
        """Give this rank's largest ‖cᵢ‖² in its row among zeros, [ranks · ⌈n/10⌉], if all know theirs.

        Its length follows from what all ranks have in common, n over all of them.
        """
        head = dict(zip(_HEAD, total[: len(_HEAD)].tolist(), strict=True))
        width = kept(round(head["n"]))
        if head["spread?"] or not width or self._size * width > MOST_LARGEST:
            return None
        rows = np.zeros((self._size, width))
        if own.readings.spread is not None:
            largest = own.readings.spread.largest[:width]
            rows[self._ranks.rank, : len(largest)] = largest
        return rows.ravel()

    def _spread(self, head: Mapping[str, float], rest: np.ndarray) -> Spread | None:
        """Give the examples' norms over all ranks, not yet as the optimizer sees them."""
        if head["spread?"]:
            return None
        return Spread(head["spread"], head["fourth"], np.sort(rest)[::-1])

    def conclude(self, total: np.ndarray, own: Own) -> Readings:
        """Give the readings of the step over all ranks, with contributions as the optimizer sees them.

        Args:
            total: the sum over all ranks, of both vectors in a row.
            own: what this rank sent, for the words of its reasons; numbers come from `total`.

        Raises:
            Refused: the ranks did not send the same step.
        """
        size = len(_HEAD) + len(POOLED)
        head: dict[str, float] = dict(zip((*_HEAD, *POOLED), total[:size].tolist(), strict=True))
        if not (_all_equal(head, "step") and _all_equal(head, "checked")):
            raise Refused(APART)
        end = size + len(self.entries) * (len(_EACH) + 2 * K)
        each, spread = total[size:end].reshape(len(self.entries), -1), self._spread(head, total[end:])
        readers = head["read"]
        reason = next((text for text in POOLED if head[text]), None)
        if reason is None and head["reason?"]:
            reason = own.readings.reason or REASON_ELSEWHERE
        if not readers:
            return empty(len(self.entries), reason=reason or IDLE_RANK)
        columns: dict[str, np.ndarray] = dict(zip(_EACH, each.T, strict=False))
        share = np.where(self._sharded, self._copies, readers)
        if reason is None and readers < self._size:
            reason = IDLE_RANK
        elif reason is None and not head["local"] and self._differ(columns, readers):
            reason = DIFFERENT_GRADIENTS
        mismatch: dict[str, float] = {}
        digits = zip(self.entries, columns["precision"], strict=True)
        dtypes = {e.name: _DTYPES[int(math.log2(digit)) // _DIGIT] for e, digit in digits if digit}
        if reason is None and own.checked:
            parts = each[:, len(_EACH) :].reshape(-1, 2, K)
            pairs = {name: (parts[i, 0], parts[i, 1] / share[i]) for name, i in self._rows(own.checked)}
            mismatch = self._compare(pairs, dtypes)
        known = self.factor is not None or not np.isfinite(columns["s"]).all() or not columns["s"].any()
        if reason is None and not known and not head["local"]:
            reason = NO_FACTOR
        squared = (1 / self._size if self.factor is None else self.factor) ** 2
        tokens, w, ww = (head[name] for name in ("tokens", "w", "ww"))
        here, unready = own.readings.misfits, own.readings.unready
        in_metric = [columns["s in metric"] * squared, columns["q in metric"] / share]
        found = Readings(
            s=columns["s"] * squared,
            q=columns["q"] / share,
            rows=columns["rows"],
            n=round(head["n"]),
            call_seen=not head["unseen"],
            totals=(math.nan if head["tokens?"] else tokens, *((math.nan,) * 2 if head["w?"] else (w, ww))),
            loss_scaled=bool(head["loss_scaled"]),
            reason=reason,
            without_gradient=self._named(columns["without_gradient"]),
            misfits={name: here.get(name, MISFIT_ELSEWHERE) for name in self._named(columns["misfit"])},
            mismatch=mismatch,
            dtypes=dtypes,
            slack=SLACK,
            spread=None if spread is None else spread.scaled(squared),
            in_metric=np.stack(in_metric, axis=1) if self._weighs else None,
            unready={name: unready.get(name, NO_STATE) for name in self._named(columns["unready"])},
        )
        return self._local(found, head, columns) if head["local"] else found

    def _local(
        self, found: Readings, head: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> Readings:
        """Give the one step that stands for all ranks' batches."""
        total = localstats.Parts(head["pairs"], head["free"], columns["q"], columns["s"])
        n, s, q = localstats.step(total)
        tokens = localstats.scaled_tokens(found.totals[0], found.n, n)
        rows, apart = localstats.rounded(found.rows, found.n, n), head["local"] < self._size
        reason = found.reason or (APART if apart else None)
        return replace(
            found,
            s=s,
            q=q,
            n=n,
            rows=rows,
            totals=(tokens, n, n),
            reason=reason,
            mismatch={},
            local=True,
            spread=None,
        )

    def _rows(self, names: Sequence[str]) -> list[tuple[str, int]]:
        rows = {e.name: i for i, e in enumerate(self.entries)}
        return [(name, rows[name]) for name in names]

    def _named(self, flags: np.ndarray) -> frozenset[str]:
        return frozenset(e.name for e, flag in zip(self.entries, flags, strict=True) if flag)

    def _differ(self, columns: Mapping[str, np.ndarray], readers: float) -> bool:
        """Whether a gradient that every rank should hold is not the same on all."""
        q, qq = columns["q"], columns["q²"]
        with np.errstate(over="ignore", invalid="ignore"):
            spread = readers * qq - q**2
        return bool((spread > (_SPREAD * q) ** 2)[~self._sharded].any())

    def _compare(
        self, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, float]:
        """Find the engine's factor, unless it is known, and give ‖f Σcᵢ − ḡ‖ of each parameter."""
        if self.factor is None:
            rtol = max(tolerance(dtypes.get(name, torch.bfloat16), 1.0, 0.0) for name in pairs)
            self.factor = factor(pairs, self._size, rtol)
        f = self.factor or 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            return {name: float(np.linalg.norm(f * a - b)) for name, (a, b) in pairs.items()}


def _digit(dtype: torch.dtype | None) -> float:
    """One rank's count of a dtype: the highest digit of the sum tells the coarsest that any rank had."""
    return 0.0 if dtype is None else 2.0 ** (_DIGIT * _DTYPES.index(dtype))


def _all_equal(head: Mapping[str, float], name: str) -> bool:
    """Whether all ranks sent the same value, x₁ = … = x_W: then and only then W Σx² = (Σx)²."""
    return head["ranks"] * head[f"{name}²"] == head[name] ** 2


def refusal(model: nn.Module) -> str | None:
    """Say why the parameters of a model cannot be measured where an engine has put them, or None."""
    old = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if old is not None and any(isinstance(m, old) for m in model.modules()):
        return OLD_FSDP
    for name, p in model.named_parameters():
        if p.requires_grad and not p.numel():
            return EMPTIED.format(name=f"`{name}`")
        if is_sharded(p) and not _all_data_parallel(p):
            return OTHER_MESH.format(name=f"`{name}`")
    return None


def _all_data_parallel(p: Any) -> bool:
    """Whether a DTensor is laid out as by fully_shard: over all ranks, or over the inner of two axes."""
    if p.device_mesh.size() != world_size() or p.device_mesh.ndim > 2:
        return False
    return p.device_mesh.ndim == 1 or p.placements[0].is_replicate()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside a data-parallel wrapper, which calls it with the same arguments."""
    kind = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", None)
    return model.module if kind is not None and isinstance(model, kind) else model  # type: ignore[reportReturnType]


def joined(model: nn.Module) -> bool:
    """Whether a DDP wrapper is in its `join()` context."""
    return bool(getattr(getattr(model, "_join_config", None), "enable", False))
