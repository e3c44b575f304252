"""The benchmark of packed runs on a tiny base, and its table from rows."""

import json

import pytest

from experiments.packed.speed import main, noise, speedup, table

ROW = {
    **{"base": "1m", "task": "wordmath", "adapter": "lora", "rank": 16, "dtype": "float32", "chosen": 4},
    "machine": {"device": "a CPU", "threads": 1, "versions": {"torch": "2"}, "commit": "abc"},
}


def _row(batch, width, packed):
    solo = [1.0, 2.0, 1.0]
    return ROW | {
        "batch": batch,
        "width": width,
        "solo_s": solo,
        "again_s": [0.5, 2.0, 1.0],
        "packed_s": packed,
    }


def test_a_speed_up_is_paired_by_rounds():
    row = _row(1, 4, [2.0, 2.0, 2.0])
    assert speedup(row)[0] == 2.0 and speedup(row)[2] == 4.0
    assert noise(row) == 1.0


def test_the_table_has_a_cell_a_row():
    text = table([_row(1, 1, [1.0] * 3), _row(1, 4, [2.0] * 3), _row(16, 1, [1.0] * 3)])
    assert "a CPU, 1 thread(s), torch 2, commit abc." in text
    lines = text.splitlines()
    assert (
        lines[-2].startswith("| 1 | 1000.0 ms | 1.00 | 1.00 (") and "| 2.00 (2.00 … 4.00) | 4 |" in lines[-2]
    )
    assert lines[-1].endswith("|  | 4 |")  # not measured
    assert {line.count("|") for line in lines[-4:]} == {7}


@pytest.mark.usefixtures("sentences")
def test_the_command_writes_rows_and_their_table(tiny_base, tmp_path, capsys):
    out = tmp_path / "sub" / "rows.jsonl"
    common = ["--out", str(out), "--device", "cpu"]
    main(
        ["--base", tiny_base, "--task", "sentences", "--rank", "2", "--batches", "8", "--widths", "1", "2"]
        + ["--rounds", "2", *common]
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["batch"], row["width"]) for row in rows] == [(8, 1), (8, 2)]
    assert all(len(row[name]) == 2 and min(row[name]) > 0 for row in rows for name in ("solo_s", "packed_s"))
    written = out.with_suffix(".md").read_text()
    out.with_suffix(".md").unlink()
    main(["--table", *common])
    assert out.with_suffix(".md").read_text() == written and "| 8 |" in capsys.readouterr().out


def test_one_round_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--rounds", "1"])
    assert "at least 2 are needed" in capsys.readouterr().err
