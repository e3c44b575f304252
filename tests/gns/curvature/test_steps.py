"""How far weights are shifted: judged by the losses themselves, or by the change of the gradient."""

import math

import pytest
import torch
from torch import nn

from gns.curvature.parts import Point
from gns.curvature.steps import LONGEST, NoStep, Steps


def steps():
    torch.manual_seed(0)
    return Steps(Point(model := nn.Linear(4, 1), dict(model.named_parameters())))


def losses(found, *, third, rounding, curvature=1.0):
    """Go through trials of a loss curvature h²/2 + third h³/6, known up to some rounding."""
    trials = 0
    found.noise = rounding
    while not found.settled("loss"):
        h = found.length("loss")
        found.judge_losses(abs(third) * h**3 / 6, curvature * h**2 / 2)
        trials += 1
    h = found.length("loss")
    return h, abs(third) * h / (3 * curvature), 2 * rounding / (curvature * h**2), trials


@pytest.mark.parametrize(
    ("third", "rounding", "one_sided"),
    [(1.0, 1e-12, True), (1e3, 1e-12, True), (1e5, 1e-16, True), (1e3, 1e-8, False), (30.0, 1e-6, False)],
)
def test_one_side_stands_for_both_only_where_neither_third_derivative_nor_rounding_shows(
    third, rounding, one_sided
):
    found = steps()
    _, odd, noise, trials = losses(found, third=third, rounding=rounding)
    assert found.one_sided == one_sided and trials <= 4
    if one_sided:
        assert odd < 0.04 and noise < 0.02
    else:  # both sides: what is left of the fourth derivative is about as large as rounding
        assert 0.1 < 2.5 * odd**2 / noise < 10


def test_a_loss_that_breaks_is_tried_nearer():
    found = steps()
    far = found.length("loss")
    found.judge_losses(math.nan, math.inf)
    assert not found.settled("loss") and found.length("loss") < far / 20


@pytest.mark.parametrize("rounding", [1e-3, 1e3])
@pytest.mark.parametrize("third", [0.0, 1e-3, 10.0])
def test_no_step_is_a_large_share_of_the_weights(third, rounding):
    found = steps()
    weights = sum(float(p.detach().square().sum()) for p in found._point.parameters.values()) ** 0.5
    h, *_ = losses(found, third=third, rounding=rounding)
    assert h <= LONGEST * weights * (1 + 1e-6)


def test_no_step_is_longer_than_rounding_asks_for():
    found = steps()
    h, _, noise, _ = losses(found, third=0.0, rounding=1e-6)
    assert found.one_sided and 1e-3 < noise < 0.01  # no third derivative shows; a fourth may be there
    assert h < LONGEST


def test_the_first_gradient_will_do_where_it_changes_as_wanted():
    found = steps()
    found.length("mean")
    assert found.judge("mean", 3e-4) and found.settled("mean")
    other = steps()
    first = other.length("mean")
    assert not other.judge("mean", 3e-3) and other.settled("mean")  # near enough to trust the power law
    assert other.length("mean") == pytest.approx(first / 10)


def test_a_gradient_that_nothing_changes_is_said():
    found = steps()
    with pytest.raises(NoStep, match="no step along a mean vector"):
        while True:
            found.length("mean")
            found.judge("mean", 0.0)
