"""What one reading of B_noise costs, in training steps of the same batch.

    python -m experiments.curvature_cost            # measure (a few minutes on one core) and print the table
    python -m experiments.curvature_cost --table    # print it from the rows that are there

Arms are interleaved: every round runs each once, in an order that turns, and costs are medians over rounds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.rows import provenance, read, write
from gns.data import Collator, pad_id
from gns.examples import IGNORED
from gns.hessian import b_noise
from gns.preparation import FinetuneConfig, prepare

ROWS = Path(__file__).parent / "results" / "curvature_cost" / "rows.jsonl.gz"
# training steps a reading is wanted to cost at most
LIMITS = {"exact": 18, "exact, H on half": 10, "difference": 20, "forward": 10}
PEER = "curvlinops, products alone"
EVERY = 200  # steps from one reading to the next, for the share of a run


@dataclass(frozen=True)
class CostConfig:
    """What is timed.

    Args:
        batch_size: examples of a training step, of g and of H.
        max_length: tokens of an example at the most.
        rounds: measured.
        parts: of the examples for H.
        probes: random sign vectors.
    """

    batch_size: int = 16
    max_length: int = 256
    rounds: int = 5
    parts: int = 4
    probes: int = 8


class _Logits(nn.Module):
    """The model as curvlinops wants it: inputs to rows of logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.inner(**given).logits[:, :-1].flatten(0, 1)


def _curvlinops(model: nn.Module, batch: dict[str, Tensor], products: int) -> Callable[[], Any] | None:
    """The same number of Hessian products by curvlinops, or None where it is not installed."""
    try:
        library = importlib.import_module("curvlinops")
    except ImportError:
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    data = [(inputs, batch["labels"][:, 1:].flatten())]
    vectors = [[torch.randn_like(p) for p in parameters] for _ in range(products)]

    def run() -> None:
        operator = library.HessianLinearOperator(
            _Logits(model),
            nn.CrossEntropyLoss(ignore_index=IGNORED),
            parameters,
            data,
            check_deterministic=False,
            batch_size_fn=lambda x: len(x["input_ids"]),
        )
        for vector in vectors:
            operator @ vector

    return run


def measured(config: CostConfig) -> list[dict[str, Any]]:
    """Time every arm; one row an arm."""
    chosen = FinetuneConfig(
        model="gns:base", data="gns:held-out", lr=1e-3, max_length=config.max_length, batch_size=16, steps=20
    )
    prepared = prepare(chosen)
    model, collate = prepared.model.train(), Collator(pad_id(prepared.tokenizer))
    n = config.batch_size
    batches = [dict(collate([prepared.train[i] for i in range(k * n, (k + 1) * n)])) for k in range(2)]
    half = {k: v[: n // 2] for k, v in batches[1].items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(**batches[0]).loss.backward()
        optimizer.step()

    def reading(method: str, for_h: Any) -> Callable[[], Any]:
        how = {"method": method, "probes": config.probes, "parts": config.parts}
        return lambda: b_noise(model, batches[:1], hessian_batches=[for_h], **how)

    arms: dict[str, Callable[[], Any]] = {
        "training step": step,
        "exact": reading("exact", batches[1]),
        "exact, H on half": reading("exact", half),
        "difference": reading("difference", batches[1]),
        "forward": reading("forward", batches[1]),
    }
    peer = _curvlinops(model, batches[1], config.probes + 1)
    failed = ""
    if peer is not None:
        try:
            peer()
            arms[PEER] = peer
        except NotImplementedError as error:  # it needs forward derivatives of backward passes
            failed = " ".join(str(error).split())
    for _ in range(5):  # a point where A trains too
        step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(config.rounds + 1):
        names = list(arms)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            many = 4 if name == "training step" else 1
            start = time.perf_counter()
            for _ in range(many):
                arms[name]()
            if round_:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / many)
    about = {"config": asdict(config), "torch": torch.__version__} | provenance()
    about |= {"threads": torch.get_num_threads(), "status": "done"}
    rows = [{"arm": name, "seconds": times} | about for name, times in seconds.items()]
    if failed:
        rows.append({"arm": PEER, "seconds": []} | about | {"status": "failed", "error": failed})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Costs in training steps, median (smallest … largest ratio to the median step), as Markdown.

    Args:
        rows: of `measured`.
    """
    step = float(np.median(next(r["seconds"] for r in rows if r["arm"] == "training step")))
    lines = [
        f"| reading, 8 probes | training steps | wanted: at most | share of a run, every {EVERY} steps |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["arm"] == "training step":
            continue
        if row["status"] == "failed":
            lines.append(f"| {row['arm']} | does not run: {row['error']} | | |")
            continue
        ratios = np.array(row["seconds"]) / step
        median, limit = float(np.median(ratios)), LIMITS.get(row["arm"])
        share = f"{100 * median / EVERY:.1f} %" if limit else ""
        spread = f"{median:.1f} ({ratios.min():.1f} … {ratios.max():.1f})"
        lines.append(f"| {row['arm']} | {spread} | {limit or ''} | {share} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure unless only the table is asked for, then print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of CostConfig as JSON")
    given = parser.parse_args(argv)
    if not given.table:
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        write(ROWS, measured(CostConfig(**given.config)))
    print(table(read(ROWS)))


if __name__ == "__main__":
    main()
