"""Start ranks as users do, and read what each wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def launch(
    folder: Path, size: int, *arguments: str, script: str = "scenarios.py", limit: int = 300
) -> list[Any]:
    """Run a script under torchrun; every rank must end well.

    Returns:
        What each rank wrote, by rank.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command = [*torchrun, str(HERE / script), str(folder), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, f"{script} ended with {done.returncode}:\n{done.stderr[-6000:]}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
