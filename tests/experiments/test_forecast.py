"""Estimates of time: the parts of a run add up, and a sweep's own times correct them."""

import dataclasses

import pytest

from experiments import forecast, rowsfile
from experiments.configs import RunConfig

RUN = RunConfig("b", "wordmath", n_train=100, batch_size=10, n_eval=30, evals=1)


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    monkeypatch.setitem(forecast.CORE, "b", (0.5, 0.01))
    monkeypatch.setitem(forecast.TOKENS, "wordmath", 2.0)


@pytest.mark.parametrize(
    "changed, seconds",
    [
        ({}, 10 * 0.5 + 0.01 * 2 * (100 + 30)),  # before the first step, at the end, test: 3 · 30 / 3
        ({"batch_size": 1}, 100 * 0.5 + 0.01 * 2 * 130),
        ({"epochs": 2}, 20 * 0.5 + 0.01 * 2 * 230),
        ({"protocol": "steps", "steps": 3}, 3 * 0.5 + 0.01 * 2 * (30 + 30)),
        ({"evals": 4}, 10 * 0.5 + 0.01 * 2 * (100 + 60)),
        ({"dials": {"merged": 2}}, 10 * 0.5 + 0.01 * 4 * 130),
        ({"gns_every": 5}, 10 * 0.5 + 0.01 * 2 * 130 + 2 * forecast.MEASURED),
        ({"adapter": "full"}, 10 * 0.5 + 0.01 * 2 * (150 + 30)),
    ],
)
def test_a_runs_parts_add_up(changed, seconds):
    start = forecast.MACHINES["laptop"].start
    assert forecast.run_seconds(dataclasses.replace(RUN, **changed), "laptop") == pytest.approx(
        start + seconds
    )


def test_a_fit_gives_the_costs_back(tmp_path, capsys):
    runs = [dataclasses.replace(RUN, batch_size=b, seed=s) for b in (1, 4, 20) for s in (0, 1)]
    rows = [
        {"hash": c.hash, "status": "done", "engine": "loop", "config": c.to_dict()}
        | {"seconds": forecast.run_seconds(c, "laptop")}
        for c in runs
    ]
    rows += [
        rows[0] | {"engine": "packed", "seconds": 99.0},
        rows[1] | {"status": "diverged", "seconds": 0.6},
    ]
    assert forecast.fitted(rows, forecast.MACHINES["laptop"].start)["b"] == pytest.approx((0.5, 0.01))
    rowsfile.append(tmp_path / "rows.jsonl", rows)
    forecast.main([str(tmp_path / "rows.jsonl")])
    assert capsys.readouterr().out == '    "b": (0.5, 0.01),\n'


def test_what_was_seen_corrects_what_was_expected():
    runs = [dataclasses.replace(RUN, seed=i) for i in range(4)]
    tally = forecast.Tally(runs, "laptop", workers=2)
    expected = forecast.run_seconds(RUN, "laptop")
    assert tally.left(4) == pytest.approx(2 * expected)
    tally.rows([{"hash": runs[0].hash, "seconds": 3 * expected, "status": "done"}])
    tally.rows([{"hash": runs[1].hash, "seconds": 0.1, "status": "diverged"}])  # stopped early: says nothing
    assert tally.left(2) == pytest.approx(3 * expected)
    assert tally.left(1) == pytest.approx(3 * expected)  # one run, one worker
    assert tally.left(0) == 0.0


def test_each_base_is_corrected_by_its_own_runs(monkeypatch):
    """A laptop's sweep over bases: one that was timed under load, and one that nobody has timed."""
    monkeypatch.setitem(forecast.CORE, "c", (5.0, 0.1))
    small = [dataclasses.replace(RUN, seed=i) for i in range(2)]
    large = [dataclasses.replace(RUN, base="c", seed=i) for i in range(2)]
    expected = [forecast.run_seconds(runs[0], "laptop") for runs in (small, large)]
    tally = forecast.Tally([*small, *large], "laptop", workers=1)
    tally.rows([{"hash": small[0].hash, "seconds": expected[0] / 2, "status": "done"}])
    assert tally.left(3) == pytest.approx((expected[0] + 2 * expected[1]) / 2)  # all that is known
    tally.rows([{"hash": large[0].hash, "seconds": 4 * expected[1], "status": "done"}])
    assert tally.left(2) == pytest.approx(expected[0] / 2 + 4 * expected[1])


@pytest.mark.parametrize(
    "seconds, said",
    [(0.2, "1 s"), (89, "89 s"), (90, "1.5 min"), (5_000, "83 min"), (5_400, "1.5 h"), (2e6, "23 days")],
)
def test_times_are_said_with_two_digits(seconds, said):
    assert forecast.words(seconds) == said
