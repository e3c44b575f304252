"""`GNSMonitor`: the façade. It keeps the history and speaks to the user; no arithmetic, no hook."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from torch import nn

from gns.capture.collect import Collector
from gns.capture.hooks import hooked
from gns.capture.openstep import Closed, OpenStep
from gns.capture.plan import Plan, batch_norms, plan, trainable
from gns.capture.pooling import refusal, unwrapped
from gns.capture.sharing import shared_by
from gns.checking import check_choice, check_whole
from gns.coverage import Coverage
from gns.curvature.readingsfile import append_reading, write_readings
from gns.curvature.result import CurvatureReading
from gns.curvature.watching import CurvatureWatch
from gns.examples import WEIGHTS
from gns.metrics import METRICS
from gns.notices import GNSWarning as GNSWarning  # filters of users name it here
from gns.notices import Notices
from gns.packing import pack, unpack
from gns.reasons import BATCH_NORM, LATE, NEVER_ATTACHED, OTHER_METRIC, UNREACHED, UNSEEN
from gns.reducers import MAX_BYTES
from gns.segments import SegmentsOf
from gns.statistics.summaries import Summaries
from gns.sums import Layout, StepSums

ON_ERROR = ("warn", "raise")


class GNSMonitor(Summaries):
    """Measures the gradient noise scale of a model in training, in any loop, without changing the training.

    `GNSMonitor(model).attach()` before the loop is all; weights stay bit-identical. Examples are the rows of
    the batch dimension of the model's own call, or the sequences packed into them. With several data-parallel
    processes, attach one on every rank: all of them hold the readings of the whole step.

    Args:
        model: the module that the loop calls, e.g. a `peft` model.
        every: measure one optimizer step in so many.
        history: how many measured steps are kept.
        segments: which example each row [R] or position [R, T] of a call belongs to, where they are not rows
            and nothing in the call says so: a function of the call's (args, kwargs), or the name of the
            keyword argument that holds them; below 0: none. Equal numbers are one example, within one call.
            See `gns.segments`, and `gns.segments.stacked(2)` for preference pairs.
        weights: of the examples in the loss: "tokens" (a token-mean loss), "equal", or "auto": by tokens
            where the model itself is given [B, T] labels and so computes the loss.
        metric: in which norms are taken: "euclidean", or "adam", that of the optimizer's own preconditioner
            (see `gns.metrics`); a step without second moments is recorded as not usable.
        scaler: the `torch.amp.GradScaler` of the loop, so that its loss scale can be undone.
        curvature_every: read B_noise once in so many optimizer steps, see `gns.curvature.watching`; the model
            must be given `labels` and return `loss`. Readings are in `curvature`. Under DDP all ranks read
            together, each on its own calls.
        curvature_spectrum: products to spend in each such reading on λ_max and tr H; 0: none. Ten about
            double the reading's cost.
        curvature_contributions: say in each such reading what factors and modules add (`groups`, `modules`),
            which makes it cost about half as much again; else they are None.
        sink: receives each `StepSums` as it is measured: a callable, or a path that records are appended to.
        on_error: what becomes of an exception inside the monitor: "warn" (once, then it stands down) or
            "raise".
        max_bytes: of per-example gradients alive at once; one example of one layer may pass it.
        share_weight_gradient: let linear layers, LoRA factors among them, have their weight's gradient out of
            the product that their examples' norms are read from, where that is surely right and cheaper (see
            `gns.capture.sharing`). Weights are then not bit-identical: a gradient differs by rounding,
            measured 2e-7 of its norm in float32 and 2e-3 under bf16 autocast, where autograd rounds more.

    Raises:
        TypeError: `model` is no module.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with GNSMonitor(model) as monitor:
        ...     for x in torch.randn(30, 8, 4):
        ...         optimizer.zero_grad()
        ...         (model(x) - 1).square().mean().backward()
        ...         optimizer.step()
        >>> monitor.estimate().n_examples
        240
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        history: int = 10_000,
        segments: SegmentsOf | str | None = None,
        weights: str = "auto",
        metric: str = "euclidean",
        scaler: Any = None,
        curvature_every: int | None = None,
        curvature_spectrum: int = 0,
        curvature_contributions: bool = False,
        sink: Callable[[StepSums], None] | str | Path | None = None,
        on_error: str = "warn",
        max_bytes: int = MAX_BYTES,
        share_weight_gradient: bool = False,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
        for name, value, unit in (
            ("every", every, "steps"),
            ("history", history, "steps"),
            ("max_bytes", max_bytes, "bytes"),
            ("curvature_every", 1 if curvature_every is None else curvature_every, "steps"),
        ):
            check_whole(name, value, 1, unit)
        check_whole("curvature_spectrum", curvature_spectrum, 0, "products")
        if curvature_spectrum and curvature_every is None:
            raise ValueError(
                f"curvature_spectrum is {curvature_spectrum} and curvature_every None; it goes with readings "
                "of B_noise: give curvature_every too"
            )
        for name, value, known in (
            ("weights", weights, WEIGHTS),
            ("metric", metric, METRICS),
            ("on_error", on_error, ON_ERROR),
        ):
            check_choice(name, value, known)
        for name, value in (
            ("share_weight_gradient", share_weight_gradient),
            ("curvature_contributions", curvature_contributions),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; True or False is needed")
        if curvature_contributions and curvature_every is None:
            raise ValueError(
                "curvature_contributions is True and curvature_every None; it goes with readings of B_noise: "
                "give curvature_every too"
            )
        if not (segments is None or isinstance(segments, str) or callable(segments)):
            raise TypeError(
                f"segments is a {type(segments).__name__}; a function of (args, kwargs), the name of a "
                "keyword argument of the model's call, or None is needed"
            )
        self.segments, self.max_bytes, self.metric = segments, max_bytes, metric
        self.share_weight_gradient = share_weight_gradient
        self._given = model  # maybe an engine's wrapper
        every, history = int(every), int(history)  # deque and JSON take no NumPy integer
        self.model, self.every, self.weights = unwrapped(model), every, weights
        self.scaler, self.on_error = scaler, on_error
        self._sink = _as_sink(sink)
        self._folder = None if callable(sink) or sink is None else Path(sink).parent
        self._spectrum, self._contributions = curvature_spectrum, curvature_contributions
        self.curvature_every, self._curvature = curvature_every, deque[CurvatureReading](maxlen=history)
        self._history: deque[StepSums] = deque(maxlen=history)
        self._arriving: deque[OpenStep] = deque()
        self._collector: Collector | None = None
        self._plan: Plan | None = None
        self._excluded: dict[str, str] = {}
        self._verified: frozenset[str] = frozenset()
        self._fired: frozenset[str] = frozenset()
        self._next_step = 0
        self._notices = Notices()
        self._stopped: str | None = None
        self._layout = functools.cache(Layout)

    # life

    def attach(self) -> Self:
        """Start measuring; the next optimizer step is measured.

        Returns:
            The monitor itself.

        Raises:
            RuntimeError: this or another monitor is attached to the model.
            ValueError: nothing trainable can be measured, or an engine has taken the parameters apart.
        """
        if self._collector is not None:
            raise RuntimeError("this monitor is attached already; call detach() first")
        if hooked(self.model):
            raise RuntimeError("another GNSMonitor is attached to this model; call its detach() first")
        if (why := refusal(self._given)) is not None:
            raise ValueError(why)
        metric = METRICS[self.metric]
        self._plan = plan(self.model, limit=self.max_bytes, blocks=metric.weighs)
        self._excluded, self._verified, self._fired = {}, frozenset(), frozenset()
        self._collector = Collector(
            self._given,
            self._plan,
            every=self.every,
            weights=self.weights,
            segments=self.segments,
            scaler=self.scaler,
            on_step=self._arrive,
            on_error=self._fail,
            on_notice=self._notices.once,
            first_step=self._next_step,
            metric=metric,
            share=self.share_weight_gradient,
        )
        if self.curvature_every is not None:
            self._collector.watch = CurvatureWatch(
                self.model,
                self.curvature_every,
                weights=self.weights,
                segments=self.segments,
                on_reading=self._read,
                on_notice=self._notices.once,
                spectrum=self._spectrum,
                contributions=self._contributions,
            )
        self._collector.attach()
        if self._plan.reasons:
            self._notices.unmeasured(self._plan.reasons)
        for name in [name for name, norm in batch_norms(self.model) if norm.training][:1]:
            self._notices.once(BATCH_NORM.format(name=f"`{name}`"))
        return self

    def detach(self) -> None:
        """Remove every hook; the history stays. Detaching twice is harmless.

        Not between a forward pass with checkpointed layers and its backward: checkpointing raises where a
        layer saves other tensors the second time, and no hook is left to see to it.
        """
        if self._collector is not None:
            self.flush()
            self._collector.detach()
            self._next_step, self._collector = self._collector.step, None

    @property
    def attached(self) -> bool:
        """Whether hooks are in place."""
        return self._collector is not None

    def __enter__(self) -> Self:
        return self if self.attached else self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # what was measured

    @property
    def latest(self) -> StepSums | None:
        """The last measured optimizer step, or None."""
        self.flush()
        return self._history[-1] if self._history else None

    @property
    def history(self) -> list[StepSums]:
        """The measured optimizer steps, oldest first."""
        self.flush()
        return list(self._history)

    @property
    def curvature(self) -> list[CurvatureReading]:
        """The readings of B_noise, oldest first."""
        return list(self._curvature)

    def _expect_steps(self) -> None:
        """Warn where nothing can have been measured."""
        if self._plan is None and self._next_step == 0:
            self._notices.once(NEVER_ATTACHED)

    def _share(self) -> float | None:
        self._expect_steps()
        return self.coverage().share if self._plan else None

    def coverage(self) -> Coverage:
        """Say which trainable parameters are measured, which not and why.

        Raises:
            RuntimeError: the monitor was never attached.
        """
        if self._plan is None:
            raise RuntimeError(NEVER_ATTACHED)
        self.flush()
        out = dict(self._excluded)
        if self._fired or any(step.reason == UNSEEN for step in self._history):
            silent = (e.name for e in self._plan.entries if e.name not in self._fired)
            out = dict.fromkeys(silent, UNREACHED) | out
        late = trainable(self.model) if self.attached else {}
        known = {e.name for e in self._plan.entries} | self._plan.reasons.keys()
        late = {name: size for name, size in late.items() if name not in known}
        sizes = {e.name: e.scalars for e in self._plan.entries}
        return Coverage(
            measured={name: size for name, size in sizes.items() if name not in out},
            unmeasured={**self._plan.scalars, **{name: sizes[name] for name in out}, **late},
            reasons={**self._plan.reasons, **out, **dict.fromkeys(late, LATE)},
            verified=self._verified,
            stopped=self._stopped,
            shared=shared_by(self._plan.entries, out) if self.share_weight_gradient else None,
        )

    def report(
        self, folder: str | Path, *, settings: dict[str, Any] | None = None, batch_size: int | None = None
    ) -> Path:
        """Write report.html, figures, steps.jsonl and summary.json.

        Args:
            folder: where to; made if missing.
            settings: shown beside the numbers, e.g. learning rate, schedule, seed.
            batch_size: examples per optimizer step in use; by default the mean over the history.

        Returns:
            Path of report.html.
        """
        from gns.report import write_report

        self._expect_steps()
        coverage = self.coverage() if self._plan else None
        if self._curvature and (self._folder is None or self._folder.resolve() != Path(folder).resolve()):
            write_readings(Path(folder), self.curvature)  # where steps are appended, readings were too
        return write_report(folder, self.history, coverage=coverage, settings=settings, batch_size=batch_size)

    # continuing

    def state_dict(self) -> dict[str, Any]:
        """Give history and step counter as plain data, to be continued by another monitor."""
        step = self._collector.step if self._collector else self._next_step
        packed = pack(step, self.history)
        return {**packed, **self._pack_looks()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; steps in another metric, whose sums do not add, are left out.

        Raises:
            RuntimeError: the monitor is attached.
            ValueError: `state` is not what `state_dict` gives.
        """
        if self.attached:
            raise RuntimeError("the monitor is attached; load its state before attach()")
        if not isinstance(state, dict) or not {"next_step", "layouts", "steps"} <= set(state):
            seen = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"state has {seen}; 'next_step', 'layouts' and 'steps' of state_dict() are needed"
            )
        steps = unpack(state)
        alike = [step for step in steps if step.metric == self.metric]
        if gone := len(steps) - len(alike):
            self._notices.once(OTHER_METRIC.format(gone=gone, all=len(steps), metric=self.metric))
        self._history.clear()
        self._history.extend(alike)
        self._unpack_looks({} if gone else state)
        self._let_go |= len(alike) > len(self._history)
        self._next_step = int(state["next_step"])

    def start_at(self, step: int) -> None:
        """Number the next optimizer step, where a training goes on without a state of ours.

        Raises:
            RuntimeError: the monitor is attached.
        """
        if self.attached:
            raise RuntimeError("the monitor is attached; number its steps before attach()")
        self._next_step = step

    # inside

    def flush(self) -> None:
        """Turn every step that has ended into a record, waiting for the device if need be."""
        while self._arriving:
            self._close(self._arriving.popleft())

    def _arrive(self, step: OpenStep) -> None:
        self._arriving.append(step)
        while self._arriving and (step.urgent or self._arriving[0].ready()):
            self._close(self._arriving.popleft())

    def _close(self, step: OpenStep) -> None:
        closed: Closed = step.close(self._excluded.keys(), self._layout)
        self._verified |= closed.verified
        self._fired |= closed.fired
        if self._collector is not None:
            self._collector.check.conclude(step.checked, closed.verified, usable=closed.sums.usable)
        if closed.excluded:
            self._exclude(closed.excluded)
        if closed.stop is not None and self._stopped is None:
            self._stopped = closed.stop
            if self._collector is not None:
                self._collector.dead = True
        self._let_go |= len(self._history) == self._history.maxlen
        self._history.append(closed.sums)
        self._notices.step(closed.sums)
        if self._sink is not None:
            self._sink(closed.sums)

    def _read(self, reading: CurvatureReading) -> None:
        self._curvature.append(reading)
        if self._folder is not None:
            append_reading(self._folder, reading)

    def _exclude(self, reasons: dict[str, str]) -> None:
        """Leave parameters out of both sums, also of the steps measured before."""
        self._excluded |= reasons
        self._verified -= reasons.keys()
        if self._collector is not None:
            self._collector.leave_out(reasons.keys())
        kept = [step.without(reasons, self._left(step, reasons)) for step in self._history]
        self._history.clear()
        self._history.extend(kept)
        self._shown.clear()  # the sums have changed
        self._notices.unmeasured(reasons)

    def _left(self, step: StepSums, reasons: dict[str, str]) -> Layout | None:
        """Give the layout of a step without some parameters: one object for all steps alike."""
        if step.layout is None:
            return None
        return self._layout(tuple(name for name in step.layout.names if name not in reasons))

    def _fail(self, error: Exception) -> None:
        self._stopped = f"{type(error).__name__}: {error}"
        if self.on_error == "raise":
            raise error
        self._notices.stands_down(self._stopped)


def _as_sink(sink: Callable[[StepSums], None] | str | Path | None) -> Callable[[StepSums], None] | None:
    if sink is None or callable(sink):
        return sink
    from gns.records import StepsWriter

    return StepsWriter(sink).write
