"""In which norm a step's two sums are taken: of the entries as they are, or as the optimizer weighs them.

A diagonal metric D makes of both sums

    m_D = (1/n) Σ gᵢᵀ D gᵢ = (1/n) Σ ‖R gᵢ‖²        q_D = ḡᵀ D ḡ = ‖R ḡ‖²        R = √D

One R is read before the step's gradients are seen and serves its reducer and its reading of `.grad` alike, so
that the two sums cannot disagree, and both stay unbiased: D does not depend on the examples of the step.

"adam": D = diag(1/(√v̂ + ε)), what the optimizer's last update was divided by, v̂ its bias-corrected second
moment as that update left it; 0 at entries whose second moment is still 0, for which it has no scale yet.
gᵀDg is the squared dual norm of the geometry in which Adam without momentum is steepest descent: its update
is −lr · Dḡ, so that to first order the loss falls by lr · GᵀDḡ. Units: loss / parameter.

It claims to say at which batch size noise and signal are equal in that norm, tr(DΣ)/(GᵀDG), where the
Euclidean number lets the coordinates with the largest gradients speak for all. Pollux (Qiao et al., OSDI
2021) uses, as we read it, tr(PΣPᵀ)/|PG|² with P the preconditioner: the noise of the update itself, which
weighs entries by D² instead of D. Naganuma et al. 2026 (arXiv:2602.03001) argue for norms of the optimizer's
own geometry; the formula here is derived above and was not checked against theirs.

Open: whether this number predicts a critical batch size under Adam better than the Euclidean one. Momentum,
weight decay, and the noise of v̂ itself, which grows at small batches, are not in it; D moves over a run, so
that steps are averaged in slowly changing units. LoRA's gauge moves it too: A → cA multiplies factor A's part
by 1/c where the Euclidean one has 1/c²; within a factor it cancels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gns.capture.projections import is_sharded
from gns.reasons import NO_SECOND_MOMENT, NO_STATE, SHARDED_STATE
from gns.rules.base import block_sq_norms

LARGE = 2**20  # entries of a tensor that is worked off alone: many together would need their copies at once


class Roots(NamedTuple):
    """R of each parameter, of its shape, in float32 or wider; and why others have none."""

    there: dict[str, Tensor]
    missing: dict[str, str]


@dataclass(frozen=True)
class Metric:
    """A norm.

    Args:
        name: as `GNSMonitor(metric=…)` and `StepSums.metric` have it.
        roots: (optimizers, parameters by name) → R as it is now; None: R = 1. Reads, and changes nothing.
    """

    name: str
    roots: Callable[[Iterable[Any], Mapping[str, Tensor]], Roots] | None = None

    @property
    def weighs(self) -> bool:
        """Whether entries are weighed, so that blocks must be formed."""
        return self.roots is not None


def of_blocks(blocks: Tensor, root: Tensor | None = None) -> Tensor:
    """Squared norm of each block; summed pairwise, in the blocks' own float32 or float64.

    Args:
        blocks: [B, ...], per-example gradients.
        root: R, [...]; None for the Euclidean norm alone.

    Returns:
        [B], or with a root [B, 2]: ‖c_b‖² and ‖R c_b‖².
    """
    plain = block_sq_norms(blocks)
    return plain if root is None else torch.stack([plain, of_blocks(blocks * root)], 1)


def of_gradients(gradients: Sequence[Tensor | None], roots: Sequence[Tensor | None]) -> list[Tensor | None]:
    """‖R ḡ‖² of each gradient, [] on its device; None where either is missing.

    Args:
        gradients: of any device and dtype.
        roots: R of each.
    """
    found: list[Tensor | None] = [None] * len(gradients)
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = defaultdict(list)
    for i, (g, r) in enumerate(zip(gradients, roots, strict=True)):
        if g is None or r is None:
            continue
        if g.numel() > LARGE or g.device.type == "cpu":
            found[i] = (g.detach() * r).square().sum()
        else:
            alike[g.device, g.dtype, r.dtype].append(i)
    for (_, _, dtype), rows in alike.items():
        wide = [gradients[i].detach().to(dtype) for i in rows]  # type: ignore[union-attr]
        weighed = torch._foreach_mul(wide, [roots[i] for i in rows])  # type: ignore[reportPrivateImportUsage]
        norms = torch._foreach_norm(weighed, 2)  # type: ignore[reportPrivateImportUsage]
        for i, squared in zip(rows, torch._foreach_mul(norms, norms), strict=True):  # type: ignore[reportPrivateImportUsage]
            found[i] = squared
    return found


def adam_roots(optimizers: Iterable[Any], parameters: Mapping[str, Tensor]) -> Roots:
    """R = (√v̂ + ε)^(−½) from the state of the optimizers, without waiting for a device.

    As torch divides: √v̂ = √v / √(1 − β₂ᵗ), v the maximum so far under amsgrad; `foreach`, `fused` and
    `capturable` keep the same state. Any optimizer with `exp_avg_sq` and `step` a parameter, and `betas` and
    `eps` a group, is read like that.

    Args:
        optimizers: those that step the parameters; of two that have state of one, the last is read.
        parameters: by name; R is on their device, wherever the state is.

    Returns:
        R of each parameter, 0 where v is; and why it is missing.

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Reddi et al. 2018 for amsgrad.
    Slow twin: tests/reference/preconditioned.py
    """
    held = _held(optimizers)
    there: dict[str, tuple[Tensor, Any, float]] = {}
    missing: dict[str, str] = {}
    for name, p in parameters.items():
        found = _second_moment(p, *held.get(id(p), ({}, {}, "")))
        if isinstance(found, str):
            missing[name] = found
        else:
            there[name] = found
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, (v, correction, _) in there.items():
        alike[v.device, v.dtype, isinstance(correction, Tensor)].append(name)
    out: dict[str, Tensor] = {}
    for names in alike.values():
        out |= dict(zip(names, _inverse_roots([there[name] for name in names]), strict=True))
    return Roots(out, missing)


def _held(optimizers: Iterable[Any]) -> dict[int, tuple[Mapping[str, Any], Mapping[str, Any], str]]:
    """Parameter (by identity) → its state, its group, and what kind of optimizer steps it."""
    held: dict[int, tuple[Mapping[str, Any], Mapping[str, Any], str]] = {}
    for optimizer in optimizers:
        states = getattr(optimizer, "state", {})
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = states[p] if p in states else {}  # a default dictionary: asking would make one
                if state or id(p) not in held:
                    held[id(p)] = (state, group, type(optimizer).__name__)
    return held


def _second_moment(
    p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], kind: str
) -> tuple[Tensor, Any, float] | str:
    """V in float32 or wider, √(1 − β₂ᵗ) (a tensor where t is on a device) and ε; or why there is none."""
    if not state:
        return NO_STATE
    v, step = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"), state.get("step")
    if not isinstance(v, Tensor) or step is None or not {"betas", "eps"} <= group.keys():
        return NO_SECOND_MOMENT.format(kind=kind)
    if is_sharded(v) or is_sharded(p):
        return SHARDED_STATE
    if v.shape != p.shape:  # factored, or flat
        return NO_SECOND_MOMENT.format(kind=kind)
    beta = group["betas"][1]
    if any(isinstance(t, Tensor) and t.device.type != "cpu" for t in (step, beta)):
        correction = (1 - beta**step).sqrt().to(p.device)
    else:
        taken = float(step)
        if taken < 1:
            return NO_STATE
        correction = math.sqrt(1 - float(beta) ** taken)
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    return v.detach().to(p.device, dtype), correction, float(group["eps"])


def _inverse_roots(parts: Sequence[tuple[Tensor, Any, float]]) -> Sequence[Tensor]:
    """(√v / c + ε)^(−½), 0 where v is 0; one launch a kind of operation for all."""
    v, corrections, eps = (list(each) for each in zip(*parts, strict=True))
    root = torch._foreach_sqrt(v)  # type: ignore[reportPrivateImportUsage]
    torch._foreach_div_(root, corrections)  # type: ignore[reportPrivateImportUsage]
    torch._foreach_add_(root, eps)  # type: ignore[reportPrivateImportUsage]
    torch._foreach_sqrt_(root)  # type: ignore[reportPrivateImportUsage]
    torch._foreach_reciprocal_(root)  # type: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(root, torch._foreach_sign(v))  # type: ignore[reportPrivateImportUsage]
    return root


EUCLIDEAN = Metric("euclidean")
METRICS = {metric.name: metric for metric in (EUCLIDEAN, Metric("adam", adam_roots))}
