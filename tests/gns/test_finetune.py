import json
import math
import signal
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gns import load
from gns.advising.capacity import read_layers
from gns.finetune import RunResult, Watcher, dropout_of, first_epoch, mean_loss, run
from gns.finetuning.data import Collator
from gns.finetuning.preparation import ConfigError, FinetuneConfig, prepare
from gns.finetuning.runfolder import read_config
from gns.finetuning.sources import DataError
from tests.gns import tiny

STEPS = 8
pytestmark = pytest.mark.usefixtures(
    "undrawn"
)  # but for `whole`, which is made before it: figures take seconds


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "llama")
    tiny.save_model(folder / "gpt2", tiny.gpt2())
    tiny.save_jsonl(folder / "data.jsonl", [{"text": text} for text in tiny.sentences(50)])
    return folder


@pytest.fixture
def config(home):
    return FinetuneConfig(
        str(home / "llama"),
        str(home / "data.jsonl"),
        rank=4,
        batch_size=4,
        steps=STEPS,
        max_length=32,
        lr=1e-2,
    )


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> tuple[Path, RunResult]:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = FinetuneConfig(
        str(home / "llama"),
        str(home / "data.jsonl"),
        rank=4,
        batch_size=4,
        steps=STEPS,
        max_length=32,
        lr=1e-2,
        schedule="cosine",
        save_every=3,
    )
    return out, run(config, out)


def records(folder):
    return [(repr(replace(s, rows=None, layout=None)), s.rows.tobytes()) for s in load(folder).history]


# a whole run


def test_a_run_learns_measures_and_leaves_everything(whole):
    out, result = whole
    assert not result.interrupted and result.steps_made == result.n_steps == STEPS
    assert [step.step for step in result.estimate.history] == list(range(STEPS))
    assert result.loss_after < result.loss_before
    assert [step.step for step in load(out).history] == list(range(STEPS))
    assert {step.n_examples for step in load(out).history} == {4}
    assert load(out).coverage == 1.0
    assert {path.name for path in out.iterdir()} >= {"run.json", "steps.jsonl", "summary.json", "report.html"}
    assert {path.name for path in out.iterdir()} >= {"adapter", "checkpoints"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["batch_size"], summary["settings"]["dataset_size"]) == (4, 45)
    assert summary["settings"]["learning_rate"] == 1e-2
    known = {"max_grad_norm": 1.0, "dropout": 0.0, "precision": "float32 base, float32 adapters"}
    known |= {"steps_planned": STEPS, "seed": 0}
    assert summary["settings"].items() >= known.items()
    assert summary["settings"]["optimizer"].startswith("adamw")
    assert {"python", "torch", "transformers", "peft"} <= set(summary["settings"]["versions"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "gradient norm to 1; measured before it" in page


def settings(folder):
    return json.loads((folder / "summary.json").read_text())["settings"]


def test_what_the_capacity_check_needs_is_recorded(config, tmp_path):
    """45 examples at 9 a step: an epoch is 5 steps, and of 7 the first 5 count."""
    losses = {}

    class Listener(Watcher):
        def step(self, progress):
            losses[progress.step] = progress.loss

    for steps, counted, share in ((2, 2, 0.4), (7, 5, 1.0)):
        known = settings(
            run(replace(config, batch_size=9, steps=steps), tmp_path / str(steps), watcher=Listener()).out
        )
        mean = sum(losses[step] for step in range(1, counted + 1)) / counted
        assert known["first_epoch_loss"] == pytest.approx(mean)
        assert known["first_epoch_share"] == pytest.approx(share, abs=0.01)
    rows = prepare(config).train
    tokens = sum(int((Collator(1)([row])["labels"][:, 1:] != -100).sum()) for row in rows)
    assert known["loss_tokens"] == tokens == sum(len(row.labels) - 1 for row in rows)
    layers = read_layers(known["adapted_layers"])
    trained = sum(a.count * a.rank * (a.in_features + a.out_features) for a in layers)
    assert trained == known["trainable_parameters"]


def test_the_first_epoch_of_odd_logs():
    assert first_epoch([]) == {"first_epoch_loss": None, "first_epoch_share": 0.0}
    logs = [{"loss": 3.0, "epoch": 0.5}, {"eval_loss": 9.0, "epoch": 0.5}, {"loss": 2.0, "epoch": 1.0}]
    logs += [{"loss": 0.1, "epoch": 1.5}, {"train_runtime": 3.0, "epoch": 1.5}]
    assert first_epoch(logs) == {"first_epoch_loss": 2.5, "first_epoch_share": 1.0}
    assert first_epoch([{"loss": math.nan, "epoch": 0.5}])["first_epoch_loss"] is None


def test_the_adapter_is_saved_as_trained(whole, config):
    out, result = whole
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 14 and any("lora_B" in name and tensor.any() for name, tensor in saved.items())
    with warnings.catch_warnings():  # peft asks transformers for the old name of a property
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), out / "adapter")
    prepared = prepare(config)
    loss = mean_loss(model, prepared.held_out, Collator(1), 4)
    assert loss == pytest.approx(result.loss_after, rel=1e-6)
    assert AutoTokenizer.from_pretrained(out / "adapter").eos_token == "<eos>"


