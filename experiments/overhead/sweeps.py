"""How the cost grows along tokens, rank, batch, layers, width, adapters and accumulation; forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from experiments.overhead.arms import Arm, Direct, Gram, Monitored
from experiments.overhead.settings import Setting

BASE = Setting("width 512, 1 layer, r=16, 8×128", "width-512", 16, 8, 128, layers=1)


@dataclass(frozen=True)
class Sweep:
    """One figure.

    Args:
        title: says what is varied, and what is not.
        xlabel: of the figure.
        points: values of x.
        at: x → setting.
        arms: beside the untouched one.
    """

    title: str
    xlabel: str
    points: tuple[int, ...]
    at: Callable[[int], Setting]
    arms: tuple[type[Arm], ...] = (Monitored,)

    def settings(self) -> list[tuple[int, Setting]]:
        """Name the setting of each point."""
        return [(x, self.at(x)) for x in self.points]


def _with(name: str, **fixed: object) -> Callable[[int], Setting]:
    """X → the base with one field changed to x, and others as given."""
    fields = {key: value for key, value in fixed.items() if key != "label"}
    return lambda x: replace(BASE, name=f"{fixed.get('label', name)} {x:,}", **{**fields, name: x})


def least(setting: Setting) -> int:
    """Pairs of a point, however little time there is: fewer than a verdict needs, of long steps fewest."""
    return 3 if setting.tokens > 4_096 else 4


# two sequences at the least: a step with one example gives no estimate, and is refused as an arm
LORA = "LoRA r = 16, width 512, 1 layer"
SWEEPS = {  # what matters most first
    "tokens": Sweep(  # narrower than the others, as attention takes its time
        "LoRA r = 16, width 128, 1 layer, 2 sequences",
        "T, tokens",
        (64, 512, 2_048, 8_192),
        _with("tokens", batch=2, shape="width-128"),
    ),
    "batch": Sweep(f"{LORA}, T = 64", "B, sequences", (2, 8, 64), _with("batch", tokens=64)),
    "rank": Sweep("LoRA, width 512, 1 layer, 8 × 128", "r", (4, 16, 64, 256), _with("rank")),
    "width": Sweep(
        "LoRA r = 16, 1 layer, 8 × 128",
        "width",
        (128, 256, 512, 1_024),
        lambda x: replace(BASE, name=f"width {x:,}", shape=f"width-{x}"),
    ),
    "layers": Sweep("LoRA r = 16, width 512, 8 × 64", "layers", (1, 2, 4), _with("layers", tokens=64)),
    "adapters": Sweep(
        "LoRA r = 16, width 512, 2 layers, 8 × 64",
        "adapted linear layers",
        (1, 4, 14),
        _with("adapted", layers=2, tokens=64),
    ),
    "accumulation": Sweep(
        f"{LORA}, 2 × 128 a pass", "passes a step", (1, 2, 4), _with("accumulate", batch=2)
    ),
    "full": Sweep(
        "Full weights, width 512, 1 layer, 1,024 tokens",
        "T, tokens",
        (16, 128, 512),
        lambda x: replace(BASE, name=f"full, T {x:,}", rank=None, batch=1_024 // x, tokens=x),
        (Monitored, Direct, Gram),
    ),
}
