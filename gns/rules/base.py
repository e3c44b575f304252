"""What a per-example rule is, and where rules are looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Blocks = Callable[[Tensor, Tensor, str], Tensor]


@dataclass(frozen=True)
class Rule:
    """How one kind of layer turns its input and its output's gradient into per-example gradients.

    Args:
        kind: name of the layer kind, as messages show it.
        layer: the module class; subclasses count as long as they keep its `forward`.
        parameters: names of the parameters that the rule knows.
        blocks: (x [B, ..., I], dy [B, ..., O], parameter name) → [B, *parameter.shape], the gradient that
            each example adds to that parameter, in float32 or wider.
        needs_input: parameters whose blocks depend on x; for the others x may be anything of dy's batch.
    """

    kind: str
    layer: type[nn.Module]
    parameters: tuple[str, ...]
    blocks: Blocks
    needs_input: tuple[str, ...] = ()  # parameters whose blocks depend on the layer's input

    def applies(self, module: nn.Module) -> bool:
        """Whether `module` computes what this rule differentiates."""
        return isinstance(module, self.layer) and type(module).forward is self.layer.forward


_REGISTRY: dict[str, Rule] = {}


def register(rule: Rule) -> Rule:
    """Add a rule to the registry.

    Raises:
        ValueError: a rule for that kind is there already.
    """
    if rule.kind in _REGISTRY:
        raise ValueError(
            f"a per-example rule for {rule.kind!r} is registered already; unregister it or rename this"
        )
    _REGISTRY[rule.kind] = rule
    return rule


def rule_for(module: nn.Module) -> Rule | None:
    """Find the rule for a module, or None."""
    return next((rule for rule in _REGISTRY.values() if rule.applies(module)), None)


def known_kinds() -> str:
    """List the registered kinds, for messages."""
    return ", ".join(sorted(_REGISTRY))


def registered() -> tuple[Rule, ...]:
    """Give all rules; the tests walk them."""
    return tuple(_REGISTRY.values())
