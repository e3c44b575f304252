import math

from gns.estimate import Estimate
from gns.report import figures
from tests.gns.report.conftest import texts


def known(b: float, status: str = "measured", high: float | None = None, **groups: Estimate) -> Estimate:
    top = 2 * b if high is None else high
    return Estimate(b, b / 2, top, 0.95, status, 1.0, 1 / b, 900, 50, 800, groups=groups)


def test_every_run_has_its_interval_its_factors_and_its_batch():
    runs = {"a": known(10, A=known(5), B=known(40)), "b": known(100, high=math.inf, status="lower bound")}
    ax = figures.compared(runs, {"a": 16, "b": None}).axes[0]
    spans = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    right = ax.get_xlim()[1]
    assert {(5, 20), (2.5, 10), (20, 80), (50, right), (16, 16)} <= set(spans)
    said = texts(ax.figure)
    assert "a\nb" in said and "batch in use" in said and "no upper end" in said and "factor B" in said
    assert "B_simple (examples), 95 % interval" in said


def test_a_run_that_is_too_early_says_so():
    said = texts(figures.compared({"a": known(10), "b": known(9, status="collecting")}, {}))
    assert "b\n(too early)" in said and "a\n(too early)" not in said


def test_names_from_outside_are_text_and_cut_at_their_beginning():
    evil = "$\\frac{1}{$"
    figure = figures.compared({evil: known(10), "x" * 60 + "end": known(20)}, {})
    assert figures.png(figure) and "…" in texts(figure) and "end" in texts(figure)


def test_nothing_known_gives_no_figure():
    empty = known(math.nan, status="collecting")
    assert figures.compared({"a": empty, "b": empty}, {}) is None
