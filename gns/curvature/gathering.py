"""The gradients' side of a curvature: all probes' signed sums out of one tapped backward pass a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gns.capture.collect import Collector
from gns.capture.gather import sum_dtype
from gns.capture.hooks import hooked
from gns.capture.openstep import OpenStep
from gns.capture.plan import Plan, plan
from gns.curvature.errors import CurvatureError
from gns.curvature.signs import Weighed, Weights, n_tokens, shares
from gns.curvature.together import Alone, Places
from gns.probing.calling import Loss, loss_of
from gns.probing.randomness import mixed, seeded
from gns.segments import SegmentsOf
from gns.sums import Layout, StepSums

Vector = dict[str, Tensor]  # parameter → a tensor of its shape
EACH_RTOL = 1e-3  # between Σ‖cᵢ‖² over examples and over layers; float32 sums in two orders are at 1e-5


@dataclass(frozen=True)
class Sums:
    """Weighted sums of the contributions c̃ᵢ = mₖcᵢ/Σm of N examples, whose weights ãᵢ sum to 1.

    Args:
        signed: parameter → [S, *shape], Σ εᵢ c̃ᵢ over each probe's examples.
        parts: parameter → [S, *shape], Σ c̃ᵢ over the same.
        weighted: parameter → [*shape], Σ ãᵢ c̃ᵢ over all.
        sq: parameter → Σ ‖c̃ᵢ‖².
        by_probe: [S], Σ ‖c̃ᵢ‖² over each probe's examples and all parameters; None where not known.
        share: [S], αₛ = Σ ãᵢ over each probe's examples.
        sign_share: [S], eₛ = Σ εᵢãᵢ.
        sq_share: [S], Aₛ = Σ ãᵢ² over each probe's examples.
        overlap: whether signs were given, and probes share examples.
        n: N.
        n_tokens: labelled tokens, or None where unknown.
        left_out: trainable parameter → why it is not measured.
    """

    signed: dict[str, Tensor]
    parts: dict[str, Tensor]
    weighted: Vector
    sq: dict[str, float]
    by_probe: np.ndarray | None
    share: np.ndarray
    sign_share: np.ndarray
    sq_share: np.ndarray
    overlap: bool
    n: int
    n_tokens: int | None
    left_out: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The measured parameters."""
        return tuple(self.sq)

    @property
    def probes(self) -> int:
        """How many signed sums there are, S."""
        return len(self.share)

    @property
    def sum_sq_weights(self) -> float:
        """Σ ãᵢ²."""
        return float(self.sq_share.sum())

    @cached_property
    def mean(self) -> Vector:
        """ḡ = Σ c̃ᵢ, the gradient over all examples."""
        return {name: part.sum(0) for name, part in self.parts.items()}

    def of(self, names: Sequence[str]) -> Sums:
        """Give the sums of some parameters alone."""
        return replace(
            self,
            signed={n: self.signed[n] for n in names},
            parts={n: self.parts[n] for n in names},
            weighted={n: self.weighted[n] for n in names},
            sq={n: self.sq[n] for n in names},
            by_probe=None,
        )

    def probe(self, s: int) -> Vector:
        """uₛ = Σ εᵢ (c̃ᵢ − ãᵢ ḡ) over the examples of probe s."""
        e = float(self.sign_share[s])
        centred = torch._foreach_add(  # type: ignore[reportPrivateImportUsage]
            [signed[s] for signed in self.signed.values()],
            [self.mean[name] for name in self.signed],
            alpha=-e,
        )
        return dict(zip(self.signed, centred, strict=True))

    @cached_property
    def probe_sq_norms(self) -> np.ndarray:
        """‖uₛ‖² by parameter, [S, P], in float64."""
        found = []
        for name, signed in self.signed.items():
            mean, shares = self.mean[name].double(), self.sign_share.tolist()
            rows = zip(signed, shares, strict=True)  # one at a time: in float64 all S would not fit
            found.append(torch.stack([(u.double() - e * mean).square().sum() for u, e in rows]).cpu())
        return torch.stack(found, -1).numpy()

    def centred_sq(self) -> np.ndarray:
        """[P], Σᵢ ‖c̃ᵢ − ãᵢ ḡ‖² of each parameter, exact: what Σₛ ‖uₛ‖² estimates."""
        found = []
        for name in self.names:
            mean, weighted = self.mean[name].double(), self.weighted[name].double()
            cross, square = float((weighted * mean).sum()), float(mean.square().sum())
            found.append(self.sq[name] - 2 * cross + self.sum_sq_weights * square)
        return np.array(found)


