"""A bare `accelerate` loop: the readings against one backward pass per example, the weights bit for bit."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradScalerKwargs
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from gns import GNSMonitor
from tests.gns.small_models import lora, tokens
from tests.reference.per_example import contributions, joint, trainable

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")
SIZES = (4, 3, 5, 2, 4)  # of the calls; the last optimizer step of the epoch is short


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its settings in the process."""

    def forget():
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield
    forget()


def batches():
    return [tokens(n, seed=n + 10 * i) for i, n in enumerate(SIZES)]


def train(*, accumulate=1, precision="no", clip=None, watch=True, epochs=2, device="cpu", checkpoint=False):
    """Train as the manual of accelerate does."""
    accelerator = Accelerator(
        cpu=device == "cpu",
        gradient_accumulation_steps=accumulate,
        mixed_precision=precision,
        kwargs_handlers=[GradScalerKwargs(init_scale=2.0**10)],  # low enough that no step overflows
    )
    model = lora("llama")
    if checkpoint:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, data, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(batches(), batch_size=None), scheduler
    )
    monitor = GNSMonitor(model, on_error="raise", scaler=accelerator.scaler)
    if watch:
        monitor.attach()
    for _ in range(epochs):
        for batch in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    monitor.detach()
    return monitor, [p.detach().clone() for p in model.parameters() if p.requires_grad]


def example_loss(model, call, i, share):
    """What row i adds to the loss: the sum over its tokens, times `share`."""
    device = next(model.parameters()).device
    t = int(call["attention_mask"][i].sum())
    ids, labels = call["input_ids"][i : i + 1, :t].to(device), call["labels"][i, 1:t].to(device)
    return share * cross_entropy(
        model(input_ids=ids).logits[0, :-1], labels, reduction="sum", ignore_index=-100
    )


def slow_twin(calls, accumulate, device="cpu"):
    """n, tokens, Σa², m and q of the first step: a mean over each call's own tokens, divided by the calls."""
    model = lora("llama").to(device)
    losses, weights, n_tokens = [], [], 0
    for call in calls:
        counts = call["labels"][:, 1:].ne(-100).sum(1).double()
        total = counts.sum().item()
        weights.append(counts / total / len(calls))
        n_tokens += total
        losses += [
            lambda call=call, i=i, share=1 / (total * accumulate): example_loss(model, call, i, share)
            for i in range(len(counts))
        ]
    m, q = joint(contributions(trainable(model), losses))
    return len(losses), n_tokens, torch.cat(weights).square().sum().item(), m, q


SETUPS = {
    "plain": ({}, [4, 3, 5, 2, 4]),
    "accumulation": ({"accumulate": 2}, [7, 7, 4]),
    "accumulation and clipping": ({"accumulate": 2, "clip": 0.01}, [7, 7, 4]),
    "checkpointing": ({"checkpoint": True, "accumulate": 3}, [12, 6]),
    "bf16": ({"precision": "bf16", "accumulate": 2, "clip": 0.01}, [7, 7, 4]),
}


def check(setup, counts, device="cpu", rel=1e-5):
    _, plain = train(**setup, watch=False, device=device)
    monitor, watched = train(**setup, device=device)
    assert all(torch.equal(p, q) for p, q in zip(plain, watched, strict=True))
    assert [step.n_examples for step in monitor.history] == counts * 2
    assert not any(step.reason or step.loss_scaled for step in monitor.history)
    accumulate = setup.get("accumulate", 1)
    n, n_tokens, sum_sq_weights, m, q = slow_twin(batches()[:accumulate], accumulate, device)
    step = monitor.history[0]
    assert (step.n_examples, step.n_tokens) == (n, n_tokens)
    assert step.sum_sq_weights == pytest.approx(sum_sq_weights, rel=1e-6)
    assert step.mean_sq_norm == pytest.approx(m, rel=rel)
    assert step.sq_norm_of_mean == pytest.approx(q, rel=rel)
    assert monitor.coverage().verified == frozenset(monitor.coverage().measured)


@pytest.mark.parametrize("setup, counts", SETUPS.values(), ids=SETUPS)
def test_readings_equal_one_pass_per_example_and_weights_stay_bit_identical(setup, counts):
    check(setup, counts, rel=0.05 if "precision" in setup else 1e-5)


@pytest.mark.gpu
def test_fp16_with_the_scaler_of_the_accelerator():
    setup = {"precision": "fp16", "accumulate": 2, "clip": 0.01}
    check(setup, [7, 7, 4], device="cuda", rel=0.02)
