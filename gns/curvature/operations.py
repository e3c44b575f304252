"""One elementary operation y = f(x, …) of a tape: what a tangent ẋ makes of it, to second order.

Each takes the tangents of its inputs to ẏ = f′ẋ, the tangent of its output, and to z = ∂⟨λ, f′ẋ⟩/∂x, what the
operation's own curvature adds to the change of the gradient at x, or to ⟨z, ẋ⟩ = ⟨λ, f″[ẋ, ẋ]⟩, what it adds
to vᵀHv; λ = ∂L/∂y is known and the same for all vectors. z is zero where f is linear.

Any operation that `torch` differentiates twice has a rule, `Other`; the rest are the same for less.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gns.curvature.smooth import through_softmax

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
    kwargs: dict[str, Any]
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


class Operation(ABC):
    """A call with its rule.

    Args:
        call: recorded.
    """

    curved = False  # whether λ is asked for

    def __init__(self, call: Call):
        self.call = call

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:  # noqa: B027 - most rules need no λ
        """Be told λ of each output; None where the loss does not depend on it."""

    @abstractmethod
    def push(self, moved: Moved, bent: Bent) -> None:
        """Add the tangents of the outputs to those of the inputs, and z to the sums of it."""

    def bend(self, moved: Moved) -> Tensor | None:
        """Add the tangents of the outputs; give ⟨λ, f″[ẋ, ẋ]⟩, None where it is zero."""
        bent = Bent()
        self.push(moved, bent)
        found = [inner(z, moved[key]) for key, z in bent.sums.items() if key in moved]
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
        listed = [x for value in call.args if type(value) in (tuple, list) for x in value]
        stays = [x for x in listed if isinstance(x, Tensor) and not call.moves(x)]
        self.still = {id(x): x.new_zeros(()).expand_as(x) for x in stays}  # what is joined to those that move

    def push(self, moved: Moved, bent: Bent) -> None:
        """Call it."""
        if self.first:
            found = self.function(moved[id(self.call.live[0])], *self.rest, **self.call.kwargs)
        else:
            found = self.call.again({**moved, **self.still}, function=self.function)
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
            self._set(moved, shaped(total, self.shape, self.dtype))


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


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product."""
    return torch.dot(a.reshape(-1), b.reshape(-1))


def shaped(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Give a tangent the shape and kind of its tensor."""
    x = x if x.dtype is dtype else x.to(dtype)
    return x if x.shape == shape else x.expand(shape)


def fitted(z: Tensor, x: Tensor) -> Tensor:
    """Sum over what broadcasting repeated."""
    z = z if z.shape == x.shape else z.sum_to_size(x.shape)
    return z if z.dtype is x.dtype else z.to(x.dtype)


def flat(x: Tensor) -> Tensor:
    """The rows of a tensor, [N, I]."""
    return x.reshape(-1, x.shape[-1])
