"""Tables and figures are of rows alone."""

import json

from experiments.overhead import sweepfigure, table
from experiments.overhead.measure import AA
from tests.experiments.overhead.rows_by_hand import row


def test_table_and_figure_are_of_rows_alone(tmp_path):
    failed = row("broken", []) | {"status": "failed", "error": "ValueError: planted"}
    rows = [row(AA, [1.0, 1.02, 1.04]), failed]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, *rows]) + '{"cut off')
    found = table.read([path])
    assert len(found) == 2
    text = table.table(found)
    assert "### tiny, float32, on a CPU" in text and "torch 2; 2 threads; commit abc; 3 pairs an arm." in text
    assert "| untouched (A/A) | 1.020 (1.000 … 1.040) | 1.000 … 1.040 | 1000.0 | not counted |" in text
    assert "| broken | could not run: ValueError: planted |" in text
    (ax,) = table.figure(found, {"tiny": 1.05}).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["untouched (A/A)", "broken"]
    assert [t.get_text() for t in ax.texts] == ["1.020", "could not run"]


def test_one_row_of_a_setting_arm_and_repetition_is_read_the_last(tmp_path):
    path = tmp_path / "rows.jsonl"
    twice = [row("a", [1.0], what="rss", repeat=i, rss_peak=n) for i, n in ((0, 1), (0, 2), (1, 3))]
    path.write_text("".join(json.dumps(r) + "\n" for r in twice))
    assert [r["rss_peak"] for r in table.read([path])] == [2, 3]


def test_an_error_is_shortened_between_words():
    long = "RuntimeError: " + "torch.func cannot do this " * 20
    assert table.shortened(long).endswith(" …") and len(table.shortened(long)) <= table.SAID
    assert table.shortened(long).removesuffix(" …") in long
    assert (
        table.shortened("OutOfMemoryError: CUDA out of memory. Tried to")
        == "OutOfMemoryError: CUDA out of memory"
    )
    assert table.shortened("KeyError: a|b\nmore") == "KeyError: a/b"


def test_sweeps_share_one_figure_and_one_scale():
    rows = [
        row(arm, ratios, sweep=sweep, x=x)
        for sweep, x in (("tokens", 64), ("tokens", 512), ("rank", 4))
        for arm, ratios in ((AA, [1.0, 1.01, 1.0]), ("monitor", [1.1, 1.2, 9.0]))
    ]
    made = sweepfigure.figure([*rows, row("monitor", [], sweep="width", x=8) | {"status": "failed"}])
    tokens, rank = made.axes
    assert tokens.get_xlabel() == "T, tokens" and rank.get_xlabel() == "r"
    assert tokens.get_ylim() == rank.get_ylim() and 1.2 < tokens.get_ylim()[1] < 1.5
    assert [t.get_text() for t in made.legends[0].get_texts()] == ["untouched beside itself", "monitor"]
