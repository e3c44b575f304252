"""What a per-example rule is, and where rules are looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Blocks = Callable[[nn.Module, Tensor, Tensor, str], Tensor]
SqNorms = Callable[[nn.Module, Tensor, Tensor, str, int], Tensor | None]
Together = Callable[[nn.Module, Tensor, Tensor, str, int], tuple[Tensor, Tensor]]
Capture = Callable[[nn.Module, tuple, dict, Any], Tensor | None]


def first_tensor(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Tensor | None:
    """Find the activation among a layer's arguments: the first one, or the only keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    found = [v for v in kwargs.values() if isinstance(v, Tensor)]
    return found[0] if len(found) == 1 and not args else None


@dataclass(frozen=True)
class Rule:
    """How one kind of layer turns its input and its output's gradient into per-example gradients.

    Args:
        kind: name of the layer kind, as messages show it.
        parameters: names of the parameters that the rule knows; "name.*" is all of a dictionary.
        blocks: (layer, x [B, ..., I], dy [B, ..., O], parameter name) → [B, *parameter.shape], the gradient
            that each example adds to that parameter, in float32 or wider. Linear in dy.
        needs_input: parameters whose blocks depend on x; for the others x may be anything of dy's batch.
        total: blocks summed over the examples, where that is cheaper than forming them.
        sq_norms: the same arguments and a bound in bytes → [B], ‖c_b‖² without forming blocks, or None where
            blocks are the better way.
        together: the same arguments → ‖c_b‖² [B] and Σ_b c_b out of one product, in chunks below the bound.
        floats: (x, dy) → floats an example that `blocks` holds besides its result.
        capture: (layer, args, kwargs, output) → what the tap keeps as x; None where the call cannot be read.
        autocast: whether autocast casts the layer's input to its low precision.
        tokenwise: whether dimension 1 of x and dy is a position (or absent), and blocks add over positions.
        ids: whether x holds integers, without a feature dimension, and may lack the batch dimension.
        scale: the layer's output is so many times what `blocks` differentiates.
        mode: the only mode (training or not) of the layer for which the rule holds, or None for both.
    """

    kind: str
    parameters: tuple[str, ...]
    blocks: Blocks
    needs_input: tuple[str, ...] = ()
    total: Blocks | None = None
    sq_norms: SqNorms | None = None
    together: Together | None = None
    floats: Callable[[Tensor, Tensor], int] | None = None
    capture: Capture = first_tensor
    autocast: bool = False
    tokenwise: bool = True
    ids: bool = False
    scale: float = 1.0
    mode: bool | None = None
    scaled: bool = field(init=False)  # a compiler with dynamic shapes cannot compare `scale` itself

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaled", self.scale != 1.0)

    def knows(self, parameter: str) -> bool:
        """Whether the rule has blocks for a parameter of that name."""
        return any(_names(pattern, parameter) for pattern in self.parameters)

    def keeps_input_for(self, parameter: str) -> bool:
        """Whether the blocks of that parameter depend on the layer's input."""
        return any(_names(pattern, parameter) for pattern in self.needs_input)


def _names(pattern: str, parameter: str) -> bool:
    return parameter.startswith(pattern[:-1]) if pattern.endswith(".*") else parameter == pattern


Recogniser = Callable[[nn.Module], Rule | None]
_REGISTRY: dict[str, tuple[Rule, Recogniser]] = {}


def exactly(rule: Rule, *layers: type[nn.Module]) -> Recogniser:
    """Recognise module classes, and subclasses as long as they keep `forward`."""

    def recognise(module: nn.Module) -> Rule | None:
        kept = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in layers)
        return rule if kept else None

    return recognise


def register(rule: Rule, recognise: Recogniser) -> Rule:
    """Add a rule to the registry; those registered first are asked first.

    Args:
        rule: the rule, or the general form of a family of rules.
        recognise: gives the rule for a module (itself, or a form of it made for that module), or None.

    Raises:
        ValueError: a rule for that kind is there already.
    """
    if rule.kind in _REGISTRY:
        raise ValueError(
            f"a per-example rule for {rule.kind!r} is registered already; unregister it or rename this"
        )
    _REGISTRY[rule.kind] = (rule, recognise)
    return rule


def rule_for(module: nn.Module) -> Rule | None:
    """Find the rule for a module, or None."""
    return next((rule for _, ask in _REGISTRY.values() if (rule := ask(module)) is not None), None)


def known_kinds() -> str:
    """List the registered kinds, for messages."""
    return ", ".join(sorted(_REGISTRY))


def registered() -> tuple[Rule, ...]:
    """Give all rules; the tests walk them."""
    return tuple(rule for rule, _ in _REGISTRY.values())


def added(parts: Sequence[Tensor]) -> Tensor:
    """Add up the results of one chunk or more, all of one shape."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Put the results of one chunk of examples or more in a row, [B]."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def block_sq_norms(blocks: Tensor, *, scratch: bool = False) -> Tensor:
    """Squared norm of each block, [B]; summed pairwise, in the blocks' own float32 or float64.

    Args:
        blocks: [B, ...].
        scratch: nobody needs them afterwards, so that on CPU the squares may take their place.
    """
    if blocks.ndim == 1:
        return blocks.square()
    dims = tuple(range(1, blocks.ndim))
    if blocks.is_cuda:  # reads the blocks once and writes no squares
        return torch.linalg.vector_norm(blocks, dim=dims).square()
    # on CPU that kernel adds in sequence: 10⁻⁴ off at 3 million float32 entries
    return (blocks.square_() if scratch else blocks.square()).sum(dims)


def wide(x: Tensor) -> Tensor:
    """Give x in float32 or wider."""
    return x if x.dtype is torch.float64 else x.float()


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Give a module's parameter by its dotted name, as it is now: engines may replace the object.

    Raises:
        AttributeError: there is none.
    """
    found = module._parameters.get(name)  # the usual case, asked several times a layer and step
    if found is not None:
        return found
    *path, last = name.split(".")
    for part in path:
        found = module._modules.get(part)
        if found is None:
            raise AttributeError(f"{type(module).__name__} has no module {part!r} on the way to {name!r}")
        module = found
    parameter = module._parameters.get(last)
    if parameter is None:
        raise AttributeError(f"{type(module).__name__} has no parameter {last!r} (of {name!r})")
    return parameter


def unknown(parameter: str, rule: str, known: tuple[str, ...]) -> ValueError:
    """Make the error for a parameter that a rule does not know."""
    names = ", ".join(map(repr, known))
    return ValueError(f"parameter {parameter!r} of a layer of kind {rule}; known: {names}")
