"""The process that starts workers, shows how far they are, and replaces those that were killed."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from experiments import forecast, rowsfile, worker
from experiments.configs import RunError
from experiments.grids import Preset
from experiments.patience import Passing
from experiments.worker import Job

LOOK = 0.5  # seconds between two looks at the workers and their rows
RECOUNT = 30.0  # seconds between two looks at the ledger, which knows what other machines did
SAY = 60.0  # seconds between two lines, where nobody watches
MOST_DEATHS = 20  # of workers in a row without a row


def settled(job: Job, *, extend: bool = False, retry: bool = False, patient: bool = True) -> Counter[str]:
    """Open a sweep's ledger, bring it in line with the rows on disk, and count.

    Args:
        job: of the sweep.
        extend: as of `experiments.ledger.Ledger`.
        retry: enqueue failed runs once more.
        patient: as of `experiments.ledger.Ledger`.

    Raises:
        RunError: as `experiments.ledger.Ledger`.
    """
    from experiments.ledger import Ledger

    ledger = Ledger(job.url, job.preset, job.configs, extend=extend, length=job.lease, patient=patient)
    while hopeless := ledger.settle(lambda: rowsfile.results(rowsfile.read(job.rows))):
        rowsfile.append(job.rows, hopeless)
    if retry:
        ledger.retry()
    return ledger.counts()


class Crew:
    """The workers of one command.

    Args:
        job: what they do.
        preset: the sweep, for its estimate.
    """

    def __init__(self, job: Job, preset: Preset) -> None:
        self.job, self.preset = job, preset
        self.console = Console(stderr=True)
        self.workers: list[BaseProcess] = []
        self.deaths = 0
        self.tally = forecast.Tally(job.configs, preset.scale, job.workers)

    def run(self, *, extend: bool = False, retry: bool = False) -> int:
        """Run the sweep to its end.

        Returns:
            0 if every run has a result, 1 if some failed.

        Raises:
            RunError: the workers cannot work; the first one's own words are on the screen.
            KeyboardInterrupt: someone wants to stop; the workers gave back what they had claimed.
        """
        counts = settled(self.job, extend=extend, retry=retry)
        self.follower = rowsfile.Follower(self.job.rows)
        self.tally.rows(self.follower.new())
        try:
            if counts["waiting"] or counts["running"]:
                self._watch(counts)
        except BaseException:
            self._dismiss()
            raise
        return self._end(settled(self.job))

    def _watch(self, counts: Counter[str]) -> None:
        """Start workers and stay until all of them are done."""
        self.workers = [self._hired() for _ in range(min(self.job.workers, len(self.job.configs)))]
        recounted = said = time.monotonic()
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while self.workers:
                time.sleep(LOOK)
                new = self.follower.new()
                self.tally.rows(new)
                counts = _moved(counts, new)
                self._muster(bool(new))
                now = time.monotonic()
                if now - recounted > RECOUNT:
                    counts, recounted = self._recounted(counts), now
                if self.console.is_terminal:
                    live.update(self._view(counts), refresh=True)
                elif now - said > SAY:
                    said = now
                    self.console.print(self._line(counts))

    def _recounted(self, counts: Counter[str]) -> Counter[str]:
        """Ask the ledger; if it does not answer now, its workers wait for it, and this count goes on."""
        try:
            return settled(self.job, patient=False)
        except Passing:
            return counts

    def _muster(self, progress: bool) -> None:
        """Replace workers that were killed; let those go that are done.

        Raises:
            RunError: a worker gave up, or too many were killed.
        """
        self.deaths = 0 if progress else self.deaths
        for process in [p for p in self.workers if p.exitcode is not None]:
            self.workers.remove(process)
            if process.exitcode == 0:
                continue
            if process.exitcode is not None and process.exitcode > 0:
                raise RunError(f"sweep {self.job.preset}: a worker gave up (exit status {process.exitcode})")
            self.deaths += 1
            if self.deaths > MOST_DEATHS:
                raise RunError(
                    f"sweep {self.job.preset}: {self.deaths} workers were killed without one new row"
                )
            killed = f"a worker was killed by signal {-(process.exitcode or 0)}; another takes its place"
            self.console.print(killed)
            self.workers.append(self._hired())

    def _hired(self) -> BaseProcess:
        """Start a worker; not by a fork, which would carry threads of torch and connections along."""
        process = multiprocessing.get_context("spawn").Process(target=worker.main, args=(self.job,))
        process.start()
        return process

    def _dismiss(self) -> None:
        """Stop the workers; they give back what they have claimed."""
        for process in self.workers:
            process.terminate()
        until = time.monotonic() + 30
        for process in self.workers:
            process.join(max(0.1, until - time.monotonic()))
            if process.exitcode is None:
                process.kill()

    def _end(self, counts: Counter[str]) -> int:
        """Say what came of it."""
        print(f"{self._line(counts)}\n{self.job.rows}")
        if counts["failed"]:
            rows = rowsfile.results(rowsfile.read(self.job.rows)).values()
            for said, n in Counter(row["error"] for row in rows if row["status"] == "failed").most_common(5):
                print(f"  {n} failed: {said}", file=sys.stderr)
            print("  --retry-failed runs them once more", file=sys.stderr)
        return 1 if counts["failed"] else 0

    def _line(self, counts: Counter[str]) -> str:
        """Say how far the sweep is."""
        seen = ("done", "diverged", "failed", "running", "waiting")
        said = ", ".join(f"{counts[s]} {s}" for s in seen if counts[s] or s == "done")
        left = self.tally.left(counts["waiting"] + counts["running"])
        return f"{self.job.preset}: {said}" + (f"; {forecast.words(left)} left" if left else "")

    def _view(self, counts: Counter[str]) -> Table:
        """Draw how far the sweep is."""
        over = counts["done"] + counts["diverged"] + counts["failed"]
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=counts.total(), completed=over, width=30), self._line(counts))
        return grid


def _moved(counts: Counter[str], new: list[rowsfile.Row]) -> Counter[str]:
    """Count new rows; which of them had been waiting at the last count is not known, nor needed."""
    counts = counts.copy()
    for row in new:
        counts[row["status"]] += 1
        counts["running" if counts["running"] else "waiting"] -= 1
    return +counts
