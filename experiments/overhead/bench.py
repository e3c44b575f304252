"""`make bench`: everything that a CPU can tell, in under 15 minutes on two quiet cores, then the page.

`python -m experiments.overhead.bench --out experiments/results/overhead` writes rows, table, figures and page
there; by default into `runs/overhead`. It says at once what it will take, and of each section what it took.
Rows lie in `rows.partial` until all are there; the same command goes on after an interruption, if machine and
commit are the same. Then they replace those of an earlier run in that folder.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import rowsfile
from experiments.overhead import fresh, page
from experiments.overhead.__main__ import counts, memory, point, saver, timed
from experiments.overhead.arms import PEERS, Arm
from experiments.overhead.budget import Budget, Part, kind, work
from experiments.overhead.measure import BLOCKS, FULL_LENGTH, SHORT, machine, warmed
from experiments.overhead.presets import PRESETS, SLOTS, kinds, resident
from experiments.overhead.rounds import LEAST
from experiments.overhead.rounds import timed as seconds_of
from experiments.overhead.settings import Setting, batches, build
from experiments.overhead.sweeps import SWEEPS, least

SECOND = 24 * 10**10  # multiply-adds of a second on the processor that this was planned on
IMPORTS, BUILD = 7 * SECOND, 0.4 * SECOND  # of starting Python with all libraries; of making a model
DEARER, PEER = 1.15, 1.4  # a step of ours and of a peer, × the untouched
OVER = 2.5  # minutes beyond those given that parts may end in: needs are estimates, and most are too high
Do = Callable[[float], None]


def bench(out: Path, *, rounds: int, pairs: int, minutes: float) -> None:
    """Run all parts that are not done yet, then write the page.

    Args:
        out: folder.
        rounds: of a setting of the table, where the minutes allow; what is judged comes several times in one.
        pairs: of a point of a sweep and of the two ranks, likewise.
        minutes: for all of it. There are 5 rounds of the table whatever they are; of the rest, parts for
            which no time is left after `OVER` minutes more are left out, and named on the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial, done = out / "rows.partial", out / "parts.partial"
    finished = _finished(partial, done)
    begun, save = time.monotonic(), saver(partial)
    rate = _rate(PRESETS["cpu"][0])
    todo = [(part, do) for part, do in _parts(save, rate, rounds, pairs) if part.name not in finished]
    budget = Budget(60 * minutes - (time.monotonic() - begun), [part for part, _ in todo], rate)
    expected, took, left_out = budget.forecast(), Counter[str](), list[str]()
    print(f"-- forecast, {_sections(expected)}; {len(finished)} parts were there already", flush=True)
    for i, (part, do) in enumerate(todo):
        seconds, start = budget.take(part.name), time.monotonic()
        if kind(part.name) != "table" and start + part.need / rate > begun + 60 * (minutes + OVER):
            left_out.append(part.name)
            print(f"-- {i + 1} of {len(todo)}, {part.name}: left out, there is no time for it", flush=True)
            continue
        spent = f"{start - begun:.0f} s so far, {seconds:.0f} for it"
        print(f"-- {i + 1} of {len(todo)}, {part.name}: {spent}", flush=True)
        do(seconds)
        took[kind(part.name)] += time.monotonic() - start
        rowsfile.append(done, [{"part": part.name}])
    if left_out:
        of = {"setting": PRESETS["cpu"][0].row(), "arm": Arm.name}
        save([{"what": "left out", "parts": left_out, "status": "ok"} | of])
    partial.replace(out / "rows.jsonl")
    done.unlink(missing_ok=True)
    print("\n".join(map(str, page.write(out))))
    print(f"-- forecast, {_sections(expected)}\n-- it took, {_sections(took)}")
    print(f"-- done in {(time.monotonic() - begun) / 60:.1f} minutes")


def _finished(partial: Path, done: Path) -> set[str]:
    """Name the parts whose rows are there; rows of another machine or commit are thrown away."""
    now, names = machine(), ("device", "threads", "versions", "commit")
    before = [row["machine"] for row in rowsfile.objects(partial)]
    if before and all(one[name] == now[name] for one in before for name in names):
        return {row["part"] for row in rowsfile.objects(done)}
    for path in (partial, done):
        path.unlink(missing_ok=True)
    return set()


def _sections(seconds: Mapping[str, float]) -> str:
    parts = [f"{name} {value:.0f} s" for name, value in seconds.items()]
    return ", ".join([f"all {sum(seconds.values()) / 60:.1f} minutes", *parts])


def _parts(save: Callable, rate: float, rounds: int, pairs: int) -> list[tuple[Part, Do]]:
    """List what there is to do, each with its work: the table, what is counted, memory, then sweeps."""
    cpu = PRESETS["cpu"]
    todo: list[tuple[Part, Do]] = []
    for each in cpu:
        part = _part(f"table: {each.name}", each, kinds("cpu", each), rounds, SLOTS.get(each.name, {}))
        todo.append((part, lambda s, each=each: timed("cpu", each, save, pairs=rounds, seconds=s)))
    few = min(pairs, LEAST)
    need = _counting(cpu[0], few)
    counting = Part("counts: idle, start-up, one thread, two ranks", need, _counting(cpu[0], pairs) - need)

    def count(seconds: float) -> None:
        share = max(0.0, seconds * rate - counting.need) / counting.wish if counting.wish else 0.0
        counts(save, pairs=few + int((pairs - few) * share + 0.5))

    todo.append((counting, count))
    todo.append((Part("memory", IMPORTS + sum(map(_resident, cpu))), lambda _: memory(save, cpu)))
    for name, sweep in SWEEPS.items():
        for x, each in sweep.settings():
            part = _part(f"sweep: {name} {x:,}", each, sweep.arms, pairs)
            todo.append((part, _swept(name, x, each, save, pairs)))
    return todo


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
    second, fewest = slots is not None, LEAST if slots is not None else least(setting)
    slots = slots or {}
    together = [arm for arm in ((Arm,) if second else ()) + tuple(arms) if arm.block == 1]
    a_round = sum((1 + _dear(arm)) * slots.get(arm, 1) for arm in together)
    blocked = [arm for arm in arms if arm.block > 1]
    short = min(1.0, SHORT / setting.tokens)
    warm = [
        _dear(arm) * (FULL_LENGTH + (arm.warm - FULL_LENGTH) * short) for arm in (Arm, *together, *blocked)
    ]
    counted = sum(arm.keeps for arm in (Arm, *together, *blocked)) if second else 0
    need = sum(warm) + counted + fewest * a_round + sum(2 * 2 * arm.block for arm in blocked)
    wish = max(0, pairs - fewest) * a_round + sum(2 * (BLOCKS - 2) * arm.block for arm in blocked)
    return Part(name, BUILD + need * work(setting), wish * work(setting))


def _dear(arm: type[Arm]) -> float:
    return 1.0 if arm is Arm else PEER if arm in PEERS else DEARER


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
    parser.add_argument("--rounds", type=int, default=8, help="of the table, at most; 5 at the least")
    parser.add_argument("--pairs", type=int, default=8, help="of a point of a sweep, at most")
    parser.add_argument(
        "--minutes",
        type=float,
        default=12.0,
        help="for all of it, give or take; 5 rounds of the table are made",
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the peers
    bench(given.out, rounds=given.rounds, pairs=given.pairs, minutes=given.minutes)


if __name__ == "__main__":
    main()
