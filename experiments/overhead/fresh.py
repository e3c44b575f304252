"""What needs a process of its own: peak resident size, attaching, one thread, two ranks.

`python -m experiments.overhead.fresh '[["rss", {"name": …}, "monitor"], ["startup", {"name": …}]]'` prints
one JSON object a job, in a process forked for it from one that has imported everything and computed nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from experiments.overhead.arms import OURS, PEERS, Arm, Monitored
from experiments.overhead.rounds import rounds
from experiments.overhead.settings import Setting, batches, build
from gns import GNSMonitor
from gns.capture import ranks

STEPS = 3  # after the first: the peak comes in each; of ours, with a part of the first self-checks
ABREAST = 2  # processes whose memory is measured at a time, with one thread each
LONGEST = 300  # seconds of a job
ROOT = Path(__file__).resolve().parents[2]
Job = tuple[Any, ...]


def run(jobs: Sequence[Job], *, lean: bool = False) -> Generator[dict[str, Any]]:
    """Run jobs one after the other, each in a process of its own.

    Args:
        jobs: ("rss", setting, name of an arm), ("startup", setting), ("alone", setting, pairs) or
            ("ranks", setting, pairs).
        lean: freed memory goes back at once: resident is what is needed, not what an allocator keeps.

    Yields:
        What was found, or `status` "failed" with the error; in the order of the jobs.

    Raises:
        RuntimeError: the processes could not be started.
    """
    given = [[what, setting.row(), *more] for what, setting, *more in jobs]
    command = [sys.executable, "-m", "experiments.overhead.fresh", json.dumps(given)]
    around = os.environ | {"PYTHONWARNINGS": "ignore"}
    if lean:
        around |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=around)
    assert started.stdout is not None
    try:
        for _ in jobs:
            line = started.stdout.readline()
            if not line:
                raise RuntimeError(f"fresh processes ended early, with {started.wait()}; see above")
            yield json.loads(line)
    finally:
        started.kill()
        started.communicate()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def rss(setting: Setting, name: str) -> dict[str, Any]:
    """Resident size before the second step, and its peak over a few."""
    kind = next(kind for kind in (Arm, *OURS, *PEERS) if kind.name == name)
    torch.set_num_threads(1)
    arm = kind(setting, build(setting, "cpu"))
    data = batches(setting, "cpu")
    arm.step(data[0])
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    for i in range(STEPS):
        arm.step(data[i % len(data)])
    found = {"rss_before": before, "rss_peak": _status("VmHWM")}
    arm.close()
    return found


def startup(setting: Setting, repeats: int = 5) -> dict[str, Any]:
    """Seconds that attaching to a model on the meta device takes, wall clock."""
    model = build(setting, "meta")
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        monitor = GNSMonitor(model).attach()
        seconds.append(time.perf_counter() - start)
        measured = len(monitor.coverage().measured)
        monitor.detach()
    return {"attach_s": seconds, "parameters": measured}


def alone(setting: Setting, pairs: int) -> dict[str, Any]:
    """One process with one thread, as each of the two ranks has."""
    torch.set_num_threads(1)
    return _loops(setting, pairs, 0, lambda arm: None)


def rank(setting: Setting, pairs: int, store: str, number: int) -> dict[str, Any]:
    """One of two ranks on gloo: the loops of `alone`, each model wrapped in DDP; the messages of a step."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    sent: list[int] = []
    own: Callable[..., Any] = ranks._summed

    def counted(group: Any, values: Any) -> Any:
        sent.append(values.nbytes)
        return own(group, values)

    def wrapped(arm: Arm) -> None:
        arm.model = torch.nn.parallel.DistributedDataParallel(arm.model)

    ranks._summed = counted
    found = _loops(setting, pairs, number, wrapped, sent.clear)
    distributed.destroy_process_group()
    return found | {"calls_a_step": len(sent) / pairs, "bytes_a_step": sum(sent) / pairs}


def _loops(
    setting: Setting,
    pairs: int,
    seed: int,
    prepare: Callable[[Arm], None],
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    model, data = build(setting, "cpu"), batches(setting, "cpu", seed=seed + 1)
    base, arm = Arm(setting, model), Monitored(setting, model)
    for each in (base, arm):
        prepare(each)
        for i in range(each.warm):
            each.step(data[i % len(data)])
    arm.monitor.flush()
    begin()
    (times,) = rounds(base, [arm], data, pairs=pairs).arms
    arm.close()
    if times.error is not None:
        raise times.error
    return {"untouched_s": times.untouched, "arm_s": times.arm}


def _forked(work: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """Start work in a child; give its number and where its answer is read."""
    end, begin = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(begin)
        return child, end
    os.close(end)
    os.dup2(2, 1)  # what a library prints is no answer
    signal.alarm(LONGEST)
    try:
        found = work()
    except BaseException as error:
        found = {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:600]}"}
    with os.fdopen(begin, "w") as answer:
        answer.write(json.dumps(found))
    os._exit(0)


def _answer(child: int, end: int) -> dict[str, Any]:
    with os.fdopen(end) as answer:
        said = answer.read()
    _, ended = os.waitpid(child, 0)
    if ended or not said:
        return {"status": "failed", "error": f"RuntimeError: a process of its own ended with {ended}"}
    return {"status": "ok"} | json.loads(said)


SINGLE: dict[str, Callable[..., dict[str, Any]]] = {"rss": rss, "startup": startup, "alone": alone}


def do(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Do jobs at the same time, each in a child, or in two.

    Raises:
        ValueError: there is no such job.
    """
    if unknown := {what for what, *_ in jobs} - {*SINGLE, "ranks"}:
        raise ValueError(
            f"job {', '.join(map(repr, sorted(unknown)))}: known are {', '.join((*SINGLE, 'ranks'))}"
        )
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for i, (what, *given) in enumerate(jobs):
            if what == "ranks":
                store = str(Path(folder) / f"{i}")
                works = [functools.partial(rank, *given, store, number) for number in (0, 1)]
            else:
                works = [functools.partial(SINGLE[what], *given)]
            started.append([_forked(work) for work in works])
        answers = [[_answer(*end) for end in ends] for ends in started]
    failed = ([each for each in several if each["status"] != "ok"] for several in answers)
    return [bad[0] if bad else several[0] for bad, several in zip(failed, answers, strict=True)]


def at_a_time(jobs: Sequence[Job]) -> list[list[Job]]:
    """Those of memory that follow each other together, `ABREAST` of them; each of the others alone."""
    found: list[list[Job]] = []
    for job in jobs:
        if found and job[0] == found[-1][0][0] == "rss" and len(found[-1]) < ABREAST:
            found[-1].append(job)
        else:
            found.append([job])
    return found


def main(arguments: list[str]) -> None:
    """Import what any job needs, compute nothing, then fork a process a job."""
    for peer in ("opacus", "backpack"):
        with contextlib.suppress(ImportError):
            importlib.import_module(peer)
    jobs = [(what, Setting(**setting), *more) for what, setting, *more in json.loads(arguments[0])]
    for several in at_a_time(jobs):
        for found in do(several):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