class _Steps:
    """A collector whose steps are ended by hand, one a batch, and what they gave."""

    def __init__(self, model: nn.Module, weights: str, segments: SegmentsOf | str | None):
        self.plan = plan(model)
        self.done: list[StepSums] = []
        self.left_out = dict(self.plan.reasons)
        self._layout = functools.cache(Layout)
        self._excluded: dict[str, str] = {}
        self.collector = Collector(
            model,
            self.plan,
            every=1,
            weights=weights,
            segments=segments,
            scaler=None,
            on_step=self._close,
            on_error=_raise,
            on_notice=lambda text: None,
            alone=True,
        )

    def _close(self, step: OpenStep) -> None:
        closed = step.close(self._excluded.keys(), self._layout)
        self.collector.check.conclude(step.checked, closed.verified, usable=closed.sums.usable)
        self._excluded |= closed.excluded
        self.left_out |= closed.excluded
        self.done.append(closed.sums)

    def __enter__(self) -> _Steps:
        self.collector.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.collector.detach()


def _raise(error: Exception) -> None:
    raise error


@dataclass(frozen=True)
class _Batch:
    """What is kept of a batch besides the sums of its gradients.

    Args:
        weighed: how it was.
        sq: measured parameter → mₖ² Σ ‖cᵢ‖².
        each: [S], mₖ² Σ ‖cᵢ‖² over each probe's examples and all parameters; None where not known.
    """

    weighed: Weighed
    sq: dict[str, float]
    each: np.ndarray | None


def gather(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None,
    *,
    probes: int,
    seed: int,
    weights: str = "auto",
    segments: SegmentsOf | str | None = None,
    signs: np.ndarray | None = None,
    places: Places | None = None,
) -> Sums:
    """Run each batch forward and backward once, and collect the weighted sums of its examples' gradients.

    Args:
        model: held still by the caller.
        batches: for g, of this process.
        loss: (model, batch) → scalar; None: the model's own.
        probes: S.
        seed: of the signs and of what the model draws.
        weights: of the examples in the loss, see `GNSMonitor`.
        segments: which rows or positions are which example, see `GNSMonitor`.
        signs: [S, N], instead of random ones.
        places: of the batches among those of all processes; None: there are no others.

    Returns:
        The sums over all processes' batches, on the parameters' device, in float32 or float64.

    Raises:
        CurvatureError: too few examples, gradients that are not finite, or a loss the taps cannot follow.
        RuntimeError: a monitor is attached.

    Memory: 2S + 1 times the trainable parameters, twice.
    """
    if hooked(model):
        raise RuntimeError("a GNSMonitor is attached to this model; call its detach() first")
    places = Places([len(batches)], Alone()) if places is None else places
    weigh = Weights(probes, places.total, seed, signs, numbers=places.numbers, sizes=places.sizes)
    kept: list[_Batch] = []
    with _Steps(model, weights, segments) as steps:
        leaves = _leaves(steps.plan, 2 * probes + 1)
        steps.collector.calls.weigh = weigh
        totals = {name: torch.zeros_like(leaf).detach() for name, leaf in leaves.items()}
        for k, batch in enumerate(batches):
            with seeded(mixed(seed, places.numbers[k])):
                loss_of(model, batch, loss).backward()
            weigh.next_batch()
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    totals[name] += leaf.grad
            norms = _sq_norms(steps.collector)
            for p in model.parameters():
                p.grad = None
            steps.collector.end_step()
            _refuse(steps.done, k, steps.left_out)
            kept.append(_batch(weigh, steps.done[-1], norms))
    for _ in range(len(batches), places.rounds):
        weigh.sit_out()
    return _concluded(places.ranks, totals, kept, _measured(steps), steps.left_out, given=signs is not None)


