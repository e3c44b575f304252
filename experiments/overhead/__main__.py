"""`python -m experiments.overhead --preset cpu`: time the monitor and its peers; print and save a table.

Presets: `smoke` (seconds), `cpu`, `gpu-7b`, `gpu-1b`. `--sweep tokens` (or another, see `sweeps.py`) shows
how the cost grows. `--counts` counts what needs no clock, and looks at fresh processes. Rows go to `--out`
(JSON lines), one an arm and setting. `make bench` does all of it that a CPU can.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from experiments.overhead import fresh
from experiments.overhead.arms import OURS, PEERS, Arm, Backpack, Between, Ghost, Monitored, Opacus, Tenth
from experiments.overhead.counting import idle
from experiments.overhead.measure import compare, machine, warmed
from experiments.overhead.settings import Setting, batches, build
from experiments.overhead.sweeps import SWEEPS

NARROW, FULL = "width 512, r=16, 8×128", "width 512, full, 8×128"
PRESETS = {
    "smoke": [Setting("width 512, 2 layers, r=8", "width-512", 8, 2, 64, layers=2)],
    "cpu": [
        Setting(NARROW, "width-512", 16, 8, 128, layers=2),
        Setting("width 768, r=16, 8×128", "width-768", 16, 8, 128, layers=2),
        Setting("width 1,024, r=16, 8×128", "width-1024", 16, 8, 128, layers=2),
        Setting(FULL, "width-512", None, 8, 128, layers=2),
        Setting("width 512, full, 4×512", "width-512", None, 4, 512, layers=2),
    ],
    "gpu-7b": [
        Setting("Llama-2-7B, r=16, 8×1,024", "llama-2-7b", 16, 8, 1_024, "bfloat16"),
        Setting("Llama-2-7B, r=128, 8×1,024", "llama-2-7b", 128, 8, 1_024, "bfloat16"),
    ],
    "gpu-1b": [
        Setting("1B shape, r=16, 4×512", "llama-3.2-1b", 16, 4, 512, "bfloat16"),
        Setting("1B shape, r=16, 16×1,024", "llama-3.2-1b", 16, 16, 1_024, "bfloat16"),
    ],
}
TRY = dict.fromkeys(PRESETS, (*OURS, *PEERS)) | {"gpu-7b": OURS[:1]}
FEWER = {  # of the larger and the full models, so that all of it takes minutes
    "width 768, r=16, 8×128": (Monitored, Tenth, Opacus, Ghost, Backpack),
    "width 1,024, r=16, 8×128": (Monitored,),
    FULL: (Monitored, *PEERS),
    "width 512, full, 4×512": (Monitored, *PEERS),
}
STARTUP = Setting("Llama-2-7B shape, r=16", "llama-2-7b", 16, 1, 16)
Saver = Callable[[Iterable[dict[str, Any]]], None]


def saver(path: Path) -> Saver:
    """Give what appends rows to a file, each with what it ran on."""
    about = machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    print(json.dumps(about), flush=True)

    def save(rows: Iterable[dict[str, Any]]) -> None:
        with path.open("a") as file:
            file.writelines(json.dumps(row | {"machine": about}) + "\n" for row in rows)

    return save


def preset(name: str, save: Saver, *, pairs: int, arms: str | None = None, only: str | None = None) -> None:
    """Time the arms of each setting of a preset."""
    device = "cuda" if name.startswith("gpu") else "cpu"
    for setting in PRESETS[name]:
        if only and only not in setting.name:
            continue
        kinds = FEWER.get(setting.name, TRY[name])
        kinds = [k for k in kinds if not arms or k.name in arms.split(";")]
        save(compare(setting, kinds, device=device, pairs=pairs, say=_say))
        if device == "cuda":
            torch.cuda.empty_cache()


def sweep(name: str, save: Saver, *, pairs: int, seconds: float) -> None:
    """Time the arms of one sweep at each of its points."""
    for x, setting in SWEEPS[name].settings():
        found = compare(setting, SWEEPS[name].arms, device="cpu", pairs=pairs, seconds=seconds, say=_say)
        save(row | {"sweep": name, "x": x} for row in found)


def counts(save: Saver, *, pairs: int) -> None:
    """Count a step between measured ones; look at fresh processes: start-up, resident size, two ranks."""
    narrow, full = (next(s for s in PRESETS["cpu"] if s.name == name) for name in (NARROW, FULL))
    model, data = build(narrow, "cpu"), batches(narrow, "cpu")
    between = Between(narrow, model)
    found = idle(warmed(Arm(narrow, model), data), warmed(between, data), data[0])
    between.close()
    save([_counted("idle", narrow, found)])
    save([_counted("startup", STARTUP, fresh.run("startup", json.dumps(STARTUP.row())))])
    save([_counted("ranks", narrow, fresh.pair(narrow, pairs))])
    for setting in (narrow, full, PRESETS["cpu"][-1]):
        for name in (Arm.name, Arm.name, Monitored.name):
            seen = fresh.run("rss", json.dumps(setting.row()), name)
            save([_counted("rss", setting, seen | {"arm": name})])


def _counted(what: str, setting: Setting, found: dict[str, Any]) -> dict[str, Any]:
    _say(f"{setting.name}: {what}: {json.dumps(found)[:300]}")
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="of timing an arm, in a sweep")
    parser.add_argument("--arms", help="names of arms, with ; between (default: all)")
    parser.add_argument("--only", help="part of a setting's name")
    given = parser.parse_args()
    if given.preset.startswith("gpu") and not torch.cuda.is_available():
        parser.error(f"preset {given.preset} needs a CUDA device, and there is none")
    save = saver(given.out)
    if given.sweep:
        sweep(given.sweep, save, pairs=given.pairs, seconds=given.seconds)
    elif given.counts:
        counts(save, pairs=given.pairs)
    else:
        preset(given.preset, save, pairs=given.pairs, arms=given.arms, only=given.only)


if __name__ == "__main__":
    main()
