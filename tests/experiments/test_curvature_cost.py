"""The cost table is arithmetic on rows."""

from experiments.curvature_cost import table


def row(arm, seconds, **more):
    return {"arm": arm, "seconds": seconds, "status": "done", **more}


def test_costs_are_ratios_to_the_median_step():
    rows = [
        row("training step", [1.0, 3.0, 2.0]),
        row("exact", [20.0, 30.0, 24.0]),
        {"arm": "curvlinops, products alone", "seconds": [], "status": "failed", "error": "no forward AD"},
    ]
    text = table(rows)
    assert "| exact | 12.0 (10.0 … 15.0) | 18 | 6.0 % |" in text
    assert "does not run: no forward AD" in text and "training step |" not in text.splitlines()[2]
