"""`OMP_NUM_THREADS=1 python -m experiments.bases NAME`: train a base model and its tokenizer from nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.bases.configs import BASES
from experiments.bases.make import make
from experiments.bases.paths import MADE


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train one row of `BASES`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bases", description="Train a base model.")
    parser.add_argument("name", nargs="?", default="1m", choices=BASES, help="row of BASES (default: 1m)")
    parser.add_argument("--out", type=Path, help=f"folder of the model (default: {MADE}/NAME)")
    parser.add_argument("--cache", type=Path, default=MADE / "cache", help="checkpoint folder")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    chosen = parser.parse_args(arguments)
    out = chosen.out or MADE / chosen.name
    try:
        row = make(BASES[chosen.name], out, chosen.cache, device=chosen.device)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"Stopped. The same command goes on from the checkpoint in {chosen.cache}.\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
