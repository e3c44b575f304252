"""Waiting for what comes back by itself: space on a disk, a database that another program holds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from experiments.configs import RunError

PATIENCE = 600.0  # seconds: a backup, a browser of databases or a full quota should be over by then
PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between two tries, doubled from the one to the other
T = TypeVar("T")


class Passing(RunError):
    """Something is in the way that may be over in a while."""


def patiently(work: Callable[[], T]) -> T:
    """Do some work; while something passing is in the way, say so once and try again.

    Raises:
        Passing: it was in the way all the time; the message says for how long.
    """
    until, pause, said = time.monotonic() + PATIENCE, PAUSE, False
    while True:
        try:
            return work()
        except Passing as error:
            if time.monotonic() >= until:
                raise type(error)(
                    f"{error}; tried again for {PATIENCE:.0f} s in vain. Every row that is written is kept: "
                    "when it is mended, the same command goes on"
                ) from error
            if not said:
                said = True
                wait = f"process {os.getpid()} tries again for up to {PATIENCE:.0f} s"
                print(f"\n{error}; {wait}", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
