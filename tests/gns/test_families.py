"""LoRA on real model families against one forward and backward pass per example."""

import pytest
import torch

from gns.monitor import GNSMonitor
from tests.gns.small_models import FAMILIES, lora, tokens

# float64 and float32: these models take norms and losses in float32 whatever their dtype.
# bfloat16: every activation is rounded to 8 bits, differently in a batch of 1 and a batch of 5.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def per_example(model, batch):
    """[n, P]: gᵢ = n cᵢ for a token-mean loss, one example at a time, and the examples' weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    counts = batch["labels"][:, 1:].ne(-100).sum(1)
    n, rows = len(counts), []
    for i in range(n):
        one = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
        logits = model(**one).logits[0, :-1]
        logits = logits if logits.dtype is torch.float64 else logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits, batch["labels"][i, 1:], reduction="sum", ignore_index=-100
        )
        grads = torch.autograd.grad(n * loss / counts.sum(), parameters)
        rows.append(torch.cat([g.double().flatten() for g in grads]))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    factors = torch.cat(
        [
            torch.full((p.numel(),), ord("A" if "lora_A" in m else "B"))
            for m, p in zip(names, parameters, strict=True)
        ]
    )
    return torch.stack(rows), factors, (counts / counts.sum()).double()


def one_step(model, batch):
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**batch).loss.backward()
        optimizer.step()
        return monitor.latest, monitor.coverage()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_norms_equal_one_pass_per_example(family, dtype):
    model, batch = lora(family, dtype), tokens(5)
    rows, factors, weights = per_example(model, batch)
    step, coverage = one_step(model, batch)
    close = {"rel": TOLERANCE[dtype]}
    assert step.mean_sq_norm == pytest.approx(rows.square().sum(1).mean().item(), **close)
    assert step.sq_norm_of_mean == pytest.approx(rows.mean(0).square().sum().item(), **close)
    for factor in "AB":
        part = rows[:, factors == ord(factor)]
        assert step.groups[factor].mean_sq_norm == pytest.approx(part.square().sum(1).mean().item(), **close)
        assert step.groups[factor].sq_norm_of_mean == pytest.approx(
            part.mean(0).square().sum().item(), **close
        )
    assert step.n_examples == 5
    assert step.n_tokens == batch["labels"][:, 1:].ne(-100).sum()
    assert step.sum_sq_weights == pytest.approx(weights.square().sum().item(), rel=1e-6)
    assert coverage.share == 1 and coverage.verified == frozenset(coverage.measured)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_initialisation_only_factor_b_has_a_gradient(family):
    model = lora(family, warm=False)
    step, coverage = one_step(model, tokens(4))
    assert step.groups["A"].mean_sq_norm == step.groups["A"].sq_norm_of_mean == 0
    assert step.groups["B"].sq_norm_of_mean > 0
    assert all("lora_B" in name for name in coverage.verified) and coverage.share == 1


def test_token_weights_follow_the_loss_division():
    model = lora("llama")
    batches = [tokens(3, seed=1), tokens(5, seed=2)]
    counts = [b["labels"][:, 1:].ne(-100).sum(1).double() for b in batches]
    total = sum(c.sum() for c in counts)
    for whole_step, a in (
        (False, torch.cat([c / c.sum() / 2 for c in counts])),
        (True, torch.cat([c / total for c in counts])),
    ):
        with GNSMonitor(model, on_error="raise") as monitor:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
            for batch in batches:
                extra = {"num_items_in_batch": total} if whole_step else {}
                (model(**batch, **extra).loss / (1 if whole_step else 2)).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert monitor.latest.sum_sq_weights == pytest.approx(a.square().sum().item(), rel=1e-6)
            assert monitor.latest.n_examples == 8


def test_equal_weights_can_be_asked_for():
    model = lora("llama")
    with GNSMonitor(model, weights="equal", on_error="raise") as monitor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        model(**tokens(4)).loss.backward()
        optimizer.step()
        assert monitor.latest.sum_sq_weights == 0.25
        assert monitor.latest.n_tokens == tokens(4)["labels"][:, 1:].ne(-100).sum()


def test_any_split_into_micro_batches_gives_the_same_sums():
    batch = tokens(6)
    total = batch["labels"][:, 1:].ne(-100).sum()
    found = []
    for sizes in ([6], [1, 5], [2, 2, 2], [1] * 6):
        model = lora("llama", torch.float64)
        with GNSMonitor(model, on_error="raise") as monitor:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for part in zip(*(v.split(sizes) for v in batch.values()), strict=True):
                model(**dict(zip(batch, part, strict=True)), num_items_in_batch=total).loss.backward()
            optimizer.step()
            s = monitor.latest
        found.append((s.mean_sq_norm, s.sq_norm_of_mean, s.sum_sq_weights, s.n_examples, s.n_tokens))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
