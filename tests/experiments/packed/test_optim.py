"""Stacked steps against `torch.optim`, slot by slot."""

import dataclasses

import pytest
import torch

from experiments.configs import RunConfig
from experiments.loop import optimizer_of
from experiments.packed.layers import Stack
from experiments.packed.optim import StackedOptimizer

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}  # of numbers about 1, after 30 steps
SLOTS = (
    {},
    {"lr": 3e-2, "beta1": 0.5, "clip": 0.7},
    {"lr": 1e-3, "beta2": 0.9, "weight_decay": 0.4, "clip": 3.0},
    {"beta2_batch": 64, "weight_decay": 0.1},
)


def _states(dtype):
    torch.manual_seed(0)
    return [{"a": torch.randn(4, 3, dtype=dtype), "b": torch.randn(5, dtype=dtype)} for _ in SLOTS]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("in_cache", [1, 2**18])
def test_a_step_is_torchs(optimizer, dtype, in_cache, monkeypatch):
    monkeypatch.setattr("experiments.packed.optim.IN_CACHE", in_cache)
    configs = [
        dataclasses.replace(RunConfig("x", "y", lr=1e-2, optimizer=optimizer), **slot) for slot in SLOTS
    ]
    states = _states(dtype)
    own = [[t.clone().requires_grad_() for t in state.values()] for state in states]
    theirs = [optimizer_of(p, c) for p, c in zip(own, configs, strict=True)]
    stack = Stack(states, "cpu")
    mine, kept = StackedOptimizer(stack, configs), [0, 1, 2, 3]
    for step in range(30):
        if step == 20:  # two slots leave
            rows, kept = stack.rows(), [3, 1]
            stack.hold([rows[i] for i in kept])
            mine.keep(kept)
        rates = [c.lr * (1 - step / 40) for c in configs]
        for place, slot in enumerate(kept):
            for p in own[slot]:
                p.grad = torch.randn_like(p)
            stack.gradient[place] = torch.cat([p.grad.flatten() for p in own[slot]])
            if configs[slot].clip is not None:
                torch.nn.utils.clip_grad_norm_(own[slot], configs[slot].clip)
            theirs[slot].param_groups[0]["lr"] = rates[slot]
            theirs[slot].step()
        mine.step([rates[slot] for slot in kept])
    for place, slot in enumerate(kept):
        expected = torch.cat([p.detach().flatten() for p in own[slot]])
        assert not torch.equal(expected, torch.cat([t.flatten() for t in states[slot].values()]))
        torch.testing.assert_close(stack.values[place], expected, rtol=0, atol=TOLERANCE[dtype])


def test_a_nan_in_one_slot_stays_there():
    configs = [RunConfig("x", "y", clip=0.1), RunConfig("x", "y", clip=0.1)]
    stack = Stack(_states(torch.float64)[:2], "cpu")
    stack.gradient[:] = 1.0
    stack.gradient[0, 3] = torch.nan
    StackedOptimizer(stack, configs).step([0.1, 0.1])
    assert stack.values[0].isnan().all() and stack.values[1].isfinite().all()
