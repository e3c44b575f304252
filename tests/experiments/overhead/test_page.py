"""One command makes rows, figures and a page that says what was reached, from which commit."""

import importlib.metadata
import json
import re
import sys

import pytest
from matplotlib.figure import Figure

from experiments import markdown
from experiments.overhead import __main__ as command
from experiments.overhead import bench, fresh, page, presets, sweepfigure, table, verdicts
from experiments.overhead.arms import Gram, Monitored
from experiments.overhead.sweeps import Sweep
from tests.experiments.overhead.rows_by_hand import row, setting
from tests.experiments.overhead.test_measure import Broken

RANKS = {
    "status": "ok",
    "untouched_s": [1.0] * 3,
    "arm_s": [1.1] * 3,
    "calls_a_step": 1.0,
    "bytes_a_step": 80,
}
ALONE = {"status": "ok", "untouched_s": [1.0] * 3, "arm_s": [1.2] * 3}
KNOWN = {"startup": {"attach_s": [0.2, 0.3, 0.4], "parameters": 448}, "ranks": RANKS, "alone": ALONE}


def test_the_command_saves_rows_with_what_they_ran_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(presets.PRESETS, "smoke", [setting()])
    monkeypatch.setitem(presets.KINDS, "smoke", (Monitored,))
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["overhead", "--out", str(out), "--pairs", "2"])
    command.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["arm"] for r in rows] == ["untouched (A/A)", "monitor"]
    assert all(r["machine"]["versions"]["torch"] == importlib.metadata.version("torch") for r in rows)
    assert rows[0]["setting"] == setting().row()
    assert "tiny: monitor: ×" in capsys.readouterr().out


@pytest.fixture
def short(monkeypatch):
    """The whole benchmark on tiny models: one setting, one sweep of two points, no fresh processes."""
    monkeypatch.setitem(presets.PRESETS, "cpu", [setting(name=presets.NARROW)])
    monkeypatch.setitem(presets.KINDS, "cpu", (Monitored, Broken))
    sweep = Sweep("tiny", "T", (4, 8), lambda x: setting(name=f"T {x}", tokens=x), (Monitored, Gram))
    for module in (command, bench, sweepfigure):
        monkeypatch.setattr(module, "SWEEPS", {"tokens": sweep})
    sizes = iter([100, 104, 103, 103, 103, 103, 103, 103, 103, 103])

    def run(jobs, **_):
        for what, *_ in jobs:
            yield KNOWN.get(what) or {"rss_peak": next(sizes) * 2**20}

    monkeypatch.setattr(fresh, "run", run)


def test_one_command_writes_rows_figures_and_a_page(short, tmp_path, capsys):
    (tmp_path / "notes.md").write_text("## What is left\n\nThis.")
    bench.bench(tmp_path, rounds=6, pairs=5, minutes=0.05)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"README.md", "rows.jsonl", "notes.md", "overhead.png", "sweeps.png"}
    text, rows = (tmp_path / "README.md").read_text(), table.read([tmp_path / "rows.jsonl"])
    assert "0 operations more than the untouched step, 0 tensors and 0 bytes more" in text
    assert "| 0.30 s | less than 0.5 s | reached |" in text
    assert "1.00 all-reduces, together 80 bytes" in text and "Time × 1.100" in text
    assert "one process with one thread: × 1.200" in text
    assert text.endswith("This.\n") and "(sweeps.png)" in text
    assert "| broken | could not run: ValueError: planted |" in text
    assert len([r for r in rows if r.get("sweep") == "tokens"]) == 6
    out = capsys.readouterr().out
    assert "-- 1 of 5, table: width 512, r=16, 8×128: " in out and "-- 5 of 5, sweep: tokens 8" in out
    assert "-- forecast, all " in out and re.search(
        r"-- it took, all .* table \d+ s, counts \d+ s, memory", out
    )
    readme = tmp_path / "PROJECT.md"
    begin, end = markdown.marks("overhead")
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    page.insert(readme, rows, "results")
    inserted = readme.read_text()
    assert inserted.startswith("before\n") and inserted.endswith("\nafter\n") and "old" not in inserted
    assert verdicts.brief(rows) in inserted and "(results/overhead.png)" in inserted


def test_what_the_minutes_do_not_hold_is_left_out_and_named(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "OVER", -1.0)
    monkeypatch.setattr(table, "figure", lambda *_: Figure())
    bench.bench(tmp_path, rounds=5, pairs=5, minutes=0.05)
    assert "5 of 5, sweep: tokens 8: left out, there is no time for it" in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text()
    said = "**Left out, as there was no time for it**: counts: idle, start-up, one thread, two ranks, memory"
    assert f"{said}, sweep: tokens 4, sweep: tokens 8." in text
    assert "| monitor |" in text and "(sweeps.png)" not in text  # the table is made whatever the time


def test_an_interrupted_run_goes_on_and_another_commit_begins_anew(short, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "write", lambda folder: [])  # its figures take seconds
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bench, "memory", interrupted)
        bench.bench(tmp_path, rounds=5, pairs=5, minutes=0.05)
    before = (tmp_path / "rows.partial").read_bytes()
    assert bench._finished(tmp_path / "rows.partial", tmp_path / "parts.partial") == {
        f"table: {presets.NARROW}", "counts: idle, start-up, one thread, two ranks"
    }  # fmt: skip
    capsys.readouterr()
    bench.bench(tmp_path, rounds=5, pairs=5, minutes=0.05)
    out = capsys.readouterr().out
    assert "2 parts were there already" in out and "-- 1 of 3, memory: " in out
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(before)
    assert not (tmp_path / "rows.partial").exists() and not (tmp_path / "parts.partial").exists()
    (tmp_path / "rows.partial").write_bytes(before)
    (tmp_path / "parts.partial").write_text('{"part": "memory"}\n')
    monkeypatch.setenv("GNS_COMMIT", "another")
    assert bench._finished(tmp_path / "rows.partial", tmp_path / "parts.partial") == set()
    assert not (tmp_path / "rows.partial").exists()


def test_a_readme_without_marks_is_refused(tmp_path):
    path = tmp_path / "PROJECT.md"
    path.write_text("none")
    with pytest.raises(ValueError, match="put both where the part belongs"):
        page.insert(path, [row("monitor", [1.0])], "results")


def made(*commits):
    rows = [row("monitor", [1.0, 1.0]) for _ in commits]
    return [r | {"machine": r["machine"] | {"commit": name}} for r, name in zip(rows, commits, strict=True)]


def test_the_page_names_its_commit_and_warns_of_several_and_of_changes():
    assert page.origin(made("abc", "abc")).startswith("All rows: commit abc. All rows: machine a CPU")
    assert "Warning" not in page.origin(made("abc"))
    assert "rows of 2 commits**, which are not to be compared: abc (1 rows), abd (2 rows)" in page.origin(
        made("abc", "abd", "abd")
    )
    assert "changes that no commit holds**: abc-dirty" in page.origin(made("abc-dirty"))
