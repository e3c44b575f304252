"""One elementary operation y = f(x, …) of a tape: what a tangent ẋ makes of it, to second order.

Each takes the tangents of its inputs to ẏ = f′ẋ, the tangent of its output, and to z = ∂⟨λ, f′ẋ⟩/∂x, what
the operation's own curvature adds to the change of the gradient at x, or to ⟨z, ẋ⟩ = ⟨λ, f″[ẋ, ẋ]⟩, what it
adds to vᵀHv; λ = ∂L/∂y is known and the same for all vectors. z is zero where f is linear. Any operation
that `torch` differentiates twice has a rule, `Other`; the rest here are the same for less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gns.curvature.smooth import plain_entropy, through_softmax

Moved = MutableMapping[int, Tensor]  # id of a tensor → its tangent; those that stay are not in it
Function = Callable[..., Any]


class Bent:
    """Sums of z by tensor."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add to the sum of a tensor; z is then ours to write to."""
        if id(x) in self.sums:
            self.sums[id(x)].add_(z)
        else:
            self.tensors[id(x)], self.sums[id(x)] = x, z

    def add_product(self, x: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a·b, of rows: in one pass where there is a sum."""
        known = self.sums.get(id(x))
        if known is None:
            self.add(x, a @ b)
        else:
            known.view(-1, known.shape[-1]).addmm_(flat(a), b)


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

    def push(self, moved: Moved, bent: Bent) -> None:
        """Add the tangents of the outputs to those of the inputs, and z to the sums of it."""
        raise NotImplementedError

    def bend(self, moved: Moved) -> Tensor | None:
        """Add the outputs' tangents to the inputs'; give ⟨λ, f″[ẋ, ẋ]⟩, None where it is zero."""
        bent = Bent()
        self.push(moved, bent)
        found = [_dot(z, moved[key]) for key, z in bent.sums.items()]
        return sum(found[1:], found[0]) if found else None

    def _set(self, moved: Moved, tangent: Tensor) -> None:
        moved[id(self.call.outs[0])] = tangent


class Linear(Operation):
    """Homogeneous in all tensors that move: the call itself, of tangents."""

    def __init__(self, call: Call):
        super().__init__(call)
        self.function = torch.Tensor.reshape if call.function is torch.Tensor.view else call.function
        self.first = len(call.live) == 1 and call.args[0] is call.live[0]
        self.rest = call.args[1:]

    def push(self, moved: Moved, bent: Bent) -> None:
        """Call it."""
        if self.first:
            found = self.function(moved[id(self.call.live[0])], *self.rest, **self.call.kwargs)
        else:
            found = self.call.again(moved, function=self.function)
        if isinstance(found, Tensor):
            self._set(moved, found)
        else:
            moved.update((id(y), dy) for y, dy in zip(self.call.outs, found, strict=True))


class Sum(Operation):
    """a·x + b·y + …, broadcast."""

    def __init__(self, call: Call, terms: Iterable[tuple[Any, float]]):
        super().__init__(call)
        self.terms = [(id(x), c) for x, c in terms if call.moves(x)]
        self.shape, self.dtype = call.outs[0].shape, call.outs[0].dtype

    def push(self, moved: Moved, bent: Bent) -> None:
        """Add the tangents."""
        total: Tensor | None = None
        for key, c in self.terms:
            if (dx := moved.get(key)) is not None:
                total = (dx if c == 1 else c * dx) if total is None else torch.add(total, dx, alpha=c)
        if total is not None:
            self._set(moved, _like(total, self.shape, self.dtype))


class Product(Operation):
    """c · a∘b + beta · bias, with ∘ elementwise or a matrix product.

    Args:
        call: recorded.
        a: left factor.
        b: right factor.
        kind: of product.
        scale: c.
        bias: what is added, if it moves.
        beta: of the bias.
    """

    def __init__(
        self,
        call: Call,
        a: Any,
        b: Any,
        kind: Kind,
        *,
        scale: float = 1.0,
        bias: Any = None,
        beta: float = 1.0,
    ):
        super().__init__(call)
        self.a, self.b, self.kind, self.scale = a, b, kind, scale
        self.bias, self.beta = bias if call.moves(bias) else None, beta
        self.curved = call.moves(a) and call.moves(b)
        self.slope: Tensor | None = None
        self.shape, self.dtype = call.outs[0].shape, call.outs[0].dtype

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Keep cλ."""
        (slope,) = slopes
        self.slope = slope if slope is None or self.scale == 1 else self.scale * slope

    def push(self, moved: Moved, bent: Bent) -> None:
        """ẏ = ȧ∘b + a∘ḃ; in a λ∘ḃ, in b ȧ∘λ."""
        da, db = self._forward(moved)
        if self.slope is not None and db is not None:
            self.kind.in_a(bent, self.a, self.slope, db)
        if self.slope is not None and da is not None:
            self.kind.in_b(bent, self.b, self.slope, da)

    def bend(self, moved: Moved) -> Tensor | None:
        """2⟨λ, ȧ∘ḃ⟩, by way of the smaller factor."""
        da, db = self._forward(moved)
        if self.slope is None or da is None or db is None:
            return None
        bent = Bent()
        if self.a.numel() <= self.b.numel():
            self.kind.in_a(bent, self.a, self.slope, db)
            return 2 * _dot(bent.sums[id(self.a)], da)
        self.kind.in_b(bent, self.b, self.slope, da)
        return 2 * _dot(bent.sums[id(self.b)], db)

    def _forward(self, moved: Moved) -> tuple[Tensor | None, Tensor | None]:
        da, db = moved.get(id(self.a)), moved.get(id(self.b))
        if da is not None and db is not None:
            total = self.kind.both(da, self.b, self.a, db)
        else:
            total = None if da is None else self.kind.times(da, self.b)
            total = self.kind.times(self.a, db) if db is not None else total
        if total is not None and self.scale != 1:
            total = self.scale * total
        if self.bias is not None and (dc := moved.get(id(self.bias))) is not None:
            total = self.beta * dc if total is None else torch.add(total, dc, alpha=self.beta)
        if total is not None:
            self._set(moved, _like(total, self.shape, self.dtype))
        return da, db


class Kind:
    """Elementwise products."""

    def times(self, a: Any, b: Any) -> Tensor:
        """a∘b."""
        return a * b

    def both(self, da: Tensor, b: Tensor, a: Tensor, db: Tensor) -> Tensor:
        """ȧ∘b + a∘ḃ."""
        return torch.addcmul(da * b, a, db)

    def in_a(self, bent: Bent, a: Tensor, slope: Tensor, db: Tensor) -> None:
        """Add the gradient of ⟨λ, a∘ḃ⟩ in a."""
        bent.add(a, _fit(slope * db, a))

    def in_b(self, bent: Bent, b: Tensor, slope: Tensor, da: Tensor) -> None:
        """Add the gradient of ⟨λ, ȧ∘b⟩ in b."""
        bent.add(b, _fit(slope * da, b))


class Quotient(Kind):
    """By what does not move."""

    def times(self, a: Any, b: Any) -> Tensor:
        """A / b."""
        return a / b


class Matrix(Kind):
    """a b, of matrices."""

    def times(self, a: Any, b: Any) -> Tensor:
        """A b."""
        return a @ b

    def both(self, da: Tensor, b: Tensor, a: Tensor, db: Tensor) -> Tensor:
        """ȧ b + a ḃ."""
        if a.ndim == b.ndim == 3 and len(a) == len(b):
            return torch.baddbmm(torch.bmm(da, b), a, db)
        return da @ b + a @ db

    def in_a(self, bent: Bent, a: Tensor, slope: Tensor, db: Tensor) -> None:
        """λ ḃᵀ."""
        bent.add(a, _fit(slope @ db.transpose(-1, -2), a))

    def in_b(self, bent: Bent, b: Tensor, slope: Tensor, da: Tensor) -> None:
        """ȧᵀ λ."""
        if b.ndim == 2:
            bent.add(b, flat(da).t() @ flat(slope))
        else:
            bent.add(b, _fit(da.transpose(-1, -2) @ slope, b))


class Rows(Kind):
    """x wᵀ of rows: a linear layer."""

    def times(self, a: Any, b: Any) -> Tensor:
        """X wᵀ."""
        return functional.linear(a, b)

    def both(self, da: Tensor, b: Tensor, a: Tensor, db: Tensor) -> Tensor:
        """ẋ wᵀ + x ẇᵀ."""
        found = functional.linear(a, db)
        found.view(-1, found.shape[-1]).addmm_(flat(da), b.t())
        return found

    def in_a(self, bent: Bent, a: Tensor, slope: Tensor, db: Tensor) -> None:
        """λ ẇ."""
        bent.add_product(a, slope, db)

    def in_b(self, bent: Bent, b: Tensor, slope: Tensor, da: Tensor) -> None:
        """λᵀ ẋ."""
        bent.add(b, flat(slope).t() @ flat(da))


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

    def push(self, moved: Moved, bent: Bent) -> None:
        """Multiply twice."""
        (x,) = self.call.live
        dx = moved[id(x)]
        self._set(moved, self.first * dx)
        if self.second is not None:
            bent.add(x, self.second * dx)


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

    def push(self, moved: Moved, bent: Bent) -> None:
        """Two passes of torch's own kernel's kind."""
        (x,) = self.call.live
        dp = through_softmax(moved[id(x)], self.p, self.dim)
        self._set(moved, dp)
        if self.off is not None:
            z = dp * self.off
            bent.add(x, z.addcmul_(self.p, z.sum(self.dim, keepdim=True), value=-1))


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

    def push(self, moved: Moved, bent: Bent) -> None:
        """One pass for each."""
        dx = moved[id(self.logits)]
        self._set(moved, torch.dot(self.slope.view(-1), dx.reshape(-1)))
        if self.weight is not None:
            bent.add(self.logits, through_softmax(dx, self.p).mul_(self.weight))


class Lookup(Operation):
    """Rows of a table; one of them, the padding's, is no parameter."""

    def __init__(self, call: Call, at: Tensor, padding: int | None):
        super().__init__(call)
        self.at, self.padding = at, padding

    def push(self, moved: Moved, bent: Bent) -> None:
        """Look up its tangents."""
        found = functional.embedding(self.at, moved[id(self.call.live[0])])
        if self.padding is not None:
            found = found.masked_fill((self.at == self.padding)[..., None], 0.0)
        self._set(moved, found)


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

    def push(self, moved: Moved, bent: Bent) -> None:
        """Differentiate ⟨f′ᵀv, ẋ⟩."""
        there = [(g, moved[id(x)]) for g, x in self.pulled if id(x) in moved and g.requires_grad]
        if not there:
            return
        outputs, along = zip(*there, strict=True)
        found = torch.autograd.grad(
            outputs, [*self.slopes, *self.free], along, retain_graph=True, allow_unused=True
        )
        n = len(self.slopes)
        moved.update((id(y), dy) for y, dy in zip(self.call.outs, found[:n], strict=True) if dy is not None)
        for x, z in zip(self.call.live, found[n:], strict=True):
            if z is not None:
                bent.add(x, z.clone())


class Changed(RuntimeError):
    """An operation gives something else when it is called again."""


def _same(found: Sequence[Tensor], outs: Sequence[Tensor]) -> bool:
    return len(found) == len(outs) and all(torch.equal(a, b) for a, b in zip(found, outs, strict=True))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _like(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    x = x if x.dtype is dtype else x.to(dtype)
    return x if x.shape == shape else x.expand(shape)


def _fit(z: Tensor, x: Tensor) -> Tensor:
    """Sum over what broadcasting repeated."""
    z = z if z.shape == x.shape else z.sum_to_size(x.shape)
    return z if z.dtype is x.dtype else z.to(x.dtype)


def flat(x: Tensor) -> Tensor:
    """The rows of a tensor, [N, I]."""
    return x.reshape(-1, x.shape[-1])


def _of(names: str) -> frozenset[Function]:
    """The functions of some names, as methods of tensors, of `torch` and of `torch.nn.functional`."""
    places = (torch.Tensor, torch, functional)
    return frozenset(
        getattr(place, name) for name in names.split() for place in places if hasattr(place, name)
    )


_LINEAR = _of(
    "view reshape flatten unflatten transpose permute movedim swapaxes t unsqueeze squeeze expand expand_as "
    "contiguous to float double type_as clone __getitem__ narrow select index_select chunk split "
    "tensor_split "
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
        alone = bool(args) and args[0] is call.live[0]  # type: ignore[reportGeneralTypeIssues]
        return Sum(call, [(call.live[0], 1)]) if still and alone else None
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
    named = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | dict(call.kwargs)
    x, w = named["input"], named["weight"]
    return Product(call, x, w, Rows(), bias=named.get("bias")) if w.ndim == 2 else None


def _softmax(call: Call) -> Operation | None:
    named = dict(zip(("input", "dim"), call.args, strict=False)) | dict(call.kwargs)
    dim, dtype = named.get("dim"), named.get("dtype")
    if not isinstance(dim, int) or dtype not in (None, call.live[0].dtype) or len(call.live) != 1:
        return None
    return Softmax(call, dim)


def _lookup(call: Call) -> Operation | None:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    named = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    if named.get("max_norm") is not None or named.get("scale_grad_by_freq") or named.get("sparse"):
        return None
    padding = named.get("padding_idx")
    if padding is not None and padding < 0:
        padding += len(named["weight"])
    return Lookup(call, named["input"], padding)
