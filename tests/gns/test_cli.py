import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from gns import load
from gns.advice import advise
from gns.cli import DEMO, app
from gns.commands.display import Display, brief
from gns.estimate import estimate
from gns.finetune import Progress
from gns.finetuning.preparation import FinetuneConfig
from gns.monitor import GNSWarning
from gns.records import STEPS, write_steps
from gns.statistics.drift import drift
from gns.sums import StepSums
from tests.gns import tiny
from tests.gns.commands.running import of

COMMANDS = [command.callback.__name__ for command in app.registered_commands]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "COLUMNS": "200",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "llama")
    tiny.save_jsonl(folder / "data.jsonl", [{"text": text} for text in tiny.sentences(53)])
    return folder


@pytest.fixture
def measure(gns, home):
    def run(**changed):
        options = {
            "model": home / "llama",
            "data": home / "data.jsonl",
            "rank": 4,
            "batch_size": 4,
            "steps": 3,
        }
        options = {**options, "max_length": 32, **changed}
        flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        return gns("measure", *[flag for flag in flags if flag is not True])

    return run


def rising():
    """Gaussian per-example gradients whose noise scale goes from 4 to 100."""
    rng, steps = np.random.default_rng(0), []
    for k, b in enumerate(np.linspace(4, 100, 120)):
        g = np.sqrt(1 / b) + rng.normal(size=(16, 32))
        steps.append(StepSums(k, 16, float((g**2).sum(1).mean()), float((g.mean(0) ** 2).sum())))
    return steps


# help


