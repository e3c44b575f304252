"""Adapters trained before there is a task: half by a larger teacher, half by text, then a better start.

    python -m experiments.foundation --base math-200k --teacher math-1m --out runs/foundation-200k
    python -m experiments.run --config '{"base": "math-200k", "task": "wordmath", "adapter": "foundation",
        "init": "runs/foundation-200k"}'

The base stays frozen. The loss of a token is half the divergence of the student's distribution from the
teacher's, KL(teacher ‖ student), and half the usual loss on the token itself. `comparison` gives the runs
that tell whether the start is worth it: against a random one, with all of the training set and less and less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.adapters import adapted
from experiments.configs import RunConfig, RunError
from experiments.distillation import Pair, same_tokenizer
from experiments.forecast import words
from experiments.loop import optimizer_of
from experiments.order import batches_of
from experiments.prepared import device_of, load_base
from experiments.rows import provenance
from experiments.schedules import lr_at
from experiments.seeding import seeded
from gns import corpus
from gns.finetune import n_labels
from gns.finetuning.data import Row, encode_texts, load_examples
from gns.finetuning.sources import DataError

FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 8)  # of the training set
ABOUT = "foundation.json"


@dataclass(frozen=True)
class FoundationConfig:
    """How adapters are trained beforehand.

    Args:
        base: as in `RunConfig`; it gets the adapters.
        teacher: a larger model with the same tokenizer, as in `RunConfig`.
        text: file, folder or hub data set for `gns.finetuning.data.load_examples`; None: the library's base
            part.
        share: of the distillation in the loss, 0 … 1.
        rank: r of the factors.
        alpha: LoRA scale; None: the rank.
        steps: optimizer steps of AdamW, cosine after a warm-up.
        batch_size: texts in a step.
        micro_batch: texts in a forward pass; None: the whole batch.
        lr: peak learning rate.
        warmup: share of the steps.
        max_length: most tokens of a text.
        held_out: texts that are not trained on, to measure by.
        dtype: of both models, "float32" or "bfloat16".
        seed: of the adapters and of the order.
    """

    base: str
    teacher: str
    text: str | None = None
    share: float = 0.5
    rank: int = 16
    alpha: float | None = None
    steps: int = 500
    batch_size: int = 16
    micro_batch: int | None = None
    lr: float = 1e-3
    warmup: float = 0.05
    max_length: int = 256
    held_out: int = 64
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise RunError(f"share is {self.share}; a number in [0, 1] is needed")
        if self.held_out < 1:
            raise RunError(f"held_out is {self.held_out}; at least one text is needed to measure by")

    def training(self, n: int) -> RunConfig:
        """Say the same as a run over `n` texts: order, schedule and optimizer are those of all runs."""
        names = ("rank", "alpha", "batch_size", "micro_batch", "lr", "warmup", "max_length", "dtype", "seed")
        same = {name: getattr(self, name) for name in names}
        return RunConfig(
            self.base, "text", n_train=n, protocol="steps", steps=self.steps, data_seed=self.seed, **same
        )


def comparison(
    run: RunConfig,
    init: str | Path,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0,),
) -> list[RunConfig]:
    """Give the runs that compare a foundation with a random start, pair by pair.

    Args:
        run: with the largest training set, and the rank and alpha of the foundation.
        init: folder of the foundation.
        fractions: of its training set; the sets are nested.
        seeds: of each pair: of the random start, and of the order for both.

    Returns:
        For each seed and each fraction the run from a random start, then that from the foundation.
    """
    runs = []
    for seed in seeds:
        for fraction in fractions:
            part = replace(run, n_train=max(1, round(run.n_train * fraction)), seed=seed, data_seed=seed)
            runs.append(replace(part, adapter="lora", init=None))
            runs.append(replace(part, adapter="foundation", init=str(init)))
    return runs


def _texts(config: FoundationConfig, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Encode the texts: those to train on, and those to measure by.

    Raises:
        RunError: there are too few, or the source cannot be read.
    """
    try:
        if config.text is None:
            texts = corpus.examples("base")
            found = encode_texts(texts, tokenizer, max_length=config.max_length, source="the library")
        else:
            found = load_examples(config.text, tokenizer, max_length=config.max_length)
    except (DataError, FileNotFoundError) as error:
        raise RunError(str(error)) from error
    rows, held_out = found.split(config.held_out, config.seed)
    if len(rows) < config.batch_size:
        raise RunError(
            f"{len(found)} texts, of which {config.held_out} are held out; {config.batch_size} more are "
            "needed for one batch"
        )
    return rows, held_out


