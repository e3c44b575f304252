"""`gns probe`, as a user calls it."""

from __future__ import annotations

import json
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gns import FrozenEstimate, load
from gns.commands.probe import FRESH
from gns.finetune import run
from gns.finetuning.preparation import FinetuneConfig, prepare
from gns.finetuning.runfolder import read_config
from gns.probing.file import read_probe
from gns.records import RecordsError
from tests.gns import tiny

pytestmark = pytest.mark.usefixtures("undrawn")  # a probe's figures: `tests/gns/report/test_write.py`


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "llama")
    tiny.save_jsonl(folder / "data.jsonl", [{"text": text} for text in tiny.sentences(60)])
    return folder


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    config = FinetuneConfig(
        str(home / "llama"), str(home / "data.jsonl"), rank=4, batch_size=4, steps=4, max_length=32, lr=0.05
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(config, out)
    return out


@pytest.fixture
def gns(gns):
    """Run a command in an empty folder; give exit code, standard output and standard error."""

    def run(*arguments):
        code, out, err = gns(*arguments)
        return code, "\n".join(out), "\n".join(err)

    return run


@pytest.fixture
def small(home):
    return (
        *("probe", "--model", home / "llama", "--data", home / "data.jsonl", "--rank", 4),
        *("--batch-size", 2, "--batches", 24, "--max-length", 32),
    )


def test_before_any_training(gns, small, tmp_path):
    code, out, err = gns(*small)
    assert code == 0, err
    first = out.splitlines()[0]
    assert first.startswith("At these weights the noise scale is")
    assert "Measured over 24 batches × 2 examples (mean" in out and FRESH in out
    assert "factor A: no gradient at these weights" in out and "sign-flip test" in out
    found = load(tmp_path / "runs" / "probe")
    assert isinstance(found, FrozenEstimate) and found.n_steps == 24 and len(found.history) == 24
    assert found.trace_sigma == found.groups["B"].trace_sigma and found.groups["A"].trace_sigma == 0
    assert not (tmp_path / "runs" / "probe-2").exists()
    assert gns(*small)[0] == 0 and (tmp_path / "runs" / "probe-2").is_dir(), "nothing is overwritten"


def test_read_back_it_is_what_was_measured(gns, small, tmp_path):
    assert gns(*small, "--out", tmp_path / "p", "--largest", 2, "--relative-width", 1e-9)[0] == 0
    found = read_probe(tmp_path / "p")
    data = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert data["in_words"] == str(found) and data["level"] == 0.95
    assert found.looks == (20, 24) and found.signal.patterns == 9_999 and len(found.largest) == 2
    assert found.largest[0].sq_norm > found.largest[1].sq_norm > 0 and found.largest[0].text
    assert found.dependence.trace_sigma == found.trace_sigma
    x = np.mean([s.trace_sigma for s in found.history])
    assert 0.5 < x / found.trace_sigma < 2


@pytest.mark.parametrize("place", ["", "adapter", "checkpoints/checkpoint-4"])
def test_at_a_checkpoint_the_run_is_known(gns, trained, tmp_path, place):
    code, out, err = gns("probe", "--adapter", trained / place, "--batches", 8, "--out", tmp_path / "p")
    assert code == 0, err
    assert FRESH not in out and "factor A: " in out and "no gradient" not in out
    found = load(tmp_path / "p")
    assert found.groups["A"].trace_sigma > 0 and found.examples_per_step == 4
    settings = json.loads((tmp_path / "p" / "summary.json").read_text())["settings"]
    assert (settings["max_length"], settings["batch_size"]) == (32, 4)
    assert settings["held_out"] == read_config(trained).held_out > 0, "what was held out stays out"


def test_the_adapter_is_the_trained_one_and_trains(trained):
    weights = load_file(trained / "adapter" / "adapter_model.safetensors")
    model = prepare(read_config(trained), adapter=trained / "adapter").model
    there = dict(model.named_parameters())
    for name, value in weights.items():
        found = there[name.replace(".weight", ".default.weight")]
        assert torch.equal(found, value) and found.requires_grad
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)


