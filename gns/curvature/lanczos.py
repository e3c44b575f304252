"""By-products: the largest eigenvalue of H by Lanczos iteration, and tr H by its random first vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from gns.curvature.errors import CurvatureError

Vector = Mapping[str, Tensor]


def lanczos(
    product: Callable[[dict[str, Tensor]], Vector], like: Vector, steps: int, seed: int
) -> tuple[float, float]:
    """Iterate from a vector of random signs.

    Args:
        product: v → H v.
        like: parameter → a tensor of its shape.
        steps: products to make.
        seed: of the signs.

    Returns:
        (zᵀHz of the sign vector z, whose mean is tr H; the largest Ritz value, a lower bound of λ_max).

    Raises:
        CurvatureError: a product is not finite.

    Memory: one vector a step, for full reorthogonalisation.
    Source: Lanczos 1950; Hutchinson 1990 for tr H.
    """
    shapes = {name: x.shape for name, x in like.items()}
    first = next(iter(like.values()))
    generator = torch.Generator().manual_seed(seed)
    d = sum(x.numel() for x in like.values())
    z = torch.randint(2, (d,), generator=generator).double().mul_(2).sub_(1).to(first.device)
    basis, diagonal, off = [z / d**0.5], [], []
    for k in range(min(steps, d)):
        w = _flat(product(_shaped(basis[k], shapes, like)), like)
        if not bool(torch.isfinite(w).all()):
            raise CurvatureError("a product for the largest eigenvalue is not finite; take method='exact'")
        diagonal.append(float(w @ basis[k]))
        for v in basis:
            w = w - (w @ v) * v
        for v in basis:  # twice is enough
            w = w - (w @ v) * v
        size = float(w.norm())
        if size <= 1e-10 * max(1e-300, max(map(abs, diagonal))):
            break
        off.append(size)
        basis.append(w / size)
    off = off[: len(diagonal) - 1]
    values = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    return diagonal[0] * d, float(values[-1])


def _flat(vector: Vector, like: Vector) -> Tensor:
    return torch.cat([vector[name].double().reshape(-1) for name in like])


def _shaped(flat: Tensor, shapes: Mapping[str, torch.Size], like: Vector) -> dict[str, Tensor]:
    out, start = {}, 0
    for name, shape in shapes.items():
        out[name] = flat[start : start + shape.numel()].reshape(shape).to(like[name])
        start += shape.numel()
    return out
