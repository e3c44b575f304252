"""A sweep from end to end with runs that train nothing: killed, stopped, resumed, merged, failed."""

import importlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from experiments import crew, grids, patience, plain, rowsfile, sweep, worker
from experiments.configs import RunConfig, RunError

pytest.importorskip("optuna")
import psutil
import sqlalchemy.exc

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
    asked = ["--preset", str(path), "--out", str(out), "--workers", str(workers)]
    code = (
        f"from experiments import sweep\nsweep.ENGINE, sweep.LEASE = {FAKE!r}, {lease}\nsweep.main({asked})"
    )
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True)


def workers_of(sweeping):
    try:
        return [p for p in psutil.Process(sweeping.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    except psutil.Error:  # one of them, or the sweep, ended meanwhile
        return []


def test_200_runs_killed_at_random_and_resumed_lose_none_and_repeat_none(tmp_path):
    path, out, rng = preset_of(tmp_path, 200, sleep=0.02), tmp_path / "out", random.Random(0)
    killed = Counter()
    sweeping = started(path, out, lease=1.0)
    until = time.monotonic() + 600  # seconds; ten on a machine that has nothing else to do
    try:
        while sweeping.poll() is None or sweeping.returncode != 0:
            assert time.monotonic() < until, (killed, len(rows_of(out)))
            if sweeping.poll() is not None:
                sweeping = started(path, out, lease=1.0)
            time.sleep(rng.uniform(0.2, 1.0))
            if killed.total() < 8 and rows_of(out):
                if killed["worker"] % 4 == 3 and killed["sweep"] < 2:
                    killed["sweep"] += 1
                    sweeping.kill()
                    sweeping.wait()  # its workers see that and stop; the next ones may have begun
                elif crowd := workers_of(sweeping):
                    killed["worker"] += 1
                    rng.choice(crowd).kill()
    finally:
        sweeping.terminate()
        sweeping.wait()
    finished = Counter(row["hash"] for row in rows_of(out))
    assert killed.total() == 8, killed
    assert set(finished) == {config.hash for config in grids.load(path).configs}
    assert set(finished.values()) == {1}, "a run was completed twice"


def test_two_sweeps_at_once_share_the_runs_and_an_interrupt_gives_them_back(tmp_path):
    path, out = preset_of(tmp_path, 40, sleep=0.1), tmp_path / "out"
    first, second = started(path, out, workers=1), started(path, out, workers=1)
    while len({row["pid"] for row in rows_of(out)}) < 2:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130
    assert second.wait() == 0
    assert "Stopped. Every finished run is kept" in out.with_suffix(".log").read_text()
    counts = Counter(row["hash"] for row in rows_of(out))
    assert len(counts) == 40 and set(counts.values()) == {1}


def in_process(the_job):
    crew.settled(the_job)
    worker.work(the_job)
    return crew.settled(the_job)


def test_what_fails_is_a_row_with_its_error_and_is_retried_only_when_asked(tmp_path):
    path, out = (
        preset_of(tmp_path, 2, more="[[cells]]\nlr = [0.5, 2.0]\n[[cells]]\ndials = {breaks = true}"),
        tmp_path,
    )
    the_job = job(path, out)
    assert in_process(the_job) == {"failed": 2, "done": 1, "diverged": 1}
    failed = [row for row in rows_of(out) if row["status"] == "failed"]
    assert [row["error"] for row in failed] == ["RuntimeError: this engine is broken"] * 2
    assert in_process(the_job)["failed"] == 2 and len(rows_of(out)) == 4
    assert crew.settled(the_job, retry=True)["waiting"] == 2
    assert in_process(the_job)["failed"] == 2 and len(rows_of(out)) == 6


def test_runs_that_are_packed_are_claimed_together_and_shared_among_workers(tmp_path):
    path = preset_of(tmp_path, 7, more='[[cells]]\nengine = "packed"')
    assert in_process(job(path, tmp_path / "one", workers=1)) == {"done": 7}
    assert [row["together"] for row in rows_of(tmp_path / "one")] == [4] * 4 + [3] * 3
    in_process(job(path, tmp_path / "two", workers=4))  # ceil(7/4), ceil(5/4), ceil(3/4), ...
    assert [row["together"] for row in rows_of(tmp_path / "two")] == [2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("taken", "got", "most"),
    [
        ((1, 2), (0, 3, 4, 5), [5, 2]),  # of 12, 6 are a worker's share; then those that are missing from 4
        ((1, 2, 4, 5, 6, 7, 8), (0, 3, 9), [5, 1]),  # it looks again: of the 5 that are left, 3 are its share
    ],
)
def test_a_program_is_filled_although_another_worker_takes_the_same_runs_first(tmp_path, taken, got, most):
    """Two workers start at once and want the same companions: whoever is later takes the next ones."""
    from experiments.ledger import Ledger

    path = preset_of(tmp_path, 12, more='[[cells]]\nengine = "packed"')
    the_job = job(path, tmp_path / "out", workers=2)
    crew.settled(the_job)
    mine, other = (Ledger(the_job.url, the_job.preset, the_job.configs) for _ in range(2))
    asked, wanted = [], importlib.import_module(FAKE)

    class Late:
        """Another worker claims what it was told just now, before it is claimed here; once."""

        def companions(self, config, waiting, device, most):
            found = wanted.companions(config, waiting, device, most)
            if not asked:
                other.claim([the_job.configs[i] for i in taken], len(taken))
            asked.append(most)
            return found

    claims = worker._claimed(mine, Late(), the_job)
    assert [claim.config.hash for claim in claims] == [the_job.configs[i].hash for i in got]
    assert asked == most


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_stop_while_runs_are_claimed_gives_all_of_them_back(tmp_path, monkeypatch, nth):
    """In the first claim, in the first of its companions, and in the second round of them."""
    from experiments.ledger import Ledger

    path = preset_of(tmp_path, 12, more='[[cells]]\nengine = "packed"')
    the_job = job(path, tmp_path / "out", workers=1)
    crew.settled(the_job)
    mine, other = (Ledger(the_job.url, the_job.preset, the_job.configs) for _ in range(2))
    other.claim(other.waiting()[1:3], 2)
    calls, note = [], Ledger._note

    def stopped(self, *given, **more):
        calls.append(given)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return note(self, *given, **more)

    monkeypatch.setattr(Ledger, "_note", stopped)
    with pytest.raises(KeyboardInterrupt):
        worker._claimed(mine, importlib.import_module(FAKE), the_job)
    monkeypatch.undo()
    counts = crew.settled(the_job)
    assert (counts["waiting"], counts["running"]) == (10, 2)


def test_a_full_disk_is_said_and_the_finished_row_waits_for_space(tmp_path, monkeypatch, capsys):
    path, append, tries = preset_of(tmp_path, 1), rowsfile.append, []

    def full(file, rows):
        tries.append(file)
        if len(tries) < 3:
            raise rowsfile.DiskFull(f"{file}: no space left")
        append(file, rows)

    monkeypatch.setattr(rowsfile, "append", full)
    monkeypatch.setattr(patience, "PAUSE", 0.01)
    assert in_process(job(path, tmp_path)) == {"done": 1}
    assert len(rows_of(tmp_path)) == 1 and len(tries) == 3
    said = capsys.readouterr().err
    assert said.count("rows.jsonl: no space left; process") == 1 and "tries again for up to 600 s" in said
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    tries.clear()
    with pytest.raises(rowsfile.DiskFull, match="no space left; tried again for 0 s in vain. Every row"):
        in_process(job(preset_of(tmp_path, 1), tmp_path / "other"))


def test_a_ledger_that_another_program_holds_is_waited_for(tmp_path, monkeypatch, capsys):
    """Someone browses the database with a transaction open, for longer than SQLite waits by itself."""
    the_job = job(preset_of(tmp_path, 3), tmp_path)
    crew.settled(the_job)
    monkeypatch.setattr("experiments.database.LOCKED", 0.05)
    monkeypatch.setattr(patience, "PAUSE", 0.01)
    browser = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, check_same_thread=False)
    browser.execute("BEGIN IMMEDIATE")
    threading.Timer(1.0, lambda: browser.execute("COMMIT")).start()
    worker.work(the_job)
    assert crew.settled(the_job) == {"done": 3} and len(rows_of(tmp_path)) == 3
    said = capsys.readouterr().err
    assert "ledger.db: the ledger does not answer: database is locked; process" in said
    browser.close()


def test_a_ledger_that_never_answers_again_costs_no_finished_row(tmp_path, monkeypatch):
    from experiments.database import LedgerBusy
    from experiments.ledger import Ledger

    the_job = job(preset_of(tmp_path, 1), tmp_path)
    monkeypatch.setattr("experiments.database.LOCKED", 0.05)
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    book = Ledger(the_job.url, the_job.preset, the_job.configs)
    (claim,) = book.claim(book.waiting())
    browser = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    browser.execute("BEGIN IMMEDIATE")
    row = {"hash": claim.config.hash, "config": claim.config.to_dict(), "status": "done", "test_loss": 1.0}
    with pytest.raises(LedgerBusy, match="database is locked; tried again for 0 s in vain. Every row"):
        worker._keep(book, claim, row, the_job.rows)
    assert [r["hash"] for r in rows_of(tmp_path)] == [claim.config.hash]
    began = time.monotonic()
    seen = crew.Crew(the_job, grids.load(tmp_path / "made.toml"))._recounted(Counter(running=1))
    assert seen == {"running": 1} and time.monotonic() - began < 5  # the display does not wait
    browser.close()


def test_a_ledger_that_never_answers_again_costs_no_row_of_a_packed_program(tmp_path, monkeypatch):
    from experiments.database import LedgerBusy
    from experiments.ledger import Ledger

    the_job = job(preset_of(tmp_path, 3), tmp_path)
    monkeypatch.setattr("experiments.database.LOCKED", 0.05)
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    book = Ledger(the_job.url, the_job.preset, the_job.configs)
    claims = book.claim(book.waiting(), 3)
    browser = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)

    def execute(configs, device):
        browser.execute("BEGIN IMMEDIATE")
        return [{"hash": c.hash, "config": c.to_dict(), "status": "done", "test_loss": 1.0} for c in configs]

    with pytest.raises(LedgerBusy, match="database is locked"):
        worker._execute(book, claims, SimpleNamespace(execute=execute), the_job)
    assert [row["hash"] for row in rows_of(tmp_path)] == [claim.config.hash for claim in claims]
    browser.execute("COMMIT")
    browser.close()
    monkeypatch.setattr("experiments.lease.alive", lambda *_: False)
    assert crew.settled(the_job) == {"done": 3}