def test_a_damaged_adapter_is_one_line(gns, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "r")
    (tmp_path / "r" / "adapter" / "adapter_config.json").write_text("{")
    code, _, err = gns("probe", "--adapter", tmp_path / "r")
    assert code == 2 and "the adapter cannot be loaded" in err.splitlines()[-1]


def test_advice_and_table_read_it(gns, small, tmp_path):
    gns(*small, "--out", tmp_path / "p")
    code, out, err = gns("advise", tmp_path / "p")
    assert code == 0 and "batch" in out.lower(), err


def test_dropout_is_told_apart(gns, small):
    code, out, err = gns(*small, "--split-dropout")
    assert code == 0 and "Dropout makes 0 % of the noise" in out, err  # these adapters have none


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "gns:base"], "--data is missing"),
        (["--data", "x.jsonl"], "--model is missing"),
        (
            ["--adapter", "nowhere"],
            "nowhere: is not a folder; the folder of an adapter, a checkpoint or a run",
        ),
        (["--adapter", "."], "holds no adapter_config.json"),
        (["--batches", "1"], "batches is 1; 2 or more"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--model", "nowhere/at/all", "--data", "x"], "no such folder"),
        (["--batches", "many"], "Invalid value for '--batches'"),
    ],
)
def test_bad_input_is_one_line(gns, options, says, tmp_path):
    code, out, err = gns("probe", *options)
    said = [line for line in err.splitlines() if line.startswith("gns: ")]
    assert code == 2 and not out and says in said[-1], (code, out, err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--relative-width", "-1", "relative_width is -1.0; a number above 0"),
        ("--largest", "-2", "largest is -2"),
    ],
)
def test_a_bad_number_of_the_measurement_is_one_line(gns, small, option, value, says, tmp_path):
    code, out, err = gns(*small, option, value)
    assert code == 2 and not out and says in err.splitlines()[-1], (code, out, err)
    assert not (tmp_path / "runs").exists()


def test_rank_of_a_trained_adapter_is_refused(gns, trained):
    code, _, err = gns("probe", "--adapter", trained, "--rank", 4)
    assert code == 2 and "--rank is of fresh adapters" in err


def test_a_folder_in_use_is_refused(gns, small, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("x")
    code, _, err = gns(*small, "--out", tmp_path / "p")
    assert code == 2 and "holds files" in err and (tmp_path / "p" / "mine.txt").read_text() == "x"


def test_fewer_data_than_asked_for_is_said(gns, home):
    code, out, err = gns(
        *("probe", "--model", home / "llama", "--data", home / "data.jsonl", "--rank", 4, "--max-length", 32),
        *("--batch-size", 12, "--batches", 50),
    )
    assert code == 0 and "the data hold 5 whole batches of 12; 50 were asked for" in err
    assert "Too early to tell" in out


def test_ctrl_c_writes_what_was_found(gns, small, monkeypatch, tmp_path):
    from gns.probing.run import Run

    feed, fed = Run.feed, []

    def feed_then_stop(self, batch):
        fed.append(1)
        if len(fed) == 6:
            signal.raise_signal(signal.SIGINT)
        feed(self, batch)

    monkeypatch.setattr(Run, "feed", feed_then_stop)
    code, out, _ = gns(*small, "--out", tmp_path / "p")
    assert code == 130 and "Ended early: interrupted after 5 batches" in out
    assert load(tmp_path / "p").n_steps == 5


@pytest.mark.parametrize("damage", ["{", '{"format": "other"}', '{"format": "gns-probe", "version": 1}'])
def test_a_damaged_file_is_said(gns, small, tmp_path, damage):
    gns(*small, "--out", tmp_path / "p", "--batches", 3)
    (tmp_path / "p" / "probe.json").write_text(damage)
    with pytest.raises(RecordsError, match="truncated, malformed or foreign; a gns-probe of version 1"):
        load(tmp_path / "p")


def test_help_names_every_option(gns):
    code, out, _ = gns("probe", "--help")
    assert code == 0
    for option in ("--model", "--data", "--adapter", "--relative-width", "--largest", "--dropout", "--out"):
        assert option in out
