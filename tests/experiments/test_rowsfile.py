"""Rows on disk: whole or not at all, whatever is killed, full or written by several at once."""

import errno
import gzip
import json
import math
import multiprocessing
import os

import pytest

from experiments import rowsfile
from experiments.configs import RunError


def row(name, status="done", **more):
    return {"hash": name, "status": status, **more}


def test_rows_come_back_and_what_is_no_json_number_is_null(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    rowsfile.append(
        path, [row("a", loss=[1.5, float("nan")]), row("b", "diverged", deep={"x": float("inf")})]
    )
    rowsfile.append(path, [row("c")])
    assert rowsfile.read(path) == [
        row("a", loss=[1.5, None]),
        row("b", "diverged", deep={"x": None}),
        row("c"),
    ]
    assert rowsfile.read(tmp_path / "missing") == []


def test_half_a_row_is_passed_over_and_nothing_follows_on_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    rowsfile.append(path, [row("a")])
    path.write_bytes(path.read_bytes() + json.dumps(row("b")).encode()[:-4])
    assert [r["hash"] for r in rowsfile.read(path)] == ["a"]
    rowsfile.append(path, [row("c")])
    assert [r["hash"] for r in rowsfile.read(path)] == ["a", "c"]


def test_a_full_disk_is_named_and_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rowsfile.append(path, [row("a")])
    before, write = path.read_bytes(), os.write

    def full(file, text):
        if len(text) > 5:  # a disk takes what it can before it refuses
            return write(file, text[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(rowsfile.DiskFull, match="rows.jsonl: no space left for a row of 32 bytes"):
        rowsfile.append(path, [row("b")])
    assert path.read_bytes() == before


def test_the_first_result_counts_and_a_failure_only_where_there_is_none():
    rows = [row("a", "failed", n=0), row("a", n=1), row("a", n=2), row("a", "failed", n=3)]
    rows += [row("b", "failed", n=4), row("b", "failed", n=5), row("c", "diverged", n=6)]
    assert {k: r["n"] for k, r in rowsfile.results(rows).items()} == {"a": 1, "b": 5, "c": 6}


@pytest.mark.parametrize("text", ["[1]\n", '{"hash": "a"}\n', '{"hash": 3, "status": "done"}\n'])
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("a")) + "\n" + text)
    with pytest.raises(RunError, match=r"rows.jsonl, line 2: no row; a JSON object with hash and status"):
        rowsfile.read(path)


def test_a_follower_sees_each_row_once_and_only_when_it_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    follower = rowsfile.Follower(path)
    assert follower.new() == []
    rowsfile.append(path, [row("a")])
    text = json.dumps(row("b")) + "\n"
    with path.open("a") as file:
        file.write(text[:7])
        file.flush()
        assert [r["hash"] for r in follower.new()] == ["a"]
        file.write(text[7:])
    assert [r["hash"] for r in follower.new()] == ["b"]
    assert follower.new() == []


def add_many(path, name):
    for i in range(40):
        rowsfile.append(path, [row(f"{name}{i}", filler="x" * 5_000)])


def test_rows_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "rows.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=add_many, args=(path, n)) for n in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(r["hash"] for r in rowsfile.read(path)) == sorted(
        f"{n}{i}" for n in "ab" for i in range(40)
    )


def test_numbers_that_are_not_finite_become_null():
    assert rowsfile.finite(
        {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": None, "d": "nan", "e": True}}
    ) == {
        "a": [1.5, None, [None, None]],
        "b": {"c": None, "d": "nan", "e": True},
    }


def test_compressed_rows_are_read_and_half_a_file_is_refused(tmp_path):
    rows = [{"hash": "a", "status": "done"}, {"hash": "b", "status": "diverged"}]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert rowsfile.read(path) == rows
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(RunError, match=r"rows.jsonl.gz: no whole compressed file"):
        rowsfile.read(path)
