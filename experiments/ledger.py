"""The ledger of a sweep: an Optuna study with a trial for each run, in SQLite or any database Optuna knows.

A trial's state says where its run is: WAITING, RUNNING (claimed), COMPLETE (a result: done or diverged),
FAIL. Optuna is the store; it samples nothing, and its `ask` is not used, which lists all waiting trials.

- **A claim is atomic**, on a server and on SQLite: see `experiments.database`.
- **A claim is a lease.** Its owner renews it from a thread. An owner that died on this machine is seen at
  once, one elsewhere when its lease runs out. Its trial is then failed without a status, which is final and
  so done by one process only, and its run enqueued again. Whoever was only asleep learns that from `holds`.
  A run that keeps killing its workers is recorded as failed after `MOST_STARTS`.
- **A row is written before its trial is finished**, by an owner who has just renewed its lease. A kill
  between the two leaves a row, and `settle` finishes the trial from it. So no row is lost, and none comes
  twice, unless a worker sleeps for a whole lease in just that moment; readers then take the first.
- A run's trial is the first with its hash that has not failed. Should two processes enqueue one run in the
  same moment, the second trial is never looked at, and is struck out (PRUNED) by the next `settle`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import lease
from experiments.configs import RunConfig, RunError
from experiments.database import Database, opening
from experiments.rowsfile import RESULTS, Row

# isort: split
import optuna  # after `experiments.database`, which says what to do where it is missing
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

FORMAT = 1  # of what is kept in a study; another number is refused
MOST_STARTS = 5  # of one run, before it is recorded as failed
_AXES: dict[str, BaseDistribution] = {  # what Optuna's own plots can show
    "lr": FloatDistribution(1e-9, 1e3, log=True),
    "batch_size": IntDistribution(1, 1 << 30, log=True),
    "rank": IntDistribution(1, 1 << 20, log=True),
    "n_train": IntDistribution(1, 1 << 40, log=True),
    "seed": IntDistribution(0, 1 << 40),
}


@dataclass(frozen=True)
class Claim:
    """A run that this process alone may execute.

    Args:
        config: of the run.
        trial: Optuna's id.
        lease: as it was signed.
    """

    config: RunConfig
    trial: int
    lease: Mapping[str, Any]


class Ledger:
    """One sweep's study. Each process opens its own.

    Args:
        url: of the database.
        preset: name of the study.
        configs: runs of the sweep.
        extend: take in runs that the ledger does not know yet; those no longer asked for are left alone.
        length: seconds after which a claim that was not renewed is void; clocks of several machines may
            differ by much less than this.
        patient: wait for a database that does not answer now, see `experiments.patience`.

    Raises:
        RunError: the database cannot be opened, or belongs to another version or to another sweep.
    """

    def __init__(
        self,
        url: str,
        preset: str,
        configs: Sequence[RunConfig],
        *,
        extend: bool = False,
        length: float = 300.0,
        patient: bool = True,
    ) -> None:
        self.url, self.preset, self.length = url, preset, length
        self.configs = {config.hash: config for config in configs}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with opening(url):
            self._database = Database(url, patient=patient)
            self.storage = self._database.storage
            made = {"storage": self.storage, "study_name": preset, "load_if_exists": True}
            self.id = self._database.ask(lambda: optuna.create_study(**made)._study_id)
            self._database.opened()
            self._check(extend)
            self._enqueue()
        self._trials: dict[str, FrozenTrial] = {}
        self._order: list[str] = []
        self.refresh()

    def refresh(self) -> None:
        """Look at all trials again: slow where there are thousands, so not done at each claim."""
        self._trials = _current(self._all(), self.configs)
        waits = {hash for hash, trial in self._trials.items() if trial.state == TrialState.WAITING}
        self._order = [hash for hash in self.configs if hash in waits]

    def counts(self) -> Counter[str]:
        """Count the runs by status: waiting, running, done, diverged, failed. As of `refresh`."""
        return Counter(_status(trial) for trial in self._trials.values())

    def waiting(self) -> list[RunConfig]:
        """Give the runs that waited at the last `refresh` and were not tried since, in the preset's order."""
        return [self.configs[hash] for hash in self._order]

    def claim(self, wanted: Iterable[RunConfig], most: int = 1) -> list[Claim]:
        """Claim up to `most` of the wanted runs.

        Args:
            wanted: runs of `waiting`, in order of preference.
            most: so many at the most.

        Returns:
            What was claimed, and is nobody else's. Fewer than `most`: the others are taken or finished.

        Raises:
            KeyboardInterrupt: someone wants to stop; what was claimed waits again.
        """
        claims: list[Claim] = []
        try:
            self._claim(wanted, most, claims)
        except KeyboardInterrupt:
            for claim in claims:
                self.release(claim)
            raise
        return claims

    def _claim(self, wanted: Iterable[RunConfig], most: int, claims: list[Claim]) -> None:
        for config in wanted:
            if len(claims) == most:
                break
            if config.hash in self._order:
                self._order.remove(config.hash)  # whoever gets it, it waits no longer
            trial = self._trials[config.hash]
            if self._set(trial._trial_id, TrialState.RUNNING):
                signed = lease.signed(_starts(trial) + 1)
                claims.append(Claim(config, trial._trial_id, signed))  # first: a stop must find it
                self._note(trial._trial_id, "lease", signed)

    def holds(self, claim: Claim, *, patient: bool = True) -> bool:
        """Renew a claim and say whether it is still held: asked before its row is written.

        Args:
            claim: of this process.
            patient: wait for a database that does not answer now.
        """
        renewed = dict(claim.lease) | {"beat": lease.signed(0)["beat"]}
        return self._note(claim.trial, "lease", renewed, patient)

    def finish(self, claim: Claim, row: Row) -> None:
        """Finish the trial of a row that is on disk."""
        self._finish(claim.trial, row)

    def release(self, claim: Claim) -> None:
        """Let a claimed run wait again, as if it had not been started."""
        self._again(claim.trial, claim.config, claim.lease["starts"] - 1)

    def settle(self, rows: Callable[[], Mapping[str, Row]]) -> list[Row]:
        """Bring the ledger in line with the rows and with who is alive; then `refresh`.

        Trials whose row is there are finished; runs whose owner is gone wait again.

        Args:
            rows: reads hash → row from the disk. Called when it is known who is gone: a row that its worker
                wrote with its last breath is then there.

        Returns:
            Rows of runs that killed their worker `MOST_STARTS` times, not on disk yet: append, settle again.
        """
        hopeless: list[Row] = []
        self._strike()
        open = {h: t for h, t in self._trials.items() if t.state != TrialState.COMPLETE and not self._busy(t)}
        written = rows() if open else {}
        for hash, trial in open.items():
            row, config = written.get(hash), self.configs[hash]
            if _status(trial) != "failed" and row is not None and row["status"] in RESULTS:
                if trial.state == TrialState.FAIL:  # abandoned, and final: its run needs another trial
                    self._finish(self._add(config, _starts(trial)), row)
                else:
                    self._finish(trial._trial_id, row)
            elif trial.state == TrialState.FAIL and _status(trial) != "failed":
                self._add(config, _starts(trial))  # its owner was killed before it could do so
            elif trial.state == TrialState.RUNNING and _starts(trial) < MOST_STARTS:
                self._again(trial._trial_id, config, _starts(trial))
            elif trial.state == TrialState.RUNNING and row is None:
                hopeless.append(_killed(config))
            elif trial.state == TrialState.RUNNING:
                self._finish(trial._trial_id, row)
        self.refresh()
        return hopeless

    def retry(self) -> int:
        """Enqueue every failed run once more; give their number."""
        failed = [hash for hash, trial in self._trials.items() if _status(trial) == "failed"]
        for hash in failed:
            self._add(self.configs[hash])
        self.refresh()
        return len(failed)

    def _busy(self, trial: FrozenTrial) -> bool:
        """Say whether someone may be at work on a trial."""
        if trial.state != TrialState.RUNNING:
            return False
        claimed = 0.0 if trial.datetime_start is None else trial.datetime_start.timestamp()
        return lease.alive(trial.user_attrs.get("lease", {}), claimed, self.length)

    def _check(self, extend: bool) -> None:
        """Refuse a study of another format or of other runs; sign a new one."""
        runs = hashlib.sha256("".join(sorted(self.configs)).encode()).hexdigest()[:16]
        seen = self._database.ask(lambda: self.storage.get_study_user_attrs(self.id))
        if seen.get("format", FORMAT) != FORMAT:
            raise RunError(
                f"{self.url}: ledger {self.preset!r} has format {seen['format']}, this version reads "
                f"{FORMAT}; give another --ledger, and take finished rows over with --merge"
            )
        if seen.get("runs", runs) != runs and not extend:
            raise RunError(
                f"{self.url}: ledger {self.preset!r} was made for other runs (the preset or a default has "
                "changed since); --extend takes the new runs in, or give another --ledger"
            )
        if seen.get("runs") != runs:
            for key, value in {"format": FORMAT, "optuna": optuna.__version__, "runs": runs}.items():
                self._database.ask(
                    lambda key=key, value=value: self.storage.set_study_user_attr(self.id, key, value)
                )

    def _enqueue(self) -> None:
        """Add the runs that have no trial."""
        known = {trial.user_attrs.get("hash") for trial in self._all()}
        for hash, config in self.configs.items():
            if hash not in known:
                self._add(config)

    def _strike(self) -> None:
        """Look at all trials, and strike out those that wait for a run that has one already."""
        self.refresh()
        chosen = {trial._trial_id for trial in self._trials.values()}
        for trial in self._all():
            other = self._trials.get(trial.user_attrs.get("hash", ""))
            if trial.state == TrialState.WAITING and other is not None and trial._trial_id not in chosen:
                if trial.number > other.number:
                    self._set(trial._trial_id, TrialState.PRUNED)

    def _add(self, config: RunConfig, starts: int = 0) -> int:
        """Enqueue one run; give its trial."""
        axes = {name: kind for name, kind in _AXES.items() if kind._contains(getattr(config, name))}
        trial = optuna.create_trial(
            state=TrialState.WAITING,
            params={name: getattr(config, name) for name in axes},
            distributions=axes,
            user_attrs={"hash": config.hash, "starts": starts},
        )
        return self._database.ask(lambda: self.storage.create_new_trial(self.id, trial))

    def _again(self, trial: int, config: RunConfig, starts: int) -> None:
        """Give a claim up and enqueue its run once more; of several that try, one does."""
        if self._set(trial, TrialState.FAIL):
            self._add(config, starts)

    def _finish(self, trial: int, row: Row) -> None:
        """Write what a row says into its trial; a trial that is finished stays as it is."""
        loss = row.get("test_loss")
        said = {"status": row["status"]} | ({"error": row["error"]} if row.get("error") else {})
        if not all([self._note(trial, key, value) for key, value in said.items()]):
            return
        if row["status"] in RESULTS:
            self._set(trial, TrialState.COMPLETE, math.inf if loss is None else float(loss))
        else:
            self._set(trial, TrialState.FAIL)

    def _all(self) -> list[FrozenTrial]:
        """Give every trial, oldest first."""
        return self._database.ask(lambda: self.storage.get_all_trials(self.id, deepcopy=False))

    def _note(self, trial: int, key: str, value: Any, patient: bool = True) -> bool:
        """Note something on a trial; give False where it is finished."""
        try:
            self._database.ask(lambda: self.storage.set_trial_user_attr(trial, key, value), patient)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def _set(self, trial: int, state: TrialState, value: float | None = None) -> bool:
        """Change a trial's state; give False where another process was faster."""
        values = None if value is None else [value]
        try:
            return self._database.ask(lambda: self.storage.set_trial_state_values(trial, state, values))
        except optuna.exceptions.UpdateFinishedTrialError:
            return False


def _current(trials: Iterable[FrozenTrial], hashes: Collection[str]) -> dict[str, FrozenTrial]:
    """Give each run's trial: its first that has not failed, or else its last failure."""
    found: dict[str, FrozenTrial] = {}
    for trial in trials:
        hash = trial.user_attrs.get("hash", "")
        if hash in hashes and trial.state != TrialState.PRUNED:
            if hash not in found or found[hash].state == TrialState.FAIL:
                found[hash] = trial
    return found


def _status(trial: FrozenTrial) -> str:
    """Say in this project's words where a run is; a trial that was only given up has a run that waits."""
    if trial.state == TrialState.RUNNING:
        return "running"
    return trial.user_attrs.get("status", "waiting") if trial.state.is_finished() else "waiting"


def _starts(trial: FrozenTrial) -> int:
    """Say how often a run was started."""
    return trial.user_attrs.get("lease", {}).get("starts", trial.user_attrs["starts"])


def _killed(config: RunConfig) -> Row:
    """Give the row of a run that no worker survived."""
    said = f"its worker was killed {MOST_STARTS} times while it ran; out of memory? (see the system's log)"
    return {"hash": config.hash, "config": config.to_dict(), "status": "failed", "error": said}
