"""Slow twin of the optimizer's metric: Adam's second moment by its own recursion, and sums entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = dict[str, Tensor]


class SecondMoment:
    """v ← β₂ v + (1 − β₂) ḡ², kept beside the optimizer and never read from it.

    Args:
        beta: β₂.
        eps: ε.
        amsgrad: whether the largest v so far divides.
    """

    def __init__(self, beta: float = 0.999, eps: float = 1e-8, *, amsgrad: bool = False):
        self.beta, self.eps, self.amsgrad = beta, eps, amsgrad
        self.v: Gradients = {}
        self.largest: Gradients = {}
        self.t = 0

    def step(self, gradient: Gradients) -> None:
        """Take one optimizer step with this ḡ."""
        self.t += 1
        for name, g in gradient.items():
            old = self.v.get(name, torch.zeros_like(g))
            self.v[name] = self.beta * old + (1 - self.beta) * g * g
            self.largest[name] = torch.maximum(self.largest.get(name, old), self.v[name])

    def weight(self, name: str) -> Tensor:
        """D of a parameter, 1/(√v̂ + ε), and 0 where v is."""
        v = (self.largest if self.amsgrad else self.v)[name]
        d = 1 / ((v / (1 - self.beta**self.t)).sqrt() + self.eps)
        return torch.where(v > 0, d, torch.zeros_like(d))


def sums(found: Sequence[Gradients], metric: SecondMoment) -> dict[str, tuple[float, float]]:
    """Name → (m, q) = (n Σ cᵢᵀ D cᵢ, ḡᵀ D ḡ)."""
    out = {}
    for name in found[0]:
        d, total = metric.weight(name), sum(c[name] for c in found)
        each = [float((c[name] * d * c[name]).sum()) for c in found]
        out[name] = (len(found) * math.fsum(each), float((total * d * total).sum()))
    return out


def norms(found: Sequence[Gradients], metric: SecondMoment) -> list[float]:
    """gᵢᵀ D gᵢ of each example over all parameters."""
    weights = {name: metric.weight(name) for name in found[0]}
    return [len(found) ** 2 * sum(float((w * c[k] ** 2).sum()) for k, w in weights.items()) for c in found]
