"""The main slow twin: one backward pass per example, in plain autograd. Imports nothing of gns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Gradients = dict[str, Tensor]


def contributions(
    parameters: Mapping[str, Tensor], losses: Sequence[Callable[[], Tensor]]
) -> list[Gradients]:
    """Run one forward and one backward pass per example.

    Args:
        parameters: name → parameter.
        losses: one function an example, which gives what that example adds to the loss of the step.

    Returns:
        One dict an example: name → its gradient cᵢ in float64 (zero where the loss does not depend on it).
    """
    out = []
    for loss in losses:
        found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), found, strict=True)
        out.append(
            {k: torch.zeros_like(p).double() if g is None else g.detach().double() for (k, p), g in pairs}
        )
    return out


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name → parameter, of those that train."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sums(found: Sequence[Gradients]) -> dict[str, tuple[float, float]]:
    """Name → (m, q) = (n Σ‖cᵢ‖², ‖Σcᵢ‖²), added up one number at a time."""
    out = {}
    for name in found[0]:
        each = [c[name].flatten() for c in found]
        squares = sum(float(c @ c) for c in each)
        total = torch.stack(each).sum(0)
        out[name] = (len(each) * squares, float(total @ total))
    return out


def joint(found: Sequence[Gradients], names: Sequence[str] | None = None) -> tuple[float, float]:
    """(m, q) over all parameters, or over some."""
    each = [v for k, v in sums(found).items() if names is None or k in names]
    return sum(m for m, _ in each), sum(q for _, q in each)


def flat(found: Sequence[Gradients]) -> Tensor:
    """[n, all parameters], the rows cᵢ."""
    return torch.stack([torch.cat([g.flatten() for g in c.values()]) for c in found])


def norms(found: Sequence[Gradients], names: Sequence[str] | None = None) -> list[float]:
    """‖gᵢ‖² = n² ‖cᵢ‖² of each example over all parameters, or over some."""
    chosen = list(found[0]) if names is None else names
    return [len(found) ** 2 * sum(float((c[k] * c[k]).sum()) for k in chosen) for c in found]


def spread(found: Sequence[Gradients], names: Sequence[str] | None = None) -> list[float]:
    """[(1/n) Σ‖gᵢ‖⁴, the largest ⌈n/10⌉ of ‖gᵢ‖², descending]."""
    each = sorted(norms(found, names), reverse=True)
    return [sum(x * x for x in each) / len(each), *each[: (len(each) + 9) // 10]]
