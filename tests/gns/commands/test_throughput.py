import json
import re
from dataclasses import asdict

import pytest

from gns.advising import throughput
from gns.finetuning.preparation import FinetuneConfig
from gns.finetuning.runfolder import write_config
from gns.finetuning.timing import LoraTrial
from tests.gns import tiny
from tests.gns.commands import running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("home") / "llama")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Two timed steps a batch size; how many there are is `tests/gns/advising/test_throughput.py`'s."""
    monkeypatch.setattr(throughput, "REPEATS", 2)


def options(home, *more):
    return ["throughput", "--model", home, "--max-length", 32, "--rank", 4, "--largest", 4, *more]


def test_it_times_shows_and_writes(gns, home, tmp_path):
    code, out, err = gns(*options(home))
    assert code == 0
    curve = throughput.read(tmp_path / "throughput.json")
    assert list(curve.speeds) == [1, 2, 4] and not curve.interrupted
    assert curve.settings["model"] == str(home) and curve.settings["tokens_per_example"] == 32
    assert err[0] == f"gns: timing {home} on {curve.settings['device']}, float32, 32 tokens an example"
    lines = [line for line in err if line.startswith("batch ")]
    assert len(lines) >= 3 and re.fullmatch(r"batch 1 = 1 × 1: \S+ examples/s, \S+ s a step", lines[0])
    assert [line.split()[0] for line in out if line[:1].isdigit()] == ["1", "2", "4"]
    assert "Ended because no batch beyond 4 was asked for." in out
    assert out[-1] == (
        "Wrote throughput.json; what it means for a measured run: gns advise RUN --throughput throughput.json"
    )


def test_by_default_it_times_what_is_shipped(gns, tmp_path):
    code, _, err = gns("throughput", "--largest", 1, "--seconds", 1)
    assert code == 0 and err[0].startswith("gns: timing gns:base on ") and "256 tokens" in err[0]


def test_a_run_gives_model_and_settings_and_gets_the_file(gns, home, tmp_path):
    (tmp_path / "a").mkdir()
    config = FinetuneConfig(str(home), "data.jsonl", rank=2, max_length=24, target_modules=("q_proj",))
    write_config(tmp_path / "a", config)
    code, out, _ = gns("throughput", "a", "--largest", 2)
    assert code == 0 and out[-1] == (
        "Wrote a/throughput.json; what it means for a measured run: gns advise a"
    )
    settings = throughput.read(tmp_path / "a" / "throughput.json").settings
    assert (settings["rank"], settings["tokens_per_example"]) == (2, 24)
    assert settings["target_modules"] == ["q_proj"]
    code, _, _ = gns("throughput", "a", "--largest", 1, "--rank", 3, "--out", "b.json")
    assert code == 0 and throughput.read(tmp_path / "b.json").settings["rank"] == 3


def test_what_it_writes_advice_reads(gns, home, tmp_path):
    running.recorded(tmp_path / "a", running.of(100))
    gns(*options(home))
    code, out, _ = gns("advise", "a", "--throughput", "throughput.json")
    assert code == 0 and any(line.startswith("On this machine the soonest in wall-clock") for line in out)


def test_ctrl_c_keeps_the_curve_so_far(gns, home, tmp_path, monkeypatch):
    whole = LoraTrial.peak

    def peak(self, micro_batch, tokens):
        if micro_batch == 4:
            raise KeyboardInterrupt
        return whole(self, micro_batch, tokens)

    monkeypatch.setattr(LoraTrial, "peak", peak)
    code, out, _ = gns(*options(home))
    curve = throughput.read(tmp_path / "throughput.json")
    assert code == 130 and list(curve.speeds) == [1, 2] and curve.interrupted
    assert "Interrupted; the curve so far." in out


def test_the_file_is_there_after_every_size(gns, home, tmp_path, monkeypatch):
    """Whatever ends the process, what was timed is not lost."""
    seen, whole = [], LoraTrial.peak

    def peak(self, micro_batch, tokens):
        path = tmp_path / "throughput.json"
        seen.append(len(json.loads(path.read_text())["points"]) if path.exists() else 0)
        return whole(self, micro_batch, tokens)

    monkeypatch.setattr(LoraTrial, "peak", peak)
    gns(*options(home))
    assert seen == [0, 1, 2]


def test_ctrl_c_before_anything_leaves_nothing(gns, home, tmp_path, monkeypatch):
    def peak(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LoraTrial, "peak", peak)
    code, out, err = gns(*options(home))
    assert (code, out) == (130, []) and not list(tmp_path.iterdir())
    assert err[-1] == "gns: interrupted before the first reading; nothing was written"


def test_too_little_memory_ends_in_one_line(gns, home, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraTrial, "memory", lambda self: throughput.Memory(10**9, 10**9 - 1))
    code, out, err = gns(*options(home))
    assert (code, out) == (2, []) and not list(tmp_path.iterdir())
    assert err[-1].startswith(f"gns: {home}: nothing could be timed: one example of 32 tokens could take ")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--model", "./none"], "./none: no such folder"),
        (["--rank", 0], "rank is 0; 1 or more is needed"),
        (["--max-length", 10_000], "max_length is 10000; "),
        (["--target-modules", " , "], "target_modules names no layer"),
        (["--dtype", "int8"], "dtype is 'int8'; known: "),
        (["--largest", 0], "largest is 0; a whole number, 1 or more, is needed"),
        (["--seconds", -1], "seconds is -1.0; a finite number > 0 is needed"),
        (["--out", "taken.json"], "taken.json: is there already; delete it, or give another with --out"),
        (
            ["--out", "taken.json/speed"],
            "taken.json/speed/throughput.json: taken.json is a file; a folder is",
        ),
        (["--out", "new", "--model", "./none"], "./none: no such folder"),
        (["nowhere"], "nowhere: holds no run.json"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line(gns, home, tmp_path, bad, message):
    (tmp_path / "taken.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = gns(*options(home)[:-2], *bad)
    assert (code, out) == (2, []) and err[-1].startswith(f"gns: {message}")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "taken.json").read_text() == "mine"


@pytest.mark.parametrize("out", ["speeds", "runs/speeds", "speeds/mine.json", "."])
def test_the_curve_goes_into_a_folder_or_a_file(gns, home, tmp_path, out):
    assert gns(*options(home)[:-2], "--largest", 1, "--out", out)[0] == 0
    path = tmp_path / (out if out.endswith(".json") else f"{out}/throughput.json")
    assert list(throughput.read(path).speeds) == [1]


def test_options_of_the_help_are_the_configurations_defaults(gns):
    text = " ".join(" ".join(gns("throughput", "--help")[1]).replace("│", " ").split())
    defaults = asdict(FinetuneConfig("", ""))
    assert f"LoRA rank (default {defaults['rank']})" in text
    assert f"(default {defaults['max_length']}; 256 for gns:base)" in text
