"""Any split of the same examples into micro-batches gives the same sums, whatever the loss divides by."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gns.monitor import GNSMonitor, GNSWarning
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close

VOCABULARY, WIDTH = 11, 5


class TinyForCausalLM(nn.Module):
    """A causal model with masked mixing over positions, which computes its token-mean loss itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, attention_mask, labels=None, num_items_in_batch=None):
        hidden = (self.mix(self.embed(input_ids)) * attention_mask[..., None]).cumsum(1).tanh()
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        items = (
            labels[:, 1:].ne(-100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        )
        return {"logits": logits, "loss": token_losses(logits, labels).sum() / items}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T − 1], 0 where there is no label."""
    return nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=-100, reduction="none")


@dataclass
class Case:
    """Examples and how they are split.

    Args:
        ids: [n, T].
        lengths: [n], tokens before the padding, 1 or more.
        masked: [n, T], tokens without a label.
        split: sizes of the micro-batches.
    """

    ids: Tensor
    lengths: Tensor
    masked: Tensor
    split: list[int]

    @property
    def inside(self) -> Tensor:
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    @property
    def labels(self) -> Tensor:
        return self.ids.masked_fill(~self.inside | self.masked, -100)

    @property
    def counts(self) -> Tensor:
        """[n], tokens with a label, as float64."""
        return self.labels[:, 1:].ne(-100).sum(1).double()

    def batches(self, *, trimmed: bool = True) -> list[dict[str, Tensor]]:
        """Give the micro-batches, each padded to its own longest row."""
        found = []
        for rows in torch.arange(len(self.ids)).split(self.split):
            t = int(self.lengths[rows].max()) if trimmed else self.ids.shape[1]
            names = {"input_ids": self.ids, "attention_mask": self.inside.long(), "labels": self.labels}
            found.append({name: value[rows, :t] for name, value in names.items()})
        return found


@st.composite
def cases(draw):
    n, t = draw(st.integers(2, 6)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    lengths = torch.tensor(draw(st.lists(st.integers(1, t), min_size=n, max_size=n)))
    masked = torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=n, max_size=n))
    )
    masked |= torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))[:, None]  # whole rows
    lengths[0], masked[0, 1] = t, False  # some row has a label
    cuts = sorted(draw(st.sets(st.integers(1, n - 1))))
    split = [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    return Case(torch.randint(0, VOCABULARY, (n, t), generator=generator), lengths, masked, split)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return TinyForCausalLM().double()


def step_of(model, losses, weights):
    """Run one optimizer step, a backward pass a loss; gives its record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GNSWarning)  # one row may have all the weight
        with GNSMonitor(model, weights=weights, on_error="raise") as monitor:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
            optimizer.zero_grad()
            for loss in losses:
                loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert monitor.coverage().share == 1
            return monitor.latest


def agree(step, case, model, scales, a):
    """Compare a step with one backward pass per example.

    Args:
        step: the record.
        case: its examples.
        model: the model.
        scales: [n], what each example's loss, summed over its tokens, is multiplied with in the step.
        a: [n], the examples' weights as Σaᵢ² must have them, unnormalised.
    """

    def one(i):
        out = model(case.ids[i : i + 1, : case.lengths[i]], torch.ones(1, int(case.lengths[i])))
        labels = case.labels[i : i + 1, : case.lengths[i]]
        return scales[i] * token_losses(out["logits"], labels).sum()

    twin = contributions(trainable(model), [lambda i=i: one(i) for i in range(len(case.ids))])
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(twin), what="(m, q)")
    s2 = float((a / a.sum()).square().sum())
    assert step.n_examples == len(case.ids)
    assert step.n_tokens == int(case.counts.sum())
    assert step.sum_sq_weights == pytest.approx(s2, rel=1e-6)
    if s2 < 1 - 1e-6:
        assert step.reason is None
        g = (step.sq_norm_of_mean - step.mean_sq_norm / step.n_examples) / (1 - s2)
        rounding = 1e-6 * step.sq_norm_of_mean / (1 - s2)  # Σa² is summed in float32
        assert step.grad_sq_norm == pytest.approx(g, rel=1e-6, abs=rounding)


@given(case=cases())
def test_token_mean_over_the_whole_step(model, case):
    """`num_items_in_batch`: every micro-batch divides by the tokens of the step."""
    total = case.labels[:, 1:].ne(-100).sum()
    losses = [lambda b=b: model(**b, num_items_in_batch=total)["loss"] for b in case.batches()]
    scales = torch.ones(len(case.ids)).double() / total
    agree(step_of(model, losses, "auto"), case, model, scales, case.counts)


@given(case=cases())
def test_token_mean_of_each_micro_batch(model, case):
    """Each micro-batch divides by its own tokens, and by the number of micro-batches."""
    k = len(case.split)
    losses = [lambda b=b: model(**b)["loss"] / k for b in case.batches()]
    per_call = torch.cat([c.sum().clamp(min=1).expand(len(c)) for c in case.counts.split(case.split)])
    agree(step_of(model, losses, "auto"), case, model, 1 / (k * per_call), case.counts / per_call)


@given(case=cases())
def test_sequence_mean(model, case):
    """Each example's loss is the mean over its own tokens, and the step's the mean over examples."""

    def loss(b):
        counts = b["labels"][:, 1:].ne(-100).sum(1).clamp(min=1)
        return (token_losses(model(**b)["logits"], b["labels"]).sum(1) / counts).sum() / n

    n = len(case.ids)
    scales = 1 / (n * case.counts.clamp(min=1))
    losses = [lambda b=b: loss(b) for b in case.batches()]
    agree(step_of(model, losses, "equal"), case, model, scales, torch.ones(n))


@given(case=cases())
def test_padding_to_a_common_length_changes_nothing(model, case):
    total = case.labels[:, 1:].ne(-100).sum()
    found = []
    for trimmed in (True, False):
        losses = [
            lambda b=b: model(**b, num_items_in_batch=total)["loss"] for b in case.batches(trimmed=trimmed)
        ]
        s = step_of(model, losses, "auto")
        found.append([s.mean_sq_norm, s.sq_norm_of_mean, s.n_examples, s.n_tokens, s.sum_sq_weights])
    close(*found)


def test_control_token_weights_are_wrong_for_a_sequence_mean(model):
    """What `weights="equal"` is for: labels do not say what a loss outside the model divides by."""
    ids = torch.arange(12).reshape(2, 6) % VOCABULARY
    case = Case(ids, torch.tensor([6, 2]), torch.zeros(2, 6, dtype=torch.bool), [2])
    scales = 1 / (2 * case.counts)

    def loss():
        (b,) = case.batches()
        return (token_losses(model(**b)["logits"], b["labels"]).sum(1) * scales).sum()

    agree(step_of(model, [loss], "equal"), case, model, scales, torch.ones(2))
    with pytest.raises(AssertionError):
        agree(step_of(model, [loss], "auto"), case, model, scales, torch.ones(2))