def test_the_readings_are_those_of_the_run_itself(whole, config, tmp_path):
    """The same run once more, with other batches of the same examples, gives the same records."""
    again = run(replace(config, schedule="cosine", save_every=3), tmp_path / "again")
    assert records(tmp_path / "again") == records(whole[0])
    assert again.loss_after == whole[1].loss_after


def test_a_run_is_measured_in_adams_metric_on_request(whole, config, tmp_path):
    out = tmp_path / "run"
    result = run(replace(config, schedule="cosine", save_every=3, metric="adam"), out)
    steps = result.estimate.history
    assert {step.metric for step in steps} == {"adam"} and result.estimate.metric == "adam"
    assert [step.usable for step in steps] == [False] + [True] * (STEPS - 1)  # no second moments yet
    assert result.loss_after == whole[1].loss_after  # training is the same run
    assert "metric</dt><dd>adam</dd>" in (out / "report.html").read_text(encoding="utf-8")


def test_a_watcher_hears_every_step(config, tmp_path):
    heard = []

    class Listener(Watcher):
        def remark(self, line):
            heard.append(line)

        def step(self, progress):
            heard.append((progress.step, progress.n_steps, progress.estimate.n_steps))

    run(replace(config, steps=3), tmp_path / "run", watcher=Listener())
    assert heard == ["3 measured steps: fewer than the 20 an estimate needs", (1, 3, 1), (2, 3, 2), (3, 3, 3)]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "gpt2", "grad_accum": 2, "steps": 2},
        {"dtype": "bfloat16", "steps": 2},
        {"target_modules": ("q_proj", "down_proj"), "steps": 2},
        {"every": 2, "steps": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_variants(config, home, tmp_path, change):
    change = {**change, **({"model": str(home / change["model"])} if "model" in change else {})}
    config = replace(config, **change)
    result = run(config, tmp_path / "run")
    steps = load(tmp_path / "run").history
    assert [step.step for step in steps] == list(range(0, config.steps, config.every))
    assert all(step.finite and step.n_examples == config.examples_per_step for step in steps)
    if "target_modules" in change:
        assert {name.split(".")[-4] for name in steps[0].layout.names} == {"q_proj", "down_proj"}
    assert result.loss_after is not None


def test_epochs_become_steps(config):
    assert prepare(replace(config, steps=None)).n_steps == 12  # 45 examples, ⌈45 / 4⌉ batches
    assert prepare(replace(config, steps=None, epochs=2)).n_steps == 24
    assert prepare(replace(config, steps=None, grad_accum=5)).n_steps == 3
    assert prepare(replace(config, steps=5)).n_steps == 5


# interrupts and resumes


class Interrupts(Watcher):
    """Sends Ctrl-C, as a user would, or a second one at once."""

    def __init__(self, at, twice=False):
        self.at, self.twice = at, twice

    def step(self, progress):
        if progress.step == self.at:
            signal.raise_signal(signal.SIGINT)
            if self.twice:
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("twice", [False, True], ids=["at the end of a step", "at once"])
def test_an_interrupted_run_reports_and_resumes_as_if_nothing_had_happened(whole, config, tmp_path, twice):
    config = replace(config, schedule="cosine", save_every=3)
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    first = run(config, out, watcher=Interrupts(5, twice))
    assert signal.getsignal(signal.SIGINT) is before
    made = 5 if twice else 6
    assert first.interrupted and first.steps_made == made and first.loss_after is None
    assert first.estimate.n_steps == load(out).n_steps == made
    assert (out / "report.html").exists()

    second = run(config, out, resume=True)
    assert not second.interrupted and second.steps_made == STEPS
    assert records(out) == records(whole[0])
    assert (second.loss_before, second.loss_after) == (whole[1].loss_before, whole[1].loss_after)
    assert second.estimate.n_steps == STEPS
    assert settings(out)["first_epoch_loss"] == settings(whole[0])["first_epoch_loss"]
    for name, tensor in load_file(out / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(whole[0] / "adapter" / "adapter_model.safetensors")[name]), name


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, config, tmp_path):
    config = replace(config, schedule="cosine", save_every=3)
    out = tmp_path / "run"
    run(config, out, watcher=Interrupts(2, twice=True))
    assert not list((out / "checkpoints").glob("checkpoint-*"))
    run(config, out, resume=True)
    assert records(out) == records(whole[0])


