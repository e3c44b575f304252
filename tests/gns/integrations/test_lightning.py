"""`LightningGNSCallback` against one backward pass per example, in every way that Lightning runs a step."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gns import GNSMonitor
from gns.integrations.lightning import LightningGNSCallback
from gns.integrations.shared import LOGGED
from gns.monitor import GNSWarning
from tests.gns.small_models import lora, tokens
from tests.reference.per_example import contributions, joint, trainable

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
ROWS = 22  # batches of 4 and a last one of 2


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3))


def each_loss(model, x, y):
    return (model(x) - y).square().mean(1)


class Plain(pl.LightningModule):
    """Calls `self.model(x)`; has no forward of its own."""

    def __init__(self, make=torch.optim.SGD):
        super().__init__()
        self.model, self.make = net(), make

    def training_step(self, batch, batch_idx):
        return each_loss(self.model, *batch).mean()

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=0.1)


class Forward(Plain):
    """Calls `self(x)`."""

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return each_loss(self, *batch).mean()


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(each_loss(self.model, *batch).mean())
        self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 6, generator=generator, dtype=dtype)
    y = 2 + torch.randn(ROWS, 3, generator=generator, dtype=dtype)  # away from 0: a clear gradient
    return TensorDataset(x, y)


def loader(dtype=torch.float32):
    return DataLoader(batches(dtype), batch_size=4)


def trainer(callbacks, tmp_path, **options):
    options = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, **options}
    return pl.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def slow_twin(model, *, epochs=2, accumulate=1, clip=None, dtype=torch.float32):
    """n, m and q of each step, and the weights that plain gradient descent on the sums ends with."""
    model, out = model.to(dtype), []
    parameters = trainable(model)
    for _ in range(epochs):
        losses, whole = [], list(loader(dtype))
        for i, (x, y) in enumerate(whole):
            share = 1 / (len(x) * accumulate)
            losses += [
                lambda a=x[j : j + 1], b=y[j : j + 1], share=share: each_loss(model, a, b).sum() * share
                for j in range(len(x))
            ]
            if (i + 1) % accumulate and i + 1 < len(whole):
                continue
            found = contributions(parameters, losses)
            out.append((len(losses), *joint(found)))
            size = sum(sum(c[name] for c in found).square().sum() for name in parameters).sqrt()
            factor = 1 if clip is None else min(1, clip / (size + 1e-6))
            with torch.no_grad():
                for name, p in parameters.items():
                    p -= 0.1 * factor * sum(c[name] for c in found).to(p.dtype)
            losses = []
    return out


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(name, kind) for name, m in model.named_modules() for kind in kinds if getattr(m, kind)]


def check(monitor, expected, rel=1e-5):
    steps = monitor.history
    assert not any(s.reason for s in steps) and all(s.call_seen for s in steps)
    assert [s.n_examples for s in steps] == [n for n, _, _ in expected]
    for step, (_, m, q) in zip(steps, expected, strict=True):
        assert step.mean_sq_norm == pytest.approx(m, rel=rel)
        assert step.sq_norm_of_mean == pytest.approx(q, rel=rel)


SETUPS = {
    "self.model(x)": (Plain, {}, {}),
    "self(x)": (Forward, {}, {}),
    "accumulation": (Plain, {"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "clipping": (Plain, {"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "accumulation and clipping": (
        Forward,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        {"accumulate": 2, "clip": 0.05},
    ),
    "manual optimisation": (Manual, {}, {"clip": 0.05}),
    "float64": (Plain, {"precision": "64-true"}, {"dtype": torch.float64}),
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_readings_equal_one_pass_per_example_and_weights_stay_bit_identical(setup, tmp_path):
    kind, options, twin = setup
    dtype = twin.get("dtype", torch.float32)
    plain, watched, callback = kind(), kind(), LightningGNSCallback(on_error="raise")
    trainer([], tmp_path, **options).fit(plain, loader(dtype))
    trainer([callback], tmp_path, **options).fit(watched, loader(dtype))
    check(callback.monitor, slow_twin(net(), **twin), rel=1e-12 if dtype is torch.float64 else 1e-5)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    untrained = net().to(dtype).parameters()
    assert not any(torch.equal(p, q) for p, q in zip(untrained, watched.model.parameters(), strict=True))
    assert hooks(watched) == [] and not callback.monitor.attached
    assert callback.monitor.coverage().share == 1
    assert callback.monitor.latest.learning_rate == 0.1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_is_bit_identical_and_close(precision, tmp_path):
    plain, watched, callback = Plain(), Plain(), LightningGNSCallback(on_error="raise")
    trainer([], tmp_path, precision=precision).fit(plain, loader())
    trainer([callback], tmp_path, precision=precision).fit(watched, loader())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    check(callback.monitor, slow_twin(net()), rel=0.05)  # every activation is rounded to 8 bits


class Overflow(Plain):
    """The third batch's loss is beyond fp16."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e30 if batch_idx == 2 else loss


