"""A sweep from end to end with runs that train nothing: killed, stopped, resumed, merged, failed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from experiments import crew, grids, plain, rowsfile, sweep
from experiments.configs import RunConfig, RunError

pytest.importorskip("optuna")
import psutil

FAKE = "tests.experiments.fake_engine"
TEXT = """
scale = "smoke"
[defaults]
base = "1m"
task = "wordmath"
n_train = 64
dials = {{sleep = {sleep}}}
[grid]
lr = [{lrs}]
"""


def preset_of(tmp_path, runs, sleep=0.0, more=""):
    path = tmp_path / "made.toml"
    lrs = ", ".join(f"{1e-4 * (i + 1):.6g}" for i in range(runs))
    path.write_text(TEXT.format(sleep=sleep, lrs=lrs) + more)
    return path


def job(path, out, **more):
    return sweep.job_of(grids.load(path), out, engine=FAKE, **more)


def rows_of(out):
    return rowsfile.read(out / "rows.jsonl")


def started(path, out, workers=2, lease=300.0):
    code = (
        "import sys\nfrom experiments import crew, grids, sweep\n"
        f"preset = grids.load({str(path)!r})\nfrom pathlib import Path\n"
        f"job = sweep.job_of(preset, Path({str(out)!r}), engine={FAKE!r}, workers={workers}, lease={lease})\n"
        "sys.exit(crew.Crew(job, preset).run())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_200_runs_killed_at_random_and_resumed_lose_none_and_repeat_none(tmp_path):
    path, out, rng = preset_of(tmp_path, 200, sleep=0.02), tmp_path / "out", random.Random(0)
    killed = Counter()
    sweeping = started(path, out, lease=1.0)
    until = time.monotonic() + 120
    while sweeping.poll() is None or sweeping.returncode != 0:
        assert time.monotonic() < until, (killed, len(rows_of(out)))
        if sweeping.poll() is not None:
            sweeping = started(path, out, lease=1.0)
        time.sleep(rng.uniform(0.2, 1.5))
        if killed.total() < 12 and rows_of(out):
            crowd = [sweeping.pid, *[p.pid for p in psutil.Process(sweeping.pid).children()]]
            victim = rng.choice(crowd[1:] if killed["worker"] % 4 else crowd)
            killed["sweep" if victim == sweeping.pid else "worker"] += 1
            psutil.Process(victim).kill()
            sweeping.wait() if victim == sweeping.pid else None
    finished = Counter(row["hash"] for row in rows_of(out))
    assert killed.total() >= 8, killed
    assert set(finished) == {config.hash for config in grids.load(path).configs}
    assert set(finished.values()) == {1}, "a run was completed twice"
