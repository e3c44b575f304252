"""What one reading of B_noise costs, in training steps of the same batch: time and memory.

    python -m experiments.curvature_cost            # measure (four minutes on one quiet core)
    python -m experiments.curvature_cost --table    # print it from the rows that are there

Arms are interleaved: every round runs each once, in an order that turns, with a training step on either side,
and costs are medians over rounds of the ratio to those. A second training step is timed like an arm: what it
is off from 1 is what the machine adds. Memory is the peak of what torch allocates beyond the model, the batch
and the optimizer's state, from the profiler's account of every allocation.

Exact readings are those of a monitor, without contributions of factors and modules, which another arm has.

Forward passes take one side of a difference where the third derivative is small, and both, for about half as
much again, where it is not, as late in a training.

`curvlinops` differentiates a backward pass forward, which fused attention and `silu` do not allow: it is
given the same model with plain attention and x·sigmoid(x).
"""

from __future__ import annotations

import argparse
import copy
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
from torch.profiler import ProfilerActivity

from experiments.rows import provenance, read, write
from gns.examples import IGNORED
from gns.finetuning.data import Collator, pad_id
from gns.finetuning.preparation import FinetuneConfig, prepare
from gns.hessian import b_noise

ROWS = Path(__file__).parent / "results" / "curvature_cost" / "rows.jsonl.gz"
# training steps a reading is wanted to cost at most
LIMITS = {"exact": 18, "exact, H on half": 10, "difference": 20, "forward": 10}
PEER = "curvlinops, products alone"
EVERY = 200  # steps from one reading to the next, for the share of a run
STEP, AGAIN = "training step", "training step again"
MEMORY_LIMIT = {"difference": 2.0}  # training steps' peaks


@dataclass(frozen=True)
class CostConfig:
    """What is timed.

    Args:
        batch_size: examples of a training step, of g and of H.
        max_length: tokens of an example at the most.
        rounds: measured.
        parts: of the examples for H; None: as `b_noise` chooses.
        probes: random sign vectors.
    """

    batch_size: int = 16
    max_length: int = 128
    rounds: int = 5
    parts: int | None = None
    probes: int = 8


class _Logits(nn.Module):
    """The model as curvlinops wants it: inputs to rows of logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.inner(**given).logits[:, :-1].flatten(0, 1)


class _Swish(nn.Module):
    """`silu` of operations that have forward derivatives of their backward passes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def _curvlinops(model: nn.Module, batch: dict[str, Tensor], products: int) -> Callable[[], Any] | None:
    """The same number of Hessian products by curvlinops, or None where it is not installed."""
    try:
        library = importlib.import_module("curvlinops")
    except ImportError:
        return None
    model = copy.deepcopy(model)
    model.get_base_model().set_attn_implementation("eager")  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = _Swish()
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

    def reading(method: str, for_h: Any, *, contributions: bool = False) -> Callable[[], Any]:
        how = {"method": method, "probes": config.probes, "parts": config.parts}
        how["contributions"] = contributions  # a monitor's readings are without
        return lambda: b_noise(model, batches[:1], hessian_batches=[for_h], **how)

    arms: dict[str, Callable[[], Any]] = {
        AGAIN: step,
        "exact": reading("exact", batches[1]),
        "exact, H on half": reading("exact", half),
        "exact, with contributions": reading("exact", batches[1], contributions=True),
        "difference": reading("difference", batches[1]),
        "forward": reading("forward", batches[1]),
    }
    for _ in range(5):  # a point where A trains too
        step()
    # The steps timed from here on cost what they cost and move nothing: all arms read one point, and hundreds
    # of steps on one batch would end where no training is.
    optimizer.param_groups[0]["lr"] = 0.0
    peer = _curvlinops(model, batches[1], config.probes + 1)
    failed = ""
    if peer is not None:
        try:
            peer()
            arms[PEER] = peer
        except (NotImplementedError, RuntimeError) as error:  # the row says that it does not run, and why
            failed = " ".join(str(error).split())
    about = {"config": asdict(config), "torch": torch.__version__} | provenance()
    about |= {"threads": torch.get_num_threads(), "status": "done"}
    peaks = {name: peak_bytes(arm) for name, arm in {STEP: step, **arms}.items()}
    rows = [
        {"arm": name, "peak_bytes": peaks[name], "step_bytes": peaks[STEP], **found} | about
        for name, found in _interleaved(arms, step, config.rounds).items()
    ]
    if failed:
        rows.append({"arm": PEER} | about | {"status": "failed", "error": failed})
    return rows


def _interleaved(
    arms: dict[str, Callable[[], Any]], step: Callable[[], None], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm, and of a training step beside it: the mean of those before and after."""
    found: dict[str, dict[str, list[float]]] = {n: {"seconds": [], "step_seconds": []} for n in arms}
    for arm in arms.values():
        arm()  # warms up
    for round_ in range(rounds):
        names = list(arms)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            before = _seconds(step, 3)
            found[name]["seconds"].append(_seconds(arms[name], 3 if name == AGAIN else 1))
            found[name]["step_seconds"].append((before + _seconds(step, 3)) / 2)
    return found


def _seconds(work: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that was allocated at once during some work, beyond what there was before."""
    work()  # what is made once and stays is not counted
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events: list[Any] = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])])
    return int(held.max(initial=0))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Costs in training steps, median (smallest … largest) of the ratios to the steps beside, as Markdown.

    Args:
        rows: of `measured`.
    """
    lines = [
        f"| reading, 8 probes | training steps | wanted: at most | share of a run, every {EVERY} steps "
        "| peak memory, training steps' peaks | wanted: at most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["status"] == "failed":
            lines.append(f"| {row['arm']} | does not run: {row['error']} | | | | |")
            continue
        ratios = np.array(row["seconds"]) / np.array(row["step_seconds"])
        median, limit = float(np.median(ratios)), LIMITS.get(row["arm"])
        digits = 2 if row["arm"] == AGAIN else 1
        spread = f"{median:.{digits}f} ({ratios.min():.{digits}f} … {ratios.max():.{digits}f})"
        share = f"{100 * median / EVERY:.1f} %" if limit else ""
        memory = f"{row['peak_bytes'] / row['step_bytes']:.2f}"
        most = MEMORY_LIMIT.get(row["arm"], "")
        lines.append(f"| {row['arm']} | {spread} | {limit or ''} | {share} | {memory} | {most} |")
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
