"""The family of base models: one row each, its shape and its training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BaseConfig:
    """One base model: its shape and its training. The weights are a function of this and of the text."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    steps: int
    batch_size: int = 8
    sequence_length: int = 256
    context: int = 1_024
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    autocast: bool = True  # matrix products in bfloat16: 1.5 times as fast on a CPU that has them
    seed: int = 0
    primer: int = 0  # sheets of calculations and one-step problems beside the library's text
    single_digits: bool = False  # every digit is a token
    tokenizer: str | None = None  # row whose tokenizer it uses; None: one of its own

    def described(self) -> dict[str, Any]:
        """Give what a checkpoint must agree with: the first version's fields, and later ones where set."""
        later = {f.name: f.default for f in dataclasses.fields(self)[-3:]}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in later or v != later[k]}


def _math(name: str, width: int, inner: int, layers: int, heads: int, steps: int, **more: Any) -> BaseConfig:
    """A row of the family that shares one text and one tokenizer."""
    shape = {"hidden_size": width, "intermediate_size": inner, "layers": layers, "heads": heads}
    shared = {"vocab_size": 2_048, "primer": PRIMER, "single_digits": True, "tokenizer": TOKENIZER}
    return BaseConfig(name, steps=steps, **shape, **(shared | more))


PRIMER = 16_000
TOKENIZER = "math-200k"
SMALL: dict[str, Any] = {"batch_size": 4, "autocast": False}  # for a CPU

BASES = {
    config.name: config
    for config in (
        BaseConfig(  # the demo's
            "1m", vocab_size=2_048, hidden_size=128, intermediate_size=344, layers=4, heads=4, steps=4_500
        ),
        BaseConfig(  # for a GPU
            "25m",
            vocab_size=4_096,
            hidden_size=512,
            intermediate_size=1_376,
            layers=8,
            heads=8,
            steps=1_500,
            batch_size=32,
            sequence_length=512,
            learning_rate=1.5e-3,
        ),
        _math("math-200k", 64, 128, 3, 4, steps=6_000, learning_rate=4e-3, tokenizer=None, **SMALL),
        _math("math-1m", 128, 344, 4, 4, steps=5_000, **SMALL),
        _math("math-5m", 256, 688, 6, 8, steps=2_500, learning_rate=2e-3, **SMALL),
        _math(  # for a GPU
            "math-25m", 512, 1_376, 8, 8, steps=3_000, batch_size=64, learning_rate=1.5e-3
        ),
        _math(  # for a GPU
            "math-100m", 768, 2_048, 14, 12, steps=4_000, batch_size=64, learning_rate=1e-3
        ),
    )
}
