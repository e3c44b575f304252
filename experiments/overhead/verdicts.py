"""What was wanted and what was reached, from rows only: the rules, and the tables that they fill.

A number is reached or missed only where the rows tell: the 95 % interval of its median lies on one side of
what was wanted, and the untouched step beside itself is nearer to 1 than the number to what was wanted.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.markdown import table
from experiments.overhead.arms import PEERS
from experiments.overhead.measure import AA
from experiments.overhead.presets import SHARED_NAME, STARTUP_SECONDS, WANTED
from experiments.overhead.ratios import Ratio, ratio

MIB = 2**20
Rows = Sequence[Mapping[str, Any]]


def timed(rows: Rows) -> list[Mapping[str, Any]]:
    """Give the rows of the table: neither swept nor counted."""
    return [row for row in rows if "what" not in row and "sweep" not in row]


def time_verdict(found: Ratio, wanted: float, itself: Ratio) -> str:
    """Judge a median of ratios.

    Args:
        found: of the arm.
        wanted: at most this.
        itself: of the untouched step beside itself, in the same run.
    """
    side = "below" if found.middle <= wanted else "above"
    distance = abs(found.middle - wanted)
    if itself.off > distance:
        return f"not resolved: median {side}, by less than the {itself.off:.3f} of untouched beside itself"
    if found.least <= wanted < found.most:
        return f"not resolved: median {side}, the interval holds {wanted}"
    return "reached" if found.middle <= wanted else "missed"


def size_verdict(found: float, wanted: float, spread: float = 0.0) -> str:
    """Judge a ratio of bytes, `spread` apart from itself when measured again."""
    if spread > abs(found - wanted):
        side = "below" if found <= wanted else "above"
        return f"not resolved: {side}, by less than the {spread:.3f} of untouched beside itself"
    return "reached" if found <= wanted else "missed"


def ahead(ours: Ratio, peers: Mapping[str, Ratio]) -> str:
    """Say whether an arm is ahead of every peer of its row, and which it is not ahead of.

    One is ahead of another where their intervals lie apart.
    """
    if not peers:
        return "no peer ran"
    before = [name for name, peer in peers.items() if peer.most < ours.least]
    level = [name for name, peer in peers.items() if name not in before and peer.least <= ours.most]
    parts = [f"no, ahead of it: {', '.join(before)}"] if before else []
    parts += [f"not resolved: {', '.join(level)}"] if level else []
    return "; ".join(parts) or f"yes, of {len(peers)}"


def named(rows: Rows, name: str) -> dict[str, Ratio]:
    """Arm → ratio, of the arms of a setting that ran."""
    here = [row for row in timed(rows) if row["setting"]["name"] == name and row["status"] == "ok"]
    return {row["arm"]: ratio(row) for row in here}


def watchers(rows: Rows) -> list[str]:
    """Name the arms of ours that are judged: the monitor, and the one that shares the weight gradient."""
    there = {row["arm"] for row in timed(rows)}
    return [arm for arm in ("monitor", SHARED_NAME) if arm == "monitor" or arm in there]


def times(rows: Rows) -> str:
    """Write the table of times wanted and reached."""
    arms = watchers(rows)
    head = ["setting", "untouched beside itself", "wanted"]
    for arm in arms:
        head += [arm, "verdict", "ahead of every peer"]
    lines = []
    for name, (wanted, _) in WANTED.items():
        found = named(rows, name)
        peers = {kind.name: found[kind.name] for kind in PEERS if kind.name in found}
        cells = [name, str(found.get(AA, "not yet measured")), f"{wanted}"]
        for arm in arms:
            if {AA, arm} <= found.keys():
                verdict = time_verdict(found[arm], wanted, found[AA])
                cells += [str(found[arm]), verdict, ahead(found[arm], peers)]
            else:
                cells += ["not yet measured", "", ""]
        lines.append(cells)
    return table(head, lines)


def brief(rows: Rows) -> str:
    """Write the few columns that a front page has room for; the page has the rest."""
    arms = watchers(rows)
    head = ["setting", "untouched beside itself", *arms, "fastest peer", "wanted", "peak memory"]
    lines = []
    for name, (wanted, _) in WANTED.items():
        found = named(rows, name)
        peers = {kind.name: found[kind.name] for kind in PEERS if kind.name in found}
        cells = [name, str(found.get(AA, "not yet measured"))]
        for arm in arms:
            there = {AA, arm} <= found.keys()
            verdict = time_verdict(found[arm], wanted, found[AA]).partition(":")[0] if there else ""
            cells.append(f"{found[arm]}: {verdict}" if there else "not yet measured")
        fastest = min(peers, key=lambda peer: peers[peer].middle, default=None)
        cells.append("none ran" if fastest is None else f"{peers[fastest]}, {fastest}")
        size = _resident(rows, name, "monitor", wanted)[0].partition(" of ")[0]
        lines.append([*cells, f"{wanted}", size])
    return table(head, lines)


def sizes(rows: Rows) -> str:
    """Write the table of memory wanted and reached."""
    arms = watchers(rows)
    head = ["setting", "wanted"]
    for arm in arms:
        head += [f"{arm}: saved for backward", "verdict", "peak resident size", "verdict"]
    lines = []
    for name, (_, wanted) in WANTED.items():
        cells = [name, f"{wanted}"]
        for arm in arms:
            cells += [*_saved(rows, name, arm, wanted), *_resident(rows, name, arm, wanted)]
        lines.append([*cells, _leanest(rows, name)])
    return table([*head, "peer with the smallest peak"], lines)


def _saved(rows: Rows, name: str, arm: str, wanted: float) -> tuple[str, str]:
    for row in timed(rows):
        if row["setting"]["name"] == name and row["arm"] == arm and "arm_saved_bytes" in row:
            found = row["arm_saved_bytes"] / row["untouched_saved_bytes"]
            return f"{found:.3f} of {row['untouched_saved_bytes'] / MIB:.0f} MiB", size_verdict(found, wanted)
    return "not measured", ""


def _resident(rows: Rows, name: str, arm: str, wanted: float) -> tuple[str, str]:
    base = resident(rows, name)
    if base is None or (found := peak(rows, name, arm)) is None:
        return "not measured", ""
    plain, spread = base
    said = f"{found / plain:.3f} of {plain / MIB:,.0f} MiB (untouched: ± {spread:.3f})"
    return said, size_verdict(found / plain, wanted, spread)


def _leanest(rows: Rows, name: str) -> str:
    base = resident(rows, name)
    peaks = {kind.name: size for kind in PEERS if (size := peak(rows, name, kind.name)) is not None}
    if base is None or not peaks:
        return "not measured"
    least = min(peaks, key=lambda peer: peaks[peer])
    return f"{least}, {peaks[least] / base[0]:.3f}"


def resident(rows: Rows, name: str) -> tuple[float, float] | None:
    """Peak resident size of the untouched step in a setting, bytes, and its spread, × that."""
    plain = _peaks(rows, name, "untouched")
    if not plain:
        return None
    base = statistics.median(plain)
    return base, (max(plain) - min(plain)) / base


def peak(rows: Rows, name: str, arm: str) -> float | None:
    """Peak resident size of an arm, bytes."""
    found = _peaks(rows, name, arm)
    return statistics.median(found) if found else None


def _peaks(rows: Rows, name: str, arm: str) -> list[float]:
    of_setting = (row for row in rows if row.get("what") == "rss" and row["setting"]["name"] == name)
    return [row["rss_peak"] for row in of_setting if row["arm"] == arm and row["status"] == "ok"]


def others(rows: Rows) -> str:
    """Write what was wanted besides: start-up and steps between measured ones."""
    there = {row["what"]: row for row in rows if "what" in row and row["status"] == "ok"}
    lines = []
    if row := there.get("startup"):
        seconds = statistics.median(row["attach_s"])
        verdict = "reached" if seconds < STARTUP_SECONDS else "missed"
        about = f"attaching, {row['setting']['name']}, {row['parameters']} factors"
        lines.append([about, f"{seconds:.2f} s", f"less than {STARTUP_SECONDS} s", verdict])
    if row := there.get("idle"):
        operations = sum(map(abs, row["extra_operations"].values()))
        tensors, size = row["extra_saved"]
        verdict = "reached" if not (operations or tensors or size) else "missed"
        seen = f"{operations} operations, {tensors} saved tensors, {size} saved bytes more than untouched"
        lines.append(["a step between measured ones, counted", seen, "none", verdict])
    return table(["besides", "found", "wanted", "verdict"], lines) if lines else ""
