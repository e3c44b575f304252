"""Which trainable parameter is measured, and which not and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gns.capture.plan import plan


def names(found):
    return [entry.name for entry in found.entries]


def test_every_trainable_parameter_of_a_known_layer_is_an_entry():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    found = plan(model)
    assert names(found) == ["0.weight", "0.bias", "2.weight"]
    assert [e.scalars for e in found.entries] == [12, 4, 8]
    assert [tap.name for tap in found.taps] == ["0", "2"]
    assert [tap.parameters for tap in found.taps] == [("weight", "bias"), ("weight",)]
    assert not found.reasons
    assert found.entries[0].parameter is model[0].weight
    assert not any(e.gathered for e in found.entries)


def test_a_layer_as_the_whole_model():
    assert names(plan(nn.Linear(2, 2))) == ["weight", "bias"]


def test_frozen_parameters_are_neither_measured_nor_listed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    found = plan(model)
    assert names(found) == ["1.weight"]
    assert found.taps[0].parameters == ("weight",)
    assert not found.reasons


def test_the_parameter_is_read_from_its_module_each_time():
    model = nn.Linear(2, 2)
    entry = plan(model).entries[0]
    model.weight = nn.Parameter(torch.zeros(2, 2))  # as fully_shard replaces it
    assert entry.parameter is model.weight


def test_parameters_without_a_rule_have_a_reason_and_a_size():
    model = nn.Sequential(nn.Linear(3, 4), nn.Bilinear(4, 4, 2))
    found = plan(model)
    assert names(found) == ["0.weight", "0.bias"]
    assert found.scalars == {"1.weight": 32, "1.bias": 2}
    for why in found.reasons.values():
        assert why.startswith("`1` (Bilinear): no per-example rule. Known: ")
        assert "Linear" in why


def test_a_parameter_that_the_rule_does_not_know():
    model = nn.Linear(2, 2)
    model.gain = nn.Parameter(torch.ones(1))
    assert plan(model).reasons == {"gain": "`` (Linear): the rule knows weight, bias, not `gain`"}


def test_tied_weights_are_one_entry_whose_uses_are_gathered():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = plan(model)
    assert names(found) == ["0.weight", "0.bias", "1.bias"]
    tied, *others = found.entries
    assert [(tap.name, local) for tap, local in tied.sites] == [("0", "weight"), ("1", "weight")]
    assert tied.gathered
    assert not any(e.gathered for e in others)
    assert tied.sites[0][0].gathers["weight"] is tied.sites[1][0].gathers["weight"]


def test_a_tie_to_a_layer_without_a_rule_leaves_out_the_whole_parameter():
    class Odd(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.append(Odd(model[0].weight))
    found = plan(model)
    assert names(found) == ["0.bias", "1.weight", "1.bias"]
    assert found.reasons == {"0.weight": found.reasons["0.weight"]}
    assert "`2` (Odd): no per-example rule" in found.reasons["0.weight"]


def test_a_module_under_two_names_is_one_place():
    layer = nn.Linear(3, 3)
    found = plan(nn.Sequential(layer, nn.ReLU(), layer))
    assert names(found) == ["0.weight", "0.bias"]
    assert len(found.taps) == 1


def test_nothing_trainable_says_what_to_do():
    with pytest.raises(ValueError, match="Linear has no trainable parameter .*get_peft_model.*then attach"):
        plan(nn.Linear(2, 2).requires_grad_(False))


def test_nothing_measurable_says_what_to_do():
    with pytest.raises(ValueError, match=r"none of the 2 trainable parameters of Bilinear .*gns/rules/"):
        plan(nn.Bilinear(3, 3, 2))
