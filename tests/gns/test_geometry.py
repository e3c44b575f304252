"""The noise scale part by part: what `estimate` gives of each part's own sums; and the gauge of LoRA."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from gns.estimate import estimate
from gns.geometry import by_layer, by_module, layer_of, module_of
from gns.monitor import GNSMonitor
from gns.sums import Layout, StepSums, factor_of, from_rows
from tests.gns.small_models import lora, tokens
from tests.reference.per_example import trainable
from tests.reference.tolerances import close

PREFIX = "base_model.model.model.layers"
NAMES = (
    "base_model.model.model.embed_tokens.lora_embedding_A.default",
    "base_model.model.model.embed_tokens.lora_embedding_B.default",
    *(f"{PREFIX}.{i}.mlp.up_proj.lora_{f}.default.weight" for i in (0, 1, 10) for f in "AB"),
    f"{PREFIX}.1.mlp.up_proj.lora_magnitude_vector.default.weight",
    f"{PREFIX}.1.input_layernorm.weight",
    "base_model.model.lm_head.modules_to_save.default.weight",
)
LAYOUT = Layout(NAMES)


def draw(count, start=0, layout=LAYOUT, seed=0, **fields):
    """Gaussian gradients of n examples in 6 dimensions a parameter; n differs from step to step."""
    rng = np.random.default_rng(seed + start)
    steps = []
    for i in range(start, start + count):
        n = 4 + i % 3
        g = 0.4 + rng.normal(size=(n, len(layout.names), 6))
        rows = np.stack([(g**2).sum(2).mean(0), (g.mean(0) ** 2).sum(1)], axis=1)
        known = {"mean_fourth": 1.0, "top_sq_norms": (1.0,), "n_tokens": 100}
        steps.append(from_rows(rows, layout, step=i, n_examples=n, **known, **fields))
    return steps


def of_part(steps, part_of, part, factor=None):
    """The slow way: a record of the part's own sums for every step that has it."""
    out = []
    for step in steps:
        if not step.usable or step.layout is None:
            continue
        chosen = [
            i
            for i, name in enumerate(step.layout.names)
            if part_of(name) == part and factor in (None, factor_of(name) or "other")
        ]
        if chosen:
            names = Layout(tuple(step.layout.names[i] for i in chosen))
            known = {"n_examples": step.n_examples, "sum_sq_weights": step.sum_sq_weights}
            known |= {"n_tokens": step.n_tokens, "metric": step.metric, "loss_scaled": step.loss_scaled}
            out.append(from_rows(step.rows[chosen], names, step=step.step, **known))
    return out


def same(actual, expected, what):
    """All that `estimate` says of the part's own records."""
    for f in fields(expected):
        a, e = getattr(actual, f.name), getattr(expected, f.name)
        if f.name in ("groups", "moments", "n_skipped"):
            continue
        if isinstance(e, float) and not math.isnan(e):
            if math.isinf(e):
                assert a == e, f"{what}.{f.name}"
            else:
                close(a, e, rtol=1e-9, what=f"{what}.{f.name}")
        elif not isinstance(e, float):
            assert a == e, f"{what}.{f.name}: {a!r}, {e!r} expected"
        else:
            assert math.isnan(a), f"{what}.{f.name}: {a!r}, NaN expected"


@pytest.mark.parametrize(
    ("parameter", "module", "layer"),
    [
        (NAMES[0], "model.embed_tokens", "model.embed_tokens"),
        (NAMES[2], "model.layers.0.mlp.up_proj", "model.layers.0"),
        (NAMES[-3], "model.layers.1.mlp.up_proj", "model.layers.1"),
        (NAMES[-2], "model.layers.1.input_layernorm", "model.layers.1"),
        (NAMES[-1], "lm_head", "lm_head"),
        ("transformer.h.3.attn.c_attn.weight", "transformer.h.3.attn.c_attn", "transformer.h.3"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block.2.layer.0.SelfAttention.q",
         "encoder.block.2"),
        ("model.layers.5.mlp.experts.7.up.base_layer.weight", "model.layers.5.mlp.experts.7.up",
         "model.layers.5"),
        ("_orig_mod." + NAMES[2], "model.layers.0.mlp.up_proj", "model.layers.0"),
        (f"{PREFIX}.1._orig_mod.mlp.up_proj.lora_A.default.weight", "model.layers.1.mlp.up_proj",
         "model.layers.1"),
        ("0.weight", "0", "0"),
        ("2.bias", "2", "2"),
        ("weight", "", ""),
    ],
)  # fmt: skip
def test_parameters_belong_to_modules_and_layers(parameter, module, layer):
    assert (module_of(parameter), layer_of(parameter)) == (module, layer)


