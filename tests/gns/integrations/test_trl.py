"""`GNSCallback` in TRL's `SFTTrainer` and `DPOTrainer` at their defaults, against one pass per example."""

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaForSequenceClassification, PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from gns import GNSCallback, GNSMonitor
from gns.integrations.trl import doubts
from gns.monitor import GNSWarning
from gns.reasons import NO_TAP
from tests.gns import tiny
from tests.reference.per_example import contributions, joint, trainable

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")
SENTENCES = tiny.sentences(60, seed=4, longest=12)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def adapted(**options):
    """A LoRA model whose factor B is not zero, so that factor A has a gradient; equal calls, equal models."""
    model = tiny.lora(tiny.llama(), **options)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def text():
    return datasets.Dataset.from_dict({"text": SENTENCES[:40]})


def completions():
    return datasets.Dataset.from_dict(
        {"prompt": SENTENCES[:30], "completion": [" " + s for s in SENTENCES[30:60]]}
    )


def train(tmp_path, callbacks, **options):
    """Fine-tune, and give the trainer and the keyword arguments of the model's calls."""
    options = {"model": adapted(), "data": text(), "per_device_train_batch_size": 3, **options}
    return run(SFTTrainer, SFTConfig, tmp_path, callbacks, **options)


def run(kind, config, tmp_path, callbacks, *, data, model, peft_config=None, **options):
    arguments = config(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"bf16": False, "max_steps": 3, **options},
    )
    trainer = kind(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    seen = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            assert args == ()
            seen.append(dict(kwargs))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return trainer, seen


def examples(call):
    """The examples of one call, unpacked: one [1, T] pair of input ids and labels each."""
    ids, labels = call["input_ids"], call["labels"]
    if "cu_seq_lens_q" in call:
        ends = call["cu_seq_lens_q"].tolist()
        return [(ids[:, a:b], labels[:, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    lengths = call["attention_mask"].sum(1).tolist()
    return [(ids[i : i + 1, :t], labels[i : i + 1, :t]) for i, t in enumerate(lengths)]


def slow_twin(calls, model=None, left_out=()):
    """n, tokens, Σa², m and q of one optimizer step: its loss is a mean over all its tokens."""
    model = adapted() if model is None else model
    pairs = [pair for call in calls for pair in examples(call)]
    counts = torch.tensor([int(labels[:, 1:].ne(-100).sum()) for _, labels in pairs]).double()

    def loss(ids, labels):
        logits = model(input_ids=ids).logits[0, :-1]
        return cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100) / counts.sum()

    found = contributions(trainable(model), [lambda p=p: loss(*p) for p in pairs])
    names = [name for name in found[0] if name not in left_out]
    a = counts / counts.sum()
    return len(pairs), counts.sum().item(), a.square().sum().item(), *joint(found, names)


def check(step, expected, rel=1e-5):
    n, n_tokens, sum_sq_weights, m, q = expected
    assert step.reason is None and step.call_seen
    assert step.n_examples == n
    assert step.mean_sq_norm == pytest.approx(m, rel=rel)
    assert step.sq_norm_of_mean == pytest.approx(q, rel=rel)
    assert step.n_tokens == n_tokens
    assert step.sum_sq_weights == pytest.approx(sum_sq_weights, rel=1e-6)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


PACKED = {"packing": True, "max_length": 32, "per_device_train_batch_size": 2}
MODES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "completion only": {"data": completions()},
    "reentrant checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "no checkpointing": {"gradient_checkpointing": False},
    "wrapped": {**PACKED, "packing_strategy": "wrapped"},
    "packed": PACKED,
    "packed, accumulation": {**PACKED, "gradient_accumulation_steps": 2},
    "packed, split": {**PACKED, "packing_strategy": "bfd_split", "max_length": 16},
    "packed, completion only": {**PACKED, "data": completions(), "max_length": 48},
    "padding free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_readings_equal_one_pass_per_example_and_weights_stay_bit_identical(mode, tmp_path):
    callback = GNSCallback(on_error="raise")
    plain, calls = train(tmp_path, [], **mode)
    watched, _ = train(tmp_path, [callback], **mode)
    per_step = mode.get("gradient_accumulation_steps", 1)
    history = callback.monitor.history
    assert len(history) == 3 and len(calls) == 3 * per_step
    check(history[0], slow_twin(calls[:per_step]))
    if per_step > 1:  # else a mean over each call's own tokens could not be told from one over the step's
        totals = [
            sum(int(labels[:, 1:].ne(-100).sum()) for _, labels in examples(c)) for c in calls[:per_step]
        ]
        assert len(set(totals)) > 1
    assert not any(step.reason for step in history)
    assert same(weights(plain), weights(watched))
    assert not same(weights(watched), trainable(adapted()))
    assert callback.monitor.coverage().share == 1
    assert callback.monitor.coverage().verified == frozenset(callback.monitor.coverage().measured)
    if "packing" in mode or "padding_free" in mode:
        assert ("cu_seq_lens_q" in calls[0]) == (mode.get("packing_strategy") != "wrapped")


@pytest.mark.parametrize("packing", [False, True])
def test_at_its_own_defaults_the_weights_stay_bit_identical(packing, tmp_path):
    """bf16 autocast, checkpointing, fused AdamW, an adapter that the trainer adds itself."""
    options = {"bf16": None, "packing": packing, "max_length": 32} if packing else {"bf16": None}
    trained, callback = [], GNSCallback(on_error="raise")
    for callbacks in ([], [callback]):
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer, calls = train(tmp_path, callbacks, model=tiny.llama(), peft_config=config, **options)
        assert trainer.args.bf16 and trainer.args.gradient_checkpointing
        assert trainer.args.optim == "adamw_torch_fused" and calls[0]["fused_lm_head"]
        trained.append(weights(trainer))
    assert same(*trained)
    n = len(examples(calls[0]))
    assert n > 2 and callback.monitor.history[0].n_examples == n
    assert callback.monitor.coverage().share == 1
    assert any(key == "gns/trace_sigma" for log in trainer.state.log_history for key in log)


def test_a_trained_head_that_the_fused_loss_bypasses_is_left_out_and_the_rest_is_right(tmp_path):
    def model():
        return adapted(modules_to_save=["lm_head"])

    callback = GNSCallback(on_error="raise")
    plain, calls = train(tmp_path, [], model=model())
    with pytest.warns(GNSWarning, match="1 trainable parameter.* not measured: .*lm_head.*weight"):
        watched, _ = train(tmp_path, [callback], model=model())
    assert same(weights(plain), weights(watched))
    reasons = callback.monitor.coverage().reasons
    (head,) = reasons
    assert "lm_head" in head and reasons[head] == NO_TAP
    check(callback.monitor.history[0], slow_twin(calls[:1], model(), left_out=[head]))


def test_label_smoothing_is_said_to_be_outside_the_model(tmp_path):
    callback = GNSCallback(on_error="raise")
    options = {"label_smoothing_factor": 0.1, "data": text()}
    plain, calls = train(tmp_path, [], **options)
    cause = pytest.warns(GNSWarning, match="label smoothing: the loss is made outside the model")
    shown = pytest.warns(GNSWarning, match="with padding and without labels")
    with cause, shown as seen:
        watched, _ = train(tmp_path, [callback], **options)
    assert [w.category for w in seen].count(GNSWarning) == 2  # no third
    assert same(weights(plain), weights(watched))
    assert "labels" not in calls[0]
    assert [step.sum_sq_weights for step in callback.monitor.history] == [1 / 3] * 3


# preference pairs


def preferences():
    thirds = SENTENCES[:20], SENTENCES[20:40], SENTENCES[40:60]
    prompt, chosen, rejected = (list(third) for third in thirds)
    return datasets.Dataset.from_dict(
        {
            "prompt": prompt,
            "chosen": [" " + c for c in chosen],
            "rejected": [" " + r for r in rejected],
        }
    )


def dpo_loss(model, call, pair, pairs, beta=0.1):
    """One pair's part in the first mean over a call's pairs; its rows are `pair` and `pair + pairs`."""

    def log_probability(row):
        t = int(call["attention_mask"][row].sum())
        ids, labels = call["input_ids"][row : row + 1, :t], call["labels"][row, 1:t]
        logits = model(input_ids=ids).logits[0, :-1]
        return -cross_entropy(logits, labels, reduction="sum", ignore_index=-100)

    now = log_probability(pair) - log_probability(pair + pairs)
    before = now.detach()  # the trainer compares with the adapter as it was given
    return -torch.nn.functional.logsigmoid(beta * (now - before)) / pairs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_preference_pair_is_one_example(accumulate, tmp_path):
    options = {
        "data": preferences(),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulate,
    }
    callback = GNSCallback(on_error="raise")
    plain, calls = run(DPOTrainer, DPOConfig, tmp_path, [], model=adapted(), **options)
    watched, _ = run(DPOTrainer, DPOConfig, tmp_path, [callback], model=adapted(), **options)
    assert same(weights(plain), weights(watched))
    assert len(calls[0]["input_ids"]) == 8
    model = adapted()
    losses = [
        lambda call=call, i=i: dpo_loss(model, call, i, 4) / accumulate
        for call in calls[:accumulate]
        for i in range(4)
    ]
    n = 4 * accumulate
    n_tokens = sum(call["labels"].ne(-100).sum() for call in calls[:accumulate])
    check(callback.monitor.history[0], (n, n_tokens, 1 / n, *joint(contributions(trainable(model), losses))))


def reward_model():
    torch.manual_seed(0)
    config = tiny.llama().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def reward_loss(model, call, pair, pairs):
    rewards = []
    for row in (pair, pair + pairs):
        t = int(call["attention_mask"][row].sum())
        rewards.append(model(input_ids=call["input_ids"][row : row + 1, :t]).logits[0, 0])
    return -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]) / pairs


def test_a_reward_model_learns_from_pairs_too(tmp_path):
    options = {"data": preferences(), "per_device_train_batch_size": 4}
    callback = GNSCallback(on_error="raise")
    plain, calls = run(RewardTrainer, RewardConfig, tmp_path, [], model=reward_model(), **options)
    watched, _ = run(RewardTrainer, RewardConfig, tmp_path, [callback], model=reward_model(), **options)
    assert same(weights(plain), weights(watched))
    model = reward_model()
    losses = [lambda i=i: reward_loss(model, calls[0], i, 4) for i in range(4)]
    n_tokens = int(calls[0]["attention_mask"].sum())
    expected = (4, n_tokens, 1 / 4, *joint(contributions(trainable(model), losses)))
    check(callback.monitor.history[0], expected)
    assert callback.monitor.coverage().share == 1


def test_pairs_counted_as_rows_are_said_to_be(tmp_path):
    options = {"data": preferences(), "per_device_train_batch_size": 4}
    model = adapted()
    monitor = GNSMonitor(model, on_error="raise")
    with pytest.warns(GNSWarning, match="DPOConfig: two rows of each call are one preference pair"):
        run(DPOTrainer, DPOConfig, tmp_path, [GNSCallback(monitor)], model=model, **options)
    assert monitor.history[0].n_examples == 8


def test_other_trainers_of_trl_are_said_to_be_unknown(tmp_path):
    arguments = KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    monitor = GNSMonitor(torch.nn.Linear(2, 2))
    (text,) = doubts(arguments, monitor, {})
    assert text.startswith("KTOConfig: GNSCallback does not know what this trainer calls an example")
    assert doubts(arguments, monitor, {"weights": "equal"}) == []
    assert doubts(SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), monitor, {}) == []
