"""The plain loop against a loop in plain words: same weights, same losses, whatever the micro-batches."""

import dataclasses
import math

import pytest
import torch

from experiments.course import Course
from experiments.evaluation import token_mean
from experiments.loop import optimizer_of, train
from experiments.order import batches_of
from experiments.prepared import prepare
from experiments.schedules import lr_at
from tests.experiments.small_runs import config

pytestmark = pytest.mark.usefixtures("sentences")
CPU = torch.device("cpu")


def _trained(given):
    prepared, course = prepare(given, CPU), Course(given)
    if not course.evaluations:
        course.evaluated(prepared.validation_loss())
    train(prepared, course)
    return prepared, course


def _weights(prepared):
    return [p.detach().clone() for p in prepared.trainable]


def _by_hand(given):
    """AdamW and the token mean as formulas, in float64: one forward pass an example."""
    prepared = prepare(given, CPU)
    prepared.model.double()
    parameters, losses = prepared.trainable, []
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    beta1, beta2 = given.betas
    for step, numbers in enumerate(batches_of(given)):
        total, tokens = 0.0, 0
        gradients = [torch.zeros_like(p) for p in parameters]
        for i in numbers:
            labels = sum(label != -100 for label in prepared.data.train[i].labels)
            loss = prepared.model(**prepared.batch([i])).loss * labels
            for gradient, more in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                gradient += more
            total, tokens = total + loss.item(), tokens + labels
        losses.append(total / tokens)
        gradients = [g / tokens for g in gradients]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        if given.clip is not None and norm > given.clip:
            gradients = [g * given.clip / norm for g in gradients]
        lr = lr_at(given, step)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                p.mul_(1 - lr * given.weight_decay)
                if given.optimizer == "sgd":
                    p.sub_(lr * g)
                    continue
                m.mul_(beta1).add_(g * (1 - beta1))
                v.mul_(beta2).add_(g * g * (1 - beta2))
                unbiased = (v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
                p.sub_(lr * m / (1 - beta1 ** (step + 1)) / unbiased)
    return parameters, losses


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"clip": 0.05, "warmup": 0.5, "schedule": "linear"},
        {"beta2_batch": 2, "beta2": 0.9, "weight_decay": 0.3, "epochs": 2},
        {"optimizer": "sgd", "lr": 0.5, "weight_decay": 0.1, "clip": 0.05},
        {"adapter": "full", "optimizer": "sgd", "lr": 0.5},
    ],
    ids=str,
)
def test_a_run_is_the_formulas(tiny_base, changed):
    given = config(tiny_base, **changed)
    prepared, course = _trained(given)
    expected, losses = _by_hand(given)
    assert course.train_loss == pytest.approx(losses, rel=1e-5)
    fresh = _weights(prepare(given, CPU))
    for mine, theirs, start in zip(prepared.trainable, expected, fresh, strict=True):
        moved = (theirs - start).norm()
        assert (mine - theirs).norm() < 2e-3 * moved + 1e-6, "weights"
    assert max((p - q).norm() for p, q in zip(prepared.trainable, fresh, strict=True)) > 1e-3


@pytest.mark.parametrize("size", [1, 3, 8, 99])
def test_micro_batches_add_up_to_the_whole_batch(tiny_base, size):
    given = config(tiny_base, optimizer="sgd", lr=1.0)
    whole, course = _trained(given)
    parts, in_parts = _trained(dataclasses.replace(given, micro_batch=size))
    assert in_parts.train_loss == pytest.approx(course.train_loss, rel=1e-6)
    for a, b in zip(whole.trainable, parts.trainable, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert (in_parts.examples, in_parts.tokens) == (course.examples, course.tokens)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(tiny_base):
    given = config(tiny_base, batch_size=30, lr=1e-9, n_train=30)
    prepared, course = _trained(given)
    rows = prepared.data.train
    assert course.train_loss == [pytest.approx(token_mean(prepared.item_losses(rows), rows), rel=1e-5)]
    assert course.tokens == sum(label != -100 for row in rows for label in row.labels)


def test_evaluation_leaves_the_training_alone(tiny_base):
    given = config(tiny_base, dropout=0.5)
    torch.manual_seed(0)
    rarely, _ = _trained(given)
    torch.manual_seed(0)
    often, course = _trained(dataclasses.replace(given, evals=4))
    assert len(course.evaluations) == 5
    assert all(torch.equal(a, b) for a, b in zip(rarely.trainable, often.trainable, strict=True))


def test_a_course_that_is_over_gets_no_step(tiny_base):
    given = config(tiny_base)
    prepared, course = prepare(given, CPU), Course(given)
    before = _weights(prepared)
    course.evaluated(math.nan)
    train(prepared, course)
    assert course.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, prepared.trainable, strict=True))


def test_a_base_in_bfloat16_trains_float32_adapters(tiny_base):
    prepared, course = _trained(config(tiny_base, dtype="bfloat16", epochs=3))
    assert {p.dtype for p in prepared.trainable} == {torch.float32}
    assert course.train_loss[-1] < course.train_loss[0]
    full, course = _trained(config(tiny_base, dtype="bfloat16", epochs=3, adapter="full"))
    assert course.train_loss[-1] < course.train_loss[0]


def test_an_optimizer_without_a_rule_is_named(tiny_base):
    given = config(tiny_base)
    object.__setattr__(given, "optimizer", "lion")
    with pytest.raises(ValueError, match="optimizer 'lion' has no rule"):
        optimizer_of([torch.nn.Parameter(torch.zeros(1))], given)
