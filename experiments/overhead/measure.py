"""Interleaved timing of arms in one process, and their peak memory. Rows are plain data, one an arm."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from experiments.overhead.arms import Arm
from experiments.overhead.counting import saved
from experiments.overhead.settings import Setting, batches, build
from experiments.rows import commit

PACKAGES = ("torch", "transformers", "peft", "opacus", "backpack-for-pytorch")
Made = TypeVar("Made", bound=Arm)
LEAST = 5  # pairs, however long a step takes


def machine() -> dict[str, Any]:
    """Say what this ran on: hardware, versions, commit."""
    cuda = torch.cuda.is_available()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("GNS_COMMIT") or commit(),
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _timed(arm: Arm, ids: torch.Tensor) -> tuple[float, int | None]:
    """Seconds of one step, and on CUDA the peak bytes above what was allocated before it."""
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    arm.step(ids)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if cuda else None


def compare(
    setting: Setting,
    kinds: Sequence[type[Arm]],
    *,
    device: str,
    pairs: int = 20,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Time each arm beside the untouched step, A B A B …, and the untouched step beside itself.

    Args:
        setting: what to measure.
        kinds: arms to compare with the untouched one.
        device: "cpu" or "cuda".
        pairs: timed steps an arm; twice the block of an arm at least.
        seconds: after so many of timing, an arm with `LEAST` pairs gets no more.
        say: receives a line an arm.

    Returns:
        One row an arm, the first the untouched step beside a second untouched loop (A/A). An arm that cannot
        run is a row with its error.
    """
    model = build(setting, device)
    data = batches(setting, device)
    base = warmed(Arm(setting, model), data)
    rows = []
    for kind in (Arm, *kinds):
        row = {"setting": setting.row(), "arm": kind.name if kind is not Arm else "untouched (A/A)"}
        try:
            row |= _paired(base, kind(setting, model), data, max(pairs, 2 * kind.block), seconds)
        except Exception as error:  # a peer that cannot do it is a result
            row |= {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
        say(describe(row))
    return rows


def warmed(arm: Made, data: Sequence[torch.Tensor]) -> Made:
    """Make the steps that come before the clock."""
    for i in range(arm.warm):
        arm.step(data[i % len(data)])
    return arm


def _paired(base: Arm, arm: Arm, data: Sequence[torch.Tensor], pairs: int, seconds: float) -> dict[str, Any]:
    least = max(LEAST, 2 * arm.block)
    try:
        warmed(arm, data)
        memory = {} if data[0].is_cuda or not arm.keeps else _saved(base, arm, data[0])
        until = time.monotonic() + seconds
        plain, other, peaks = [], [], ([], [])
        for i in range(pairs):
            ids = data[i % len(data)]
            order = (base, arm) if i % 2 == 0 else (arm, base)
            for each in order:
                seconds, peak = _timed(each, ids)
                (plain if each is base else other).append(seconds)
                peaks[each is arm].append(peak)
            if i + 1 >= least and time.monotonic() > until:
                break
    finally:
        arm.close()
    memory |= _memory(*peaks)
    return {"status": "ok", "block": arm.block, "untouched_s": plain, "arm_s": other, **memory}


def _saved(base: Arm, arm: Arm, ids: torch.Tensor) -> dict[str, Any]:
    """Bytes that one pass of each keeps for backward."""
    return {"untouched_saved_bytes": saved(base, ids)[1], "arm_saved_bytes": saved(arm, ids)[1]}


def _memory(plain: list[int | None], other: list[int | None]) -> dict[str, Any]:
    if None in plain:
        return {}
    return {"untouched_peak_bytes": max(plain), "arm_peak_bytes": max(other)}  # type: ignore[type-var]


def ratio(row: dict[str, Any]) -> tuple[float, float, float]:
    """Median of the paired ratios arm/untouched, with their quartiles; of sums over blocks, if there are."""
    size = row.get("block", 1)
    plain, other = (_sums(row[key], size) for key in ("untouched_s", "arm_s"))
    ratios = [b / a for a, b in zip(plain, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def _sums(values: Sequence[float], size: int) -> list[float]:
    return [sum(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]


def describe(row: dict[str, Any]) -> str:
    """Say a row in one line."""
    start = f"{row['setting']['name']}: {row['arm']}"
    if row["status"] != "ok":
        return f"{start}: {row['status']}, {row['error']}"
    middle, low, high = ratio(row)
    seconds = statistics.median(row["untouched_s"])
    memory = ""
    if "arm_peak_bytes" in row:
        more = row["arm_peak_bytes"] / row["untouched_peak_bytes"]
        memory = f"; peak × {more:.4f} of {row['untouched_peak_bytes'] / 2**30:.2f} GiB"
    if "arm_saved_bytes" in row:
        kept = row["untouched_saved_bytes"]
        memory = f"; saved × {row['arm_saved_bytes'] / kept:.4f} of {kept / 2**20:.1f} MiB"
    return f"{start}: × {middle:.4f} ({low:.4f} … {high:.4f}) of {1e3 * seconds:.1f} ms{memory}"
