"""Which rule a recorded call has, by the function that was called and how."""

from __future__ import annotations

import torch
from torch.nn import functional

from gns.curvature.factors import Kind, Matrix, Product, Quotient, Rows
from gns.curvature.operations import (
    Call,
    Elementwise,
    Entropy,
    Function,
    Linear,
    Lookup,
    Operation,
    Other,
    Softmax,
    Sum,
)
from gns.curvature.smooth import plain_entropy


def _of(names: str) -> frozenset[Function]:
    """The functions of some names, as methods of tensors, of `torch` and of `torch.nn.functional`."""
    places = (torch.Tensor, torch, functional)
    return frozenset(
        getattr(place, name) for name in names.split() for place in places if hasattr(place, name)
    )


_LINEAR = _of(
    "view reshape flatten unflatten transpose permute movedim swapaxes t unsqueeze squeeze expand expand_as "
    "contiguous to float double type_as clone __getitem__ narrow select index_select chunk split "
    "tensor_split unbind "
    "repeat repeat_interleave tile cat concat stack sum mean neg __neg__ roll flip tril triu cumsum "
    "gather diagonal"
) | {getattr(torch.Tensor, name).__get__ for name in ("T", "mT")}
_ELEMENTWISE = _of(
    "silu gelu relu leaky_relu elu selu mish softplus sigmoid logsigmoid tanh exp log sqrt rsqrt square "
    "reciprocal sin cos erf abs"
)
_POWER = _of("pow __pow__")
_ADD, _SUB, _RSUB = _of("add __add__ __radd__"), _of("sub __sub__ subtract"), _of("__rsub__ rsub")
_MUL, _DIV = _of("mul __mul__ __rmul__ multiply"), _of("div __truediv__ __div__ divide true_divide")
_MATMUL, _BIASED = _of("matmul __matmul__ bmm mm"), _of("addmm baddbmm")
_SOFTMAX = frozenset({torch.softmax, torch.Tensor.softmax, functional.softmax})


def operation(call: Call) -> Operation:
    """Give the rule of a call: that of its kind where it is the plain case of it, else that of any."""
    return _known(call) or Other(call)


def _known(call: Call) -> Operation | None:
    f, args, kwargs = call.function, call.args, call.kwargs
    if len(call.outs) > 1 and f not in _LINEAR or not args:
        return None
    if f in _LINEAR:
        return None if _retyped(call) else Linear(call)
    if f in _ELEMENTWISE or (f in _POWER and len(args) == 2 and isinstance(args[1], int | float)):
        return Elementwise(call) if len(call.live) == 1 and args[0] is call.live[0] else None
    if f in _SOFTMAX:
        return _softmax(call)
    if f is functional.dropout:
        still = kwargs.get("training") is False or args[2:3] == (False,)
        return Sum(call, [(args[0], 1)]) if still and args[0] is call.live[0] else None
    if f is functional.linear:
        return _rows(call)
    if f is functional.embedding:
        return _lookup(call)
    if f is functional.cross_entropy:
        found = plain_entropy(*args, **kwargs)
        return None if found is None else Entropy(call, *found)
    if len(args) == 2 and (not kwargs or (kwargs.keys() == {"alpha"} and f not in _MUL | _DIV)):
        return _pair(call, float(kwargs.get("alpha", 1)))
    if f in _BIASED and len(args) == 3 and kwargs.keys() <= {"alpha", "beta"}:
        scale, beta = float(kwargs.get("alpha", 1)), float(kwargs.get("beta", 1))
        return Product(call, args[1], args[2], Matrix(), scale=scale, bias=args[0], beta=beta)
    return None


def _retyped(call: Call) -> bool:
    """Whether a view is one of other numbers, not of others' places."""
    return call.function is torch.Tensor.view and any(
        isinstance(x, torch.dtype) for x in (*call.args, *call.kwargs.values())
    )


def _pair(call: Call, alpha: float) -> Operation | None:
    f, (a, b) = call.function, call.args
    if f in _ADD | _SUB | _RSUB:
        flip = f in _RSUB
        return Sum(call, [(a, -alpha if flip else 1), (b, 1 if flip else alpha if f in _ADD else -alpha)])
    if f in _MUL:
        return Product(call, a, b, Kind())
    if f in _DIV and not call.moves(b):
        return Product(call, a, b, Quotient())
    if f in _MATMUL and a.ndim > 1 and b.ndim > 1:
        return Product(call, a, b, Matrix())
    return None


def _rows(call: Call) -> Operation | None:
    named = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
    x, w = named["input"], named["weight"]
    return Product(call, x, w, Rows(), bias=named.get("bias")) if w.ndim == 2 else None


def _softmax(call: Call) -> Operation | None:
    named = dict(zip(("input", "dim"), call.args, strict=False)) | call.kwargs
    dim, dtype = named.get("dim"), named.get("dtype")
    if not isinstance(dim, int) or dtype not in (None, call.live[0].dtype) or len(call.live) != 1:
        return None
    return Softmax(call, dim)


def _lookup(call: Call) -> Operation | None:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    named = dict(zip(names, call.args, strict=False)) | call.kwargs
    if named.get("max_norm") is not None or named.get("scale_grad_by_freq") or named.get("sparse"):
        return None
    padding = named.get("padding_idx")
    if padding is not None and padding < 0:
        padding += len(named["weight"])
    return Lookup(call, named["input"], padding)
