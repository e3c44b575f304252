"""Rank at initialisation: rows of real probes, the slope on made-up ones, figures from rows alone."""

import json

import numpy as np
import pytest

from experiments.frozen_rank import figure, main, slope
from gns import corpus


def test_rows_are_of_factor_b_for_each_rank_and_of_full_weights(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    sizes = ["--ranks", "2", "4", "--seeds", "2", "--batches", "4", "--batch-size", "3", "--length", "12"]
    main([*sizes, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    whole = [r for r in rows if r["share"] == 1]
    assert [(r["rank"], r["seed"]) for r in whole] == [(2, 0), (2, 1), (4, 0), (4, 1), (None, 0)]
    assert {r["n_examples"] for r in whole} == {12}
    assert len(rows) == 5 + 3 * 3
    first, second = (r for r in whole if r["rank"] == 2)
    assert first["trace_sigma"] != second["trace_sigma"], "the seed draws another factor A"
    assert all(r["trace_sigma"] > 0 and r["base"] == corpus.base_model_path().name for r in rows)
    assert "r=None seed 0, 12 examples: B = " in capsys.readouterr().out
    main(["--figures", str(out)])
    assert (tmp_path / "frozen_rank.png").stat().st_size > 10_000


def test_too_few_examples_are_named():
    with pytest.raises(ValueError, match="99999 batches of 16 need 1599984 examples; there are"):
        main(["--batches", "99999"])


def rows_of(exponent, scatter=0.0):
    noise = np.random.default_rng(0).normal(size=8) * scatter
    ranks = [2, 4, 8, 16, 2, 4, 8, 16]
    return [
        {"rank": r, "b_simple": float(20 * r**exponent * np.exp(e))}
        for r, e in zip(ranks, noise, strict=True)
    ]


@pytest.mark.parametrize("exponent", [0.0, 1.0, -0.3])
def test_the_slope_is_found_with_its_interval(exponent):
    assert slope(rows_of(exponent), "rank")[0] == pytest.approx(exponent, abs=1e-12)
    middle, low, high = slope(rows_of(exponent, 0.1), "rank")
    assert low < exponent < high and 0 < high - low < 0.3 and low < middle < high


def test_the_figure_says_what_the_lines_are():
    about = {"base": "toy", "width": 8, "n_examples": 64, "share": 1.0, "low": 10, "high": 40}
    rows = [{**about, **r, "seed": i // 4} for i, r in enumerate(rows_of(0.0, 0.1))]
    rows.append({**about, "rank": None, "seed": 0, "b_simple": 21.0})
    left, right = figure(rows).axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("LoRA rank", "examples in the probe")
    labels = [t.get_text() for t in left.get_legend().get_texts()]
    assert labels[0].startswith("full weights") and f"slope {slope(rows[:-1], 'rank')[0]:.3f}" in labels[1]