def test_fp16_takes_the_scaler_of_the_precision_plugin_and_leaves_overflow_out(tmp_path):
    trained = []
    for callbacks in ([], [LightningGNSCallback(on_error="raise")]):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model = Overflow()
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer(callbacks, tmp_path, plugins=[plugin], max_epochs=1).fit(model, loader())
        trained.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))
    monitor = callbacks[0].monitor
    assert monitor.scaler is scaler and scaler.get_scale() == 2.0**9
    assert [s.n_examples for s in monitor.history] == [4, 4, 4, 4, 2]  # five of six batches
    assert not any(s.loss_scaled or s.reason for s in monitor.history)
    expected = slow_twin(net(), epochs=1)[:2]
    for step, (_, m, q) in zip(monitor.history, expected, strict=False):
        assert step.mean_sq_norm == pytest.approx(m, rel=0.01)
        assert step.sq_norm_of_mean == pytest.approx(q, rel=0.01)


def test_lbfgs_is_refused_with_its_reason(tmp_path):
    callback = LightningGNSCallback(on_error="raise")
    with pytest.warns(GNSWarning, match="the closure took 20 gradients for one step"):
        trainer([callback], tmp_path, max_epochs=1).fit(Plain(torch.optim.LBFGS), loader())
    assert all(s.reason for s in callback.monitor.history)
    assert callback.monitor.estimate().status == "collecting"


# the compiler instantiates autograd functions while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("what", ["the part that is called", "the whole"])
def test_a_compiled_model_has_exact_sums(what, tmp_path):
    trained, callback = [], LightningGNSCallback(on_error="raise")
    for callbacks in ([], [callback]):
        torch._dynamo.reset()
        model = Plain()
        if what == "the whole":
            compiled = torch.compile(model, backend="aot_eager")
        else:
            model.model, compiled = torch.compile(model.model, backend="aot_eager"), model
        run = trainer(callbacks, tmp_path, max_epochs=1)
        if callbacks and what == "the whole":
            with pytest.warns(GNSWarning, match="the model's own call was not seen"):
                run.fit(compiled, loader())
        else:
            run.fit(compiled, loader())
        trained.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))
    expected = slow_twin(net(), epochs=1)
    for step, (n, m, q) in zip(callback.monitor.history, expected, strict=True):
        assert (step.n_examples, step.reason) == (n, None)
        assert step.mean_sq_norm == pytest.approx(m, rel=1e-5)
        assert step.sq_norm_of_mean == pytest.approx(q, rel=1e-5)
        assert step.call_seen == (what != "the whole")


# which module is the one that is called


