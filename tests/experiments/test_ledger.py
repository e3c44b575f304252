"""The ledger: one claim a run, whoever is killed, asleep or of another version."""

import multiprocessing
import os
import time

import pytest

pytest.importorskip("optuna")
import optuna
import psutil

from experiments import lease, ledger
from experiments.configs import RunConfig, RunError
from experiments.ledger import Ledger

RUNS = [RunConfig("1m", "wordmath", lr=1e-3 * (i + 1)) for i in range(4)]
DONE = {"status": "done", "test_loss": 1.5}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'folder' / 'ledger.db'}"


def opened(url, configs=RUNS, **more):
    return Ledger(url, "x", configs, **more)


def row_of(config, **more):
    return {"hash": config.hash, "config": config.to_dict(), **DONE, **more}


def no_rows():
    return {}


def test_each_run_is_enqueued_once_and_claimed_once_in_order(url):
    first, second = opened(url), opened(url)
    assert first.counts() == second.counts() == {"waiting": 4}
    assert [c.config for c in first.claim(first.waiting(), 3)] == RUNS[:3]
    assert [c.config for c in second.claim(second.waiting(), 3)] == RUNS[3:]
    assert first.claim(first.waiting()) == second.claim(second.waiting()) == []
    second.refresh()
    assert second.counts() == {"running": 4}


def test_results_and_failures_are_told_apart_and_only_failures_are_retried(url):
    book = opened(url)
    claims = book.claim(book.waiting(), 3)
    statuses = [{"status": "diverged", "test_loss": None}, {"status": "failed", "error": "no memory"}, DONE]
    for claim, row in zip(claims, statuses, strict=True):
        assert book.holds(claim)
        book.finish(claim, row)
    book.settle(no_rows)
    assert book.counts() == {"waiting": 1, "diverged": 1, "failed": 1, "done": 1}
    assert book.retry() == 1
    assert book.counts() == {"waiting": 2, "diverged": 1, "done": 1}
    assert [c.config for c in book.claim(book.waiting(), 9)] == [RUNS[1], RUNS[3]]
    trials = optuna.load_study(study_name="x", storage=url).trials
    assert [t.value for t in trials if t.state.is_finished()] == [float("inf"), None, 1.5]
    assert trials[1].user_attrs["error"] == "no memory"
    assert trials[0].params["lr"] == RUNS[0].lr  # what Optuna's plots show


def test_a_released_run_waits_again_and_its_old_claim_is_void(url):
    book = opened(url)
    claim, *_ = book.claim(book.waiting())
    book.release(claim)
    book.refresh()
    assert book.counts() == {"waiting": 4}
    assert not book.holds(claim)
    book.finish(claim, DONE)  # has no effect
    assert [c.config for c in opened(url).claim(RUNS[:1])] == RUNS[:1]


def claim_and_die(url, seconds=0.0, claimed=None):
    book = opened(url)
    book.claim(book.waiting())
    if claimed is not None:
        claimed.set()
    time.sleep(seconds)


def test_what_a_dead_process_had_claimed_waits_again_at_once(url):
    opened(url)
    context = multiprocessing.get_context("fork")
    claimed = context.Event()  # signed too: a claim without a signature lapses with its lease only, see below
    worker = context.Process(target=claim_and_die, args=(url, 60, claimed))
    worker.start()
    assert claimed.wait(60)
    book = opened(url)
    book.settle(no_rows)
    assert book.counts() == {"waiting": 3, "running": 1}  # control: the living keep their claims
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # a corpse that nobody has asked after yet
    assert psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE
    book.settle(no_rows)
    assert book.counts() == {"waiting": 4}
    worker.join()


def test_a_row_that_a_dead_process_wrote_with_its_last_breath_counts(url):
    opened(url)
    worker = multiprocessing.get_context("fork").Process(target=claim_and_die, args=(url,))
    worker.start()
    worker.join()
    book = opened(url)
    book.settle(lambda: {RUNS[0].hash: row_of(RUNS[0])})
    assert book.counts() == {"waiting": 3, "done": 1}


