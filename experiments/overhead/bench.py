"""`make bench`: everything that a CPU can tell, in under 15 minutes on two quiet cores, then the page.

`python -m experiments.overhead.bench --out experiments/results/overhead` writes rows, table, figures and page
there; by default into `runs/overhead`. Rows of an earlier run in that folder are replaced.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.overhead import fresh, page
from experiments.overhead.__main__ import counts, memory, point, saver, timed
from experiments.overhead.arms import Arm
from experiments.overhead.budget import Budget, Part, work
from experiments.overhead.measure import BLOCKS, FULL_LENGTH, SHORT, warmed
from experiments.overhead.presets import PRESETS, SLOTS, kinds, resident
from experiments.overhead.rounds import LEAST
from experiments.overhead.rounds import timed as seconds_of
from experiments.overhead.settings import Setting, batches, build
from experiments.overhead.sweeps import SWEEPS

SECOND = 24 * 10**10  # multiply-adds of a second on the processor that this was planned on
IMPORTS, BUILD = 7 * SECOND, 0.4 * SECOND  # of starting Python with all libraries; of making a model
DEARER = 1.15  # an arm's step, × the untouched


def bench(out: Path, *, pairs: int, sweep_pairs: int, minutes: float) -> None:
    """Run all parts, then write the page.

    Args:
        out: folder.
        pairs: timed steps an arm of the table, where the minutes allow, and of the two ranks.
        sweep_pairs: of a point of a sweep, likewise.
        minutes: for all of it; whatever they are, nothing has fewer than 5 pairs.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "rows.partial"
    partial.unlink(missing_ok=True)
    save = saver(partial)
    begun = time.monotonic()
    cpu, rate = PRESETS["cpu"], _rate(PRESETS["cpu"][0])
    todo: list[tuple[Part, Callable[[float], None]]] = []

    for each in cpu:
        part = _part(f"table: {each.name}", each, kinds("cpu", each), pairs, SLOTS.get(each.name, {}))
        todo.append((part, lambda s, each=each: timed("cpu", each, save, pairs=pairs, seconds=s)))
    few = min(pairs, LEAST)
    need = _counting(cpu[0], few)
    counting = Part("table: counts, one thread, two ranks", need, _counting(cpu[0], pairs) - need)

    def count(seconds: float) -> None:
        share = (seconds * rate - counting.need) / counting.wish if counting.wish else 0.0
        counts(save, pairs=few + int((pairs - few) * share + 0.5))

    todo.append((counting, count))
    todo.append((Part("memory", IMPORTS + sum(map(_resident, cpu))), lambda _: memory(save, cpu)))
    for name, sweep in SWEEPS.items():
        for x, each in sweep.settings():
            part = _part(f"sweep: {name} {x:,}", each, sweep.arms, sweep_pairs)
            todo.append((part, _swept(name, x, each, save, sweep_pairs)))

    budget = Budget(60 * minutes - (time.monotonic() - begun), [part for part, _ in todo], rate)
    for i, (part, do) in enumerate(todo):
        seconds = budget.take(part.name)
        spent = f"{time.monotonic() - begun:.0f} s so far, {seconds:.0f} for it"
        print(f"-- {i + 1} of {len(todo)}, {part.name}: {spent}", flush=True)
        do(seconds)
    partial.replace(out / "rows.jsonl")
    print("\n".join(map(str, page.write(out))))
    print(f"-- done in {(time.monotonic() - begun) / 60:.1f} minutes")


def _swept(name: str, x: int, setting: Setting, save: Callable, pairs: int) -> Callable[[float], None]:
    return lambda seconds: point(name, x, setting, save, pairs=pairs, seconds=seconds)


def _part(
    name: str,
    setting: Setting,
    arms: Sequence[type[Arm]],
    pairs: int,
    slots: Mapping[type[Arm], int] | None = None,
) -> Part:
    """Reckon a comparison: building and warming, then rounds; without `slots` it is a point of a sweep."""
    second = slots is not None
    slots = slots or {}
    together = [kind for kind in ((Arm,) if second else ()) + tuple(arms) if kind.block == 1]
    a_round = sum((1 + DEARER) * slots.get(kind, 1) for kind in together)
    blocked = [kind for kind in arms if kind.block > 1]
    short = min(1.0, SHORT / setting.tokens)
    before = [FULL_LENGTH + (kind.warm - FULL_LENGTH) * short for kind in (Arm, *together, *blocked)]
    counted = sum(kind.keeps for kind in (Arm, *together, *blocked)) if second else 0
    need = sum(before) + counted + LEAST * a_round + sum(2 * 2 * kind.block for kind in blocked)
    wish = max(0, pairs - LEAST) * a_round + sum(2 * (BLOCKS - 2) * kind.block for kind in blocked)
    return Part(name, BUILD + need * work(setting), wish * work(setting))


def _counting(setting: Setting, pairs: int) -> float:
    """Reckon the counts: a dozen steps, then loops on one thread, alone and on two ranks."""
    loops = 2 * pairs + 12
    return IMPORTS + 4 * BUILD + (20 + 2 * 2 * loops) * work(setting)


def _resident(setting: Setting) -> float:
    """Reckon the memory of a setting, a process an arm; as many at a time as there are cores."""
    processes = 2 + len(resident(setting))
    return processes * (BUILD + DEARER * (1 + fresh.STEPS) * work(setting))


def _rate(setting: Setting) -> float:
    """Time a few untouched steps: work that this machine does in a second."""
    data = batches(setting, "cpu")
    arm = warmed(Arm(setting, build(setting, "cpu")), data)
    return work(setting) / statistics.median(seconds_of(arm, ids)[0] for ids in data)


def main() -> None:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sweep-pairs", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=14.6, help="for all of it; 5 pairs at the least")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the peers
    bench(given.out, pairs=given.pairs, sweep_pairs=given.sweep_pairs, minutes=given.minutes)


if __name__ == "__main__":
    main()
