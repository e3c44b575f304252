"""Slow twin of B_noise: every per-example gradient, the whole dense Hessian. Imports nothing of gns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[nn.Module, object], Tensor]


def _flat_function(model: nn.Module, names: Sequence[str], f: Callable[[nn.Module], Tensor]):
    """f of the model as a function of one flat vector of some parameters."""
    parameters = dict(model.named_parameters())
    sizes = [parameters[n].numel() for n in names]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return f(self.inner)

    wrapped = Wrapped()

    def of_vector(w: Tensor) -> Tensor:
        parts = zip(names, w.split(sizes), strict=True)
        values = {f"inner.{n}": part.reshape(parameters[n].shape) for n, part in parts}
        return torch.func.functional_call(wrapped, values, ())

    return of_vector, torch.cat([parameters[n].detach().reshape(-1) for n in names])


@contextmanager
def _plain_attention() -> Generator[None]:
    """Attention with second derivatives; torch.func loads deprecated code on its first use."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def hessian(model: nn.Module, names: Sequence[str], f: Callable[[nn.Module], Tensor]) -> Tensor:
    """Dense Hessian of f(model) in the named parameters, [d, d]."""
    of_vector, w = _flat_function(model, names, f)
    with _plain_attention():
        return torch.func.hessian(of_vector)(w).detach()


def gauss_newton(
    model: nn.Module,
    names: Sequence[str],
    outputs: Callable[[nn.Module], Tensor],
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """Dense Jᵀ H_L J, [d, d]: J of the outputs, H_L of the loss in them."""
    of_vector, w = _flat_function(model, names, outputs)
    with _plain_attention():
        j, z = torch.func.jacrev(of_vector)(w).detach(), of_vector(w).detach()
        h = torch.func.hessian(loss)(z).reshape(z.numel(), z.numel())
    j = j.reshape(z.numel(), -1)
    return j.T @ h @ j


def gradients(
    model: nn.Module, names: Sequence[str], losses: Sequence[Callable[[nn.Module], Tensor]]
) -> Tensor:
    """One row cᵢ an example, [n, d]."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[n] for n in names]
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss(model), chosen, allow_unused=True)
        pairs = zip(chosen, found, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
    return torch.stack(rows).double()


def ratio(c: Tensor, a: Tensor, h: Tensor) -> tuple[float, float]:
    """(tr(HΣ), GᵀHG) from the contributions c [N, d], Σ = gradient of the mean loss, with weights a, Σa = 1.

    All pairs i ≠ j, written as a double loop: Y = Σ_{i≠j} cᵢᵀHcⱼ / Σ_{i≠j} aᵢaⱼ, X = N (Σ cᵢᵀHcᵢ − Σaᵢ² Y).
    """
    n = len(c)
    hc = c @ h.double().T
    y, weight = 0.0, 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                y += float(c[i] @ hc[j])
                weight += float(a[i] * a[j])
    y /= weight
    x = n * (sum(float(c[i] @ hc[i]) for i in range(n)) - float((a * a).sum()) * y)
    return x, y