STEPS = {
    "plain": draw(30),
    "of unequal weights": draw(30, sum_sq_weights=0.3),
    "scaled": draw(25, loss_scaled=True),
    "parameters left out on the way": draw(12) + draw(18, 12, Layout(NAMES[2:])) + draw(4, 30),
    "with unusable steps": [*draw(22), *draw(3, 22, reason="broken"), StepSums(25, 4, 3.0, 1.0)],
    "too few": draw(5),
    "one": draw(1),
    "float32": [
        from_rows(s.rows.astype(np.float32), LAYOUT, step=s.step, n_examples=s.n_examples) for s in draw(21)
    ],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("by", "part_of"), [(by_module, module_of), (by_layer, layer_of)])
def test_each_part_is_estimated_from_its_own_sums(steps, by, part_of):
    found = by(steps, level=0.9)
    assert list(found) == list(dict.fromkeys(part_of(name) for name in NAMES))
    for part, actual in found.items():
        own = of_part(steps, part_of, part)
        same(actual, estimate(own, level=0.9), part)
        assert actual.n_skipped == len(steps) - len(own)
        for factor in actual.groups:
            wanted = estimate(of_part(steps, part_of, part, factor), level=0.9)
            same(actual.groups[factor], wanted, f"{part}, factor {factor}")


def test_factors_are_told_where_there_are_any():
    found = by_module(draw(3))
    groups = {module: list(each.groups) for module, each in found.items()}
    assert groups["model.layers.0.mlp.up_proj"] == ["A", "B"]
    assert groups["model.layers.1.mlp.up_proj"] == ["A", "B", "other"]
    assert groups["model.embed_tokens"] == ["A", "B"]
    assert groups["lm_head"] == groups["model.layers.1.input_layernorm"] == []


def test_parts_add_up_to_the_whole():
    steps = draw(30)
    whole = estimate(steps)
    for found in (by_module(steps), by_layer(steps)):
        close(sum(e.trace_sigma for e in found.values()), whole.trace_sigma)
        close(sum(e.grad_sq_norm for e in found.values()), whole.grad_sq_norm)


def test_without_rows_there_are_no_parts():
    assert by_module([]) == by_layer([StepSums(0, 4, 3.0, 1.0)]) == {}


def test_a_level_and_foreign_steps_are_refused_as_by_estimate():
    with pytest.raises(ValueError, match="level is 2"):
        by_module(draw(3), level=2)
    with pytest.raises(TypeError, match="StepSums are needed"):
        by_layer([1])


def test_many_modules_and_steps_take_no_record_a_part():
    """448 modules × 10,000 steps take seconds: no object is made for a part of a step."""
    made, steps = [], draw(40)
    original = StepSums.__post_init__
    try:
        StepSums.__post_init__ = lambda self: (made.append(1), original(self))[1]
        by_module(steps)
    finally:
        StepSums.__post_init__ = original
    assert len(made) <= 3 * 2 * len(steps), "only those of the joint estimate's groups"


# the gauge


def regauged(model, c):
    """A → cA, B → B/c: the same function."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.mul_(c)
            elif "lora_B" in name:
                p.div_(c)
    return model


def measured(model, steps=21):
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        for step in range(steps):
            loss = model(**tokens(5, seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), monitor.history


@pytest.mark.parametrize("c", [3.0, 0.1])
def test_factors_do_not_move_with_the_gauge_and_the_joint_number_does(c):
    (loss, before), (same_loss, after) = (
        measured(regauged(lora("llama", torch.float64), scale)) for scale in (1.0, c)
    )
    close(same_loss, loss, rtol=1e-9)
    one, other = by_module(before), by_module(after)
    for module in one:
        for factor, power in (("A", -1), ("B", 1)):
            a, b = one[module].groups[factor], other[module].groups[factor]
            figures = [[e.b_simple, e.low, e.detection_limit] for e in (a, b)]
            figures = [[x for x in f if math.isfinite(x)] for f in figures]
            close(figures[1], figures[0], rtol=1e-6, what=f"{module}, factor {factor}")
            assert (a.status, math.isinf(a.high)) == (b.status, math.isinf(b.high))
            sums = np.array([a.trace_sigma, a.grad_sq_norm])
            close([b.trace_sigma, b.grad_sq_norm], sums * c ** (2 * power), rtol=1e-6)
    whole, moved = estimate(before), estimate(after)
    for factor in "AB":
        close(moved.groups[factor].b_simple, whole.groups[factor].b_simple, rtol=1e-6)
    assert abs(moved.b_simple / whole.b_simple - 1) > 1e-2, "the control: the joint number is a convention"
    assert max(abs(other[m].trace_sigma / one[m].trace_sigma - 1) for m in one) > 0.1
