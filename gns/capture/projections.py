"""Seeded random projections of a parameter's sums, so that ranks compare Σcᵢ and ḡ without exchanging either.

A parameter's entries are given random signs and dealt into K buckets; the K bucket sums of x are S x. The
map is linear, so the ranks' parts add up to the whole's projections, and it keeps squared norms on average:

    E ‖S x‖² = ‖x‖²;   ‖S x‖² / ‖x‖² is about χ²_K / K for a dense x

With K = 8 a difference is seen as less than half its size in one of 50 draws, and as more than twice its
size in one of 10⁴. So `SLACK` = 2 times the tolerance of one process is allowed, and what is wrong by four
times the tolerance or more is found at the first look in 49 of 50 cases, else later: each self-check draws
anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

K = 8
SLACK = 2.0


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank; the tensor itself unless it is a DTensor."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor; imports nothing."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def copies(tensor: Tensor, size: int) -> int:
    """On how many of `size` ranks each entry of a parameter is held."""
    if not is_sharded(tensor):
        return size
    pairs = zip(tensor.device_mesh.shape, tensor.placements, strict=True)  # type: ignore[reportAttributeAccessIssue]
    return int(np.prod([dim for dim, placement in pairs if placement.is_replicate()]))


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Put this rank's part of a parameter at its place among zeros.

    Args:
        part: what `local` gives of the parameter or its gradient.
        like: the parameter.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)  # type: ignore[reportAttributeAccessIssue]
    out = torch.zeros(like.shape, dtype=part.dtype, device=part.device)
    if part.numel():
        out[tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))] = part
    return out


def project(tensors: list[Tensor], seed: int) -> Tensor:
    """Project tensors of one shape and device, with the same signs.

    Args:
        tensors: of n entries each.
        seed: of the signs; every rank must use the same.

    Returns:
        [len(tensors), K], S x of each, summed in float64 where the device has it.
    """
    n, device = tensors[0].numel(), tensors[0].device
    generator = torch.Generator(device).manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator, device=device, dtype=torch.int8).mul_(2).sub_(1)
    wide = torch.float32 if device.type == "mps" else torch.float64
    found = []
    for x in tensors:
        signed = nn.functional.pad(x.reshape(-1) * signs, (0, -n % K))
        found.append(signed.reshape(-1, K).sum(0, dtype=wide))
    return torch.stack(found)


def factor(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], size: int, rtol: float) -> float | None:
    """Find the engine's factor f, ḡ = f · Σ over all ranks of what each has in backward.

    The median over parameters of ⟨a, b⟩/⟨a, a⟩: what is wrong with a few parameters does not move it. A
    factor within `rtol` of 1/size (the ranks' mean) or of 1 (their sum) is taken for that.

    Args:
        pairs: parameter → projections a of the sum over ranks and b of ḡ, [K] each.
        size: number of ranks.
        rtol: of the engine's arithmetic.

    Returns:
        The factor, or None where every sum is zero or not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        ratios = [a @ b / (a @ a) for a, b in pairs.values() if 0 < a @ a < np.inf]
    ratios = [r for r in ratios if np.isfinite(r)]
    if not ratios:
        return None
    found = float(np.median(ratios))
    return next((f for f in (1 / size, 1.0) if abs(found - f) <= rtol * f), found)
