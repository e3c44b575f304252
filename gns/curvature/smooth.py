"""Attention, cross-entropy and silu of few operations while the graph of an exact product is built.

What `torch` itself differentiates twice is right and slow: cross-entropy passes some ten times over its
logits for every product, attention without a fused kernel scales, masks and guards in steps of their own.
These give the same values and derivatives, which tests compare; other calls are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Slope(torch.autograd.Function):
    """Slope of cross-entropy in its logits, (p − y) w dL, with a derivative of its own in them and in dL."""

    @staticmethod
    def forward(ctx: Any, dloss: Tensor, logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """Give the slope in the logits, [N, V]; dloss [], labels and share of each row in the mean [N]."""
        p = torch.softmax(logits, -1)
        ctx.save_for_backward(dloss, p, labels, share)
        return _off_label(p.clone(), labels).mul_((share * dloss)[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        """Give the derivatives in dloss, [], and in the logits, [N, V], along a change of the slope."""
        dloss, p, labels, share = ctx.saved_tensors
        of_dloss = None
        if ctx.needs_input_grad[0]:
            mean, at_label = (p * change).sum(-1), change.gather(-1, labels[:, None])[:, 0]
            of_dloss = (share * (mean - at_label)).sum()
        curved = through_softmax(change, p).mul_((share * dloss)[:, None])  # (diag p − ppᵀ) y
        return of_dloss, curved, None, None


def through_softmax(change: Tensor, p: Tensor, dim: int = -1) -> Tensor:
    """(diag p − ppᵀ) y of each row, by torch's own kernel: one pass."""
    return torch._softmax_backward_data(change, p, dim, p.dtype)  # type: ignore[reportPrivateImportUsage]


def _off_label(p: Tensor, labels: Tensor) -> Tensor:
    """P − y, in place."""
    return p.scatter_add_(-1, labels[:, None], p.new_full((1, 1), -1.0).expand(len(labels), 1))


class _Entropy(torch.autograd.Function):
    """Mean cross-entropy; its slope is `_Slope`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels, share)
        each = functional.cross_entropy(logits, labels, reduction="none")
        return torch.where(share > 0, each * share, 0.0).sum()  # of an ignored row it may be infinite

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, share = ctx.saved_tensors
        return _Slope.apply(slopes[0], logits, labels, share), None, None  # type: ignore[return-value]


def _entropy(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mean cross-entropy of rows of logits with class labels; None for any other."""
    found = plain_entropy(*args, **kwargs)
    return None if found is None else _Entropy.apply(*found)  # type: ignore[return-value]


def plain_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rows of logits, their labels and their shares in the mean cross-entropy; None for any other."""
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    if not plain or reduction != "mean" or input.ndim != 2 or target.shape != input.shape[:1]:
        return None
    if target.is_floating_point() or not target.numel() or input.dtype not in _WIDE:
        return None
    live = target != ignore_index
    share = live.to(input.dtype)
    return input, target.long().masked_fill(~live, 0), share / share.sum()


_WIDE = (torch.float32, torch.float64)


def _attention(*args: Any, **kwargs: Any) -> Tensor | None:
    return attended(*args, **kwargs, softmax=lambda x, dim: _Softmax.apply(x))


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softmax: Callable[..., Any],
) -> Tensor | None:
    """softmax(scale q kᵀ + mask) v of four-dimensional tensors; None for what is not so simple."""
    if query.ndim != 4 or dropout_p or query.shape[:2] != key.shape[:2] or query.dtype not in _WIDE:
        return None
    if key.dtype != query.dtype or value.dtype != query.dtype or value.shape[:3] != key.shape[:3]:
        return None
    (b, h, t, d), u = query.shape, key.shape[2]
    if is_causal:
        attn_mask = torch.ones(t, u, dtype=torch.bool, device=query.device).tril()
    bias = query.new_zeros(1, 1, 1) if attn_mask is None else _bias(attn_mask, query, u)
    if bias is None:
        return None
    q, k, v = (x.reshape(b * h, -1, x.shape[-1]) for x in (query, key, value))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5 if scale is None else scale)
    return torch.bmm(softmax(scores, dim=-1), v).view(b, h, t, -1)


class _SoftmaxSlope(torch.autograd.Function):
    """(diag p − ppᵀ) dp of each row, with a derivative in dp and in p.

    That in p is known up to a constant in each row, which `_Softmax` takes out again.
    """

    @staticmethod
    def forward(ctx: Any, dp: Tensor, p: Tensor) -> Tensor:
        centred = dp - (p * dp).sum(-1, keepdim=True)
        ctx.save_for_backward(p, centred)
        return p * centred

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor, Tensor]:
        p, centred = ctx.saved_tensors
        rest = change - (p * change).sum(-1, keepdim=True)
        return p * rest, rest.mul_(centred)


class _Softmax(torch.autograd.Function):
    """Softmax of each row; its slope is `_SoftmaxSlope`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return through_softmax(slopes[0], p)
        return _SoftmaxSlope.apply(slopes[0], p)  # type: ignore[return-value]


def _bias(mask: Tensor, query: Tensor, keys: int) -> Tensor | None:
    """A mask as what is added to the scores, [1 or B·H, T, U]; None where it hides all of a row."""
    if mask.requires_grad or mask.ndim > 4 or not (mask.dtype is torch.bool or mask.dtype == query.dtype):
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    if bool((mask == -torch.inf).all(-1).any()):
        return None
    (b, h, t, _), shape = query.shape, (1,) * (4 - mask.ndim) + tuple(mask.shape)
    mask = mask.reshape(shape)
    if shape[:2] == (1, 1):
        return mask[0].expand(1, t, keys)
    return mask.expand(b, h, t, keys).reshape(b * h, t, keys)


class _SiluSlope(torch.autograd.Function):
    """dy silu′(x), with a derivative in dy and in x, whose factors are known."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, dy * second)
        return dy * first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor, Tensor, None, None]:
        first, bent = ctx.saved_tensors
        return change * first, change * bent, None, None


class _Silu(torch.autograd.Function):
    """x σ(x); its slope is `_SiluSlope`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        first = s * (1 + x * (1 - s))
        second = s * (1 - s) * (2 + x * (1 - 2 * s))
        ctx.save_for_backward(x, first, second)
        return x * s

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        x, first, second = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return slopes[0] * first
        return _SiluSlope.apply(slopes[0], x, first, second)  # type: ignore[return-value]


def _silu(input: Tensor, inplace: bool = False) -> Tensor | None:
    """silu(input), out of place; None for low precisions."""
    return None if inplace or input.dtype not in _WIDE else _Silu.apply(input)  # type: ignore[return-value]


_INSTEAD: Mapping[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.cross_entropy: _entropy,
    functional.scaled_dot_product_attention: _attention,
    functional.silu: _silu,
}


class Smooth(TorchFunctionMode):
    """Lets calls of the three go to the functions above, where they fit."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        instead = _INSTEAD.get(func)
        if instead is not None and not elsewhere(*args, *kwargs.values()):
            found = instead(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def elsewhere(*given: Any) -> bool:
    """Whether a compiler, a transform of torch.func or autocast has a say in a call."""
    transformed = torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]
    if transformed or torch.compiler.is_compiling():
        return True
    first = next((x for x in given if isinstance(x, Tensor)), None)
    return torch.is_autocast_enabled("cpu" if first is None else first.device.type)
