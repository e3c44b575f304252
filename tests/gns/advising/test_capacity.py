import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gns.advising.capacity import (
    AdaptedLayer,
    Capacity,
    first_epoch_bits,
    read_layers,
    recorded,
    step_cost,
)
from gns.finetune import adapted_layers
from tests.gns import tiny

sizes = st.integers(1, 500)


@given(sizes, sizes, sizes)
def test_the_square_case_is_the_quoted_formula(n, r, count):
    cost = step_cost([AdaptedLayer(n, n, r, count)])
    assert (cost.lora, cost.full) == (count * (2 * n**2 + 6 * n * r), count * 3 * n**2)


def products(i, o, r):
    """Multiply-adds of each product of one token's forward and backward, one after the other."""
    frozen = [i * o, o * i]  # y = Wx; dx = Wᵀdy
    trained = lambda a, b: [a * b, b * a, b * a]  # noqa: E731  forward, input gradient, weight gradient
    return sum(frozen + trained(i, r) + trained(r, o)), sum(trained(i, o))


@given(sizes, sizes, sizes)
def test_layers_that_are_not_square_add_up_product_by_product(i, o, r):
    cost = step_cost([AdaptedLayer(i, o, r), AdaptedLayer(o, i, r, 2)])
    lora, full = products(i, o, r)
    assert (cost.lora, cost.full) == (3 * lora, 3 * full)
    assert step_cost([AdaptedLayer(i, o, 0)]).ratio == pytest.approx(2 / 3)


def test_bits():
    assert first_epoch_bits(math.log(2), 1000) == pytest.approx(1000)  # a nat is 1/ln 2 bits
    assert first_epoch_bits(2.1, 10) == pytest.approx(2.1 * 10 / math.log(2))


def test_two_bits_a_parameter():
    full = Capacity(300.0, 100)
    assert (full.adapter_bits, full.load, full.fits) == (200.0, 1.5, False)
    assert Capacity(200.0, 100).fits and Capacity(199.0, 100).load == pytest.approx(0.995)


def test_the_layers_of_a_model_and_back_from_a_record():
    model = tiny.lora(tiny.llama())
    layers = adapted_layers(model)
    shapes = {(a.in_features, a.out_features, a.rank): a.count for a in layers}
    # q and o; k and v, one key head of two; gate and up; down
    assert shapes == {(16, 16, 4): 2, (16, 8, 4): 2, (16, 32, 4): 2, (32, 16, 4): 1}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(a.count * a.rank * (a.in_features + a.out_features) for a in layers) == trained
    assert adapted_layers(torch.nn.Linear(3, 3)) == []
    assert read_layers([[16, 8, 4, 1]]) == [AdaptedLayer(16, 8, 4, 1)]


def test_conv1d_layers_count_the_same():
    model = tiny.lora(tiny.gpt2(), fan_in_fan_out=True)
    shapes = {(a.in_features, a.out_features): a.count for a in adapted_layers(model)}
    assert (16, 48) in shapes and (48, 16) not in shapes  # queries, keys and values in one, stored transposed


@pytest.mark.parametrize(
    "recorded", [None, "abcd", [[1, 2, 3]], [[1, 2, 3, 0]], [["16", 8, 4, 1]], [7], [[1, 1, True, 1]]]
)
def test_a_foreign_record_of_layers_is_none(recorded):
    assert read_layers(recorded) == []


def test_what_a_runs_settings_tell():
    settings = {"first_epoch_loss": 2.0, "loss_tokens": 1000, "trainable_parameters": 10_000}
    capacity, cost = recorded(settings)
    assert capacity == Capacity(first_epoch_bits(2.0, 1000), 10_000) and cost is None
    assert recorded(settings, 99)[0].parameters == 99
    assert (capacity.share, recorded({**settings, "first_epoch_share": 0.2})[0].share) == (1.0, 0.2)
    for odd in (0.5, 10**400):  # no whole token; beyond any float
        assert recorded({**settings, "loss_tokens": odd})[0] is None
    assert recorded({"adapted_layers": [[16, 8, 4, 2]]}) == (None, step_cost([AdaptedLayer(16, 8, 4, 2)]))
    for name in settings:
        for odd in (None, "many", -1, 0, True, math.nan, [1]):
            assert recorded({**settings, name: odd}) == (None, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Capacity(0, 10), "data_bits is 0; a finite number > 0 is needed"),
        (lambda: Capacity(10, 1.5), "parameters is 1.5; a whole number, 1 or more, is needed"),
        (lambda: Capacity(10, 1, 0.0), "share is 0.0"),
        (lambda: first_epoch_bits(math.nan, 10), "loss is nan"),
        (lambda: first_epoch_bits(1.0, 0), "tokens is 0"),
        (lambda: AdaptedLayer(0, 3, 1), "in_features is 0"),
        (lambda: AdaptedLayer(3, 3, -1), "rank is -1"),
        (lambda: AdaptedLayer(3, 3, 1, 0), "count is 0"),
        (lambda: step_cost([]), "layers is empty; at least one linear layer is needed"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
