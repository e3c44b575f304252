"""A base so small that it trains in a second."""

import dataclasses

import torch

from experiments.bases.configs import BaseConfig
from experiments.bases.training import Run, build_model

TINY = BaseConfig(
    "tiny",
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    layers=1,
    heads=2,
    steps=2,
    batch_size=2,
    sequence_length=16,
    context=32,
    warmup_steps=1,
)


def start(tokenizer, stream, **changes):
    config = dataclasses.replace(TINY, **changes)
    return Run(config, build_model(config, tokenizer), stream)


def weights(run):
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