def test_help_imports_nothing_heavy():
    heavy = "('torch', 'transformers', 'peft', 'matplotlib', 'scipy', 'numpy', 'jinja2')"
    code = f"""
import sys
from gns.cli import main
try:
    main(["--help"])
except SystemExit as end:
    print(end.code, [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stderr.strip() == "0 []", done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(gns, command):
    code, out, err = gns(command, "--help")
    assert code == 0 and out and not err


def test_without_a_command_there_is_help(gns):
    code, out, _ = gns()
    assert code == 0 and "Usage: gns" in "\n".join(out)


def test_defaults_in_the_help_are_the_defaults(gns):
    text = " ".join(" ".join(gns("measure", "--help")[1]).replace("│", " ").split())
    stated = dict(re.findall(r"--([a-z-]+) \S+ [^()]*\(default ([^):]+)\)", text))
    defaults = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(FinetuneConfig)}
    assert {
        "rank",
        "alpha",
        "batch-size",
        "lr",
        "schedule",
        "max-length",
        "dtype",
        "seed",
        "every",
        "metric",
    } <= set(stated)
    assert stated == {name: str(defaults[name]) for name in stated}


# a run


def test_measure_reports_in_words(measure, tmp_path):
    code, out, err = measure(out=tmp_path / "run", steps=24)
    assert code == 0, err
    text = "\n".join(out)
    assert re.search(r"Held-out loss: \d\.\d+ → \d\.\d+ nats a token in 24 steps\.", text)
    assert (
        f"Report: {tmp_path / 'run' / 'report.html'}" in text and (tmp_path / "run" / "report.html").exists()
    )
    assert "24 optimizer steps × 4 examples (mean" in text
    assert [line.split()[1] for line in err] == [f"{i}/24" for i in range(2, 25, 2)]
    assert all("loss" in line and "B_simple" in line for line in err)
    assert "Too early" not in text and load(tmp_path / "run").n_steps == 24


def test_a_run_never_overwrites(measure, undrawn, home, tmp_path):
    assert measure()[0] == measure()[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["measure", "measure-2"]
    code, _, err = measure(out="runs/measure")
    assert code == 2 and err == [
        "gns: runs/measure: holds another run; give another, or resume an interrupted run with --resume"
    ]


def test_the_demo_runs_on_what_is_shipped(gns, tmp_path):
    code, out, err = gns("demo", "--steps", 2, "--batch-size", 4)
    assert code == 0 and (tmp_path / "runs" / "demo" / "report.html").exists()
    assert out[-1] == "Report: runs/demo/report.html"
    settings = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())["settings"]
    assert {name: settings[name] for name in DEMO} == DEMO
    assert settings["dataset_size"] > 1000


# Ctrl-C


def test_ctrl_c_leaves_a_report_and_the_run_can_go_on(home, tmp_path, gns, undrawn):
    out = tmp_path / "run"
    options = ["--model", home / "llama", "--data", home / "data.jsonl", "--out", out, "--max-length", 32]
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "gns.cli",
        "measure",
        *map(str, options),
        "--steps",
        "100000",
    ]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        deadline = time.monotonic() + 300  # on a busy machine the imports alone take a minute
        while run.poll() is None and time.monotonic() < deadline:
            if (out / STEPS).exists() and (out / STEPS).read_bytes().count(b'"step"') > 3:
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        said, complained = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, complained
    made = load(out).n_steps
    assert made > 3 and (out / "report.html").exists() and (out / "summary.json").exists()
    assert complained.splitlines()[-1] == (
        f"gns: interrupted after {made} of 100000 steps; go on with: gns measure --resume --out {out}"
    )
    assert f"Report: {out}/report.html" in said

    config = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**config, "steps": made + 2}))  # to come to an end in this test
    code, _, _ = gns("measure", "--resume", "--out", out)
    assert code == 0 and [step.step for step in load(out).history] == list(range(made + 2))
    code, _, err = gns("measure", "--resume", "--out", out)
    assert code == 2 and err == [f"gns: {out}: the run is complete, {made + 2} steps; nothing to resume"]
    code, _, err = gns("measure", "--resume", "--out", out, "--rank", 3)
    assert code == 2 and err == [f"gns: {out}: was started with rank 16, not 3; a resumed run keeps it"]


def test_ctrl_c_before_the_first_reading_leaves_nothing(measure, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gns.finetune.mean_loss", interrupted)
    code, out, err = measure()
    assert (code, out) == (130, [])
    assert err[-1] == "gns: interrupted before the first reading; nothing was written"
    assert not list(tmp_path.iterdir())


# bad input: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "./none"}, "./none: no such folder"),
        ({"data": "none.jsonl"}, "none.jsonl: no such file or folder"),
        ({"data": "bad.jsonl"}, "bad.jsonl, line 2: not JSON (Expecting value at column 10)"),
        (
            {"data": "unknown.jsonl"},
            "unknown.jsonl, line 1: unknown fields `txt`; known: `text`, or `prompt`",
        ),
        ({"data": "empty.jsonl"}, "empty.jsonl: empty; at least one example is needed"),
        ({"rank": 0}, "rank is 0; 1 or more is needed"),
        ({"rank": -3}, "rank is -3; 1 or more is needed"),
        ({"rank": "many"}, "Invalid value for '--rank'"),
        ({"rank": 100_000_000}, "rank is 100000000, but the largest dimension of the layers to adapt is 32"),
        ({"seed": -1}, "seed is -1; a number from 0 to 4294967295 is needed"),
        ({"seed": 2**70}, f"seed is {2**70}; a number from 0 to 4294967295 is needed"),
        ({"data": "half.jsonl"}, "half.jsonl, line 2: `text` holds half a character (\\ud800)"),
        ({"data": "deep.jsonl"}, "deep.jsonl, line 2: malformed JSON (nested too deeply)"),
        ({"data": "long.jsonl"}, "long.jsonl, line 2: malformed JSON (a number of more than 4300 digits)"),
        ({"model": "empty"}, "empty: holds no config.json; a model folder needs config.json, weights"),
        ({"target_modules": " , "}, "target_modules names no layer; names with commas between"),
        ({"target_modules": "q_proj,nose"}, "target module 'nose' is not in"),
        ({"batch_size": 1000}, "a batch of 1000 is larger than the data: 48 examples (after 5 are held out)"),
        ({"schedule": "sawtooth"}, "schedule is 'sawtooth'; known: constant, cosine, linear"),
        ({"metric": "fisher"}, "metric is 'fisher'; known: euclidean, adam"),
        ({"dtype": "int8"}, "dtype is 'int8'; known: auto, float32, bfloat16, float16"),
        ({"epochs": 1}, "steps is 3 and epochs is 1.0; give one of the two"),
        ({"steps": 0}, "steps is 0; a number above 0 is needed"),
        ({"resume": True}, "--resume needs --out, the folder of the interrupted run"),
        ({"resume": True, "out": "none"}, "none: holds no run.json"),
        ({"out": "bad.jsonl"}, "bad.jsonl: is a file; a folder is needed"),
        ({"out": "bad.jsonl/run"}, "bad.jsonl/run: cannot be made: Not a directory"),
        ({"colour": "red"}, "No such option: --colour"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input(measure, tmp_path, changed, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "a b c"}\n{"text": oops}\n')
    (tmp_path / "unknown.jsonl").write_text('{"txt": "a b c"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    good = '{"text": "a b c"}\n'
    (tmp_path / "half.jsonl").write_text(good + '{"text": "\\ud800 abc"}\n')
    (tmp_path / "deep.jsonl").write_text(good + "[" * 100_000 + "\n")
    (tmp_path / "long.jsonl").write_text(good + f'{{"text": {"9" * 6000}}}\n')
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = measure(**changed)
    assert (code, out) == (2, [])
    assert len(err) == 1 and err[0].startswith(f"gns: {message}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", ["model", "data"])
def test_model_and_data_are_needed(gns, given):
    missing = {"model": "data", "data": "model"}[given]
    code, out, err = gns("measure", f"--{given}", "x")
    assert (code, out, err) == (2, [], [f"gns: --{missing} is missing; a local path or a hub id is needed"])


def test_a_fault_of_ours_keeps_its_traceback_and_leaves_nothing(measure, tmp_path, monkeypatch):
    monkeypatch.setattr("gns.finetune.mean_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure()
    assert not list(tmp_path.iterdir())


def test_empty_names_between_commas_are_ignored(measure, undrawn, tmp_path):
    code, _, err = measure(target_modules="q_proj, ,", out="run", seed=2**32 - 1, steps=1)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["target_modules"] == ["q_proj"]


# reports and advice of runs that are there


def test_report_draws_anew(gns, tmp_path):
    (tmp_path / "a").mkdir()
    write_steps(tmp_path / "a" / STEPS, of(100))
    code, out, err = gns("report", "a")
    assert code == 0 and not err and out[-1] == "Report: a/report.html"
    assert (tmp_path / "a" / "report.html").exists()
    assert out[0].startswith("Noise scale ≈ ")


def test_report_compares_several(gns, undrawn, tmp_path):
    for name, b in (("a", 100), ("b", 20)):
        (tmp_path / name).mkdir()
        write_steps(tmp_path / name / STEPS, of(b))
    code, out, _ = gns("report", "a", "b")
    assert code == 0 and out[:2] == ["Report: a/report.html", "Report: b/report.html"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out if line.startswith("│")]
    assert [row[0] for row in rows] == ["a", "b"]
    assert all(row[4:7] == ["measured", "40 × 16", "0.001"] for row in rows)


def test_report_of_a_damaged_run_keeps_the_good_records(gns, undrawn, tmp_path):
    (tmp_path / "a").mkdir()
    write_steps(tmp_path / "a" / STEPS, of(100))
    whole = (tmp_path / "a" / STEPS).read_bytes()
    (tmp_path / "a" / STEPS).write_bytes(whole[:-30])
    code, out, err = gns("report", "a")
    assert code == 0 and "39 optimizer steps" in "\n".join(out)
    assert len(err) == 1 and "39 good record(s)" in err[0]


def test_no_report_is_drawn_unless_all_can_be(gns, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_steps(tmp_path / name / STEPS, of(100))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = gns("report", "a", "b", "nope")
    assert (code, out) == (2, []) and len(err) == 1 and err[0].startswith("gns: nope is not there; a folder")
    (tmp_path / "b" / "summary.json").write_text("{")
    assert gns("report", "a", "b")[0] == 2
    (tmp_path / "b" / "summary.json").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_whose_noise_scale_moved_is_advised_by_its_end(gns, undrawn, tmp_path):
    (tmp_path / "a").mkdir()
    steps = rising()
    write_steps(tmp_path / "a" / STEPS, steps)
    last = drift(steps).last
    code, out, _ = gns("report", "a")
    said = "\n".join(out)
    assert code == 0 and out[0].endswith("examples on average, and rising") and "95 % sure that" not in out[1]
    assert "What batch size pays, for the last third of the run, steps 80–119:" in said
    line = advise(last, batch_size=16).sentences[0]
    assert line in said
    code, out, _ = gns("advise", "a")
    assert code == 0 and line in out
    assert out[0].startswith("In the last third of the run, steps 80–119, the noise scale is about")
    assert out[1].startswith("The noise scale moved during the run: it rose")
    assert load(tmp_path / "a").n_steps == 120
    (tmp_path / "b").mkdir()
    write_steps(tmp_path / "b" / STEPS, of(100))
    code, out, _ = gns("report", "a", "b")
    assert "measured, rising" in "\n".join(out)


@pytest.mark.parametrize("command", ["report", "advise"])
def test_a_folder_that_is_no_run(gns, tmp_path, command):
    code, out, err = gns(command, tmp_path / "none")
    assert (code, out) == (2, []) and len(err) == 1 and "none" in err[0]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / STEPS).write_text('{"loss": 3}\n')
    code, out, err = gns(command, tmp_path / "foreign")
    assert (code, out) == (2, []) and len(err) == 1 and "foreign" in err[0]


# the display


def test_a_warning_of_the_monitor_becomes_a_line(capsys):
    with warnings.catch_warnings(record=True) as others, Display():
        warnings.simplefilter("always")
        warnings.warn("one parameter is not measured", GNSWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "gns: one parameter is not measured\n"
    assert [str(other.message) for other in others] == ["something else"]


def test_the_bar_shows_loss_and_interval():
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120, legacy_windows=False)
    with Display(console) as display:
        display.remark("a remark [not markup]")
        display.step(Progress(3, 10, 2.345678, estimate(of(100))))
        display.bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "gns: a remark [not markup]" in shown
    assert "3/10" in shown and "loss 2.346" in shown
    assert brief(estimate(of(100))) in shown


def test_brief_words_for_every_state():
    assert brief(None) == brief(estimate(of(100)[:1])) == "B_simple …"
    assert re.fullmatch(r"B_simple \S+ \(\S+ … \S+\) measured", brief(estimate(of(100))))
    steps = [StepSums(step=i, n_examples=4, mean_sq_norm=8.0 + i % 2, sq_norm_of_mean=1.0) for i in range(30)]
    assert re.fullmatch(r"B_simple ≥ \S+ not detectable", brief(estimate(steps)))
    below = dataclasses.replace(estimate(of(100)), b_simple=-0.5, low=0.0, high=2.0)  # tr Σ averages below 0
    assert brief(below) == "B_simple (0 … 2) measured"
