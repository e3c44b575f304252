"""One worker of a sweep: claims runs, executes them, keeps their rows, until none is left."""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import rowsfile
from experiments.configs import RunConfig, RunError
from experiments.engines import accompanied, executed
from experiments.patience import patiently
from experiments.rowsfile import Row

TRIES = 3  # to fill a program while other workers claim from the same runs


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Args:
        url: of the ledger.
        preset: name of the sweep.
        configs: its runs.
        rows: file that rows are added to.
        workers: how many there are on this machine.
        device: to run on; None: the best there is.
        engine: module that executes runs, with the two functions of `experiments.engines`.
        lease: seconds after which a claim that was not renewed is void.
    """

    url: str
    preset: str
    configs: tuple[RunConfig, ...]
    rows: Path
    workers: int
    device: str | None
    engine: str
    lease: float


def main(job: Job) -> None:
    """Work as a process of its own, and exit with 0, 1 (said why) or 130 (stopped)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        work(job)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RunError, OSError) as error:
        print(f"\nworker {os.getpid()}: {said(error)}", file=sys.stderr, flush=True)
        sys.exit(1)


def said(error: RunError | OSError) -> str:
    """Say an error in one line, of the system's first which file it is about."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def work(job: Job) -> None:
    """Execute runs until every run of the sweep has a row.

    Raises:
        RunError: ledger or rows cannot be used.
        KeyboardInterrupt: someone wants to stop; what was claimed waits again.
    """
    from experiments.ledger import Ledger  # optuna: only where a ledger is used

    engine = importlib.import_module(job.engine)
    ledger = Ledger(job.url, job.preset, job.configs, length=job.lease)
    while True:
        claims = _claimed(ledger, engine, job)
        if claims:
            _execute(ledger, claims, engine, job)
            continue
        began = time.monotonic()
        if hopeless := ledger.settle(lambda: rowsfile.results(rowsfile.read(job.rows))):
            patiently(lambda hopeless=hopeless: rowsfile.append(job.rows, hopeless))
            continue
        counts = ledger.counts()
        if not counts["waiting"] and not counts["running"]:
            return
        if not ledger.waiting():  # others are at work; should they be killed, their runs are this worker's
            time.sleep(max(min(2.0, job.lease / 4), 10 * (time.monotonic() - began)))


def _claimed(ledger: Any, engine: Any, job: Job) -> list[Any]:
    """Claim a run and what pays to be executed with it; leave the other workers their share."""
    claims = ledger.claim(ledger.waiting())
    room: float = math.inf
    try:
        for _ in range(TRIES if claims else 0):  # what another worker takes meanwhile is asked for again
            waiting = ledger.waiting()
            share = math.ceil((len(waiting) + len(claims)) / job.workers) - len(claims)
            if (most := int(min(share, room))) < 1:
                break
            others = accompanied(engine, claims[0].config, waiting, job.device, most)
            gained = ledger.claim(others, len(others))
            claims += gained
            room = len(others) - len(gained)
            if room:
                ledger.refresh()  # whoever took these may have taken more
    except KeyboardInterrupt:
        for claim in claims:
            ledger.release(claim)
        raise
    return claims


def _execute(ledger: Any, claims: Sequence[Any], engine: Any, job: Job) -> None:
    """Execute what was claimed and keep the rows; on a stop, give back what has none."""
    try:
        with _renewed(ledger, claims, job.lease / 5):
            made = executed(engine, [claim.config for claim in claims], job.device)
            left = list(zip(claims, made, strict=True))
            try:
                while left:
                    _keep(ledger, *left.pop(0), job.rows)
            except RunError as error:
                if left and not isinstance(error, rowsfile.DiskFull):  # the others of a packed program
                    patiently(lambda: rowsfile.append(job.rows, [row for _, row in left]))
                raise
    except KeyboardInterrupt:
        written = rowsfile.results(rowsfile.read(job.rows))
        for claim in claims:
            row = written.get(claim.config.hash)
            if row is not None and row["status"] in rowsfile.RESULTS:  # not a failure that is tried again
                ledger.finish(claim, row)
            else:
                ledger.release(claim)
        raise


def _keep(ledger: Any, claim: Any, row: Row, path: Path) -> None:
    """Write a row and finish its trial, unless another worker was given the run meanwhile.

    Raises:
        RunError: there was no space on the disk, or no ledger, all the time. Without a ledger the row is
            written all the same: should the run have been given away, readers take the first of two rows.
    """
    try:
        held = ledger.holds(claim)
    except RunError:
        patiently(lambda: rowsfile.append(path, [row]))
        raise
    if held:
        patiently(lambda: rowsfile.append(path, [row]))
        ledger.finish(claim, row)


@contextmanager
def _renewed(ledger: Any, claims: Sequence[Any], every: float) -> Generator[None, None, None]:
    """Renew claims from a thread; end this process if the sweep that started it is gone."""
    done, parent = threading.Event(), os.getppid()

    def renew() -> None:
        while not done.wait(min(every, 5.0)):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if time.monotonic() - renewed[0] >= every:
                renewed[0] = time.monotonic()
                try:
                    for claim in claims:
                        ledger.holds(claim, patient=False)
                except RunError:
                    pass  # the next renewal may succeed; if none does, the claim lapses, and `holds` says so

    renewed = [time.monotonic()]
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _stop(*_: Any) -> None:
    """Turn the first signal into KeyboardInterrupt; further ones must not disturb the giving back."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
