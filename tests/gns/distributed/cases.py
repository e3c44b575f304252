"""Training on several ranks as a table: one row a case, run by `scenarios.py` and by the slow twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.reference import preconditioned
from tests.reference.per_example import contributions, spread, sums, trainable


def even(step: int, rank: int) -> list[int]:
    return [4]


def uneven(step: int, rank: int) -> list[int]:
    return [2 + (3 * rank + step) % 5]


def no_rows(step: int, rank: int) -> list[int]:
    return [0 if step == 2 and rank else 3]


@dataclass(frozen=True)
class Case:
    """One training; sizes gives the rows of each micro-batch of a step on a rank."""

    name: str
    engine: str = "ddp"
    sizes: Callable[[int, int], list[int]] = even
    steps: int = 4
    reduce: str = "mean"  # of the rows of a micro-batch
    clip: float | None = None
    dtype: torch.dtype = torch.float64
    wrapper: bool = False  # the monitor is given the engine's wrapper
    attach_first: bool = False  # before the engine takes the model
    engine_options: dict[str, Any] = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)
    factor: float | None = None  # ḡ = factor · Σ over ranks; None: the mean
    monitored: bool = True
    tolerance: torch.dtype | None = None  # of the readings; None: of `dtype`
    ranks: int | None = None  # it needs so many
    adam: bool = False  # trained with Adam, measured in its metric
    tokens: int = 0  # positions in a row; 0: a row has none


SHARED = {"share_weight_gradient": True}
CASES = [
    Case("plain"),
    Case("float32", dtype=torch.float32),
    Case("wrapper", wrapper=True),
    Case("attach first", attach_first=True),
    Case("many buckets", engine_options={"bucket_cap_mb": 1e-5}),
    Case("views", engine_options={"gradient_as_bucket_view": True}),
    Case("no_sync", sizes=lambda step, rank: [3, 2 + rank, 4]),
    Case("uneven", sizes=uneven),
    Case("no rows", sizes=no_rows, reduce="sum"),
    Case("never rows", sizes=lambda step, rank: [3 * (rank == 0)], reduce="sum"),
    Case("clip", clip=1e-3),
    Case("every", monitor={"every": 2}, steps=5),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("unmonitored", dtype=torch.float32, monitored=False),
    Case("adam", adam=True, sizes=uneven, monitor={"metric": "adam"}),
    Case("fsdp adam", engine="fsdp", adam=True, monitor={"metric": "adam"}),
    Case("fsdp", engine="fsdp"),
    Case("fsdp float32", engine="fsdp", dtype=torch.float32),
    Case("fsdp attach first", engine="fsdp", attach_first=True),
    Case("fsdp no_sync", engine="fsdp", sizes=lambda step, rank: [3, 2 + rank, 4]),
    Case("fsdp no rows", engine="fsdp", sizes=no_rows, reduce="sum"),
    Case("fsdp clip", engine="fsdp", clip=1e-3, sizes=uneven),
    Case("fsdp divisor", engine="fsdp", engine_options={"divide": 3.0}, factor=1 / 3),
    Case("fsdp sum", engine="fsdp", engine_options={"divide": 1.0}, factor=1.0),
    Case("fsdp bfloat16", engine="fsdp", dtype=torch.float32, tolerance=torch.bfloat16,
         engine_options={"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}),
    Case("hsdp", engine="hsdp", sizes=uneven, ranks=4),
    Case("fsdp unmonitored", engine="fsdp", dtype=torch.float32, monitored=False),
    Case("shared", tokens=9, monitor=SHARED),
    Case("shared, buckets", tokens=9, monitor=SHARED, sizes=lambda step, rank: [3, 2 + rank, 4],
         engine_options={"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True}),
    Case("not shared", tokens=9, monitored=False),
    Case("not shared, buckets", tokens=9, monitored=False, sizes=lambda step, rank: [3, 2 + rank, 4],
         engine_options={"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True}),
    Case("fsdp shared", engine="fsdp", tokens=9, monitor=SHARED),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def net(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def rows(case: Case, step: int, rank: int, micro: int) -> torch.Tensor:
    """The rows of one micro-batch, [n, 3] or [n, T, 3]."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    n = case.sizes(step, rank)[micro]
    shape = (n, case.tokens, 3) if case.tokens else (n, 3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)


def losses(out: torch.Tensor) -> torch.Tensor:
    """Loss of each row, [n]."""
    return (out - 1).square().flatten(1).sum(1)


def optimizer_of(model: nn.Module, case: Case | None = None) -> torch.optim.Optimizer:
    if case is not None and case.adam:
        return torch.optim.Adam(model.parameters(), lr=0.05)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


@dataclass
class Expected:
    """What the slow twin finds in a step."""

    n: int
    sums: dict[str, tuple[float, float]]
    spread: list[float]
    in_metric: dict[str, tuple[float, float]] | None = None


def twin(case: Case, size: int) -> list[Expected]:
    """One process, one backward pass per example, all ranks' rows."""
    model = net(case.dtype)
    optimizer, found, moment = optimizer_of(model, case), [], preconditioned.SecondMoment()
    factor = 1 / size if case.factor is None else case.factor
    for step in range(case.steps):
        each = []
        for rank in range(size):
            micros = case.sizes(step, rank)
            for micro, n in enumerate(micros):
                share = factor / (len(micros) * (n if case.reduce == "mean" else 10))
                x = rows(case, step, rank, micro)
                each += [lambda i=i, x=x, a=share: losses(model(x[i : i + 1])).sum() * a for i in range(n)]
        cs = contributions(trainable(model), each)
        found.append(
            Expected(len(each), sums(cs), spread(cs), preconditioned.sums(cs, moment) if moment.t else None)
        )
        moment.step({name: sum(c[name] for c in cs) for name in cs[0]})
        for name, p in model.named_parameters():
            p.grad = sum(c[name] for c in cs).to(p.dtype)
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
    return found
