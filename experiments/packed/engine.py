"""Many LoRA runs of one base in one program: a sweep at small batches wastes the machine run by run.

A slot is one run, with its own learning rate, seed, data order, betas, decay, schedule and clip; the slots
share base, adapter kind, rank, batch size and the number of steps. Each slot's row is what its solo twin's
would be, to rounding (`tests/experiments/packed/test_engine.py`). How: see `experiments.packed.layers`.

    packable(a, b)           whether two can share a program
    run_packed(group)        a row each, engine "packed"
    best_width(config)       how many slots pay on this machine (`experiments.packed.width`)

A slot that is over (diverged, or at its target) leaves the program; the others go on without it.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from experiments.configs import RunConfig, RunError
from experiments.outcome import device_name, header, one_line
from experiments.packed.program import Program, Slot
from experiments.packed.width import best_width
from experiments.prepared import data_of, device_of
from experiments.rowsfile import finite

__all__ = ["best_width", "packable", "refusal", "run_packed"]

KINDS = ("lora", "rslora", "dora", "pissa", "milora", "foundation")
FREE = (  # what may differ between slots; how many steps they make may not
    *(
        "lr",
        "seed",
        "data_seed",
        "beta1",
        "beta2",
        "beta2_batch",
        "weight_decay",
        "warmup",
        "schedule",
        "clip",
    ),
    *("n_train", "epochs", "steps", "target_loss", "dials", "engine"),
)
Progress = Callable[[int, int], None]


def refusal(config: RunConfig) -> str | None:
    """Say why a run cannot be packed; None where it can."""
    if config.adapter not in KINDS:
        return (
            f"adapter {config.adapter!r} has weights of its own on every layer; packed are {', '.join(KINDS)}"
        )
    if config.gns_every:
        return f"gns_every is {config.gns_every}; the monitor reads one run at a time"
    if config.dropout:
        return f"dropout is {config.dropout}; its random numbers would not be the solo run's"
    return None


def packable(a: RunConfig, b: RunConfig) -> bool:
    """Whether two runs can share a program; of one run and itself, whether it can be packed at all."""
    return refusal(a) is None and refusal(b) is None and _shared(a) == _shared(b)


def _shared(config: RunConfig) -> tuple[Any, ...]:
    """Give what slots of one program have in common."""
    fixed = tuple(getattr(config, f.name) for f in fields(config) if f.name not in FREE)
    asked = _dials(config) if config.generate else ""  # answers are generated for the same items
    return *fixed, config.n_steps, asked


def _dials(config: RunConfig) -> str:
    return json.dumps(dict(config.dials), sort_keys=True)


def run_packed(
    configs: Sequence[RunConfig], *, device: str | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Make the runs of one program.

    Args:
        configs: runs that can share it.
        device: of torch; None: an accelerator if there is one.
        progress: hears (steps made, steps to make) after each step.

    Returns:
        A row for each, in their order, as `experiments.run.run` gives it; `seconds` is the run's share of the
        program's time. What goes wrong is "failed" in the rows concerned; only KeyboardInterrupt is raised.
        Runs that do not fit into the memory of an accelerator together are made in two halves.
    """
    rows, started = [header(config, "packed") for config in configs], time.monotonic()
    too_large = False
    try:
        where = device_of(device)
        found = _made(configs, where, progress)
        found = [{"device": device_name(where)} | each for each in found]
    except torch.OutOfMemoryError as error:
        too_large, found = len(configs) > 1, [_failed(error)] * len(configs)
    except (Exception, SystemExit) as error:
        found = [_failed(error)] * len(configs)
    if too_large:  # not in the handler, whose traceback holds the program that did not fit
        gc.collect()
        torch.cuda.empty_cache()
        half = len(configs) // 2
        parts = configs[:half], configs[half:]
        return [row for part in parts for row in run_packed(part, device=device, progress=progress)]
    seconds = round((time.monotonic() - started) / max(1, len(configs)), 3)
    return [finite(row | each | {"seconds": seconds}) for row, each in zip(rows, found, strict=True)]


def _failed(error: BaseException) -> dict[str, Any]:
    return {"status": "failed", "error": one_line(error)}


def _made(
    configs: Sequence[RunConfig], device: torch.device, progress: Progress | None
) -> list[dict[str, Any]]:
    """Make the runs whose data are there; the others are rows with the error.

    Raises:
        RunError: the runs cannot be packed, or not together.
    """
    for config in configs:
        if why := refusal(config):
            raise RunError(f'this run cannot be packed: {why}; run it with engine "loop"')
        if not packable(configs[0], config):
            raise RunError(f"runs {configs[0].hash} and {config.hash} cannot share a program; see `groups`")
    found: dict[int, dict[str, Any]] = {}
    slots: dict[int, Slot] = {}
    for i, config in enumerate(configs):
        try:
            slots[i] = Slot(config, data_of(config))
        except Exception as error:
            found[i] = _failed(error)
    if slots:
        program = Program(list(slots.values()), device)
        program.train(progress)
        found |= zip(slots, program.results(), strict=True)
    return [found[i] for i in range(len(configs))]