def test_a_row_is_written_once_though_the_ledger_fails_after_it(tmp_path, monkeypatch):
    from experiments.ledger import Ledger

    the_job = job(preset_of(tmp_path, 1), tmp_path)
    book = Ledger(the_job.url, the_job.preset, the_job.configs)
    (claim,) = book.claim(book.waiting())
    set_, tries = book.storage.set_trial_state_values, []

    def busy(*given):
        tries.append(given)
        if len(tries) < 3:
            raise sqlalchemy.exc.OperationalError("UPDATE", {}, Exception("database is locked"))
        return set_(*given)

    monkeypatch.setattr(book.storage, "set_trial_state_values", busy)
    monkeypatch.setattr(patience, "PAUSE", 0.01)
    row = {"hash": claim.config.hash, "config": claim.config.to_dict(), "status": "done", "test_loss": 1.0}
    worker._keep(book, claim, row, the_job.rows)
    assert len(rows_of(tmp_path)) == 1 and len(tries) == 3
    assert crew.settled(the_job) == {"done": 1}


def test_a_worker_whose_claim_lapsed_keeps_its_row_to_itself(tmp_path, monkeypatch):
    from experiments.ledger import Ledger

    the_job = job(preset_of(tmp_path, 1), tmp_path)
    book = Ledger(the_job.url, the_job.preset, the_job.configs)
    (claim,) = book.claim(book.waiting())
    book._again(claim.trial, claim.config, 1)  # as another worker does that believes it dead
    worker._keep(book, claim, {"hash": claim.config.hash, "status": "done"}, the_job.rows)
    assert rows_of(tmp_path) == []
    assert crew.settled(the_job) == {"waiting": 1}


