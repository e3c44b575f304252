"""Readings of B_noise during a training: on the calls of the model that the training itself made.

Every k-th optimizer step, when its gradients are complete and before the weights move, the calls of this
step give g and those of the step before give H: other examples. Not the other way round: the weights have
just moved against the gradients of the step before, which so say too little of GᵀHG, by about
2·rate·tr(H²Σ)/n.

Under DDP every rank gives the calls that it made, and all get the reading over all of them. A rank that has
none to give says so, and no rank has a reading then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gns.capture.guard import in_backward
from gns.capture.hooks import hooks_of, is_ours
from gns.capture.ranks import world_size
from gns.curvature.errors import CurvatureError
from gns.curvature.result import CurvatureEstimate, CurvatureReading
from gns.curvature.together import Alone, NotAll, everyone
from gns.examples import row_map
from gns.probing.calling import ProbeError, value_of
from gns.segments import SegmentsOf

CALLS = 8  # of one step that are kept; the rest of a step with more micro-batches is not used
PROBES = 8
SPANS = 50  # last steps whose time is known, for the cost of a reading
FAILED = "no B_noise at optimizer step {step} (training goes on, later failures are not told): {error}"
IDLE = "this data-parallel rank did not call the model in training mode in this step, or the one before"
NO_LOSS = ". curvature_every needs a model that is given `labels` and returns `loss`"


@dataclass(frozen=True)
class _Call:
    """Arguments of a call of the model, and the autocast it was made under."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool]


class CurvatureWatch:
    """Keeps the last calls and makes readings of them.

    Args:
        model: whose calls are kept.
        every: optimizer steps from one reading to the next.
        spectrum: products of each reading to spend on λ_max and tr H.
        contributions: say in each what factors and modules add, which costs about half as much again.
        weights: of the examples in the loss, see `GNSMonitor`.
        segments: which rows or positions are which example, see there.
        on_reading: receives each reading.
        on_notice: receives what the user should know, once.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        *,
        weights: str,
        segments: SegmentsOf | str | None,
        on_reading: Callable[[CurvatureReading], None],
        on_notice: Callable[[str], None],
        spectrum: int = 0,
        contributions: bool = False,
    ):
        self.model, self.every, self.weights, self.segments = model, every, weights, segments
        self.spectrum, self.contributions = spectrum, contributions
        self.on_reading, self.on_notice = on_reading, on_notice
        self._before: list[_Call] = []  # calls of the step before
        self._now: list[_Call] = []
        self._failed = False
        self._apart = False  # the ranks do not measure together
        self._spans: deque[float] = deque(maxlen=SPANS)  # seconds of steps, without readings
        self._ended: float | None = None

    def call(self, step: int, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Keep a call made in a step, if a reading will want it."""
        wanted = self._due(step) or self._due(step + 1)
        if not wanted or len(self._now) >= CALLS or not self.model.training:
            return
        device = next((t.device.type for t in self.model.parameters()), "cpu")
        # the number of items is that of the whole step, not of a call
        named = {k: v for k, v in kwargs.items() if k != "num_items_in_batch"}
        cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._now.append(_Call(_kept(args), _kept(named), cast))

    def _due(self, step: int) -> bool:
        return step > 0 and (step + 1) % self.every == 0

    def step_ends(self, step: int, learning_rate: float | None) -> None:
        """Read, if it is time; nothing may be under way. Errors are told once, and training goes on."""
        if self._ended is not None:
            self._spans.append(perf_counter() - self._ended)
        self._read_if_due(step, learning_rate)
        self._ended = perf_counter()

    def _read_if_due(self, step: int, learning_rate: float | None) -> None:
        before, now = self._before, self._now
        self._before, self._now = now, []
        if not self._due(step) or in_backward() or self._apart:
            return
        if (not before or not now) and world_size() == 1:
            return
        try:
            found = self._read(step, before, now)
            if found.cost is not None and self._spans:
                found = replace(found, cost=replace(found.cost, step_seconds=median(self._spans)))
            self.on_reading(CurvatureReading(step, learning_rate, found))
        except Exception as error:
            self._apart = isinstance(error, NotAll)
            if not self._failed:
                self._failed = True
                text = " ".join(f"{type(error).__name__}: {error}".split())
                why = NO_LOSS if isinstance(error, ProbeError) else ""
                self.on_notice(FAILED.format(step=step, error=text + why))

    def _read(self, step: int, before: list[_Call], now: list[_Call]) -> CurvatureEstimate:
        with everyone() as ranks:
            if not before or not now:
                raise CurvatureError(IDLE)
            n = sum(ranks.all(sum(self._examples(call) for call in now)))
            with unhooked(self.model):
                return self._measured(step, before, now, max(2, min(PROBES, n)), ranks)

    def _measured(
        self, step: int, before: list[_Call], now: list[_Call], probes: int, ranks: Alone
    ) -> CurvatureEstimate:
        from gns.hessian import Asked, measured

        def loss(model: Any, batch: Any) -> Tensor:
            kind, dtype, enabled = now[0].autocast
            with torch.autocast(kind, dtype, enabled=enabled):
                return value_of(model, batch, None)

        how = {"weights": self.weights, "segments": self.segments, "spectrum": self.spectrum}
        asked = Asked(probes=probes, seed=step, contributions=self.contributions, **how)
        for_g, for_h = ([(call.args, call.kwargs) for call in calls] for calls in (now, before))
        return measured(self.model, for_g, for_h, asked, loss if now[0].autocast[2] else None, ranks)

    def _examples(self, call: _Call) -> int:
        rows = row_map(self.model, call.args, call.kwargs, self.weights, self.segments)
        return 0 if rows is None else rows.n


def _kept(value: Any) -> Any:
    """Arguments without a graph, copied: a loop may write its next batch into the same tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _kept(item) for key, item in value.items()}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_kept(item) for item in value)
    return value


@contextmanager
def unhooked(model: nn.Module) -> Generator[None]:
    """Take a monitor's own hooks off a model for a while; order and identity are put back."""
    kept = [(hooks, dict(hooks)) for hooks in hooks_of(model)]
    try:
        for hooks, before in kept:
            for key, hook in before.items():
                if is_ours(hook):
                    del hooks[key]
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)
