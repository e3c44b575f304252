"""The arms of a setting, timed in one process, and what they keep for backward: a row of plain data each."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from experiments.overhead.arms import Arm
from experiments.overhead.counting import saved
from experiments.overhead.ratios import ratio
from experiments.overhead.rounds import LEAST, Found, Times, rounds
from experiments.overhead.settings import Setting, batches, build
from experiments.rows import commit

PACKAGES = ("torch", "transformers", "peft", "opacus", "backpack-for-pytorch")
Made = TypeVar("Made", bound=Arm)
AA = "untouched (A/A)"
BLOCKS = 3  # of an arm whose pairs are added up in blocks; 2 at least, if time is short
SHORT = 64  # tokens of the first warm steps: what they warm does not depend on the length
FULL_LENGTH = 2  # of the warm steps, the last ones


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


@dataclass
class Entry:
    """An arm of a comparison: its kind, then the arm itself, then its times or its error."""

    kind: type[Arm]
    arm: Arm | None = None
    times: Times = field(default_factory=Times)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its row."""
        return AA if self.kind is Arm else self.kind.name


def compare(
    setting: Setting,
    kinds: Sequence[type[Arm]],
    *,
    device: str,
    pairs: int = 20,
    least: int = LEAST,
    seconds: float = math.inf,
    slots: Mapping[type[Arm], int] | None = None,
    second: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Time each arm between untouched steps, and the untouched step beside itself.

    On a CPU all arms take turns; on CUDA, where each holds memory that counts, one after the other.

    Args:
        setting: what to measure.
        kinds: arms to compare with the untouched one.
        device: "cpu" or "cuda".
        pairs: timed steps an arm; `BLOCKS` blocks at least of an arm that has blocks.
        least: rounds that are made however long they take.
        seconds: for all of it; once they are gone no further round starts.
        slots: kind → times that it comes in a round, if not once; `Arm` is the untouched one beside itself.
        second: whether the untouched step stands beside a second loop of its kind, and bytes are counted;
            otherwise it stands beside itself, of the same steps that the arms stand beside.
        say: receives a line an arm.

    Returns:
        One row an arm, the first the untouched step beside itself (A/A). An arm that cannot run is a row
        with its error.
    """
    until = time.monotonic() + seconds
    model, data = build(setting, device), batches(setting, device)
    base = warmed(Arm(setting, model), data)
    entries = [Entry(kind) for kind in ((Arm,) if second else ()) + tuple(kinds)]
    rows = []
    for group in _groups(entries, alone=device == "cuda"):
        found = _group(base, group, setting, model, data, (pairs, least), until, slots or {}, second)
        if not second and not rows:
            rows.append(_row(setting, Entry(Arm, base, found.itself())))
            say(describe(rows[0]))
        for entry in group:
            rows.append(_row(setting, entry))
            say(describe(rows[-1]))
            entry.arm = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _groups(entries: Sequence[Entry], alone: bool) -> list[list[Entry]]:
    """Those that take turns: all with single pairs, then each that has blocks of them."""
    if alone:
        return [[entry] for entry in entries]
    together = [entry for entry in entries if entry.kind.block == 1]
    return [group for group in (together, *([e] for e in entries if e.kind.block > 1)) if group]


def _group(
    base: Arm,
    group: Sequence[Entry],
    setting: Setting,
    model: torch.nn.Module,
    data: Sequence[torch.Tensor],
    limits: tuple[int, int],
    until: float,
    slots: Mapping[type[Arm], int],
    bytewise: bool,
) -> Found:
    """Build, warm, time and close the arms of a group, each error beside its arm."""
    for entry in group:
        try:
            entry.arm = entry.kind(setting, model)
            warmed(entry.arm, data)
        except Exception as error:  # a peer that cannot do it is a result
            entry.times.error = error
    able = [entry for entry in group if entry.times.error is None]
    block = max((entry.kind.block for entry in able), default=1)
    pairs, least = limits
    found = rounds(
        base,
        [entry.arm for entry in able if entry.arm is not None],
        data,
        pairs=pairs if block == 1 else max(pairs, BLOCKS * block),
        least=least if block == 1 else 2 * block,
        seconds=until - time.monotonic(),
        slots={i: slots[entry.kind] for i, entry in enumerate(able) if entry.kind in slots},
    )
    kept = _saved(base, data[0]) if bytewise and not data[0].is_cuda else None
    for entry, times in zip(able, found.arms, strict=True):
        entry.times = times
        entry.memory = _memory(entry, found, kept, data[0])
    for entry in group:
        if entry.arm is not None:
            _close(entry)
    return found


def _close(entry: Entry) -> None:
    """Detach; steps that were not measured make the arm a failed one."""
    try:
        entry.arm.close()  # type: ignore[union-attr]
    except RuntimeError as error:
        entry.times.error = entry.times.error or error


def warmed(arm: Made, data: Sequence[torch.Tensor]) -> Made:
    """Make the steps that come before the clock, the last ones at full length."""
    for i in range(arm.warm):
        ids = data[i % len(data)]
        arm.step(ids if i >= arm.warm - FULL_LENGTH else ids[:, :SHORT])
    return arm


def _saved(arm: Arm, ids: torch.Tensor) -> int | None:
    """Bytes that one pass keeps for backward; None where watching what is saved is not possible."""
    try:
        return saved(arm, ids)[1]
    except RuntimeError:  # torch.func refuses hooks on saved tensors; the step itself works
        return None


def _memory(entry: Entry, found: Found, kept: int | None, ids: torch.Tensor) -> dict[str, int]:
    if entry.arm is None or entry.times.error is not None:
        return {}
    if ids.is_cuda:
        return {"untouched_peak_bytes": found.peak, "arm_peak_bytes": entry.times.peak}
    mine = _saved(entry.arm, ids) if entry.arm.keeps and kept is not None else None
    if mine is None or kept is None:
        return {}
    return {"untouched_saved_bytes": kept, "arm_saved_bytes": mine}


def _row(setting: Setting, entry: Entry) -> dict[str, Any]:
    row = {"setting": setting.row(), "arm": entry.name}
    if entry.times.error is not None:
        error = entry.times.error
        return row | {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:600]}"}
    times = {"untouched_s": entry.times.untouched, "arm_s": entry.times.arm}
    return row | {"status": "ok", "block": entry.kind.block, **times, **entry.memory}


def describe(row: dict[str, Any]) -> str:
    """Say a row in one line."""
    start = f"{row['setting']['name']}: {row['arm']}"
    if row["status"] != "ok":
        return f"{start}: {row['status']}, {row['error']}"
    found, seconds = ratio(row), statistics.median(row["untouched_s"])
    memory = ""
    if "arm_peak_bytes" in row:
        more = row["arm_peak_bytes"] / row["untouched_peak_bytes"]
        memory = f"; peak × {more:.4f} of {row['untouched_peak_bytes'] / 2**30:.2f} GiB"
    if "arm_saved_bytes" in row:
        kept = row["untouched_saved_bytes"]
        memory = f"; saved × {row['arm_saved_bytes'] / kept:.4f} of {kept / 2**20:.1f} MiB"
    return f"{start}: × {found} of {1e3 * seconds:.1f} ms, {found.pairs} pairs{memory}"
