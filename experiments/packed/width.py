"""How many slots pay on this machine: a few steps of the solo loop and of packed programs, timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from experiments import loop
from experiments.configs import RunConfig
from experiments.course import Course
from experiments.packed.program import Program, Slot
from experiments.prepared import data_of, device_of, prepare

WIDTHS = (2, 4, 8, 16, 32, 64)
PAYS = 1.05  # a wider program must give so many times the examples a second: padding and memory grow too
MISSES = 2  # one may be the machine's: at batch 4 a single slow timing of two slots hid that sixteen give 1.8
STEPS, REPEATS = 2, 3  # timed; the fastest counts, for what else runs on the machine only slows it
ENOUGH = 1.0  # seconds of them; a search must not take longer than the runs that it is for
EXAMPLES = 16  # of a solo run in one timing, at the least

Clock = Callable[[int], float]


def timed(config: RunConfig) -> RunConfig:
    """Give a run of the same steps without an end, a target or more data than it needs."""
    n_train = min(config.n_train, max(64, 16 * config.batch_size))
    return replace(
        config,
        protocol="steps",
        steps=10**6,
        epochs=1,
        target_loss=None,
        n_train=n_train,
        n_eval=1,
        generate=0,
    )


def solo_clock(config: RunConfig, device: torch.device) -> Clock:
    """Make a solo run and give what times so many of its steps, in seconds; its first step is made.

    It goes on from timing to timing with one optimizer, as a program does: whoever makes its moments anew for
    a few steps is slower than any run.
    """
    config = timed(config)
    prepared, course = prepare(config, device), Course(config)
    made = loop.Steps(prepared, course)

    def steps(n: int) -> float:
        return _seconds(lambda: [made.next() for _ in range(n)], device)

    steps(1)
    return steps


def packed_clock(config: RunConfig, width: int, device: torch.device) -> Clock:
    """Make a program of so many slots and give what times its steps, in seconds; its first step is made."""
    config = timed(config)
    program = Program([Slot(config, data_of(config)) for _ in range(width)], device)

    def steps(n: int) -> float:
        return _seconds(lambda: [program.step() for _ in range(n)], device)

    steps(1)
    return steps


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def best_width(config: RunConfig, device: str | None = None, most: int = WIDTHS[-1]) -> int:
    """Say how many slots of a kind of run pay; 1: the solo loop is as fast, as on a machine at its limit.

    Widths are tried in turn until two in a row are not `PAYS` times as fast as the best before them, or one
    does not fit into memory. Takes seconds on a small model; kept for runs of the same base, shape and batch.

    Args:
        config: of the kind; one that can be packed.
        device: of torch; None: an accelerator if there is one.
        most: slots that there are runs for, at least 1; no wider program is timed.
    """
    kind = replace(
        RunConfig(config.base, config.task, config.dials),
        n_train=timed(config).n_train,
        **{
            name: getattr(config, name)
            for name in (
                *("adapter", "init", "rank", "alpha", "batch_size", "micro_batch", "optimizer"),
                *("max_length", "dtype", "trust_remote_code"),
            )
        },
    )
    return _search(_Key(kind), str(device_of(device)), torch.get_num_threads()).up_to(most)


class _Key:
    """A configuration as a key: its dials are a mapping, which has no hash."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return hash(self.config.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.config.hash == other.config.hash


class _Search:
    """Times wider and wider programs of one kind, as far as it is asked to, and goes on from there."""

    def __init__(self, config: RunConfig, where: torch.device) -> None:
        self.config, self.where = config, where
        self.paid: list[tuple[int, float]] = []  # widths that paid, and the runs' steps in a second
        self.left, self.missed = list(WIDTHS), 0

    def up_to(self, most: int) -> int:
        """Give the most of so many slots that pay: all, where a wider program is known to."""
        if not self.paid and most > 1:
            steps = max(STEPS, -(-EXAMPLES // self.config.batch_size))
            self.paid.append((1, steps / _fastest(solo_clock(self.config, self.where), steps)))
        while self.left and self.left[0] <= most and self.missed < MISSES:
            self._time(self.left.pop(0))
        return min(most, self.paid[-1][0]) if self.paid else 1

    def _time(self, width: int) -> None:
        try:
            now = STEPS * width / _fastest(packed_clock(self.config, width, self.where), STEPS)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.left.clear()
            return
        if now >= PAYS * self.paid[-1][1]:
            self.paid.append((width, now))
            self.missed = 0
        else:
            self.missed += 1


@functools.lru_cache(maxsize=256)
def _search(key: _Key, device: str, threads: int) -> _Search:
    """Give the one search of a kind; the number of threads is part of the key only."""
    return _Search(key.config, torch.device(device))


def _fastest(clock: Clock, steps: int) -> float:
    """Give the fastest of a few timings; of long ones, which what else runs moves less, fewer."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        taken.append(clock(steps))
    return min(taken)