def test_a_checkpoint_that_was_not_finished_is_passed_over(whole, config, tmp_path):
    config = replace(config, schedule="cosine", save_every=3)
    out = tmp_path / "run"
    run(config, out, watcher=Interrupts(5, twice=True))
    half = out / "checkpoints" / "checkpoint-5"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_st')
    run(config, out, resume=True)
    assert records(out) == records(whole[0])


def test_what_cannot_be_resumed(whole, config, tmp_path):
    out, _ = whole
    with pytest.raises(ConfigError, match="was started with schedule cosine, not constant"):
        run(replace(config, save_every=3), out, resume=True)
    with pytest.raises(ConfigError, match="the run is complete, 8 steps; nothing to resume"):
        run(replace(config, schedule="cosine", save_every=3), out, resume=True)
    with pytest.raises(ConfigError, match="holds no run.json"):
        run(config, tmp_path / "none", resume=True)
    (tmp_path / "run.json").write_text('{"format": "gns-run", "version": 1, "colour": 3}')
    with pytest.raises(ConfigError, match="damaged or foreign"):
        run(config, tmp_path, resume=True)


def test_an_error_in_training_keeps_the_readings_before_it(config, tmp_path):
    class Bomb(Watcher):
        def step(self, progress):
            if progress.step == 3:
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run(config, tmp_path / "run", watcher=Bomb())
    assert load(tmp_path / "run").n_steps == 3 and (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("there", [False, True])
def test_an_error_before_the_first_reading_leaves_nothing(config, tmp_path, monkeypatch, there):
    monkeypatch.setattr("gns.finetune.mean_loss", lambda *args: 1 / 0)
    out = tmp_path / "some" / "run"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        run(config, out)
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if there else [])


def test_the_configuration_survives_its_file(whole, config):
    assert read_config(whole[0]) == replace(config, schedule="cosine", save_every=3)
    named = replace(config, target_modules=["q_proj"])
    assert FinetuneConfig(**json.loads(json.dumps(asdict(named)))) == named


