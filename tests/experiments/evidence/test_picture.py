"""The front page's picture: every number of it is where its axes say."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.evidence.picture import below, picture
from experiments.evidence.practice import BY_NOISE
from experiments.evidence.readout import BY_DEFAULT, read_out
from tests.experiments.evidence.synthetic import rows
from tests.experiments.evidence.test_practice import bowls


@pytest.fixture(scope="module")
def found():
    made = rows(8.0, 8.0, noise=0.03, n=1) + rows(16.0, 16.0, noise=0.03, n=2, dials={"label_noise": 0.2})
    return read_out(made + rows(9.0, 8.0, noise=0.03, n=3, rank=4) + bowls(), [])


def points(axes) -> list[tuple[float, float]]:
    """Marks of single numbers, lines left out."""
    one = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in one]


def test_each_configuration_is_at_its_noise_scale_and_critical_batch_size(found):
    left = picture(found).axes[0]
    there = {(m.noise["B"].value, m.doubled.value) for m in found.compared.values()}
    assert len(there) == 3 and set(points(left)) == there
    assert "3 configurations" in left.get_title()
    dashed = [line for line in left.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [found.judged[BY_DEFAULT].constant.value]


def test_each_rule_is_at_what_it_gives_away_and_takes(found):
    _, middle, right = picture(found).axes
    rules = [text.get_text() for text in middle.get_yticklabels()]
    assert set(found.priced) == {"constant", "cosine"}
    for axes, number in ((middle, "regret"), (right, "steps")):
        there = {getattr(each, number).value for priced, _ in found.priced.values() for each in priced}
        assert {x for x, _ in points(axes)} == there
    as_read = rules.index("B_simple as read")
    (own,) = (each for each in found.priced["cosine"][0] if each.rule == BY_NOISE)
    ((_, at),) = [(x, y) for x, y in points(middle) if x == own.regret.value]
    assert abs(at - as_read) < 0.5
    bars = [
        line for line in middle.get_lines() if list(line.get_xdata()) == [own.regret.low, own.regret.high]
    ]
    assert [line.get_ydata()[0] for line in bars] == [at]


def test_of_a_bound_the_mark_is_open_and_an_open_end_reaches_the_frame(found):
    name, own = next(iter(found.compared.items()))
    bounded = replace(own, doubled=replace(own.doubled, high=math.inf, at_least=True))
    left = picture(replace(found, found={name: {1_024: bounded}}, priced={})).axes[0]
    (mark,) = (line for line in left.get_lines() if len(line.get_xdata()) == 1)
    assert mark.get_fillstyle() == "none"
    upright = [line.get_ydata() for line in left.get_lines() if np.ptp(line.get_xdata()) == 0]
    assert max(max(each) for each in upright) == left.get_ylim()[1]


def test_it_says_how_many_runs_and_what_is_harmless(found):
    assert below(found).startswith(f"{found.runs:,} runs. ") and "0.01 nat" in below(found)
