"""The Gauss-Newton operator Jᵀ H_L J: J of the model's outputs, H_L of the loss in them; never negative.

Defined here for cross-entropy and squared error, whose H_L is positive semi-definite. J v comes from a second
derivative of Jᵀ y, which is linear in y (double-backward trick), so attention runs as plain products.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gns.curvature.errors import CurvatureError
from gns.curvature.parts import Point
from gns.curvature.products import HIDDEN, without_second

_ENTROPY = ("NllLoss", "CrossEntropyLoss")
_SQUARES = ("MseLoss",)
_LINEAR_RTOL = 1e-4
_OTHERWISE = 'take operator="hessian" with method="difference", which needs no second derivative'


class GaussNewton:
    """Products with the Gauss-Newton matrix of one part's loss.

    Args:
        point: the model and its loss.
        batch: the part.

    Raises:
        CurvatureError: the model's output is no tensor and has no `logits`, the loss does not come from it,
            or it is neither cross-entropy nor squared error; an operation has no second derivative, or
            gradients come past the graph (reentrant checkpointing).

    Source: Schraudolph 2002, Neural Comput. 14:1723; Martens 2020, arXiv:1412.1193, §8.
    """

    def __init__(self, point: Point, batch: Any):
        self.names, self.parameters = list(point.parameters), list(point.parameters.values())
        with _twice():
            loss = point.value(batch)
        self.mass = point.mass()
        self.out = outputs_of(point.output())
        with _twice():
            (slope,) = torch.autograd.grad(loss, self.out, create_graph=True, allow_unused=True)
        if slope is None:
            raise CurvatureError(
                "the loss does not depend on the model's outputs (`logits`): a fused or separate head? Take "
                'operator="hessian"'
            )
        _refuse_other(loss, self.out, slope)
        self.slope = slope
        self.dual = torch.zeros_like(self.out, requires_grad=True)
        with _twice():
            found = torch.autograd.grad(
                self.out, self.parameters, self.dual, create_graph=True, allow_unused=True
            )
        lost = [name for g, name in zip(found, self.names, strict=True) if g is None]
        if (name := point.hidden(batch, lost)) is not None:
            raise CurvatureError(HIDDEN.format(name=name) + _OTHERWISE)
        self.pulled = [(g, n) for g, n in zip(found, self.names, strict=True) if g is not None]

    def pushed(self, vector: Mapping[str, Tensor]) -> Tensor:
        """J v, of the outputs' shape."""
        outputs, weights = zip(*[(g, vector[name].to(g)) for g, name in self.pulled], strict=True)
        with _twice():
            (found,) = torch.autograd.grad(outputs, self.dual, weights, retain_graph=True)
        return found.detach()

    def curved(self, change: Tensor) -> Tensor:
        """H_L y, of the outputs' shape."""
        (found,) = torch.autograd.grad(self.slope, self.out, change.to(self.slope), retain_graph=True)
        return found.detach()

    def product(self, vector: Mapping[str, Tensor], *, signed: bool = False) -> dict[str, Tensor]:
        """Jᵀ H_L J v."""
        back = self.curved(self.pushed(vector))
        with _twice():
            found = torch.autograd.grad(
                self.out, self.parameters, back.to(self.out), retain_graph=True, allow_unused=True
            )
        zipped = zip(self.names, self.parameters, found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g.detach() for name, p, g in zipped}


@contextmanager
def _twice() -> Generator[None]:
    """Calls and derivatives with attention as plain products: checkpointed layers are called anew in them.

    Raises:
        CurvatureError: something has no second derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if (said := without_second(error)) is None:
            raise
        raise CurvatureError(f"{said}; turn checkpointing off for the reading, or {_OTHERWISE}") from error


def outputs_of(out: Any) -> Tensor:
    """Give the outputs that the loss is made of.

    Raises:
        CurvatureError: there are none.
    """
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if found is None and isinstance(out, Mapping):
        found = out.get("logits")
    if not isinstance(found, Tensor) or not found.requires_grad:
        raise CurvatureError(
            f'operator="ggn" needs a model that gives a tensor or has `logits`; this gives a '
            f'{type(out).__name__}. Take operator="hessian"'
        )
    return found


def _refuse_other(loss: Tensor, out: Tensor, slope: Tensor) -> None:
    """Let pass cross-entropy, by the loss's own graph, and squared error, whose slope is linear."""
    names = _names_between(loss, out)
    kinds = [k for k in (*_ENTROPY, *_SQUARES) if any(k in name for name in names)]
    if len(kinds) == 1 or _is_square(out, slope):
        return
    raise CurvatureError(
        'operator="ggn" fits cross-entropy and squared error only; the loss is made of '
        f'{", ".join(sorted(names)[:6])}. Take operator="hessian"'
    )


def _names_between(loss: Tensor, out: Tensor) -> set[str]:
    """Name the operations on the way from the outputs to the loss."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node is out.grad_fn or node in seen:
            continue
        seen.add(node)
        found.add(type(node).__name__)
        todo += [n for n, _ in node.next_functions]
    return {name.removesuffix("0").removesuffix("Backward") for name in found}


def _is_square(out: Tensor, slope: Tensor) -> bool:
    """Whether H_L is a constant times one, or zero, entry by entry: a sum of squares."""
    if not slope.requires_grad:
        return False
    generator = torch.Generator(out.device).manual_seed(0)
    made = []
    for _ in range(2):
        y = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
        (h,) = torch.autograd.grad(slope, out, y.to(slope), retain_graph=True)
        made.append(h.detach() / y)
    a, b = made
    there = a[a != 0]
    if not there.numel() or bool((there < 0).any()):
        return False
    same = (a - b).abs() <= _LINEAR_RTOL * a.abs()
    graph = torch.autograd.grad(slope.sum(), out, retain_graph=True, create_graph=True)[0]
    return bool(same.all()) and not graph.requires_grad