# what cannot start; the command line's share of it is in test_cli.py


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0; 1 or more is needed"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"lr": float("nan")}, "lr is nan; a number above 0 is needed"),
        ({"alpha": 0}, "alpha is 0; a number above 0"),
        ({"steps": 0}, "steps is 0; a number above 0"),
        ({"epochs": 1}, "steps is 8 and epochs is 1; give one of the two"),
        ({"schedule": "sawtooth"}, "schedule is 'sawtooth'; known: constant, cosine, linear"),
        ({"dtype": "int8"}, "dtype is 'int8'; known: auto, float32, bfloat16, float16"),
        ({"curvature_spectrum": 3}, "curvature_spectrum is 3, curvature_every None; 0 or more"),
        ({"seed": -1}, "seed is -1; a number from 0 to 4294967295 is needed"),
        ({"seed": 2**32}, "seed is 4294967296; a number from 0 to 4294967295"),
        ({"target_modules": ()}, "target_modules names no layer"),
        ({"rank": 33}, "rank is 33, but the largest dimension of the layers to adapt is 32; take 32 or less"),
        (
            {"rank": 17, "target_modules": ("q_proj",)},
            "rank is 17, but the largest dimension of the layers to adapt is 16",
        ),
        ({"max_length": 65}, "max_length is 65; .* has 64 positions"),
        (
            {"target_modules": ("q_proj", "nose")},
            "target module 'nose' is not in .*; known: down_proj, gate_proj",
        ),
        ({"batch_size": 46}, r"a batch of 46 is larger than the data: 45 examples \(after 5 are held out\)"),
        ({"batch_size": 12, "grad_accum": 4}, "a batch of 12 × 4 is larger than the data"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_configuration_writes_nothing(config, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(replace(config, **change), tmp_path / "run")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_float16_needs_a_gpu(config):
    with pytest.raises(ConfigError, match="float16.* needs a GPU"):
        prepare(replace(config, dtype="float16"))


def test_models_that_cannot_be_used(config, home, tmp_path):
    def fails(message, **change):
        with pytest.raises(ConfigError, match=message) as error:
            prepare(replace(config, **change))
        assert "\n" not in str(error.value)

    fails("no such folder", model=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    needs = "a model folder needs config.json, weights and tokenizer files"
    fails(f"empty: holds no config.json; {needs}$", model=str(tmp_path / "empty"))
    fails("is a file; a model folder or a hub id is needed", model=config.data)
    (tmp_path / "bare").mkdir()
    tiny.llama().config.save_pretrained(tmp_path / "bare")
    fails("its tokenizer cannot be loaded: .*[^:]$", model=str(tmp_path / "bare"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    fails("an adapter, not a model; give its base model", model=str(tmp_path / "adapter"))
    tiny.tokenizer().save_pretrained(tmp_path / "bare")
    fails("its model cannot be loaded", model=str(tmp_path / "bare"))
    small = tiny.llama()
    small.resize_token_embeddings(100)
    tiny.save_model(tmp_path / "small", small)
    fails(
        "has 100 embeddings, the data hold token 3..; give a model with its own tokenizer",
        model=str(tmp_path / "small"),
    )


def test_a_model_without_layers_to_adapt(config, monkeypatch):
    from gns.finetuning import preparation

    class Bare(torch.nn.Module):
        config = tiny.llama().config

        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(320, 4), torch.nn.Linear(4, 320)

        def get_input_embeddings(self):
            return self.embedding

        def get_output_embeddings(self):
            return self.head

    load = preparation._from_pretrained
    monkeypatch.setattr(
        preparation, "_from_pretrained", lambda auto, c, **o: Bare() if "dtype" in o else load(auto, c)
    )
    with pytest.raises(ConfigError, match="no linear layer that LoRA can adapt"):
        prepare(config)


def test_a_folder_in_use_is_left_alone(config, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds files; give another"):
        run(config, tmp_path)
    with pytest.raises(ConfigError, match="is a file; a folder is needed"):
        run(config, tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_data_write_nothing(config, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        run(replace(config, data=str(tmp_path / "none.jsonl")), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_flag_about_dropout_is_no_probability():
    model = tiny.llama()
    assert dropout_of(model) == 0
    model.config.use_dropout_somewhere, model.config.hidden_dropout = True, 0.1
    assert dropout_of(model) == 0.1