def train(
    config: FoundationConfig,
    out: Path,
    *,
    device: str | None = None,
    watch: Callable[[Iterator[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Train adapters and write their folder, whole or not at all.

    Args:
        config: of the adapters.
        out: folder; an older foundation there is replaced.
        device: of torch; None: an accelerator if there is one.
        watch: wraps the steps, for a progress bar.

    Returns:
        What is written beside the adapters: configuration, versions, both held-out losses before and after.

    Raises:
        RunError: the models do not fit each other, there is too little text, the loss is not finite, or `out`
            holds something else.
    """
    started, where = time.monotonic(), device_of(device)
    _refuse_foreign(out)
    with seeded(config.seed, where):
        model, tokenizer = load_base(config.training(config.batch_size))
        teacher, theirs = load_base(replace(config.training(config.batch_size), base=config.teacher))
        same_tokenizer(tokenizer, theirs, (config.base, config.teacher))
        rows, held_out = _texts(config, tokenizer)
        run = config.training(len(rows))
        bfloat16 = config.dtype == "bfloat16"
        pair = Pair(adapted(model, run), teacher, tokenizer, where, autocast=bfloat16)
        before = pair.measured(held_out, run.batch_size)
        _steps(pair, run, rows, config.share, watch)
        after = pair.measured(held_out, run.batch_size)
    row = {
        "config": asdict(config),
        "before": before,
        "after": after,
        "texts": len(rows),
        "seconds": round(time.monotonic() - started, 1),
        **provenance(),
        "torch": torch.__version__,
    }
    _save(pair.student, out, row)
    return row


def _steps(
    pair: Pair,
    run: RunConfig,
    texts: Sequence[Row],
    share: float,
    watch: Callable[[Iterator[Any]], Iterable[Any]],
) -> None:
    """Make all optimizer steps.

    Raises:
        RunError: a loss is not finite.
    """
    optimizer = optimizer_of([p for p in pair.student.parameters() if p.requires_grad], run)
    pair.student.train()
    for step, numbers in enumerate(watch(batches_of(run))):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(run, step)
        rows = [texts[i] for i in numbers]
        tokens = sum(n_labels(row) for row in rows)
        size, total = run.micro_batch or len(rows), 0.0
        for start in range(0, len(rows), size):
            found, _ = pair.sums(rows[start : start + size])
            loss = (share * found.divergence + (1 - share) * found.text) / tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise RunError(f"the loss of step {step} is {total}; lr {run.lr:g} is too high")
        optimizer.step()
        optimizer.zero_grad()


def card(row: Mapping[str, Any]) -> str:
    """Write the README of adapters from what was measured of them.

    Args:
        row: as `train` gives it.
    """
    config, before, after = FoundationConfig(**row["config"]), row["before"], row["after"]
    training = config.training(config.batch_size)
    text = "the library's base part" if config.text is None else config.text
    return f"""\
---
library_name: peft
base_model: {json.dumps(config.base, ensure_ascii=False)}
---
# A foundation for {config.base}: LoRA r = {config.rank}, α = {training.scale:g}

Adapters on all linear layers, trained before there is a task: a start for adapter "foundation" of
`experiments.run`, and of no use elsewhere.

Made by `python -m experiments.foundation --base {config.base} --teacher {config.teacher} …`
from {row["texts"]:,} texts ({text}): {config.steps:,} steps of {config.batch_size} texts, AdamW,
peak learning rate {config.lr:g}, cosine after a warm-up of {100 * config.warmup:g} %, seed {config.seed};
{words(row["seconds"])}, torch {row["torch"]}, commit {row["commit"] or "unknown"}. `{ABOUT}` has it all.

| held out, nats per token | before | after |
| --- | --- | --- |
| divergence from the teacher | {before["divergence"]:.4f} | {after["divergence"]:.4f} |
| loss on the text | {before["text"]:.4f} | {after["text"]:.4f} |
"""


def _refuse_foreign(out: Path) -> None:
    """Let nothing be replaced but an older foundation.

    Raises:
        RunError: there is something else.
    """
    if out.exists() and not (out / ABOUT).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} holds no {ABOUT}, so it is not replaced; choose another folder")


def _save(model: Any, out: Path, row: dict[str, Any]) -> None:
    """Write the folder of the adapters beside its place, then put it there."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for held in model.peft_config.values():
        held.base_model_name_or_path = row["config"]["base"]  # as it was asked for
    model.save_pretrained(str(partial), save_embedding_layers=False)
    (partial / "README.md").write_text(card(row), encoding="utf-8")
    (partial / ABOUT).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, train, say what was gained; 0, or 2 where it cannot be done."""
    title = str(__doc__).splitlines()[0]
    asked = argparse.ArgumentParser(prog="python -m experiments.foundation", description=title)
    for name, field in FoundationConfig.__dataclass_fields__.items():
        needed = name in ("base", "teacher")
        kind = {"alpha": float, "micro_batch": int}.get(name)
        kind = kind or (str if field.default is None or needed else type(field.default))
        shown = {} if needed else {"default": field.default, "help": f"default: {field.default}"}
        asked.add_argument(f"--{name.replace('_', '-')}", type=kind, required=needed, **shown)
    asked.add_argument("--out", type=Path, required=True, help="folder to write")
    asked.add_argument("--device", help="of torch (default: an accelerator if there is one)")
    chosen = vars(asked.parse_args(arguments))
    out, device = chosen.pop("out"), chosen.pop("device")
    try:
        config = FoundationConfig(**chosen)
        row = train(config, out, device=device, watch=lambda steps: tqdm(steps, total=config.steps))
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    for name, said in (("divergence", "from the teacher"), ("text", "on text")):
        before, after = row["before"][name], row["after"][name]
        print(f"{name} {said}, held out: {before:.4f} → {after:.4f} nats per token")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