def test_the_plain_path_resumes_by_hash_and_its_rows_merge_into_a_ledger(tmp_path, capsys):
    path, out = (
        preset_of(
            tmp_path, 4, more="[[cells]]\nlr = [0.5, 2.0, 3e-3]\n[[cells]]\nlr = 0.7\ndials = {breaks = true}"
        ),
        tmp_path,
    )
    the_job, source, rows = job(path, out), tmp_path / "in.jsonl", tmp_path / "elsewhere.jsonl"
    sweep.write_configs(source, the_job.configs)
    lines = source.read_text().splitlines()
    source.write_text("\n".join(lines[:2]) + "\n")
    assert plain.run_file(source, rows, engine=FAKE, device=None) == 0
    before = rows.read_bytes()
    source.write_text("\n".join(lines[:3]) + "\n\n")
    assert plain.run_file(source, rows, engine=FAKE, device=None) == 0
    assert rows.read_bytes().startswith(before) and len(rowsfile.read(rows)) == 3
    assert "2 done, 1 diverged, 0 failed" in capsys.readouterr().out
    foreign = {"hash": "other", "status": "done", "config": {}}
    rowsfile.append(
        rows, [foreign, {"hash": the_job.configs[3].hash, "status": "failed", "error": "x", "config": {}}]
    )
    said = sweep.merge(the_job, [rows])
    assert said == "3 rows taken over, 0 known before, 1 failed and left to be run here, 1 of other sweeps"
    assert crew.settled(the_job) == {"done": 2, "diverged": 1, "waiting": 1}
    assert sweep.merge(the_job, [rows, rows]).startswith("0 rows taken over, 3 known before")
    with pytest.raises(RunError, match="nowhere.jsonl: no such file of rows"):
        sweep.merge(the_job, [tmp_path / "nowhere.jsonl"])


