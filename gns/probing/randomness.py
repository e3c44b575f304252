"""The random generators that a forward pass may draw from: read, seeded for a while, put back.

A device that was not used stays unused, and keeps the seed that waits for its first use: `torch.manual_seed`
would replace that one, and a training that moves to the device later would draw other numbers.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NEEDED = ("is_initialized", "get_rng_state_all", "set_rng_state_all", "manual_seed_all")


def _used() -> list[ModuleType]:
    """Torch's modules of the devices that were used, those with a generator for each device of their kind."""
    registered = getattr(torch, torch._C._get_privateuse1_backend_name(), None)  # a vendor's, as Ascend's
    kinds: tuple[Any, ...] = (torch.cuda, torch.xpu, torch.mtia, registered)
    return [m for m in kinds if all(hasattr(m, name) for name in _NEEDED) and m.is_initialized()]


def _apples() -> Tensor | None:
    """State of Apple's generator; None without one, and in a child of a process that used it, as in torch."""
    there = torch.backends.mps.is_available() and not torch.mps._is_in_bad_fork()
    return torch.mps.get_rng_state() if there else None


@dataclass(frozen=True)
class RandomState:
    """States of the random generators that a forward pass may draw from.

    Args:
        torch: of the host's.
        devices: (torch's module of a kind of devices, states of all of them).
        mps: of Apple's, or None.
        numpy: of numpy's global one.
        python: of `random`.
    """

    torch: Tensor
    devices: tuple[tuple[ModuleType, tuple[Tensor, ...]], ...]
    mps: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """Read them; a device that was not used is left unused."""
        devices = tuple((module, tuple(module.get_rng_state_all())) for module in _used())
        return cls(torch.get_rng_state(), devices, _apples(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.torch)
        for module, states in self.devices:
            module.set_rng_state_all(list(states))
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def same(self, other: RandomState) -> bool:
        """Whether no random number was drawn in between."""
        pairs = zip(self._tensors(), other._tensors(), strict=False)
        keys, others = (np.append(r.numpy[1], r.numpy[2:]) for r in (self, other))
        drawn = not np.array_equal(keys, others) or self.python != other.python
        return not drawn and all(torch.equal(a, b) for a, b in pairs)

    def _tensors(self) -> list[Tensor]:
        apple = [] if self.mps is None else [self.mps]
        return [self.torch, *apple, *(state for _, states in self.devices for state in states)]


def mixed(*parts: int) -> int:
    """Make one seed of several numbers. It has 32 bits: torch's generator on the host heeds no more."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Generator[RandomState]:
    """Run with all generators seeded, and put them back; gives the state that the seed makes."""
    before = RandomState.now()
    try:
        torch.default_generator.manual_seed(seed)
        for module, _ in before.devices:
            module.manual_seed_all(seed)
        if before.mps is not None:
            torch.mps.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield RandomState.now()
    finally:
        before.restore()