def test_a_claim_elsewhere_lapses_with_its_lease(url, monkeypatch):
    book = opened(url, length=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(lease, "machine", lambda: "elsewhere")
        asleep, kept = book.claim(book.waiting(), 2)
        book.settle(no_rows)
        assert book.counts() == {"waiting": 2, "running": 2}
    time.sleep(0.6)
    assert book.holds(kept)
    book.settle(no_rows)
    assert book.counts() == {"waiting": 3, "running": 1}
    assert not book.holds(asleep)  # it learns so before it writes its row


def test_a_claim_without_signature_lapses_too(url, monkeypatch):
    book = opened(url, length=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(book, "_note", lambda *_: True)  # killed before it could sign
        book.claim(book.waiting())
    book.settle(no_rows)
    assert book.counts()["running"] == 1
    time.sleep(0.4)
    book.settle(no_rows)
    assert book.counts() == {"waiting": 4}


def test_a_run_given_up_by_a_process_that_died_doing_so_is_not_lost(url, monkeypatch):
    book = opened(url)
    claim, *_ = book.claim(book.waiting())
    with monkeypatch.context() as patch:
        patch.setattr(book, "_add", lambda *_: None)
        book.release(claim)
    book.settle(no_rows)
    assert book.counts() == {"waiting": 4}
    assert len(book.claim(book.waiting(), 9)) == 4


def test_of_two_trials_of_one_run_the_second_is_struck_out(url):
    book = opened(url)
    book._add(RUNS[2])
    book.settle(no_rows)
    assert book.counts() == {"waiting": 4}
    states = [t.state.name for t in optuna.load_study(study_name="x", storage=url).trials]
    assert states == ["WAITING"] * 4 + ["PRUNED"]


def test_a_run_that_kills_its_workers_is_recorded_as_failed(url, monkeypatch):
    book = opened(url)
    monkeypatch.setattr(lease, "alive", lambda *_: False)
    for _ in range(ledger.MOST_STARTS):
        assert book.settle(no_rows) == []
        book.claim(RUNS[:1])
    (row,) = book.settle(no_rows)
    assert row["status"] == "failed" and row["hash"] == RUNS[0].hash
    assert "its worker was killed 5 times while it ran; out of memory?" in row["error"]
    book.settle(lambda: {row["hash"]: row})
    assert book.counts() == {"waiting": 3, "failed": 1}


def test_a_ledger_of_other_runs_is_refused_and_can_be_extended(url):
    opened(url)
    more = [*RUNS[1:], RunConfig("1m", "wordmath", lr=7.0)]
    with pytest.raises(RunError, match="'x' was made for other runs.*--extend takes the new runs in"):
        opened(url, more)
    assert opened(url, more, extend=True).waiting() == more
    assert opened(url, more).counts() == {"waiting": 4}


def test_a_ledger_of_another_version_is_refused(url):
    optuna.load_study(study_name="x", storage=opened(url).url).set_user_attr("format", 0)
    with pytest.raises(RunError, match="'x' has format 0, this version reads 1; give another --ledger"):
        opened(url)


def test_what_is_no_database_is_named(tmp_path):
    (tmp_path / "ledger.db").write_text("something else " * 100)
    with pytest.raises(RunError, match="ledger.db: the ledger cannot be used: file is not a database"):
        opened(f"sqlite:///{tmp_path / 'ledger.db'}")


def test_workers_that_race_never_share_a_run(url):
    runs = [RunConfig("1m", "wordmath", lr=1e-3 * (i + 1)) for i in range(40)]
    context = multiprocessing.get_context("fork")
    box = context.Queue()

    def racer():
        book = opened(url, runs)
        taken = []
        while claims := book.claim(book.waiting()):
            taken += [c.config.lr for c in claims]
        box.put(taken)

    workers = [context.Process(target=racer) for _ in range(3)]  # all of them fill a ledger that is not there
    for worker in workers:
        worker.start()
    taken = [lr for _ in workers for lr in box.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(taken) == [run.lr for run in runs]


def test_the_ledger_costs_under_50_ms_a_run(url):
    runs = [RunConfig("1m", "wordmath", lr=1e-3 * (i + 1)) for i in range(50)]
    book, times = opened(url, runs), []
    while waiting := book.waiting():
        began = time.process_time()
        (claim,) = book.claim(waiting)
        assert book.holds(claim)
        book.finish(claim, DONE)
        times.append(time.process_time() - began)
    assert min(times) < 0.050  # what else runs on the machine only adds to it
