"""Who holds a claim, and whether they may still be at work: by process id here, by time elsewhere."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def signed(starts: int) -> dict[str, Any]:
    """Give a lease of this process that begins now.

    Args:
        starts: how often the run was started, this time included.
    """
    pid = os.getpid()
    return {"machine": machine(), "pid": pid, "born": born(pid), "starts": starts, "beat": time.time()}


def alive(lease: Mapping[str, Any], claimed: float, length: float) -> bool:
    """Say whether the owner of a lease may still be at work.

    Args:
        lease: as `signed` gave it; empty if a worker was killed between its claim and its signature.
        claimed: when the run was claimed, seconds since 1970.
        length: seconds for which a lease holds that cannot be asked after on this machine.
    """
    if lease.get("machine") == machine():
        # an id is given to another process sooner or later; clocks that are set move what the system reports
        return abs(born(lease["pid"]) - lease["born"]) < 5
    return time.time() - max(lease.get("beat", 0.0), claimed) < length


def machine() -> str:
    """Name what process ids mean something in: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        place = f"{platform.node()} {psutil.boot_time():.0f}"
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def born(pid: int) -> float:
    """Give when a process was started, seconds since 1970; NaN where there is none, or only its corpse."""
    try:
        process = psutil.Process(pid)
        return math.nan if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return math.nan