class Adversarial(pl.LightningModule):
    """Two optimizers, each with its part; the critic sees real and generated rows."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.generator = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def critic_losses(self, x, y):
        return torch.cat([self.critic(y)[:, 0], -self.critic(self.generator(x).detach())[:, 0]])

    def generator_losses(self, x):
        return self.critic(self.generator(x))[:, 0]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.critic_losses(*batch).mean())
        first.step()
        second.zero_grad()
        self.manual_backward(self.generator_losses(batch[0]).mean())
        second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.critic, self.generator)]


def adversarial_twin(model):
    out = {"critic": [], "generator": []}
    for x, y in loader():
        for name, losses in (
            ("critic", lambda x=x, y=y: model.critic_losses(x, y)),
            ("generator", lambda x=x: model.generator_losses(x)),
        ):
            parameters, n = trainable(getattr(model, name)), len(losses())
            found = contributions(parameters, [lambda i=i, f=losses, n=n: f()[i] / n for i in range(n)])
            out[name].append((n, *joint(found)))
            with torch.no_grad():
                for key, p in parameters.items():
                    p -= 0.1 * sum(c[key] for c in found).float()
    return out


def test_two_optimizers_each_with_a_callback_of_its_own(tmp_path):
    plain, watched = Adversarial(), Adversarial()
    callbacks = [
        LightningGNSCallback(module="generator", on_error="raise"),
        LightningGNSCallback(module="critic", on_error="raise"),
    ]
    trainer([], tmp_path, max_epochs=1).fit(plain, loader())
    trainer(callbacks, tmp_path, max_epochs=1).fit(watched, loader())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    expected = adversarial_twin(Adversarial())
    for callback in callbacks:
        check(callback.monitor, expected[callback.module])


class Misleading(Forward):
    """Has a forward, and trains without it."""

    def training_step(self, batch, batch_idx):
        return each_loss(self.model, *batch).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_module_that_was_not_expected_is_measured_from_the_next_step_on(accumulate, tmp_path):
    plain, watched, callback = Misleading(), Misleading(), LightningGNSCallback(on_error="raise")
    options = {"accumulate_grad_batches": accumulate}
    trainer([], tmp_path, **options).fit(plain, loader())
    trainer([callback], tmp_path, **options).fit(watched, loader())
    assert callback.monitor.model is watched.model
    assert callback.monitor.history[0].step == 1
    check(callback.monitor, slow_twin(net(), accumulate=accumulate)[1:])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))


class InPieces(Plain):
    """Calls two modules one after the other; none holds all that trains."""

    def __init__(self):
        super().__init__()
        self.model, self.head = self.model[:3], self.model[3]

    def training_step(self, batch, batch_idx):
        return each_loss(lambda x: self.head(self.model(x)), *batch).mean()


def test_modules_called_one_after_the_other_are_said_to_be_counted_by_rows(tmp_path):
    model, callback = InPieces(), LightningGNSCallback(on_error="raise")
    with pytest.warns(GNSWarning) as seen:
        trainer([callback], tmp_path, max_epochs=1).fit(model, loader())
    texts = [str(w.message) for w in seen if w.category is GNSWarning]
    assert len(texts) == 2  # the second is the monitor's own, that the model's call was not seen
    assert "calls `model` first, which does not hold all that trains (e.g. not `head.weight`)" in texts[0]
    assert not any(s.call_seen for s in callback.monitor.history)
    for step, (n, m, q) in zip(callback.monitor.history, slow_twin(net(), epochs=1), strict=True):
        assert (step.n_examples, step.mean_sq_norm) == (n, pytest.approx(m, rel=1e-5))
        assert step.sq_norm_of_mean == pytest.approx(q, rel=1e-5)


class Functional(Plain):
    """Uses the weights without calling their layers."""

    def training_step(self, batch, batch_idx):
        first, last = self.model[0], self.model[3]

        def call(x):
            hidden = nn.functional.linear(x, first.weight, first.bias).tanh()
            return nn.functional.linear(hidden, last.weight, last.bias)

        return each_loss(call, *batch).mean()


def test_a_training_in_which_nothing_was_seen_is_said_to_be_one(tmp_path):
    callback = LightningGNSCallback(on_error="raise")
    with pytest.warns(GNSWarning, match="the optimizer stepped, but no backward pass through the measured"):
        trainer([callback], tmp_path, max_epochs=1).fit(Functional(), loader())
    assert not any(step.usable for step in callback.monitor.history)


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="GNSMonitor has no evry; it has every, history"):
        LightningGNSCallback(evry=2)
    with pytest.raises(TypeError, match="module is a Linear; its name in the LightningModule is needed"):
        LightningGNSCallback(module=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got a GNSMonitor and module"):
        LightningGNSCallback(GNSMonitor(nn.Linear(2, 2)), module="model")
    with pytest.raises(ValueError, match="Plain has no module 'generator'; its children: model"):
        trainer([LightningGNSCallback(module="generator")], tmp_path).fit(Plain(), loader())
    with pytest.raises(ValueError, match="belongs to another model than the Trainer trains"):
        trainer([LightningGNSCallback(GNSMonitor(nn.Linear(2, 2)))], tmp_path).fit(Plain(), loader())


def test_a_monitor_of_ones_own(tmp_path):
    model = Plain()
    with GNSMonitor(model.model) as monitor:
        trainer([LightningGNSCallback(monitor)], tmp_path).fit(model, loader())
        assert monitor.attached  # who attached it detaches it
    assert len(monitor.history) == 12


class Language(pl.LightningModule):
    """A LoRA fine-tune: the model computes a token-mean loss of the labels that it is given."""

    def __init__(self):
        super().__init__()
        self.lm = lora("llama")

    def training_step(self, batch, batch_idx):
        return self.lm(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, fused=True)


def test_a_language_model_is_read_with_its_tokens(tmp_path):
    model, callback = Language(), LightningGNSCallback(on_error="raise")
    batch = tokens(5)
    trainer([callback], tmp_path, max_steps=1).fit(model, DataLoader([batch], batch_size=None))
    twin, counts = lora("llama"), batch["labels"][:, 1:].ne(-100).sum(1)
    losses = [
        lambda i=i: (
            twin(**{k: v[i : i + 1] for k, v in batch.items()}).loss * counts[i] / counts.sum()
            if counts[i]
            else twin(input_ids=batch["input_ids"][i : i + 1]).logits.sum() * 0
        )
        for i in range(5)
    ]
    check(callback.monitor, [(5, *joint(contributions(trainable(twin), losses)))])
    step = callback.monitor.latest
    assert step.n_tokens == counts.sum()
    a = counts.double() / counts.sum()
    assert step.sum_sq_weights == pytest.approx(a.square().sum().item(), rel=1e-6)


# what is logged and kept


class Slow(Plain):
    """Stays where the gradient is far from zero."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-5)


