"""`python -m experiments.overhead --preset cpu`: time the monitor and its peers; print and save a table.

Presets: `smoke` (seconds), `cpu`, `gpu-7b`, `gpu-1b`. `--sweep tokens` (or another, see `sweeps.py`) shows
how the cost grows. `--counts` counts what needs no clock, and looks at fresh processes. Rows go to `--out`
(JSON lines), one an arm and setting. `make bench` does all of it that a CPU can.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import rowsfile
from experiments.overhead import fresh
from experiments.overhead.arms import Arm, Between
from experiments.overhead.counting import idle
from experiments.overhead.measure import compare, machine, warmed
from experiments.overhead.presets import NARROW, PRESETS, SLOTS, STARTUP, kinds, resident
from experiments.overhead.settings import Setting, batches, build
from experiments.overhead.sweeps import SWEEPS, least

Saver = Callable[[Iterable[dict[str, Any]]], None]


def saver(path: Path) -> Saver:
    """Give what appends rows to a file, each with what it ran on."""
    about = machine()
    print(json.dumps(about), flush=True)

    def save(rows: Iterable[dict[str, Any]]) -> None:
        rowsfile.append(path, [row | {"machine": about} for row in rows])

    return save


def timed(
    preset: str,
    setting: Setting,
    save: Saver,
    *,
    pairs: int,
    seconds: float = math.inf,
    arms: str | None = None,
) -> None:
    """Time the arms of a setting of a preset."""
    device = "cuda" if preset.startswith("gpu") else "cpu"
    chosen = [kind for kind in kinds(preset, setting) if not arms or kind.name in arms.split(";")]
    slots = SLOTS.get(setting.name)
    save(compare(setting, chosen, device=device, pairs=pairs, seconds=seconds, slots=slots, say=_say))


def point(
    sweep: str, x: int, setting: Setting, save: Saver, *, pairs: int, seconds: float = math.inf
) -> None:
    """Time the arms of one point of a sweep."""
    kinds = SWEEPS[sweep].arms
    how = {"pairs": pairs, "least": least(setting), "seconds": seconds}
    found = compare(setting, kinds, device="cpu", **how, second=False, say=_say)
    save(row | {"sweep": sweep, "x": x} for row in found)


def counts(save: Saver, *, pairs: int) -> None:
    """Count a step between measured ones; look at other processes: start-up, one thread, two ranks."""
    narrow = next(setting for setting in PRESETS["cpu"] if setting.name == NARROW)
    model, data = build(narrow, "cpu"), batches(narrow, "cpu")
    between = Between(narrow, model)
    found = idle(warmed(Arm(narrow, model), data), warmed(between, data), data[0])
    between.close()
    save([_counted("idle", narrow, found)])
    jobs = [("startup", STARTUP), ("alone", narrow, pairs), ("ranks", narrow, pairs)]
    for (what, setting, *_), found in zip(jobs, fresh.run(jobs), strict=True):
        save([_counted(what, setting, found)])


def memory(save: Saver, settings: Sequence[Setting]) -> None:
    """Measure peak resident sizes in processes of their own, twice of the untouched step."""
    jobs, repeats = [], []
    for setting in settings:
        names = [Arm.name, *(kind.name for kind in resident(setting)), Arm.name]
        jobs += [("rss", setting, name) for name in names]
        repeats += [names[:i].count(name) for i, name in enumerate(names)]
    for (what, setting, name), repeat, found in zip(jobs, repeats, fresh.run(jobs, lean=True), strict=True):
        save([_counted(what, setting, {"arm": name, "repeat": repeat} | found)])


def _counted(what: str, setting: Setting, found: dict[str, Any]) -> dict[str, Any]:
    _say(f"{setting.name}: {what}: {json.dumps(found)[:200]}")
    return {"what": what, "setting": setting.row(), "status": "ok"} | found


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--preset", choices=PRESETS, default="smoke")
    asked.add_argument("--sweep", choices=SWEEPS)
    asked.add_argument("--counts", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/overhead/rows.jsonl"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a setting or a point")
    parser.add_argument("--arms", help="names of arms, with ; between (default: all)")
    parser.add_argument("--only", help="part of a setting's name")
    given = parser.parse_args()
    if given.preset.startswith("gpu") and not torch.cuda.is_available():
        parser.error(f"preset {given.preset} needs a CUDA device, and there is none")
    save = saver(given.out)
    if given.sweep:
        for x, setting in SWEEPS[given.sweep].settings():
            point(given.sweep, x, setting, save, pairs=given.pairs, seconds=given.seconds)
    elif given.counts:
        counts(save, pairs=given.pairs)
        memory(save, PRESETS["cpu"])
    else:
        for setting in PRESETS[given.preset]:
            if not given.only or given.only in setting.name:
                timed(given.preset, setting, save, pairs=given.pairs, seconds=given.seconds, arms=given.arms)


if __name__ == "__main__":
    main()
