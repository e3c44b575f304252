"""The readings of `GNSCallback` in `transformers.Trainer`, against one backward pass per example."""

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from gns import GNSCallback
from gns.finetuning.data import encode_texts
from gns.monitor import GNSWarning
from gns.reasons import LOSS_OUTSIDE, NO_CALL
from tests.gns import tiny
from tests.reference.per_example import contributions, joint, trainable

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")
STEPS = 4


@pytest.fixture(scope="module")
def rows():
    found = encode_texts(tiny.sentences(60), tiny.tokenizer(), max_length=32, source="here").rows
    return [row._asdict() for row in found]


def adapted():
    """A LoRA model whose factor B is not zero, so that factor A has a gradient; equal calls, equal models."""
    model = tiny.lora(tiny.llama())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def train(rows, tmp_path):
    """Train, and give the trainer and the keyword arguments of the model's calls in training."""

    def train(callbacks, *, compute_loss_func=None, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            **{"max_steps": STEPS, **options},
        )
        trainer = Trainer(
            adapted(),
            arguments,
            train_dataset=rows,
            eval_dataset=rows[:4],
            data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
            compute_loss_func=compute_loss_func,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        seen, true = [], trainer.compute_loss

        def note(model, inputs, *args, **kwargs):
            if model.training:
                seen.append(dict(inputs))
            return true(model, inputs, *args, **kwargs)

        trainer.compute_loss = note
        trainer.train()
        return trainer, seen

    return train


def token_losses(model, call, i, smoothing):
    """What each labelled token of row i adds to the loss, before the division by their number."""
    t = int(call["attention_mask"][i].sum())
    log_p = log_softmax(model(input_ids=call["input_ids"][i : i + 1, :t]).logits[0, :-1], -1)
    labels = call["labels"][i, 1:t]
    log_p, labels = log_p[labels != -100], labels[labels != -100]
    return -(1 - smoothing) * log_p.gather(1, labels[:, None])[:, 0] - smoothing * log_p.mean(1)


def slow_twin(calls, smoothing=0.0):
    """n, tokens, Σa², m and q of one optimizer step: its loss is a mean over all its tokens."""
    model = adapted()
    counts = torch.cat([c["labels"][:, 1:].ne(-100).sum(1) for c in calls]).double()
    losses = [
        lambda call=call, i=i: token_losses(model, call, i, smoothing).sum() / counts.sum()
        for call in calls
        for i in range(len(call["labels"]))
    ]
    a = counts / counts.sum()
    m, q = joint(contributions(trainable(model), losses))
    return len(losses), counts.sum().item(), a.square().sum().item(), m, q


def check_sums(step, expected, rel=1e-5):
    n, _, _, m, q = expected
    assert step.reason is None and step.n_examples == n
    assert step.mean_sq_norm == pytest.approx(m, rel=rel)
    assert step.sq_norm_of_mean == pytest.approx(q, rel=rel)


def check(step, expected, rel=1e-5):
    check_sums(step, expected, rel)
    _, n_tokens, sum_sq_weights, _, _ = expected
    assert step.n_tokens == n_tokens
    assert step.sum_sq_weights == pytest.approx(sum_sq_weights, rel=1e-6)


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def same(some, others):
    return all(torch.equal(p, q) for p, q in zip(some, others, strict=True))


SETUPS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.01},
    "grouped by length": {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16 autocast": {"bf16": True, "gradient_accumulation_steps": 2},
    "another optimizer": {"optim": "adafactor"},
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_readings_equal_one_pass_per_example_and_weights_stay_bit_identical(setup, train):
    callback = GNSCallback(on_error="raise")
    plain, calls = train([], **setup)
    watched, _ = train([callback], **setup)
    per_step = setup.get("gradient_accumulation_steps", 1)
    history = callback.monitor.history
    assert len(history) == STEPS and len(calls) == STEPS * per_step
    check(history[0], slow_twin(calls[:per_step]), rel=0.05 if "bf16" in setup else 1e-5)
    assert not any(step.reason for step in history)
    assert same(weights(plain), weights(watched))
    assert not same(weights(watched), [p for p in adapted().parameters() if p.requires_grad])
    assert callback.monitor.coverage().verified == frozenset(callback.monitor.coverage().measured)
    if per_step > 1:  # else a mean over each call's own tokens could not be told from one over the step's
        assert len({int(call["labels"][:, 1:].ne(-100).sum()) for call in calls[:per_step]}) > 1


def summed(outputs, labels, num_items_in_batch=None):
    return (
        torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        / num_items_in_batch
    )


@pytest.mark.parametrize(
    "outside", [{"label_smoothing_factor": 0.2}, {"compute_loss_func": summed}], ids=["smoothing", "own loss"]
)
def test_a_loss_outside_the_model_has_exact_sums_and_its_weights_are_said_to_be_unseen(outside, train):
    callback = GNSCallback(on_error="raise")
    plain, calls = train([], **outside)
    with pytest.warns(GNSWarning) as seen:
        watched, _ = train([callback], **outside)
    assert [str(w.message) for w in seen if w.category is GNSWarning] == [LOSS_OUTSIDE]
    smoothing = outside.get("label_smoothing_factor", 0.0)
    check_sums(callback.monitor.history[0], slow_twin(calls[:1], smoothing))
    assert same(weights(plain), weights(watched))
    assert [step.sum_sq_weights for step in callback.monitor.history] == [1 / 4] * STEPS


def test_equal_weights_asked_for_silence_the_warning(train):
    callback = GNSCallback(on_error="raise", weights="equal")
    train([callback], label_smoothing_factor=0.2)
    assert len(callback.monitor.history) == STEPS


@pytest.mark.slow
# the compiler instantiates autograd functions while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_has_exact_sums_and_says_that_it_shows_no_call(train):
    torch._dynamo.reset()
    callback = GNSCallback(on_error="raise")
    setup = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    plain, calls = train([], **setup)
    torch._dynamo.reset()
    with pytest.warns(GNSWarning) as seen:
        watched, _ = train([callback], **setup)
    assert [str(w.message) for w in seen if w.category is GNSWarning] == [NO_CALL]
    check_sums(callback.monitor.history[0], slow_twin(calls[:1]))
    assert same(weights(plain), weights(watched))
    assert not any(step.call_seen for step in callback.monitor.history)
