"""One part of the examples for H: its losses, shifted weights, and inner products of vectors."""

import numpy as np
import pytest
import torch
from torch import nn

from gns.curvature import vectors
from gns.curvature.parts import Point, label_kind
from gns.curvature.products import Exact, Forward
from gns.curvature.steps import Steps
from gns.curvature.vectors import along, dots, inner, norm
from gns.hessian import b_noise
from tests.gns.small_models import lora, tokens


@pytest.mark.parametrize("together", [1, 10, 10**6])
def test_inner_products_are_those_of_each_parameter(together, monkeypatch):
    monkeypatch.setattr(vectors, "TOGETHER", together)
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 2), "b": (), "c": (7,), "d": (2, 2)}
    kinds = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16, "d": torch.float32}
    stacked = {n: torch.randn(3, *s, generator=draw).to(kinds[n]) for n, s in shapes.items()}
    vector = {n: torch.randn(s, generator=draw).to(kinds[n]) for n, s in shapes.items()}
    expected = [
        [float((stacked[n][s].double() * vector[n].double()).sum()) for n in shapes] for s in range(3)
    ]
    np.testing.assert_allclose(along(stacked, vector), expected, rtol=1e-13)
    whole = np.sum(expected, 1)
    np.testing.assert_allclose(along(stacked, vector, whole=True), whole[:, None], rtol=1e-12)
    first = {n: x[0] for n, x in stacked.items()}
    assert inner(first, vector) == pytest.approx(whole[0], rel=1e-12)
    assert norm(vector) ** 2 == pytest.approx(inner(vector, dict(vector)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shifted_weights_are_rounded_once_and_put_back(dtype):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    point = Point(model, dict(model.named_parameters()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wide = torch.promote_types(dtype, torch.float32)
    vector = {n: torch.randn(p.shape, dtype=wide) for n, p in before.items()}
    with point.shifted(vector, 0.3):
        for n, p in model.named_parameters():
            assert torch.equal(p, torch.add(before[n].to(wide), vector[n], alpha=0.3).to(dtype))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class Off(nn.Module):
    """A language model whose loss is off the mean over its tokens by a factor."""

    def __init__(self):
        super().__init__()
        self.inner, self.factor, self.calls = lora("gpt2", torch.float64), 1.0, 0

    def forward(self, **batch):
        self.calls += 1
        out = self.inner(**batch)
        out.loss = out.loss * self.factor  # fails without labels
        return out


class OfLabels(nn.Module):
    """One whose input, or logits, are other ones with labels; "same": it is a plain language model.

    "ignored": it does not see what has no label.
    """

    def __init__(self, how):
        super().__init__()
        self.inner, self.how, self.labelled = lora("gpt2", torch.float64), how, 0

    def forward(self, input_ids, labels=None, **rest):
        self.labelled += labels is not None
        if self.how == "input" and labels is not None:
            input_ids = input_ids.roll(1, 1)
        if self.how == "ignored" and labels is not None:
            input_ids = input_ids.masked_fill(labels == -100, 0)
        out = self.inner(input_ids=input_ids, labels=labels, **rest)
        if self.how == "logits" and labels is None:
            out.logits = None
        return out


def test_losses_that_are_subtracted_are_added_up_in_one_way():
    model, batch = Off().eval(), tokens(4, t=11)
    point = Point(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    point.value(batch)
    assert point.adds_up()
    wide = point.last_value(wide=True)
    assert point.forward_value(batch, wide=True) == wide
    model.factor = 1.001  # as far off as the model's own loss may come to be after a step
    assert point.forward_value(batch, wide=True) == wide
    assert point.forward_value(batch, wide=False) == pytest.approx(1.001 * wide)
    assert not point.adds_up()


def test_the_loss_of_the_gradient_stands_for_one_without_a_graph():
    model, batch = Off().eval(), tokens(4, t=11)
    point = Point(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    steps, seen = Steps(point), []
    for _ in range(3):
        before = model.calls
        part = Forward(point, batch, steps)
        seen.append(model.calls - before)
        assert part.here == point.forward_value(batch, wide=True)
    assert steps.same_loss and seen == [3, 1, 1]  # once in vain, without labels


def test_vectors_asked_for_together_give_what_each_gives_alone():
    """The slope of the loss along each is taken for all of them at once."""
    model, batch = OfLabels("same").eval(), dict(tokens(4, t=11))
    point = Point(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    draw = torch.Generator().manual_seed(0)
    several = [
        {n: torch.randn(p.shape, generator=draw).to(p) for n, p in point.parameters.items()} for _ in "abc"
    ]
    part = Forward(point, batch, Steps(point))
    part.quadratics(several)  # finds the length of the step
    for one_sided in (True, False):
        part.steps.one_sided = one_sided
        together = part.quadratics(several)
        alone = np.concatenate([part.quadratics([v]) for v in several])
        np.testing.assert_allclose(together, alone, rtol=1e-12)
        assert len(np.unique(together)) == 3


@pytest.mark.parametrize(("how", "spared"), [("same", True), ("input", False), ("logits", False)])
@pytest.mark.parametrize("as_call", [False, True])
def test_labels_are_left_out_only_where_the_call_is_the_same_without(how, spared, as_call):
    """The model's own loss need not be made again: its logits are added up in float64 anyway."""
    model, batch = OfLabels(how).eval(), dict(tokens(4, t=11))
    given = ((batch.pop("input_ids"),), batch) if as_call else batch
    point = Point(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    generator = torch.Generator().manual_seed(0)
    vectors = [
        {n: torch.randn(p.shape, generator=generator).to(p) for n, p in point.parameters.items()}
        for _ in range(3)
    ]
    steps, plain = Steps(point), Steps(point)
    plain.bare = False
    part, known = Forward(point, given, steps), Forward(point, given, plain)
    assert steps.bare is spared and part.here == known.here
    expected = known.quadratics(vectors)
    model.labelled = 0
    np.testing.assert_array_equal(part.quadratics(vectors), expected)  # bit by bit
    assert (model.labelled == 1) is spared  # its own loss is looked at once after a step
    model.labelled = 0
    part.quadratics(vectors)
    assert (model.labelled == 0) is spared


def test_labels_that_show_something_new_are_not_left_out_untried():
    model = OfLabels("ignored").eval()
    ids = tokens(4, t=11)["input_ids"]
    prompts, row = ids.clone(), ids.clone()
    prompts[:, :4], row[1] = -100, -100
    point = Point(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    steps, asked, labelled = Steps(point), [], []
    for labels in (ids, ids, prompts):
        part = Forward(point, {"input_ids": ids, "labels": labels}, steps)
        asked.append(steps.bare)
        model.labelled = 0
        part.quadratics([{n: torch.ones_like(p) for n, p in point.parameters.items()}] * 3)
        labelled.append(model.labelled)
    assert asked == [True, True, False] and labelled[:2] == [1, 0] and labelled[2] > 1
    assert len({label_kind({"labels": labels}) for labels in (ids, prompts, row)}) == 3
    assert label_kind(([ids], {})) is None


class Smoothed(nn.Module):
    """One with label smoothing, to which all classes are about as likely."""

    def __init__(self, dtype):
        super().__init__()
        self.inner, self.smoothing = lora("gpt2", dtype), 0.3

    def forward(self, labels=None, **rest):
        out = self.inner(**rest)
        out.logits = 0.03 * out.logits
        if labels is not None:
            rows = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            out.loss = nn.functional.cross_entropy(*rows, label_smoothing=self.smoothing)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_loss_that_moves_otherwise_is_not_the_token_mean(dtype, smoothing):
    model, batch = Smoothed(dtype).eval(), tokens(4, t=11)
    model.smoothing = smoothing
    point = Point(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    generator = torch.Generator().manual_seed(0)
    signs = {
        n: torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
        for n, p in point.parameters.items()
    }
    exact, steps = Exact(point, batch), Steps(point)
    assert point.adds_up()  # here they are about the same
    part = Forward(point, batch, steps)
    part.quadratics([signs])
    assert steps.wide is (smoothing == 0) and part.here == point.forward_value(batch, wide=steps.wide)
    if smoothing and dtype is torch.float64:  # others are rounded, see `steps.error`
        expected = float(dots(signs, exact.product(signs)).sum())
        assert part.quadratics([signs])[0, 0] == pytest.approx(expected, rel=0.1)


def test_a_loss_of_the_users_own_keeps_its_labels():
    model, batch = OfLabels("same").eval(), dict(tokens(4, t=11))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    point = Point(model, parameters, loss=lambda model, batch: model(**batch).loss)
    assert point.bare_value(batch) is None and model.labelled == 0
    rest = {k: v for k, v in batch.items() if k != "labels"}
    assert Point(model, parameters).bare_value(rest) is None


def test_a_loss_that_is_another_with_a_graph_does_not_stand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = list(zip(torch.randn(9, 16, 5).double(), torch.randint(0, 3, (9, 16)), strict=True))

    def loss(model, batch):
        other = 1e-3 if torch.is_grad_enabled() else 0.0
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + other

    exact, found = (b_noise(model, batches, loss=loss, method=m) for m in ("exact", "forward"))
    assert found.trace_h_sigma == pytest.approx(exact.trace_h_sigma, rel=0.02)
