"""The linear layer y = x Wᵀ + b, and so both LoRA factors, which `peft` builds as linear layers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gns.rules.base import Rule, added, block_sq_norms, exactly, joined, register, unknown, wide
from gns.rules.probing import close, own_parameters, run

FLOAT = 4  # bytes
CACHED = 2**22  # bytes of products that are squared before they leave a CPU's cache
PASSES = 48  # multiply-adds that a CPU makes while it adds up and squares one entry of a block (measured)


def as_sequences(x: Tensor) -> Tensor:
    """View [B, ..., F] as [B, T, F].

    Raises:
        ValueError: there is no batch dimension.
    """
    if x.ndim < 2:
        raise ValueError(f"an activation has shape {tuple(x.shape)}; [B, ..., features] is needed")
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply [B, N, K] by [B, K, M] into [B, N, M], float32 or wider.

    Products of two 16-bit floats are exact in float32, and on CUDA the matrix units add them up in float32
    and can hand that out: a wider copy of the activations would gain nothing and cost more than the product.
    """
    halves = a.dtype is b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    if halves and a.is_cuda and not torch.compiler.is_compiling():
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(wide(a), wide(b))


def linear_blocks(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to a linear layer's parameter.

    weight: C_b = Σ_t dy_bt x_btᵀ        bias: c_b = Σ_t dy_bt

    Args:
        layer: the layer; not looked at.
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: "weight" or "bias".

    Returns:
        [B, O, I] or [B, O], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Slow twin: tests/reference/per_example.py
    """
    if parameter == "weight":
        return wide_bmm(as_sequences(dy).mT, as_sequences(x))
    if parameter == "bias":
        return wide(as_sequences(dy)).sum(1)
    raise unknown(parameter, "Linear", ("weight", "bias"))


def linear_total(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Sum of `linear_blocks` over the examples, in one product."""
    if parameter == "weight":
        a, b = (as_sequences(t).flatten(0, 1).unsqueeze(0) for t in (dy, x))
        return wide_bmm(a.mT, b)[0]
    return linear_blocks(layer, x, dy, parameter).sum(0)


def gram_is_cheaper(x: Tensor, dy: Tensor) -> bool:
    """Compare the two forms' multiply-adds: T²(I + O) for the Gram form against T·I·O for the product."""
    t, i, o = x.shape[1:-1].numel(), x.shape[-1], dy.shape[-1]
    return t * (i + o) < i * o


def linear_sq_norms_gram(x: Tensor, dy: Tensor, limit: int = 2**28) -> Tensor:
    """Squared norm of each example's weight gradient, without forming the gradient.

    s_b = ‖Σ_t dy_bt x_btᵀ‖² = Σ_tu (x_bt·x_bu)(dy_bt·dy_bu)

    Args:
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.
        limit: bytes of Gram matrices alive at once; positions t are worked off in chunks.

    Returns:
        [B], float32 or float64, in (loss / parameter)².

    Memory: 2T² per example, against I·O for the product.
    Source: Li et al. 2022, arXiv:2110.05679; T = 1 is Goodfellow 2015, arXiv:1510.01799.
    Slow twin: tests/reference/per_example.py
    """
    x, dy = as_sequences(x), as_sequences(dy)
    b, t = x.shape[:2]
    if t == 1:
        return wide(x).square().sum((1, 2)) * wide(dy).square().sum((1, 2))
    rows = max(1, limit // (2 * FLOAT * max(1, b * t)))
    parts = [
        wide_bmm(xs, x.mT).mul_(wide_bmm(dys, dy.mT)).sum((1, 2))
        for xs, dys in zip(x.split(rows, 1), dy.split(rows, 1), strict=True)
    ]
    return added(parts)


def linear_sq_norms(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, limit: int) -> Tensor | None:
    """‖C_b‖² of a weight, [B], by the cheaper form in chunks of at most `limit` bytes; None for a bias.

    Where one example's I·O product alone would pass the limit, output features are worked off in slices.
    """
    if parameter != "weight":
        return None
    if gram_is_cheaper(x, dy):
        t = x.shape[1:-1].numel()
        size = max(1, limit // (2 * FLOAT * max(1, t * t)))
        chunks = zip(x.split(size), dy.split(size), strict=True)
        return joined([linear_sq_norms_gram(a, b, limit) for a, b in chunks])
    i, o = x.shape[-1], dy.shape[-1]
    if FLOAT * i * o <= limit:
        return _direct_sq_norms(as_sequences(x), as_sequences(dy), limit)
    width = max(1, limit // (FLOAT * i))
    pairs = zip(x.split(1), dy.split(1), strict=True)
    return joined([_sliced_sq_norm(as_sequences(a), as_sequences(b), width) for a, b in pairs])


def _direct_sq_norms(x: Tensor, dy: Tensor, limit: int) -> Tensor:
    """‖C_b‖², [B], from the products themselves, the smaller side first: as MKL likes it, by a quarter.

    On CPU a chunk stays in the cache: what does not is written and read back at several times the price.
    """
    limit = limit if dy.is_cuda else min(limit, CACHED)
    size = max(1, limit // (FLOAT * x.shape[-1] * dy.shape[-1]))
    a, b = (dy, x) if dy.shape[-1] <= x.shape[-1] else (x, dy)
    if len(a) <= size:
        return block_sq_norms(wide_bmm(a.mT, b), scratch=True)
    chunks = zip(a.split(size), b.split(size), strict=True)
    return torch.cat([block_sq_norms(wide_bmm(c.mT, d), scratch=True) for c, d in chunks])


def _sliced_sq_norm(x: Tensor, dy: Tensor, width: int) -> Tensor:
    """‖C_b‖² of one example, [1], from products of `width` output features at a time."""
    return added([wide_bmm(part.mT, x).square().sum((1, 2)) for part in dy.split(width, -1)])


def sharing_pays(x: Tensor, dy: Tensor) -> bool:
    """Whether norms and sum out of one product cost less than the norms beside autograd's own gradient.

    The product is there anyway, so that what it adds is a pass over the blocks: on CPU as much as `PASSES`
    multiply-adds an entry. It always is where the norms alone would take the product.

    Args:
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], of the shape of its output.
    """
    if not gram_is_cheaper(x, dy):
        return True
    t, i, o = x.shape[1:-1].numel(), x.shape[-1], dy.shape[-1]
    return not dy.is_cuda and t * t * (i + o) > PASSES * i * o


def linear_together(
    layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, limit: int
) -> tuple[Tensor, Tensor]:
    """Squared norms of the examples' weight gradients, and their sum, out of one product.

    s_b = ‖C_b‖²        C = Σ_b C_b        C_b = Σ_t dy_bt x_btᵀ

    Args:
        layer: the layer; not looked at.
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: "weight".
        limit: bytes of blocks alive at once.

    Returns:
        s [B], float32 or float64, in (loss / parameter)², and C [O, I], contiguous, in loss / parameter.

    Raises:
        ValueError: the parameter is not the weight.

    Memory: C, as the gradient that it is, beside blocks below the limit (on CPU, below the cache).
    Slow twin: tests/reference/per_example.py
    """
    if parameter != "weight":
        raise unknown(parameter, "Linear, norms and sum together", ("weight",))
    x, dy = as_sequences(x), as_sequences(dy)
    i, o = x.shape[-1], dy.shape[-1]
    limit = limit if dy.is_cuda else min(limit, CACHED)
    if o > 4 * i:  # a LoRA factor B: the short side first, as MKL likes it
        norms, total = _norms_and_sum(dy, x, limit)
        return norms, total.mT.clone(memory_format=torch.contiguous_format)  # strides of a side of 1 too
    return _norms_and_sum(x, dy, limit)


def _norms_and_sum(x: Tensor, dy: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """‖C_b‖² [B] and Σ_b C_b [O, I], in slices of output features where one block alone passes the limit."""
    i, o = x.shape[-1], dy.shape[-1]
    total = torch.empty(o, i, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    width = min(o, max(1, limit // (FLOAT * i)))
    slices = zip(dy.split(width, -1), total.split(width), strict=True)
    return added([_added_up(x, part, to, limit) for part, to in slices]), total


def _added_up(x: Tensor, dy: Tensor, total: Tensor, limit: int) -> Tensor:
    """Write Σ_b C_b into `total`, [O, I], chunk by chunk, and give ‖C_b‖², [B]."""
    size, norms = max(1, limit // (FLOAT * max(1, total.numel()))), []
    for number, (a, b) in enumerate(zip(x.split(size), dy.split(size), strict=True)):
        found = wide_bmm(b.mT, a)
        part = found[0] if len(found) == 1 else found.sum(0)
        if number:
            total.add_(part)
        else:
            total.copy_(part)
        norms.append(block_sq_norms(found, scratch=True))
    return joined(norms)


LINEAR = Rule(
    "Linear",
    ("weight", "bias"),
    linear_blocks,
    needs_input=("weight",),
    total=linear_total,
    sq_norms=linear_sq_norms,
    together=linear_together,
    autocast=True,
)


def multiplies(module: nn.Module, *, transposed: bool) -> bool:
    """Whether a module computes x Wᵀ + b (or, transposed, x W + b), found out on random numbers."""
    given = own_parameters(module)
    if (
        given is None
        or given.keys() - {"weight", "bias"}
        or "weight" not in given
        or given["weight"].ndim != 2
    ):
        return False
    w = given["weight"].mT if transposed else given["weight"]  # [O, I]
    if "bias" in given and given["bias"].shape != w.shape[:1]:
        return False
    x = torch.randn(2, 3, w.shape[1], generator=torch.Generator().manual_seed(1))
    found = run(module, given, x)
    return close(found, x @ w.mT + given.get("bias", 0.0))


def _recognise(module: nn.Module) -> Rule | None:
    by_type = exactly(LINEAR, nn.Linear)(module)
    # one that is only found to compute the same may do so in float32, whatever autocast says
    return by_type or (replace(LINEAR, autocast=False) if multiplies(module, transposed=False) else None)


register(LINEAR, _recognise)
