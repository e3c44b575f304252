"""`probe`: the noise scale at frozen weights, from many batches at one parameter point, without any training.

Each batch is run forward and backward once. The taps of `gns.monitor` give Σ‖cᵢ‖², `.grad` the batch's
gradient, and `gns.pairs` makes of both the average over all pairs of examples of all batches.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from gns.calling import Loss, ProbeError, loss_of, moved
from gns.estimate import estimate
from gns.frozenestimate import DropoutNoise, FrozenEstimate, from_batches
from gns.gradrows import MAX_BYTES, SIZE, GradientRows
from gns.looks import declared
from gns.monitor import GNSMonitor
from gns.pairs import Batches, pooled
from gns.ranks import world_size
from gns.segments import SegmentsOf
from gns.still import RandomState, seeded, still, uninterrupted
from gns.sums import StepSums

RANDOM = (
    "Random numbers were drawn in the model's forward pass although dropout is off: some noise of the "
    "model's own is in tr Σ."
)
MIXED = "token labels in some batches and not in others"


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    level: float = 0.95,
    relative_width: float | None = None,
    max_batches: int | None = None,
    dropout: bool = False,
    split_dropout: bool = False,
    progress: bool | None = None,
    seed: int = 0,
    weights: str = "auto",
    segments: SegmentsOf | str | None = None,
    max_bytes: int = MAX_BYTES,
) -> FrozenEstimate:
    """Measure the gradient noise scale at the model's weights as they are; nothing is trained.

    Weights, `.grad`, buffers, training modes and random states are bit by bit the same afterwards, also after
    an exception or Ctrl-C. Optimizers are never touched.

    Args:
        model: the module to call, e.g. a `peft` model; its trainable parameters are measured.
        batches: what to call it with: mappings (keyword arguments), (args, kwargs), tuples or lists
            (positional arguments) or tensors. Their tensors are moved to the model's device. Batches may
            differ in size; the loss is to be a mean over its examples or tokens.
        loss: (model, batch) → scalar; None: `model(**batch).loss`.
        level: nominal coverage of the confidence set, over all looks together.
        relative_width: stop at the first declared look (20, 40, 80, … batches) at which the set's relative
            half-width, (high − low) / 2B, is at most this.
        max_batches: use no more batches than this.
        dropout: False: evaluation mode (batch norms and router noise too), but for layers that would stop
            checkpointing their activations by it. True: training mode, but for batch norms.
        split_dropout: run each batch a second time with other dropout masks, and say how much of tr Σ is
            dropout's; implies `dropout`.
        progress: show a bar on standard error; None: if that is a terminal.
        seed: of dropout masks, sketch and sign-flip test.
        weights: of the examples in the loss, see `GNSMonitor`.
        segments: which rows or positions are which example, see `GNSMonitor`.
        max_bytes: of whole gradients kept on the host; beyond it they are sketched, and the result says so.

    Returns:
        The estimate. After Ctrl-C, or if `batches` raises it, what was found until then, which says so.

    Raises:
        ProbeError: an argument does not fit, several processes are under way, a parameter's hook would act on
            the gradients, or there is no loss.
        KeyboardInterrupt: Ctrl-C before the first batch was done.
        ValueError: nothing trainable can be measured.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> batches = torch.randn(30, 8, 4)
        >>> found = probe(model, batches, loss=lambda model, x: (model(x) - 1).square().mean())
        >>> found.n_steps, found.n_examples
        (30, 240)
    """
    most = _most(batches, max_batches)
    looks = _looks(relative_width, most)
    _check(model, level, max_batches)
    run = _Run(model, loss, bool(dropout or split_dropout), split_dropout, seed, max_bytes)
    with (
        still(model, dropout=run.dropout),
        _Monitor(model, weights=weights, segments=segments, on_error="raise", history=2**31) as run.monitor,
    ):
        stopped = None
        try:
            with _bar(progress, most) as tick:
                for batch in _first(batches, max_batches):
                    run.feed(batch)
                    tick(len(run.done))
                    if relative_width is not None and len(run.done) in looks[:-1]:
                        found = run.result(level, looks)
                        if found.status == "measured" and _narrow(found, relative_width):
                            return replace(found, stopped=f"±{100 * relative_width:g} % was reached")
        except KeyboardInterrupt:
            if not run.done:
                raise
            stopped = f"interrupted after {len(run.done)} batches"
        return run.result(level, looks, stopped)


def _most(batches: Iterable[Any], max_batches: int | None) -> int | None:
    """Say how many batches there will be at the most, or None where nobody knows."""
    if isinstance(max_batches, bool) or not (
        max_batches is None or (isinstance(max_batches, int) and max_batches > 0)
    ):
        raise ProbeError(f"max_batches is {max_batches!r}; a whole number, 1 or more, is needed, or None")
    try:
        there = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set has a length in name only
        there = None
    known = [n for n in (there, max_batches) if n is not None]
    return min(known, default=None)


def _looks(relative_width: float | None, most: int | None) -> tuple[int, ...]:
    if relative_width is None:
        return ()
    if not relative_width > 0:
        raise ProbeError(
            f"relative_width is {relative_width}; a number above 0 is needed, e.g. 0.2 for ±20 %"
        )
    if most is None:
        raise ProbeError(
            "relative_width needs to know the largest number of batches, so that looks are declared "
            "beforehand; pass max_batches"
        )
    return declared(most)


def _check(model: nn.Module, level: float, max_batches: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if not 0 < level < 1:
        raise ProbeError(f"level is {level}; a coverage in (0, 1) is needed, e.g. 0.95")
    if world_size() > 1:
        raise ProbeError(
            f"{world_size()} processes are under way; a probe runs in one: call it in a process of its own"
        )
    for name, p in model.named_parameters():
        if p.requires_grad and getattr(p, "_post_accumulate_grad_hooks", None):
            raise ProbeError(
                f"`{name}` has a hook that runs when its gradient is complete (an optimizer inside "
                "backward?) and would act on the probe's gradients; remove it first"
            )


def _narrow(found: FrozenEstimate, width: float) -> bool:
    return (found.high - found.low) / (2 * found.b_simple) <= width


class _Monitor(GNSMonitor):
    """A monitor whose steps are ended by hand, and whose remarks are kept."""

    def gradients(self) -> dict[str, Tensor | None]:
        """Give the gradients of the measured parameters."""
        assert self._plan is not None
        return {e.name: e.parameter.grad for e in self._plan.entries}

    def by_tokens(self) -> bool:
        """Whether the examples of the calls since the last step weigh by their tokens."""
        assert self._collector is not None
        calls = self._collector.now.calls
        return bool(calls) and all(c.rows is not None and c.rows.weight_sum is not None for c in calls)

    def end_step(self) -> StepSums:
        """End a step here and give its record."""
        assert self._collector is not None
        self._collector.end_step()
        self.flush()
        return self._history[-1]

    def _tell(self, sums: StepSums) -> None:
        """Say nothing of a batch: the result says what was left out."""


@dataclass(frozen=True)
class _Done:
    """A batch that was measured.

    Args:
        at: its place in the monitor's history.
        by_tokens: its examples weigh by their tokens.
        gaps: parameter → ‖ḡ − ḡ′‖² of two runs with different dropout masks.
    """

    at: int
    by_tokens: bool
    gaps: Mapping[str, float]


class _Run:
    """A probe on its way."""

    monitor: _Monitor

    def __init__(
        self, model: nn.Module, loss: Loss | None, dropout: bool, split: bool, seed: int, max_bytes: int
    ):
        self.model, self.loss, self.dropout, self.split, self.seed = model, loss, dropout, split, seed
        self.rows = GradientRows(max_bytes=max_bytes, seed=seed)
        self.done: list[_Done] = []
        self.skipped: list[str] = []
        self.random = False
        devices = {p.device for p in model.parameters()}
        self.device = devices.pop() if len(devices) == 1 else None

    # measuring

    def feed(self, batch: Any) -> None:
        """Measure one batch."""
        batch = batch if self.device is None else moved(batch, self.device)
        first = self._backward(batch, 0)
        with uninterrupted():
            by_tokens, gradients = self.monitor.by_tokens(), self.monitor.gradients()
            self._free()
            step, at = self.monitor.end_step(), len(self.monitor.history) - 1
        gaps = self._again(batch, gradients) if self.split else {}
        with uninterrupted():
            if (why := _unusable(step)) is not None:
                self.skipped.append(f"batch {first}: {why}")
                return
            if self.done and self.done[0].by_tokens != by_tokens:
                raise ProbeError(f'{MIXED}; pass weights="tokens" or weights="equal"')
            self.rows.add(gradients, _mass(step, by_tokens))
            self.done.append(_Done(at, by_tokens, gaps))

    def _backward(self, batch: Any, again: int) -> int:
        number = len(self.done) + len(self.skipped)
        with seeded((self.seed << 24) + 2 * number + again) as before:
            loss_of(self.model, batch, self.loss).backward()
            self.random = self.random or not RandomState.now().same_torch(before)
        return number

    def _again(self, batch: Any, gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
        """Run a batch with other masks, and give ‖ḡ − ḡ′‖² of each parameter."""
        self._backward(batch, 1)
        gaps = {}
        for name, other in self.monitor.gradients().items():
            one = gradients[name]
            if one is not None or other is not None:
                gap = (one if one is not None else 0) - (other if other is not None else 0)
                gaps[name] = float(gap.double().square().sum())  # type: ignore[union-attr]
        with uninterrupted():
            self._free()
            self.monitor.end_step()
        return gaps

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
        how = {"level": level, "looks": max(1, len(looks)), "seed": self.seed}
        groups = {
            g: from_batches(self._batches(part, [s.groups[g] for s in history], grams[g]), **how)
            for g, part in parts.items()
        }
        about = self._about(history, level, joint)
        about |= {"groups": groups, "looks": tuple(looks), "stopped": stopped}
        return from_batches(joint, about=about, **how)

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
            kept = f"sketched, {SIZE:,} numbers a batch; {share} of their products' spread is the sketch's"
        remarks = [*getattr(base, "warnings", ()), *self.skipped]
        if self.random and not self.dropout:
            remarks.append(RANDOM)
        return {
            "unit": base.unit,
            "loss_scaled": base.loss_scaled,
            "n_skipped": len(self.skipped),
            "coverage": self.monitor.coverage().share,
            "history": tuple(replace(step, step=i) for i, step in enumerate(history)),
            "steps": (0, len(history) - 1) if history else None,
            "gradients": kept,
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


def _unusable(step: StepSums) -> str | None:
    """Say why a batch is left out; one example alone is no reason: its pairs are with other batches."""
    alone = replace(step, reason=None).reason  # what the numbers themselves say
    if not step.finite or step.n_examples < 1 or step.reason != alone:
        return step.reason
    return None


def _mass(step: StepSums, by_tokens: bool) -> float:
    """Weight of a batch in the whole: its tokens where examples weigh by them, else its examples."""
    return float(step.n_tokens) if by_tokens and step.n_tokens is not None else float(step.n_examples)


def _first(batches: Iterable[Any], most: int | None) -> Iterator[Any]:
    """Yield no more than `most` batches, and ask for no more."""
    return iter(batches) if most is None else itertools.islice(batches, most)


@contextmanager
def _bar(shown: bool | None, most: int | None) -> Generator[Callable[[int], None]]:
    """Show a bar on standard error, if asked for or if that is a terminal; gives what moves it."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("batches at frozen weights", total=most)
        yield lambda done: bar.update(task, completed=done)
