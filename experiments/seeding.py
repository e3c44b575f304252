"""Random numbers of a run's own, which leave the program's as they were."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Generator[None]:
    """Seed torch, numpy and Python for a while; afterwards their generators are where they were.

    Args:
        seed: 0 or more.
        device: whose generator is put back too, beside the CPU's.
    """
    device = torch.device(device)
    accelerators = [device] if device.type == "cuda" else []
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=accelerators):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