def _leaves(plan: Plan, k: int) -> dict[str, Tensor]:
    """Open the leaves that collect k weighted sums of each measured parameter."""
    leaves = {}
    for entry in plan.entries:
        p = entry.parameter
        leaf = torch.zeros((k, *p.shape), dtype=sum_dtype(p.dtype), device=p.device, requires_grad=True)
        leaves[entry.name] = leaf
        for tap, local in entry.sites:
            tap.contracted[local] = leaf
    return leaves


def _sq_norms(collector: Collector) -> np.ndarray:
    """‖cᵢ‖² of the examples of the step under way."""
    rows = [(c, c.rows.n) for c in collector.now.calls if c.rows is not None]
    found = [call.sq_norms(n).double().cpu().numpy() for call, n in rows]
    return np.concatenate(found) if found else np.zeros(0)


def _refuse(history: Sequence[StepSums], k: int, left_out: dict[str, str]) -> None:
    """Let pass only a batch whose sums are what they should be; one example alone will do."""
    if len(history) != k + 1:
        raise CurvatureError(f"batch {k}: no gradient reached a measured parameter")
    step = history[-1]
    alone = step.n_examples == 1 or not (step.sum_sq_weights or 0) < 1
    if not step.finite or not (step.usable or (alone and step.rows is not None)):
        first = next(iter(left_out.items()), None)
        example = "" if first is None else f" (left out: {len(left_out)}, e.g. {first[0]}: {first[1]})"
        raise CurvatureError(f"batch {k} cannot be used: {step.reason}{example}")


def _batch(weigh: Weights, step: StepSums, norms: np.ndarray) -> _Batch:
    assert step.rows is not None and step.layout is not None
    scale = weigh.done[-1].mass ** 2 / step.n_examples
    sq = {name: scale * float(m) for name, (m, _) in zip(step.layout.names, step.rows, strict=True)}
    return _Batch(weigh.done[-1], sq, weigh.by_probe(norms) if len(norms) == step.n_examples else None)


def _measured(steps: _Steps) -> tuple[str, ...]:
    """Parameters that could be measured in all of this process's batches."""
    layout = steps.done[-1].layout
    return () if layout is None else layout.names


def _concluded(
    ranks: Alone,
    totals: dict[str, Tensor],
    kept: list[_Batch],
    measured: tuple[str, ...],
    left_out: dict[str, str],
    *,
    given: bool,
) -> Sums:
    found = ranks.all((kept, measured, left_out))
    left_out = {name: why for _, _, reasons in found for name, why in reasons.items()}
    names = [name for name in measured if all(name in others for _, others, _ in found)]
    if not names:
        why = next(iter(left_out.values()), "no parameter has a gradient")
        raise CurvatureError(f"no trainable parameter can be measured: {why}")
    batches = sorted((b for of_rank, _, _ in found for b in of_rank), key=lambda b: b.weighed.number)
    weighed = [b.weighed for b in batches]
    share, sign_share, sq_share = shares(weighed, given=given)
    mass, s = sum(b.mass for b in weighed), len(share)
    sq = {name: sum(b.sq.get(name, 0.0) for b in batches) / mass**2 for name in names}
    sums = {name: totals[name] for name in names}
    ranks.add(sums)
    for total in sums.values():
        total /= mass
    return Sums(
        signed={name: t[:s] for name, t in sums.items()},
        parts={name: t[s : 2 * s] for name, t in sums.items()},
        weighted={name: t[2 * s] / mass for name, t in sums.items()},
        sq=sq,
        by_probe=_by_probe([b.each for b in batches], mass, sum(sq.values())),
        share=share,
        sign_share=sign_share,
        sq_share=sq_share,
        overlap=given,
        n=sum(b.n for b in weighed),
        n_tokens=n_tokens(weighed),
        left_out=left_out,
    )


def _by_probe(each: Sequence[np.ndarray | None], mass: float, total: float) -> np.ndarray | None:
    """Σ ‖c̃ᵢ‖² over each probe's examples [S], if it is known of all and adds up to the total."""
    known = [e for e in each if e is not None]
    found = sum(known, np.zeros(1)) / mass**2
    return found if len(known) == len(each) and abs(found.sum() - total) <= EACH_RTOL * total else None
