"""A probe on its way: batch by batch through a monitor whose steps are ended by hand, then to an estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gns.estimate import estimate
from gns.metrics import METRICS
from gns.monitor import GNSMonitor
from gns.notices import Notices
from gns.probing.calling import Loss, ProbeError, loss_of, moved
from gns.probing.gradrows import GradientRows
from gns.probing.largest import Largest
from gns.probing.randomness import RandomState, mixed, seeded
from gns.probing.result import DropoutNoise, FrozenEstimate, from_batches
from gns.probing.signs import from_signs
from gns.probing.still import uninterrupted
from gns.statistics.pairs import Batches, pooled
from gns.sums import StepSums

RANDOM = (
    "Random numbers were drawn in the model's forward pass although dropout is off: some noise of the "
    "model's own may be in tr Σ."
)
MIXED = 'some batches have token labels and others have none; pass weights="equal", or labels in all of them'
NOTHING = "no gradient reached a measured parameter"
LARGE = (
    'the gradients of {n} batches pass {size:,} bytes, and metric="sign" needs them whole; pass fewer '
    "batches, or a larger max_bytes"
)
UNLABELLED = "none of its tokens has a label"
UNLISTED = "Examples of {n} batches are not among the largest: their norms cannot be told apart there."
NORMS_RTOL = 1e-3  # between Σ‖cᵢ‖² over examples and over layers; float32 sums in two orders are at 1e-5


@dataclass(frozen=True)
class Reading:
    """A batch that has just run backward.

    Args:
        gradients: measured parameter → its `.grad`.
        by_tokens: the examples weigh by their tokens.
        examples: [n], ‖cᵢ‖² of its examples; None where they cannot be told apart.
        by_rows: example i is row i of the batch.
    """

    gradients: Mapping[str, Tensor | None]
    by_tokens: bool
    examples: Tensor | None
    by_rows: bool


class _OfTheModel(Notices):
    """Warns of the model alone: what was left out of a batch, the result says."""

    def step(self, sums: StepSums) -> None:
        """Say nothing."""


class StillMonitor(GNSMonitor):
    """A monitor whose steps are ended by hand."""

    optimizer: Any = None

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any, metric: str, **options: Any) -> StillMonitor:
        """Make one that measures in a metric, for "adam" that of an optimizer."""
        of_entries = metric if metric in METRICS else "euclidean"
        monitor = cls(model, on_error="raise", history=2**31, metric=of_entries, **options)
        monitor.optimizer = optimizer
        monitor._notices = _OfTheModel()
        return monitor

    def attach(self) -> Self:
        """Start measuring."""
        super().attach()
        if self.optimizer is not None and self._collector is not None:
            self._collector.weights.owned_by(self.optimizer)
        return self

    def reading(self) -> Reading:
        """Give what is there of the step under way."""
        assert self._plan is not None and self._collector is not None
        calls = [c for c in self._collector.now.calls if c.rows is not None]
        roots = self._collector.weights.roots
        norms = [c.sq_norms(c.rows.n).cpu() for c in calls if c.rows is not None]
        return Reading(
            gradients={e.name: _weighed(e.parameter.grad, roots.get(e.name)) for e in self._plan.entries},
            by_tokens=bool(calls) and all(c.rows and c.rows.weight_sum is not None for c in calls),
            examples=torch.cat(norms) if norms else None,
            by_rows=len(calls) == 1 and all(c.rows is not None and c.rows.segments is None for c in calls),
        )

    def end_step(self) -> StepSums | None:
        """End a step here and give its record; None if no gradient reached a measured parameter."""
        assert self._collector is not None
        before = len(self._history)
        self._collector.end_step()
        self.flush()
        return self._history[-1] if len(self._history) > before else None


@dataclass(frozen=True)
class Done:
    """A batch that was measured.

    Args:
        at: its place in the monitor's history.
        by_tokens: its examples weigh by their tokens.
        gaps: parameter → ‖ḡ − ḡ′‖² of two runs with different dropout masks.
    """

    at: int
    by_tokens: bool
    gaps: Mapping[str, float]


class Run:
    """A probe on its way."""

    monitor: StillMonitor

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        *,
        metric: str,
        dropout: bool,
        split: bool,
        seed: int,
        rows: GradientRows,
        largest: Largest | None,
    ):
        self.model, self.loss, self.dropout, self.split, self.seed = model, loss, dropout, split, seed
        self.metric, self.rows, self.largest = metric, rows, largest
        self.done: list[Done] = []
        self.skipped: list[str] = []
        self.fed = self.seen = 0  # batches, and the examples in them
        self.random = False  # a generator moved
        self.unlisted = 0  # batches whose examples' norms could not be told
        devices = {p.device for p in model.parameters()}
        self.device = devices.pop() if len(devices) == 1 else None

    # measuring

    def feed(self, batch: Any) -> None:
        """Measure one batch."""
        batch = batch if self.device is None else moved(batch, self.device)
        self._backward(batch, again=False)
        with uninterrupted():
            read, step = self.monitor.reading(), self.monitor.end_step()
            at = len(self.monitor.history) - 1
            self._free()
        gaps = self._again(batch, read.gradients) if self.split and step is not None else {}
        with uninterrupted():
            number, start = self.fed, self.seen
            self.fed, self.seen = number + 1, start + (0 if step is None else step.n_examples)
            why = NOTHING if step is None else _unusable(step, read.by_tokens) or self._odd(step)
            if step is None or why is not None:
                self.skipped.append(f"Batch {number} is left out: {why}.")
                return
            if self.done and self.done[0].by_tokens != read.by_tokens:
                raise ProbeError(MIXED)
            mass = float(step.n_tokens or 0) if read.by_tokens else float(step.n_examples)
            self.rows.add(read.gradients, mass)
            if self.metric == "sign" and self.rows.sketched:
                raise ProbeError(LARGE.format(n=number + 1, size=self.rows.max_bytes))
            if self.largest is not None:
                shown = batch if read.by_rows else None
                self._look_at(shown, number, start, read.examples, mass, step)
            self.done.append(Done(at, read.by_tokens, gaps))

    def _odd(self, step: StepSums) -> str | None:
        """Say why a batch does not go with the others: signs are of equal batches."""
        usual = self.monitor.history[self.done[0].at].n_examples if self.done else step.n_examples
        if self.metric != "sign" or step.n_examples == usual:
            return None
        return f'it has {step.n_examples} examples, the first {usual}, and metric="sign" needs equal ones'

    def _backward(self, batch: Any, *, again: bool) -> None:
        with seeded(mixed(self.seed, self.fed, again)) as before:
            loss_of(self.model, batch, self.loss).backward()
            self.random = self.random or not RandomState.now().same(before)

    def _again(self, batch: Any, gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
        """Run a batch with other masks, and give ‖ḡ − ḡ′‖² of each parameter."""
        self._backward(batch, again=True)
        gaps = {}
        for name, other in self.monitor.reading().gradients.items():
            one = gradients[name]
            if one is not None and other is not None:
                gaps[name] = float((one - other).double().square().sum())
            elif one is not None or other is not None:  # its layer was dropped in one of the runs
                gaps[name] = float((other if one is None else one).double().square().sum())  # type: ignore[union-attr]
        with uninterrupted():
            self._free()
            self.monitor.end_step()
        return gaps

    def _look_at(
        self, batch: Any, number: int, start: int, examples: Tensor | None, mass: float, step: StepSums
    ) -> None:
        """Hand the norms of a batch's examples on, if they are those of the measured parameters."""
        assert self.largest is not None
        found = np.zeros(0) if examples is None else examples.double().cpu().numpy()
        whole = step.mean_sq_norm / step.n_examples
        if len(found) != step.n_examples or abs(found.sum() - whole) > NORMS_RTOL * whole:
            self.unlisted += 1
            return
        self.largest.add(batch, number, start, found, mass)

    def _free(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    # concluding

    def result(self, level: float, looks: Sequence[int] = (), stopped: str | None = None) -> FrozenEstimate:
        """Estimate from the batches so far."""
        history = [self.monitor.history[d.at] for d in self.done]
        layout = history[-1].layout if history else None
        names: list[str] = list(layout.names) if layout is not None else []
        rows = layout.groups if layout is not None else {}
        parts = {g: [names[i] for i in of_group] for g, of_group in rows.items()}
        grams = {g: self.rows.gram(part) for g, part in (parts or {"": names}).items()}
        joint = self._batches(names, history, np.sum(list(grams.values()), axis=0))
        how: dict[str, Any] = {"level": level, "looks": max(1, len(looks)), "seed": self.seed}
        if self.metric == "sign":
            said = {"looks": tuple(looks), "stopped": stopped}
            return self._by_signs(names, parts, joint, how, {**self._about(history, level, joint), **said})
        groups = {
            g: from_batches(self._batches(part, [s.groups[g] for s in history], grams[g]), **how)
            for g, part in parts.items()
        }
        about = self._about(history, level, joint)
        about |= {"groups": groups, "looks": tuple(looks), "stopped": stopped}
        return from_batches(joint, about=about, **how)

    def _by_signs(
        self,
        names: Sequence[str],
        parts: Mapping[str, Sequence[str]],
        joint: Batches,
        how: Mapping[str, Any],
        about: Mapping[str, Any],
    ) -> FrozenEstimate:
        def of(some: Sequence[str], about: Mapping[str, Any]) -> FrozenEstimate:
            return from_signs(map(self.rows.whole, self.rows.known(some)), joint.n, about=about, **how)

        groups = {g: of(part, {}) for g, part in parts.items()}
        return of(names, {**about, "groups": groups, "metric": "sign"})

    def _batches(self, names: Sequence[str], steps: Sequence[StepSums], gram: np.ndarray) -> Batches:
        n = np.array([s.n_examples for s in steps], dtype=np.int64)
        mass, cross = np.array(self.rows.mass), self.rows.sq_norm_of_sum(names)
        share = self.rows.sketch_share(names, gram)
        if cross is not None:
            q = np.array([s.sq_norm_of_mean for s in steps])
            np.fill_diagonal(gram, q)
            cross -= float(mass**2 @ q)
        return Batches(
            gram=gram,
            n=n,
            sum_sq_norms=np.array([s.mean_sq_norm for s in steps]) / n,
            sum_sq_weights=np.array([s.sum_sq_weights for s in steps]),
            mass=mass,
            cross=cross,
            sketch_share=share,
        )

    def _about(self, history: Sequence[StepSums], level: float, joint: Batches) -> dict[str, Any]:
        """Give what the result says of itself besides its figures."""
        base = estimate(history, level=level)
        kept = "whole"
        if self.rows.sketched:
            share = f"{100 * joint.sketch_share:.2g} %"
            kept = f"sketched, {self.rows.size:,} numbers a batch; {share} of the products' spread is theirs"
        remarks = [*base.warnings, *self.skipped]
        if self.random and not self.dropout:
            remarks.append(RANDOM)
        if self.unlisted:
            remarks.append(UNLISTED.format(n=self.unlisted))
        z, sizes = joint.mass.sum(), float(joint.mass**2 @ joint.sum_sq_norms)
        found = () if self.largest is None else self.largest.found((joint.n.sum() / z) ** 2, sizes)
        return {
            "unit": base.unit,
            "metric": base.metric,
            "tail_share": base.tail_share,
            "loss_scaled": base.loss_scaled,
            "n_skipped": len(self.skipped),
            "coverage": self.monitor.coverage().share,
            "history": tuple(replace(step, step=i) for i, step in enumerate(history)),
            "steps": (0, len(history) - 1) if history else None,
            "gradients": kept,
            "largest": found,
            "warnings": tuple(remarks),
            "dropout": self._noise(joint) if self.split and history else None,
        }

    def _noise(self, joint: Batches) -> DropoutNoise:
        """Split tr Σ: half of ‖ḡ − ḡ′‖² of a batch is the variance of ḡ over masks."""
        last = self.monitor.history[self.done[-1].at]
        names = set(last.layout.names) if last.layout is not None else set()
        gaps = np.array([sum(v for name, v in d.gaps.items() if name in names) for d in self.done])
        each = joint.n.sum() * (joint.mass / joint.mass.sum()) ** 2 * gaps / 2
        masks, k = float(each.sum()), len(each)
        se = math.sqrt(k / (k - 1) * float(((each - each.mean()) ** 2).sum())) if k > 1 else math.nan
        return DropoutNoise(data=pooled(joint)[0] - masks, dropout=masks, dropout_se=se)


def _weighed(gradient: Tensor | None, root: Tensor | None) -> Tensor | None:
    """Give a gradient in the metric of the step, R ḡ."""
    return gradient if gradient is None or root is None else gradient * root


def check_metric(model: nn.Module, metric: str, optimizer: Any, largest: int) -> None:
    """Refuse a metric that cannot be had.

    Raises:
        ProbeError: it is unknown, or its optimizer is missing, or has no second moments yet.
    """
    known = (*METRICS, "sign")
    if metric not in known:
        raise ProbeError(f"metric is {metric!r}; known: {', '.join(map(repr, known))}")
    if (metric == "adam") != (optimizer is not None):
        needs = "an optimizer= to read" if metric == "adam" else "no optimizer"
        raise ProbeError(f"metric={metric!r} needs {needs}")
    if largest and metric != "euclidean":
        raise ProbeError(f"largest goes with metric='euclidean', not {metric!r}")
    roots = METRICS[metric].roots if metric in METRICS else None
    if roots is not None:
        trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, why in roots([optimizer], trains).missing.items():
            raise ProbeError(f"`{name}`: {why}")


def _unusable(step: StepSums, by_tokens: bool) -> str | None:
    """Say why a batch is left out; one example alone is no reason: its pairs are with other batches."""
    alone = replace(step, reason=None).reason  # what the numbers themselves say
    if not step.finite or step.n_examples < 1 or step.reason != alone:
        return step.reason
    return UNLABELLED if by_tokens and not step.n_tokens else None
