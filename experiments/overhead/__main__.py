"""`python -m experiments.overhead --preset cpu`: time the monitor and its peers; print and save a table.

Presets: `smoke` (seconds), `cpu`, `gpu`. Rows go to `--out` (JSON lines), one an arm and setting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from experiments.overhead.arms import OURS, PEERS
from experiments.overhead.measure import compare, machine
from experiments.overhead.settings import Setting

PRESETS = {
    "smoke": [Setting("width 512, 2 layers, r=8", "width-512", 8, 2, 64, layers=2)],
    "cpu": [
        Setting("width 512, r=16, 8×128", "width-512", 16, 8, 128),
        Setting("width 768, r=16, 8×128", "width-768", 16, 8, 128),
        Setting("width 1,024, r=16, 8×128", "width-1024", 16, 8, 128),
        Setting("width 512, full, 8×128", "width-512", None, 8, 128),
        Setting("width 512, full, 2×512", "width-512", None, 2, 512),
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


def main() -> None:
    """Run a preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--out", type=Path, default=Path("runs/overhead.jsonl"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--arms", help="names of arms, with ; between (default: all)")
    parser.add_argument("--only", help="part of a setting's name")
    given = parser.parse_args()
    device = "cuda" if given.preset.startswith("gpu") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"preset {given.preset} needs a CUDA device, and there is none")
    kinds = [k for k in TRY[given.preset] if not given.arms or k.name in given.arms.split(";")]
    about = machine()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(json.dumps(about))
    for setting in PRESETS[given.preset]:
        if given.only and given.only not in setting.name:
            continue
        rows = compare(setting, kinds, device=device, pairs=given.pairs)
        with given.out.open("a") as file:
            file.writelines(json.dumps(row | {"machine": about}) + "\n" for row in rows)
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