def test_readings_reach_the_loggers(tmp_path):
    logger, callback = pl.loggers.CSVLogger(tmp_path), LightningGNSCallback(on_error="raise")
    run = trainer([callback], tmp_path, logger=logger, max_epochs=5)
    run.fit(Slow(), loader())
    rows = [row.split(",") for row in (tmp_path / logger.log_dir / "metrics.csv").read_text().splitlines()]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert set(LOGGED) <= set(rows[0])
    now, seen = callback.monitor.estimate(), callback.monitor.live()
    last = replace(now, low=seen.low, high=seen.high)  # the interval of the last look
    for key, name in LOGGED.items():
        assert float(run.callback_metrics[key]) == pytest.approx(getattr(last, name), rel=1e-6)
        assert float(table[-1][key]) == pytest.approx(getattr(last, name), rel=1e-6)
    assert [row["gns/trace_sigma"] != "" for row in table] == [True] * len(table)
    assert len(table) == 5 * 6


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val", each_loss(self.model, *batch).mean())


def test_validation_and_the_sanity_check_do_not_count(tmp_path):
    callback = LightningGNSCallback(on_error="raise")
    run = trainer([callback], tmp_path, num_sanity_val_steps=2, val_check_interval=2)
    run.fit(Validated(), loader(), loader())
    check(callback.monitor, slow_twin(net()))


class Bomb(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("out of luck")


def figures(monitor):
    return [
        (s.step, s.n_examples, s.mean_sq_norm, s.sq_norm_of_mean, s.rows.tobytes()) for s in monitor.history
    ]


def test_after_an_exception_nothing_is_left(tmp_path):
    model, callback = Plain(), LightningGNSCallback()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer([callback, Bomb(3)], tmp_path).fit(model, loader())
    assert hooks(model) == [] and not callback.monitor.attached and len(callback.monitor.history) == 3


@pytest.mark.parametrize("kind", [Plain, Misleading])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_resumed_training_goes_on_with_its_readings(kind, tmp_path):
    whole = LightningGNSCallback()
    trainer([whole], tmp_path).fit(kind(), loader())
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    broken = [LightningGNSCallback(), keep, Bomb(8)]
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(broken, tmp_path, enable_checkpointing=True).fit(kind(), loader())
    resumed = LightningGNSCallback()
    trainer([resumed], tmp_path).fit(kind(), loader(), ckpt_path=tmp_path / "step=6.ckpt")
    expected = figures(whole.monitor)
    if kind is Misleading:  # the first batch of each training shows what is called
        expected = [f for f in expected if f[0] != 6]
    assert figures(resumed.monitor) == expected and len(expected) > 9


def test_a_checkpoint_without_readings_still_gives_the_step_numbers(tmp_path):
    run = trainer([], tmp_path, max_epochs=1)
    run.fit(Plain(), loader())
    run.save_checkpoint(tmp_path / "bare.ckpt")
    callback = LightningGNSCallback()
    trainer([callback], tmp_path).fit(Plain(), loader(), ckpt_path=tmp_path / "bare.ckpt")
    assert [s.step for s in callback.monitor.history] == [6, 7, 8, 9, 10, 11]


def test_a_second_fit_goes_on(tmp_path):
    callback, model = LightningGNSCallback(), Plain()
    for _ in range(2):
        trainer([callback], tmp_path, max_epochs=1).fit(model, loader())
    check(callback.monitor, slow_twin(net()))
    assert [s.step for s in callback.monitor.history] == list(range(12))


# which package


def reimported(monkeypatch):
    monkeypatch.delitem(sys.modules, "gns.integrations.lightning")
    return importlib.import_module("gns.integrations.lightning")


def test_without_lightning_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] in ("lightning", "pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("lightning", "pytorch_lightning"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"pip install 'gradient-noise-scale\[lightning\]'"):
        reimported(monkeypatch)


def test_the_package_that_the_user_imported_is_taken(monkeypatch):
    class Other(pl.Callback):
        pass

    assert not issubclass(reimported(monkeypatch).LightningGNSCallback, Other)
    unified = ModuleType("lightning.pytorch")
    unified.Callback = Other
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", unified)
    assert issubclass(reimported(monkeypatch).LightningGNSCallback, Other)
