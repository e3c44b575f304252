"""One elementary operation y = f(x, …) of a tape: what a tangent ẋ makes of it, to second order.

Each takes the tangents of its inputs to ẏ = f′ẋ, the tangent of its output, and to z = ∂⟨λ, f′ẋ⟩/∂x, what the
operation's own curvature adds to the change of the gradient at x; λ = ∂L/∂y is known and the same for all
vectors. z is zero where f is linear. Any operation that `torch` differentiates twice has a rule, `Other`; the
rest here are the same for less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Moved = MutableMapping[int, Tensor]  # id of a tensor → its tangent; those that stay are not in it
Bent = list[tuple[Tensor, Tensor]]  # tensor, z
Function = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """A recorded call.

    Args:
        function: what was called.
        args: with what.
        kwargs: with what else.
        live: the tensors among these that depend on the parameters, each once.
        outs: those that came out of it and depend on them.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    live: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]

    def moves(self, value: Any) -> bool:
        """Whether a value is a tensor that depends on the parameters."""
        return isinstance(value, Tensor) and any(value is x for x in self.live)

    def again(self, instead: Mapping[int, Tensor], *, function: Function | None = None) -> Any:
        """Call it with other tensors in place of some; of tensors that move and are not given, zeros."""
        args = [self._swapped(x, instead) for x in self.args]
        kwargs = {name: self._swapped(x, instead) for name, x in self.kwargs.items()}
        return (function or self.function)(*args, **kwargs)

    def _swapped(self, value: Any, instead: Mapping[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            there = instead.get(id(value))
            return there if there is not None else torch.zeros_like(value) if self.moves(value) else value
        if type(value) in (tuple, list):
            return type(value)(self._swapped(x, instead) for x in value)
        return value


class Operation:
    """A call with its rule.

    Args:
        call: recorded.
    """

    curved = False  # whether λ is asked for

    def __init__(self, call: Call):
        self.call = call

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Be told λ of each output; None where the loss does not depend on it."""

    def push(self, moved: Moved) -> Bent:
        """Add the tangents of the outputs to those of the inputs; give z."""
        raise NotImplementedError

    def _set(self, moved: Moved, tangent: Tensor) -> None:
        moved[id(self.call.outs[0])] = tangent


class Linear(Operation):
    """Homogeneous in all tensors that move: the call itself, of tangents."""

    def __init__(self, call: Call):
        super().__init__(call)
        self.function = torch.Tensor.reshape if call.function is torch.Tensor.view else call.function
        self.first = len(call.live) == 1 and call.args[0] is call.live[0]
        self.rest = call.args[1:]

    def push(self, moved: Moved) -> Bent:
        """Call it."""
        if self.first:
            found = self.function(moved[id(self.call.live[0])], *self.rest, **self.call.kwargs)
        else:
            found = self.call.again(moved, function=self.function)
        if isinstance(found, Tensor):
            self._set(moved, found)
        else:
            moved.update((id(y), dy) for y, dy in zip(self.call.outs, found, strict=True))
        return []


class Sum(Operation):
    """a·x + b·y + …, broadcast."""

    def __init__(self, call: Call, terms: Iterable[tuple[Any, float]]):
        super().__init__(call)
        self.terms = [(id(x), c) for x, c in terms if call.moves(x)]
        self.shape, self.dtype = call.outs[0].shape, call.outs[0].dtype

    def push(self, moved: Moved) -> Bent:
        """Add the tangents."""
        total: Tensor | None = None
        for key, c in self.terms:
            if (dx := moved.get(key)) is not None:
                total = (dx if c == 1 else c * dx) if total is None else torch.add(total, dx, alpha=c)
        if total is not None:
            self._set(moved, _like(total, self.shape, self.dtype))
        return []


class Product(Operation):
    """c · a∘b + beta · bias, with ∘ elementwise or a matrix product.

    Args:
        call: recorded.
        a: left factor.
        b: right factor.
        times: forward, (a, b) → a∘b.
        back: (λ, a, b) → the gradients of ⟨λ, a∘b⟩ in a and in b, each by a function of its own.
        scale: c.
        bias: what is added, if it moves.
        beta: of the bias.
    """

    def __init__(
        self,
        call: Call,
        a: Any,
        b: Any,
        times: Function,
        back: tuple[Function, Function],
        *,
        scale: float = 1.0,
        bias: Any = None,
        beta: float = 1.0,
    ):
        super().__init__(call)
        self.a, self.b, self.times, self.back, self.scale = a, b, times, back, scale
        self.bias, self.beta = bias if call.moves(bias) else None, beta
        self.curved = call.moves(a) and call.moves(b)
        self.slope: Tensor | None = None
        self.shape, self.dtype = call.outs[0].shape, call.outs[0].dtype

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Keep cλ."""
        (slope,) = slopes
        self.slope = slope if slope is None or self.scale == 1 else self.scale * slope

    def push(self, moved: Moved) -> Bent:
        """ẏ = ȧ∘b + a∘ḃ; in a λ∘ḃ, in b ȧ∘λ."""
        da, db = moved.get(id(self.a)), moved.get(id(self.b))
        total = self.times(da, self.b) if da is not None else None
        if db is not None:
            other = self.times(self.a, db)
            total = other if total is None else total + other
        if total is not None and self.scale != 1:
            total = self.scale * total
        if self.bias is not None and (dc := moved.get(id(self.bias))) is not None:
            total = self.beta * dc if total is None else torch.add(total, dc, alpha=self.beta)
        if total is not None:
            self._set(moved, _like(total, self.shape, self.dtype))
        if self.slope is None:
            return []
        bent = [] if db is None else [(self.a, self.back[0](self.slope, db, self.a))]
        return bent if da is None else [*bent, (self.b, self.back[1](self.slope, da, self.b))]


class Elementwise(Operation):
    """y = f(x) entry by entry: ẏ = f′ẋ, z = λf″ẋ."""

    curved = True

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Compute f′ and λf″."""
        (x,), (slope,) = self.call.live, slopes
        with torch.enable_grad():
            free = x.detach().requires_grad_()
            y = self.call.again({id(x): free})
            (first,) = torch.autograd.grad(y.sum(), free, create_graph=True)
            bends = first.requires_grad and slope is not None
            second = torch.autograd.grad(first.sum(), free, allow_unused=True)[0] if bends else None
        self.first = first.detach()
        self.second = None if second is None or slope is None else second * slope

    def push(self, moved: Moved) -> Bent:
        """Multiply twice."""
        (x,) = self.call.live
        dx = moved[id(x)]
        self._set(moved, self.first * dx)
        return [] if self.second is None else [(x, self.second * dx)]


class Softmax(Operation):
    """p = softmax(x): ṗ = (diag p − ppᵀ) ẋ, z = ṗ∘e − p⟨ṗ, e⟩ with e = λ − ⟨p, λ⟩."""

    curved = True

    def __init__(self, call: Call, dim: int):
        super().__init__(call)
        self.dim, self.p = dim, call.outs[0].detach()
        self.off: Tensor | None = None

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Keep e."""
        (slope,) = slopes
        if slope is not None:
            self.off = slope - (self.p * slope).sum(self.dim, keepdim=True)

    def push(self, moved: Moved) -> Bent:
        """Two passes of torch's own kernel's kind."""
        (x,) = self.call.live
        dp = through_softmax(moved[id(x)], self.p, self.dim)
        self._set(moved, dp)
        if self.off is None:
            return []
        bent = dp * self.off
        return [(x, torch.addcmul(bent, self.p, bent.sum(self.dim, keepdim=True), value=-1))]


def through_softmax(change: Tensor, p: Tensor, dim: int = -1) -> Tensor:
    """(diag p − ppᵀ) y of each row, by torch's own kernel: one pass."""
    return torch._softmax_backward_data(change, p, dim, p.dtype)  # type: ignore[reportPrivateImportUsage]


class Entropy(Operation):
    """Cross-entropy of rows of logits with class labels: L̇ = Σ w(p − y)·ẋ, z = λw (diag p − ppᵀ) ẋ."""

    curved = True

    def __init__(self, call: Call, logits: Tensor, labels: Tensor, share: Tensor):
        super().__init__(call)
        self.logits, self.labels, self.share = logits, labels, share[:, None]

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Compute p and the slope."""
        (slope,) = slopes
        self.p = torch.softmax(self.logits.detach(), -1)
        label = self.p.new_full((1, 1), -1.0).expand(len(self.labels), 1)
        self.slope = self.p.clone().scatter_add_(-1, self.labels[:, None], label).mul_(self.share)
        self.weight = None if slope is None else self.share * slope

    def push(self, moved: Moved) -> Bent:
        """One pass for each."""
        dx = moved[id(self.logits)]
        self._set(moved, torch.dot(self.slope.view(-1), dx.reshape(-1)))
        if self.weight is None:
            return []
        return [(self.logits, through_softmax(dx, self.p).mul_(self.weight))]


class Lookup(Operation):
    """Rows of a table; one of them, the padding's, is no parameter."""

    def __init__(self, call: Call, at: Tensor, padding: int | None):
        super().__init__(call)
        self.at, self.padding = at, padding

    def push(self, moved: Moved) -> Bent:
        """Look up its tangents."""
        found = functional.embedding(self.at, moved[id(self.call.live[0])])
        if self.padding is not None:
            found = found.masked_fill((self.at == self.padding)[..., None], 0.0)
        self._set(moved, found)
        return []


class Other(Operation):
    """Any operation: (v, x) → f′(x)ᵀv is differentiated once more, in v for ẏ and in x, at v = λ, for z."""

    curved = True

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Build its graph anew, apart from the model's.

        Raises:
            Changed: it does not give the same again, as what draws at random.
        """
        with torch.enable_grad():
            self.free = [x.detach().requires_grad_() for x in self.call.live]
            found = self.call.again(dict(zip(map(id, self.call.live), self.free, strict=True)))
            ys = [y for y in ([found] if isinstance(found, Tensor) else found) if y.requires_grad]
            if not _same(ys, self.call.outs):
                raise Changed(getattr(self.call.function, "__name__", "an operation"))
            self.slopes = [
                (torch.zeros_like(y) if v is None else v.detach().clone()).requires_grad_()
                for y, v in zip(ys, slopes, strict=True)
            ]
            grads = torch.autograd.grad(ys, self.free, self.slopes, create_graph=True, allow_unused=True)
        self.pulled = [(g, x) for g, x in zip(grads, self.call.live, strict=True) if g is not None]

    def push(self, moved: Moved) -> Bent:
        """Differentiate ⟨f′ᵀv, ẋ⟩."""
        there = [(g, moved[id(x)]) for g, x in self.pulled if id(x) in moved and g.requires_grad]
        if not there:
            return []
        outputs, along = zip(*there, strict=True)
        found = torch.autograd.grad(
            outputs, [*self.slopes, *self.free], along, retain_graph=True, allow_unused=True
        )
        n = len(self.slopes)
        moved.update((id(y), dy) for y, dy in zip(self.call.outs, found[:n], strict=True) if dy is not None)
        return [(x, z) for x, z in zip(self.call.live, found[n:], strict=True) if z is not None]


class Changed(RuntimeError):
    """An operation gives something else when it is called again."""


def _same(found: Sequence[Tensor], outs: Sequence[Tensor]) -> bool:
    return len(found) == len(outs) and all(torch.equal(a, b) for a, b in zip(found, outs, strict=True))


def _like(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    x = x if x.dtype is dtype else x.to(dtype)
    return x if x.shape == shape else x.expand(shape)


def _fit(z: Tensor, x: Tensor) -> Tensor:
    """Sum over what broadcasting repeated."""
    z = z if z.shape == x.shape else z.sum_to_size(x.shape)
    return z if z.dtype is x.dtype else z.to(x.dtype)


def _times_back(slope: Tensor, change: Tensor, x: Tensor) -> Tensor:
    return _fit(slope * change, x)


def _matrix_back(slope: Tensor, change: Tensor, x: Tensor) -> Tensor:
    if x.ndim == 2:
        return _flat(change).t() @ _flat(slope)
    return _fit(change.transpose(-1, -2) @ slope, x)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


TIMES = (_times_back, _times_back)
# of y = ab; y = xWᵀ
MATRIX = (lambda slope, db, a: _fit(slope @ db.transpose(-1, -2), a), _matrix_back)
ROWS = (lambda slope, dw, x: slope @ dw, lambda slope, dx, w: _flat(slope).t() @ _flat(dx))


def _of(names: str) -> frozenset[Function]:
    """The functions of some names, as methods of tensors, of `torch` and of `torch.nn.functional`."""
    places = (torch.Tensor, torch, functional)
    return frozenset(getattr(place, name) for name in names.split() for place in places if hasattr(place, name))


_LINEAR = _of(
    "view reshape flatten unflatten transpose permute movedim swapaxes t unsqueeze squeeze expand expand_as "
    "contiguous to float double type_as clone __getitem__ narrow select index_select chunk split tensor_split "
    "unbind repeat repeat_interleave tile cat concat stack sum mean neg __neg__ roll flip tril triu cumsum "
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
        still = kwargs.get("training") is False or (len(args) > 2 and args[2] is False)
        return Sum(call, [(args[0], 1)]) if still and args[0] is call.live[0] else None
    if f is functional.linear:
        return _rows(call)
    if f is functional.embedding:
        return _lookup(call)
    if len(args) == 2 and (not kwargs or (kwargs.keys() == {"alpha"} and f not in _MUL | _DIV)):
        return _pair(call, float(kwargs.get("alpha", 1)))
    if f in _BIASED and len(args) == 3 and kwargs.keys() <= {"alpha", "beta"}:
        scale, beta = float(kwargs.get("alpha", 1)), float(kwargs.get("beta", 1))
        return Product(call, args[1], args[2], torch.matmul, MATRIX, scale=scale, bias=args[0], beta=beta)
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
        return Product(call, a, b, torch.mul, TIMES)
    if f in _DIV and not call.moves(b):
        return Product(call, a, b, torch.div, TIMES)
    if f in _MATMUL and a.ndim > 1 and b.ndim > 1:
        return Product(call, a, b, torch.matmul, MATRIX)
    return None


def _rows(call: Call) -> Operation | None:
    named = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
    x, w = named["input"], named["weight"]
    return Product(call, x, w, functional.linear, ROWS, bias=named.get("bias")) if w.ndim == 2 else None


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
