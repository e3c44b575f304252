"""`python -m experiments.frozen_rank`: does the noise scale at initialisation depend on LoRA's rank?

At B = 0 only factor B has a gradient, s·G·Aᵀ with a random A, in r·d_out dimensions. A random subspace
catches signal and noise alike, so theory expects the noise scale of factor B to be that of the full weights,
whatever the rank, with a scatter over A that shrinks in r; and it does not expect it to move with the number
of examples it is measured on. Nothing is trained: each row is one frozen probe.

    python -m experiments.frozen_rank                     # the shipped base, two cores, about ten minutes
    python -m experiments.frozen_rank --base runs/bases/25m --device cuda --batch-size 32
    python -m experiments.frozen_rank --figures ROWS.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from scipy import stats

from experiments.figures.palette import BLUE, VERMILION
from experiments.overhead.measure import machine
from gns import corpus, probe
from gns.estimate import Estimate
from gns.finetuning.preparation import quiet_peft

RANKS = (2, 4, 8, 16, 32, 64)
SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the examples, for the readings on fewer


def adapted(base: Path, rank: int | None, seed: int, device: str) -> torch.nn.Module:
    """Load the base in float32, with fresh adapters on all linear layers, or all of these trainable."""
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    if rank is None:
        wanted = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted - {"lm_head.weight"})
        return model
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet_peft():
        return peft.get_peft_model(model, lora)


def batches(base: Path, count: int, size: int, length: int, device: str) -> list[dict[str, torch.Tensor]]:
    """Held-out text in random order, cut to `length` tokens: the same examples for every row.

    Raises:
        ValueError: there are too few examples.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = corpus.examples("held_out")
    if len(texts) < count * size:
        raise ValueError(f"{count} batches of {size} need {count * size} examples; there are {len(texts)}")
    texts = random.Random(0).sample(texts, count * size)
    found = []
    for start in range(0, count * size, size):
        batch = tokenizer(
            texts[start : start + size], padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append({**batch, "labels": labels})
    return found


def row(found: Estimate, **about: Any) -> dict[str, Any]:
    """Give a reading as plain data; of LoRA, that of factor B."""
    part = found.groups.get("B", found)
    names = ("b_simple", "low", "high", "status", "trace_sigma", "grad_sq_norm", "n_examples", "level")
    return {**about, **{name: getattr(part, name) for name in names}, "unit": found.unit}


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each rank, seed and number of examples."""
    data = batches(given.base, given.batches, given.batch_size, given.length, given.device)
    config = json.loads((given.base / "config.json").read_text())
    about = {"base": given.base.name, "width": config["hidden_size"], "machine": machine()}
    for rank, seed in itertools.product([*given.ranks, None], range(given.seeds)):
        if rank is None and seed:
            continue  # nothing is random about full weights
        model = adapted(given.base, rank, seed, given.device)
        for share in (*SHARES, 1.0) if seed == 0 else (1.0,):
            count, start = max(2, round(share * len(data))), time.monotonic()
            found = probe(model, data, max_batches=count)
            took = time.monotonic() - start
            yield row(found, **about, rank=rank, seed=seed, share=share, seconds=took)


def slope(rows: Sequence[dict[str, Any]], over: str) -> tuple[float, float, float]:
    """Slope of log B over log rank or log examples by least squares, with its 95 % interval.

    Examples are shared between rows, so the interval shows the scatter over adapters, not that over data.
    """
    rows = [r for r in rows if r["b_simple"] > 0]  # NaN where |G|² averaged below zero
    if len(rows) < 3:
        return math.nan, math.nan, math.nan
    x, y = np.log([r[over] for r in rows]), np.log([r["b_simple"] for r in rows])
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2)) * float(fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw B over rank with full weights beside it, and B over the number of examples; a line a base."""
    bases = sorted({r["base"] for r in rows}, key=lambda b: next(r["width"] for r in rows if r["base"] == b))
    made = Figure(figsize=(7.6, 3.2 * len(bases)), dpi=160, layout="constrained")
    axes = made.subplots(len(bases), 2, squeeze=False)
    for (left, right), base in zip(axes, bases, strict=True):
        mine = [r for r in rows if r["base"] == base]
        _over_rank(left, [r for r in mine if r["share"] == 1 or r["rank"] is None], base)
        _over_examples(right, [r for r in mine if r["seed"] == 0])
    return made


def _interval(ax: Any, x: float, r: dict[str, Any], colour: str, **style: Any) -> None:
    """Draw a reading with its set; one without an upper end goes up to an arrow at the top."""
    low, high = max(r["low"], 1e-3), r["high"]
    if np.isinf(high):
        ax.plot([x], [0.97], "^", color=colour, transform=ax.get_xaxis_transform(), markersize=5)
        high = max(low, np.nan_to_num(r["b_simple"]))
    ax.plot([x, x], [low, high], color=colour, linewidth=2, alpha=0.4)
    ax.plot([x], [r["b_simple"]], color=colour, linestyle="none", **style)


def _over_rank(ax: Any, rows: Sequence[dict[str, Any]], base: str) -> None:
    lora = [r for r in rows if r["rank"] is not None]
    for r in lora:
        _interval(ax, r["rank"] * 1.06 ** r["seed"], r, BLUE, marker="o", markersize=5)
    full = max((r for r in rows if r["rank"] is None), key=lambda r: r["n_examples"], default=None)
    if full is not None:
        if np.isfinite(full["high"]):
            ax.axhspan(full["low"], full["high"], color=VERMILION, alpha=0.15, linewidth=0)
        ax.axhline(full["b_simple"], color=VERMILION, label="full weights, 95 % band")
    middle, low, high = slope(lora, "rank")
    ax.plot([], [], "o", color=BLUE, label=f"factor B, slope {middle:.3f} ({low:.3f} … {high:.3f})")
    ax.set_xlabel("LoRA rank")
    ax.set_title(f"{base}, at B = 0", loc="left", fontsize=10)
    _dress(ax, sorted({r["rank"] for r in lora}))


def _over_examples(ax: Any, rows: Sequence[dict[str, Any]]) -> None:
    ranks = sorted({r["rank"] for r in rows if r["rank"] is not None})
    for rank, colour in ((ranks[len(ranks) // 2], BLUE), (None, VERMILION)):
        mine = [r for r in rows if r["rank"] == rank]
        if not mine:
            continue
        for r in mine:
            shift = 0.97 if rank else 1.03
            _interval(
                ax, r["n_examples"] * shift, r, colour, marker="s" if rank is None else "o", markersize=5
            )
        label = "full weights" if rank is None else f"factor B, r = {rank}"
        ax.plot([], [], "o" if rank else "s", color=colour, label=label)
    ax.set_xlabel("examples in the probe")
    _dress(ax, sorted({r["n_examples"] for r in rows}))


def _dress(ax: Any, ticks: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    low, high = ax.get_ylim()
    low = max(low, high / 1e4)
    ax.set_ylim(low / 1.5, high * 1.8)
    ax.set_yticks(
        [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000) if low / 1.5 < t < high * 1.8]
    )
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("B_simple (examples), 95 % sets")
    ax.legend(frameon=False, fontsize=8)
    ax.grid(color="#E4E4E4")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(prog="python -m experiments.frozen_rank", description=__doc__)
    parser.add_argument("--base", type=Path, default=corpus.base_model_path())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/frozen_rank.jsonl"))
    parser.add_argument("--figures", type=Path, nargs="+", metavar="ROWS", help="draw from these rows")
    given = parser.parse_args(arguments)
    if given.figures:
        rows = [json.loads(line) for path in given.figures for line in path.read_text().splitlines()]
        target = given.figures[0].parent / "frozen_rank.png"
        FigureCanvasAgg(figure(rows)).print_png(str(target))
        print(target)
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as file:
        for found in measure(given):
            file.write(json.dumps(found) + "\n")
            file.flush()
            b = f"{found['b_simple']:.1f} ({found['low']:.1f} … {found['high']:.1f})"
            print(f"r={found['rank']} seed {found['seed']}, {found['n_examples']} examples: B = {b}")


if __name__ == "__main__":
    main()
