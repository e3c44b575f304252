"""A record of the calls that a loss is made of, as they come, for what is differentiated by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gns.curvature.operations import Call
from gns.curvature.smooth import attended, elsewhere

WIDE = (torch.float32, torch.float64)


class NoTape(Exception):
    """The loss is made of something that cannot be followed call by call."""


class Tape(TorchFunctionMode):
    """Records, while it is on, each call whose result depends on some parameters.

    What is not seen is noticed: a tensor with a graph that no recorded call made (a custom autograd function,
    a compiled or checkpointed layer, a graph from outside), and one that was written to. Then `why` says so,
    and nothing more is recorded.

    Args:
        parameters: that the loss is differentiated in.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.calls: list[Call] = []
        self.why: str | None = None
        self._live = {id(p): p for p in parameters}
        self._still: dict[int, Tensor] = {}  # have a graph, of others' parameters; kept, for their ids
        self._versions: dict[int, tuple[Tensor, int]] = {k: (p, p._version) for k, p in self._live.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.why is not None:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and not elsewhere(*args, *kwargs.values()):
            with self:
                found = attended(*args, **kwargs, softmax=functional.softmax)
            if found is not None:
                return found
        found = func(*args, **kwargs)
        if isinstance(found, Tensor | tuple | list):
            self._note(func, args, kwargs, found)
        return found

    def _note(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], found: Any) -> None:
        made = (found,) if isinstance(found, Tensor) else found
        out = [y for y in made if isinstance(y, Tensor) and y.requires_grad]
        out = [y for y in out if id(y) not in self._live and id(y) not in self._still]
        if not out:
            return
        inputs = _tensors([*args, *kwargs.values()])
        given = {id(x): x for x in inputs if x.requires_grad}
        strange = [x for k, x in given.items() if k not in self._live and k not in self._still]
        if any(x.grad_fn is not None for x in strange):
            self.why = "a tensor comes from where no call was seen"
        elif elsewhere(*args, *kwargs.values()) or _hooked_saving():
            self.why = "autocast, a transform, a compiler or a checkpoint has a say in a call"
        elif not all(y.dtype in WIDE and y.layout is torch.strided for y in out):
            self.why = "a call gives numbers of other precision"
        if self.why is not None:
            return
        live = tuple(x for k, x in given.items() if k in self._live)
        for x in inputs:
            self._versions.setdefault(id(x), (x, x._version))
        self._versions |= {id(y): (y, y._version) for y in out}
        if not live:
            self._still |= {id(y): y for y in out}
            return
        self._live |= {id(y): y for y in out}
        self.calls.append(Call(function, args, kwargs, live, tuple(out)))

    def check(self, loss: Tensor) -> None:
        """Let pass only a whole record.

        Raises:
            NoTape: it is not, or the loss is not in it.
        """
        if self.why is None and id(loss) not in self._live:
            self.why = "the loss comes from where no call was seen"
        if any(x._version != version for x, version in self._versions.values()):
            self.why = "a tensor was written to"
        if any(x._backward_hooks for x in self._live.values()):
            self.why = "a gradient passes a hook"
        if self.why is not None:
            raise NoTape(self.why)


def _tensors(given: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, and in lists of them."""
    found: list[Tensor] = []
    for x in given:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple | list):
            found += _tensors(x)
    return found


def _hooked_saving() -> bool:
    """Whether tensors saved for backward are taken elsewhere, by a checkpoint or to save memory."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]
