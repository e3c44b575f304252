import numpy as np
import pytest

from gns.advice import advise
from gns.advising.tradeoff import LAWS
from gns.advising.wording import DISAGREE
from gns.estimate import estimate
from gns.report import figures
from tests.gns.report.conftest import texts


def test_current_batch_and_paying_range_are_marked(runs):
    result = estimate(runs["measured"])
    advice = advise(result, batch_size=16)
    ax = figures.trade_off(advice).axes[0]
    assert any(list(line.get_xdata()) == [16, 16] for line in ax.lines)
    span = ax.patches[-1]
    near = advice.ranges[-1]
    assert span.get_x() == pytest.approx(near.low)
    assert span.get_x() + span.get_width() == pytest.approx(near.high)


def test_every_law_starts_from_the_rate_in_use_and_has_its_band(runs):
    advice = advise(estimate(runs["measured"]), batch_size=16, learning_rate=2e-4)
    figure = figures.learning_rates(advice)
    ax = figure.axes[0]
    dot = next(line for line in ax.lines if line.get_label() == "in use")
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([16], [2e-4])
    for curve in advice.rates:
        line = next(line for line in ax.lines if line.get_label() == curve.law)
        x, y = line.get_data()
        assert np.interp(16, x, y) == pytest.approx(2e-4)
        assert (np.array(curve.low) <= y * (1 + 1e-12)).all() and (
            y <= np.array(curve.high) * (1 + 1e-12)
        ).all()
    said = texts(figure)
    assert "learning rate" in said and "batch size (examples per optimizer step)" in said
    styles = {line.get_linestyle() for line in ax.lines if line.get_label() in said and line is not dot}
    assert len(styles) == len(advice.rates)  # told apart without colour


def test_where_the_laws_disagree_is_shaded_and_nowhere_else(runs):
    advice = advise(estimate(runs["measured"]), batch_size=16, learning_rate=2e-4)
    shade = figures.learning_rates(advice).axes[0].collections[0]
    assert shade.get_label() == f"laws differ by more than {DISAGREE:g}×"
    shaded = np.concatenate([path.vertices[:, 0] for path in shade.get_paths()])
    for at, batch in enumerate(advice.rates[0].batches):
        by_law = [[law(batch, 16, end) for law in LAWS.values()] for end in (advice.low, advice.high)]
        apart = max(max(rates) / min(rates) for rates in by_law)  # at one noise scale, not over the interval
        assert (apart > DISAGREE) == (batch in shaded), (at, batch)
    assert 16 not in shaded


def test_the_span_names_its_price(runs):
    result = estimate(runs["measured"])
    for price, said in (
        ({}, "pays if both matter equally"),
        ({"time_price": 3}, "pays at the price that is stated"),
        ({"step_price": 40}, "pays at the price that is stated"),
    ):
        assert said in texts(figures.trade_off(advise(result, batch_size=16, **price)))


def test_without_a_rate_there_is_nothing_to_carry_over(runs):
    assert figures.learning_rates(advise(estimate(runs["measured"]), batch_size=16)) is None
    assert (
        figures.learning_rates(advise(estimate(runs["collecting"]), batch_size=16, learning_rate=1e-3))
        is None
    )
    assert figures.learning_rates(None) is None


def test_a_long_axis_of_batches_has_no_labels_that_collide(runs):
    advice = advise(estimate(runs["lower bound"]), batch_size=1, learning_rate=2e-4)
    figure = figures.trade_off(advice)
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].get_xticklabels() if t.get_text()]
    boxes = sorted((b for b in boxes if b.width > 1), key=lambda b: b.x0)
    assert len(boxes) >= 4 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
