"""The table of the matrix test: its axes, what is expected of each cell, and which cells run when."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gns.boundary import IN_BACKWARD
from gns.reasons import AMBIGUOUS, NO_CALL
from tests.gns.matrix_models import ADAPTERS, FAMILIES


@dataclass(frozen=True)
class Precision:
    """One column of numbers.

    Args:
        dtype: of the weights.
        autocast: dtype of autocast, or None.
        scaler: whether a `GradScaler` is used, and whether the monitor is given it: "given", "hidden", "".
        rtol: of squared norms, relative, against one backward pass per example in the same precision.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None = None
    scaler: str = ""
    rtol: float = 1e-5


PRECISIONS = {
    "float32": Precision(torch.float32, rtol=1e-5),
    "float64": Precision(torch.float64, rtol=1e-6),  # the models take norms and losses in float32
    "bf16 autocast": Precision(torch.float32, torch.bfloat16, rtol=2e-2),
    "bf16 weights": Precision(torch.bfloat16, rtol=2e-2),
    "fp16 scaled": Precision(torch.float32, torch.float16, "given", rtol=1e-2),
    "fp16 scale unknown": Precision(torch.float32, torch.float16, "hidden", rtol=1e-2),
}


@dataclass(frozen=True)
class Engine:
    """One way to train.

    Args:
        optimizer: key of `matrix_engines.OPTIMIZERS`.
        splits: sizes of the micro-batches; each one's loss is divided by their number.
        clip: largest gradient norm, or None.
        reentrant: of gradient checkpointing, or None for none.
        compiled: "whole", "layers" or "".
        dropout: its probability.
    """

    optimizer: str = "SGD"
    splits: tuple[int, ...] = (4,)
    clip: float | None = None
    reentrant: bool | None = None
    compiled: str = ""
    dropout: float = 0.0


ENGINES = {
    "plain": Engine(),
    "accumulation": Engine(splits=(1, 3)),
    "clipping": Engine(clip=0.05),
    "checkpointing": Engine(reentrant=False),
    "checkpointing, reentrant": Engine(reentrant=True),
    "AdamW": Engine("AdamW"),
    "AdamW fused": Engine("AdamW fused"),
    "SGD momentum": Engine("SGD momentum"),
    "all at once": Engine("AdamW fused", splits=(1, 3), clip=0.05, reentrant=False),
    "dropout": Engine(dropout=0.2),
    "LBFGS": Engine("LBFGS"),
    "optimizer in backward": Engine("in backward"),
    "compiled by layers": Engine(compiled="layers"),
    "compiled whole": Engine(compiled="whole"),
}
COMPILED = tuple(name for name, engine in ENGINES.items() if engine.compiled)


class Cell(NamedTuple):
    """One combination."""

    family: str
    adapter: str
    engine: str
    precision: str

    def __str__(self) -> str:
        return "/".join(self).replace(" ", "_")


@dataclass(frozen=True)
class Expected:
    """What a cell must come to.

    Args:
        kind: "exact", "approximate", "refused", or "impossible": the engine itself cannot do it.
        why: a part of what is said to the user, or why it is impossible.
        weights: of the examples in the record, "tokens" or "equal".
        twin: whether the sums are compared with one backward pass per example.
        scaled: whether the sums carry the unknown loss scale.
        left_out: the only parameter that is not measured, but named by the coverage.
    """

    kind: str = "exact"
    why: str = ""
    weights: str = "tokens"
    twin: bool = True
    scaled: bool = False
    left_out: str = ""


IMPOSSIBLE = {
    ("LBFGS", "given"): "GradScaler takes no closure",
    ("optimizer in backward", "given"): "GradScaler unscales after backward",
}
BY_ENGINE = {
    "LBFGS": Expected("refused", "the closure took 2 gradients", twin=False),
    "optimizer in backward": Expected("refused", IN_BACKWARD, twin=False),
    "compiled whole": Expected("approximate", NO_CALL, weights="equal"),
    "dropout": Expected("exact", twin=False),  # the twin draws other masks; the self-check must hold
}


# Of a weight that embedding and head share, the uses cannot be joined where the model's own call is not seen;
# and GPT-2's positions have one row, so that there rows cannot be told from examples at all.
TIED = {
    ("gemma3", "full", "compiled whole"): Expected(
        "approximate", NO_CALL, weights="equal", left_out="model.embed_tokens.weight"
    ),
    ("gpt2", "full", "compiled whole"): Expected(
        "refused", AMBIGUOUS, twin=False, left_out="transformer.wte.weight"
    ),
}


def expected(cell: Cell) -> Expected:
    """Look up what a cell must come to."""
    precision = PRECISIONS[cell.precision]
    if precision.scaler and (cell.engine, "given") in IMPOSSIBLE:
        return Expected("impossible", IMPOSSIBLE[cell.engine, "given"])
    found = TIED.get(cell[:3]) or BY_ENGINE.get(cell.engine, Expected())
    if precision.scaler == "hidden":
        kind = "approximate" if found.kind == "exact" else found.kind
        return dataclasses.replace(found, kind=kind, scaled=True)
    return found


def every_cell() -> Iterator[Cell]:
    """Walk the full product, without what is impossible."""
    for names in itertools.product(FAMILIES, ADAPTERS, ENGINES, PRECISIONS):
        if expected(cell := Cell(*names)).kind != "impossible":
            yield cell


def widest() -> Iterator[Cell]:
    """Walk what the slow suite runs: all cells that are not in the fast one.

    Of the compiled ones, at seconds a cell, each family × adapter × engine is there, its precision in turn.
    """
    done = set(covering())
    yield from (c for c in every_cell() if c not in done and c.engine not in COMPILED)
    for k, names in enumerate(itertools.product(FAMILIES, ADAPTERS, COMPILED)):
        cell = Cell(*names, list(PRECISIONS)[(k + k // 6) % len(PRECISIONS)])
        if cell not in done:
            yield cell


@functools.cache
def covering() -> tuple[Cell, ...]:
    """Choose cells that hold each pair of values of two different axes.

    The compiler takes seconds a cell: each compiled engine has one cell here, and all others run as `slow`.
    """
    chosen = []
    engines = [name for name in ENGINES if name not in COMPILED]
    for (a, adapter), (e, engine) in itertools.product(enumerate(ADAPTERS), enumerate(engines)):
        family = list(FAMILIES)[(a + e) % len(FAMILIES)]
        names = [
            name for name in PRECISIONS if expected(Cell(family, adapter, engine, name)).kind != "impossible"
        ]
        chosen.append(Cell(family, adapter, engine, names[(a + e + e // 3) % len(names)]))
    chosen += [
        Cell("llama", "lora", "compiled whole", "float32"),
        Cell("qwen3", "lora", "compiled by layers", "float32"),
    ]
    return tuple(chosen)
