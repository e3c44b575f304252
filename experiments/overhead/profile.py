"""`python -m experiments.overhead.profile --preset gpu-1b`: what a step spends with and without the monitor.

Prints, for one step each, the kernels launched, the time on the device and the time of the host, and the
kernels whose number or time differ most.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.overhead.arms import Arm, Monitored
from experiments.overhead.presets import PRESETS
from experiments.overhead.settings import batches, build

STEPS = 3


def kernels(arm: Arm, ids: torch.Tensor) -> tuple[Counter[str], Counter[str], float]:
    """Launches and microseconds on the device by kernel, and seconds of the host, a step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        arm.step(ids)
    host = (time.perf_counter() - start) / STEPS
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            arm.step(ids)
        torch.cuda.synchronize()
    launches: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches[event.name] += 1
            spent[event.name] += event.self_device_time_total
    return launches, spent, host


def main() -> None:
    """Profile the first setting of a preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="gpu-1b")
    given = parser.parse_args()
    setting = PRESETS[given.preset][0]
    model = build(setting, "cuda")
    ids = batches(setting, "cuda")[0]
    found: list[Any] = []
    for kind in (Arm, Monitored):
        arm = kind(setting, model)
        for _ in range(arm.warm):
            arm.step(ids)
        found.append(kernels(arm, ids))
        launches, spent, host = found[-1]
        total = sum(spent.values()) / STEPS / 1e3
        print(
            f"{setting.name}, {kind.name}: {sum(launches.values()) / STEPS:.0f} launches, "
            f"{total:.2f} ms on the device, {1e3 * host:.2f} ms of the host"
        )
        arm.close()
    (plain, before, _), (watched, after, _) = found
    more = {name: after[name] - before[name] for name in after | before}
    for name in sorted(more, key=lambda n: -abs(more[n]))[:14]:
        count = (watched[name] - plain[name]) / STEPS
        print(f"  {more[name] / STEPS / 1e3:+8.3f} ms {count:+7.0f} launches  {name[:100]}")


if __name__ == "__main__":
    main()