def test_on_the_plain_path_a_run_that_breaks_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    broken = [RunConfig("1m", "wordmath", dials={"breaks": True}, lr=lr) for lr in (1e-3, 2e-3)]
    fine = [RunConfig("1m", "wordmath", lr=lr) for lr in (1e-3, 2e-3)]
    sweep.write_configs(tmp_path / "in", [broken[0], fine[0], broken[1], fine[1]])
    append, tries = rowsfile.append, []

    def full_at_first(file, rows):
        tries.append(file)
        if len(tries) == 1:
            raise rowsfile.DiskFull(f"{file}: no space left")
        append(file, rows)

    monkeypatch.setattr(rowsfile, "append", full_at_first)
    monkeypatch.setattr(patience, "PAUSE", 0.01)
    assert plain.run_file(tmp_path / "in", tmp_path / "out", engine=FAKE, device=None) == 1
    found = rowsfile.read(tmp_path / "out")
    assert [row["status"] for row in found] == ["failed", "done", "failed", "done"]
    assert found[0]["error"] == "RuntimeError: this engine is broken"
    said = capsys.readouterr()
    assert "out: no space left; process" in said.err and "2 done, 0 diverged, 2 failed" in said.out
    assert plain.run_file(tmp_path / "in", tmp_path / "out", engine=FAKE, device=None, retry=True) == 1
    assert len(rowsfile.read(tmp_path / "out")) == 6


def test_the_plain_path_needs_neither_optuna_nor_datasets(tmp_path):
    code = "import sys; sys.modules['optuna'] = sys.modules['datasets'] = None\n"
    code += "from experiments import sweep\nsweep.ENGINE = 'tests.experiments.fake_engine'\n"
    code += f"sweep.main(['--jsonl', '{tmp_path}/in', '{tmp_path}/out'])"
    sweep.write_configs(tmp_path / "in", [RunConfig("1m", "wordmath")])
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert len(rowsfile.read(tmp_path / "out")) == 1
    code = code.replace(f"'--jsonl', '{tmp_path}/in'", "'--preset', 'smoke', '--status', '--out'")
    refused = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 2
    assert "a ledger needs optuna" in refused.stderr and "--jsonl IN.jsonl OUT.jsonl" in refused.stderr


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"base": "1m"}', "in.jsonl, line 2: a run needs task"),
        ('{"base": "1m", "task": "x", "ranks": 2}', r"line 2: unknown key\(s\) ranks"),
        ("{", "in.jsonl, line 2: Expecting property name"),
        ("3", "in.jsonl, line 2: "),
    ],
)
def test_a_file_of_configurations_is_refused_with_its_line(tmp_path, line, said):
    (tmp_path / "in.jsonl").write_text('{"base": "1m", "task": "x"}\n' + line)
    with pytest.raises(RunError, match=said):
        plain.read_configs(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["--preset", "nothing"], 2, "no preset 'nothing'; known: "),
        ([], 2, "give --preset NAME, --list, or --jsonl IN OUT"),
        (["--preset", "smoke", "--workers", "0"], 2, "--workers 0: at least 1"),
        (["--preset", "no/where.toml"], 2, "no/where.toml: no such file"),
        (["--preset", "smoke", "--status", "--out", f"{__file__}/x"], 2, f"{__file__}/x: Not a directory"),
        (["--preset", "smoke", "--write", f"{__file__}/x"], 2, f"{__file__}: "),
        (["--preset", "smoke", "--status", "--ledger", "nonsense"], 2, "nonsense: the ledger cannot be used"),
        (
            ["--preset", "smoke", "--status", "--ledger", "oracle://x"],
            2,
            "no driver for this kind of database",
        ),
        (
            ["--jsonl", "nowhere", "out"],
            2,
            "nowhere: no such file; python -m experiments.sweep --preset NAME --write",
        ),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, status, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(arguments)
    assert stopped.value.code == status and said in capsys.readouterr().err
