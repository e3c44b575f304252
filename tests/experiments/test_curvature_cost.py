"""The cost table is arithmetic on rows; peaks of memory are those of the tensors that were alive at once."""

import torch

from experiments.curvature_cost import AGAIN, PEER, peak_bytes, table


def row(arm, seconds, **more):
    beside = {"step_seconds": [1.0, 3.0, 2.0], "peak_bytes": 30, "step_bytes": 20}
    return {"arm": arm, "seconds": seconds, "status": "done", **beside, **more}


def test_costs_are_ratios_to_the_steps_beside():
    rows = [
        row(AGAIN, [1.0, 3.3, 1.8]),
        row("exact", [20.0, 30.0, 24.0]),
        row("difference", [12.0, 36.0, 26.0]),
        {"arm": PEER, "status": "failed", "error": "no forward AD"},
    ]
    text = table(rows)
    assert f"| {AGAIN} | 1.00 (0.90 … 1.10) |  |  | 1.50 |  |" in text
    assert "| exact | 12.0 (10.0 … 20.0) | 18 | 6.0 % | 1.50 |  |" in text
    assert "| difference | 12.0 (12.0 … 13.0) | 20 | 6.0 % | 1.50 | 2.0 |" in text
    assert "does not run: no forward AD" in text


def test_the_peak_is_what_was_alive_at_once():
    n, kept = 1 << 20, []

    def work():
        kept.clear()
        a = torch.zeros(n)
        b = a + 1
        del a
        c = b * 2
        del b
        kept.append(c[:1].clone())

    assert abs(peak_bytes(work) / (8 * n) - 1) < 0.01  # two of three float32 tensors
    x = torch.ones(n, requires_grad=True)
    assert peak_bytes(lambda: (x.exp().exp().sum()).backward()) >= 2 * 4 * n  # saved for backward
