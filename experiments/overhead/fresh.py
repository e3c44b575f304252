"""What needs a process of its own: the peak resident size of a training, attaching, two ranks.

`python -m experiments.overhead.fresh rss '{"name": …}' monitor` prints one JSON object; so do `startup` and,
for each of two processes, `ranks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from experiments.overhead.arms import OURS, PEERS, Arm, Monitored
from experiments.overhead.settings import Setting, batches, build
from gns import GNSMonitor, ranks

STEPS = 6
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, timeout: float = 300) -> dict[str, Any]:
    """Run this module in a fresh process and read what it printed last.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "experiments.overhead.fresh", *arguments]
    # freed memory goes back at once: what is measured is what is needed, not what an allocator keeps
    around = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if arguments[0] != "rss":
        around = dict(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=around)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:1])} in a fresh process: {done.stderr[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def rss(setting: Setting, kind: type[Arm]) -> dict[str, Any]:
    """Resident size before the first step, and its peak over a few steps."""
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


def pair(setting: Setting, pairs: int) -> dict[str, Any]:
    """Two ranks on gloo: time with and without the monitor, and what the ranks exchange for it.

    Returns:
        Of rank 0: seconds of the steps, and the calls and bytes of one measured step.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps(setting.row()), str(pairs), str(Path(folder) / "store")
        command = [sys.executable, "-m", "experiments.overhead.fresh", "ranks", *given]
        ends = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for rank in (0, 1)
        ]
        try:
            said = [end.communicate(timeout=600)[0] for end in ends]
        finally:
            for end in ends:
                end.kill()
    if any(end.returncode for end in ends):
        raise RuntimeError(f"ranks ended with {[end.returncode for end in ends]}")
    return json.loads(said[0].splitlines()[-1])


def _rank(setting: Setting, pairs: int, store: str, rank: int) -> dict[str, Any]:
    """One of two ranks: the same interleaved loops as in one process, each model wrapped in DDP."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sent: list[int] = []
    own: Callable[..., Any] = ranks._summed

    def counted(group: Any, values: Any) -> Any:
        sent.append(values.nbytes)
        return own(group, values)

    ranks._summed = counted
    model, data = build(setting, "cpu"), batches(setting, "cpu", seed=rank + 1)
    arms = [kind(setting, model) for kind in (Arm, Monitored)]
    for arm in arms:
        arm.model = torch.nn.parallel.DistributedDataParallel(arm.model)
        for i in range(arm.warm):
            arm.step(data[i % len(data)])
    times: list[list[float]] = [[], []]
    arms[1].monitor.flush()  # type: ignore[reportAttributeAccessIssue]
    sent.clear()
    for i in range(pairs):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            start = time.perf_counter()
            arms[which].step(data[i % len(data)])
            times[which].append(time.perf_counter() - start)
    arms[1].close()
    distributed.destroy_process_group()
    return {
        "untouched_s": times[0],
        "arm_s": times[1],
        "calls_a_step": len(sent) / pairs,
        "bytes_a_step": sum(sent) / pairs,
    }


def main(arguments: list[str]) -> None:
    """Do one of the three and print it."""
    what, setting, *more = arguments
    given = Setting(**json.loads(setting))
    if what == "rss":
        kinds = {kind.name: kind for kind in (Arm, *OURS, *PEERS)}
        found = rss(given, kinds[more[0]])
    elif what == "startup":
        found = startup(given)
    else:
        found = _rank(given, int(more[0]), more[1], int(more[2]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
