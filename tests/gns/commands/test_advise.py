import json
import math
from dataclasses import replace

import numpy as np
import pytest

from gns.advice import advise
from gns.advising import throughput
from gns.advising.capacity import Capacity, first_epoch_bits
from gns.advising.throughput import Speed, Throughput
from gns.advising.wording import AS_IF
from gns.coverage import Coverage
from gns.records import load, read_summary, write_summary
from gns.report.findings import findings
from gns.sums import StepSums
from tests.gns.commands import running

SETTINGS = {
    "dataset_size": 2000,
    "learning_rate": 1e-3,
    "steps_made": 40,
    "trainable_parameters": 10_000,
    "first_epoch_loss": 2.0,
    "first_epoch_share": 0.32,
    "loss_tokens": 200_000,
    "adapted_layers": [[64, 64, 4, 8], [64, 128, 4, 2]],
}
CURVE = Throughput(
    (Speed(16, 16, 1, 0.2, 0.2, 0.2, 7), Speed(64, 64, 1, 0.4, 0.4, 0.4, 7)), "…", {"tokens_per_example": 250}
)


@pytest.fixture
def folder(tmp_path):
    """A run with everything recorded."""
    folder = running.recorded(tmp_path / "a", running.of(100, tokens=120))
    write_summary(folder, load(folder), settings=SETTINGS, batch_size=16)
    return folder


def row(out, name):
    """Cells of the table of inputs."""
    start = out.index("What this rests on")
    (line,) = (line for line in out[start:] if line.startswith(name))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_batch_in_use_is_the_reports_where_steps_differ_in_size(gns, tmp_path):
    """Nobody recorded it: the median of the steps, not their mean of 28, before a report and after one."""
    steps = [
        *running.of(100, count=30),
        *(replace(s, step=s.step + 30) for s in running.of(100, 64, count=10)),
    ]
    running.recorded(tmp_path / "a", steps)
    assert row(gns("advise", "a")[1], "batch in use") == ["batch in use", "16 examples a step", "the run"]
    assert findings("a", steps, read_summary(tmp_path / "a")).batch_size == 16


def test_everything_recorded_is_used_and_its_source_named(gns, folder):
    throughput.write(folder / "throughput.json", CURVE)
    code, out, err = gns("advise", "a")
    assert code == 0 and not err
    expected = advise(
        load(folder),
        batch_size=16,
        dataset_size=2000,
        learning_rate=1e-3,
        throughput={16: 80.0, 64: 160.0},
        examples_needed=640,
        capacity=Capacity(first_epoch_bits(2.0, 200_000), 10_000, 0.32),
    )
    assert out[0] == expected.headline
    for line in expected.sentences:
        assert line in out
    for line in (*expected.warnings, *expected.caveats):
        assert any(said.endswith(line) for said in out)
    assert row(out, "noise scale") == [
        "noise scale",
        "40 steps × 16 examples (mean 120 tokens), ratio of averages",
        "a",
    ]
    assert row(out, "batch in use") == ["batch in use", "16 examples a step", "the run"]
    assert row(out, "data set")[1:] == ["2,000 examples", "the run"]
    assert row(out, "learning rate")[1:] == ["0.001 at batch 16", "the run, its highest"]
    assert row(out, "price of time")[2] == "default; see --time-price"
    assert row(out, "loss aimed at")[1:] == [
        "640 examples at the batch in use",
        "the run: what it took to the loss it ended at",
    ]
    assert row(out, "throughput")[1:] == ["2 batch sizes, 16 … 64", "a/throughput.json"]
    assert row(out, "data and adapters")[2].endswith(
        "200,000 tokens; the loss is of the first 32 % of an epoch"
    )
    assert row(out, "adapted")[1:] == ["10 matrices", "the run"]
    titles = ["Batch size", "The batch in use", "One epoch", "Wall-clock time", "Learning rate"]
    titles += ["Capacity and cost of LoRA", "Careful", "Before you rely on it", "What this rests on"]
    assert [line for line in out if line in titles] == titles


def test_the_table_marks_what_counts(gns, folder):
    throughput.write(folder / "throughput.json", CURVE)
    out = gns("advise", "a")[1]
    head = next(i for i, line in enumerate(out) if line.startswith("batch "))
    columns = [cell.strip() for cell in out[head].split("  ") if cell.strip()]
    assert columns == ["batch", "steps", "examples", "steps an epoch", "examples/s", "useful/s"]
    rows = {line.split()[0]: line for line in out[head + 1 : out.index("The batch in use")] if line}
    assert "in use" in rows["16"] and "proposed, in the range" in rows["128"] and "soonest here" in rows["64"]
    assert "1.2" in rows["16"] and "160" in rows["64"] and "80" in rows["16"]
    assert "──" not in "\n".join(out)  # plain columns, as this is no terminal
    rates = out[out.index("Learning rate") + 2 :]
    assert rates[0].split("  ")[0] == "batch" and "Adam surge law" in rates[0]
    at_16 = next(line for line in rates if line.startswith("16 "))
    assert at_16.split()[:4] == ["16", "0.001", "0.001", "0.001"] and "in use" in at_16


def test_options_win_over_the_record(gns, folder):
    options = ["--batch-size", 32, "--dataset-size", 5000, "--learning-rate", 2e-4, "--time-price", 4]
    options += ["--examples-needed", 1000, "--data-bits", 1e4, "--trainable-parameters", 99_000]
    options += ["--throughput", "32=10", "--throughput", "64=15"]
    code, out, _ = gns("advise", "a", *options)
    assert code == 0
    expected = advise(
        load(folder),
        batch_size=32,
        dataset_size=5000,
        learning_rate=2e-4,
        time_price=4.0,
        throughput={32: 10.0, 64: 15.0},
        examples_needed=1000.0,
        capacity=Capacity(1e4, 99_000),
    )
    assert all(line in out for line in expected.sentences)
    for name, option in (
        ("batch in use", "--batch-size"),
        ("data set", "--dataset-size"),
        ("learning rate", "--learning-rate"),
        ("price of time", "--time-price"),
        ("loss aimed at", "--examples-needed"),
        ("throughput", "32=10, 64=15"),
        ("data and adapters", "--data-bits"),
    ):
        assert row(out, name)[2] == option
    out = gns("advise", "a", "--step-price", 40)[1]
    assert out[3].startswith(f"If the time of one step is worth 40 examples{AS_IF}: a batch of ")
    assert row(out, "price of time")[1:] == ["40 examples for a step", "--step-price"]


def test_another_batch_leaves_out_what_belongs_to_the_runs_own(gns, folder):
    out = gns("advise", "a", "--batch-size", 32)[1]
    with pytest.raises(ValueError, match="not enough values"):
        row(out, "learning rate")
    assert not any(line.startswith("Learning rate") for line in out)
    assert any("say how many examples that loss takes at batch 32" in line for line in out)


@pytest.mark.parametrize("steps", [125, 200])
def test_a_run_of_an_epoch_or_more_sets_no_aim(gns, folder, steps):
    write_summary(folder, load(folder), settings={**SETTINGS, "steps_made": steps}, batch_size=16)
    out = gns("advise", "a")[1]
    assert any("say how many examples that loss takes at batch 16" in line for line in out)


def test_files_and_pairs_of_throughput_go_together(gns, folder, tmp_path):
    throughput.write(tmp_path / "here.json", CURVE)
    out = gns("advise", "a", "--throughput", "here.json", "--throughput", "16=500")[1]
    assert any(line.startswith("On this machine the soonest") and line.endswith("timed: 16.") for line in out)
    assert row(out, "throughput")[2] == "here.json, 16=500"
    # 250 tokens timed against 120 with a loss: more than twice
    assert any(
        "timed with 250 tokens an example, the run's have a loss on 120 on average" in line for line in out
    )


def test_a_run_that_tells_nothing_but_its_steps(gns, tmp_path):
    running.recorded(tmp_path / "a", running.of(100))
    code, out, _ = gns("advise", "a")
    assert code == 0 and "One epoch" not in out and "Capacity and cost of LoRA" not in out
    assert any("fewer steps save time only as far as" in line for line in out)


def test_a_users_own_settings_cannot_break_it(gns, folder):
    odd = {"trainable_parameters": "7B", "loss_tokens": [1], "first_epoch_loss": -1, "steps_made": True}
    odd |= {"adapted_layers": "all", "first_epoch_share": None, "dataset_size": "big"}
    write_summary(folder, load(folder), settings=odd, batch_size=16)
    code, out, _ = gns("advise", "a")
    assert code == 0 and "Capacity and cost of LoRA" not in out


def test_too_early_still_says_what_needs_no_noise_scale(gns, tmp_path):
    folder = running.recorded(tmp_path / "a", running.of(100, count=7))
    write_summary(folder, load(folder), settings=SETTINGS, batch_size=16)
    code, out, _ = gns("advise", "a")
    assert code == 0 and out[0].startswith("Too early for advice: 7 usable step(s)")
    assert "Capacity and cost of LoRA" in out and "Batch size" not in out


def test_a_lower_bound_says_what_to_measure(gns, tmp_path):
    rng = np.random.default_rng(1)
    steps = []
    for k in range(40):
        g = rng.normal(size=(16, 64)) / 8 + 0.002
        steps.append(StepSums(k, 16, float((g**2).sum(1).mean()), float((g.mean(0) ** 2).sum())))
    running.recorded(tmp_path / "a", steps)
    code, out, _ = gns("advise", "a")
    assert code == 0 and "To know more" in out and load(tmp_path / "a").high == math.inf
    assert any(
        line.startswith(f"If time and examples matter equally{AS_IF}: a batch of at least") for line in out
    )
    assert any("`gns probe --adapter RUN`" in line and "640" in line for line in out)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--batch-size", 0], "batch_size is 0; a whole number, 1 or more, is needed"),
        (
            ["--throughput", "fast"],
            "throughput 'fast': no such file; a file that `gns throughput` wrote is needed, or BATCH=",
        ),
        (["--throughput", "16=x"], "throughput '16=x': no such file; a file that"),
        (["--throughput", "16=-1"], "throughput at batch 16 is -1.0; a finite number > 0 is needed"),
        (
            ["--throughput", "foreign.json"],
            "foreign.json: damaged or foreign; a file that `gns throughput` wrote",
        ),
        (["--time-price", 0], "time_price is 0.0; a finite number > 0 is needed"),
        (
            ["--time-price", 2, "--step-price", 3],
            "time_price is 2.0 and step_price is 3.0; exactly one of the two",
        ),
        (["--examples-needed", -5], "examples_needed is -5.0; a finite number > 0 is needed"),
        (["--data-bits", 0], "data_bits is 0.0; a finite number > 0 is needed"),
        (["--dataset-size", 0], "dataset_size is 0; a whole number, 1 or more, is needed"),
        (["--dataset-size", 4], "batch_size is 16 with a dataset_size of 4; at most that is needed"),
        (["--trainable-parameters", 0], "trainable_parameters is 0; a whole number, 1 or more, is needed"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_options_end_in_one_line(gns, folder, tmp_path, bad, message):
    (tmp_path / "foreign.json").write_text(json.dumps({"loss": 3}))
    code, out, err = gns("advise", "a", *bad)
    assert (code, out) == (2, []) and len(err) == 1 and err[0].startswith(f"gns: {message}")


def test_bits_without_parameters(gns, tmp_path):
    running.recorded(tmp_path / "a", running.of(100))
    code, _, err = gns("advise", "a", "--data-bits", 1e6)
    assert code == 2 and err == [
        "gns: data_bits says what the data carry; --trainable-parameters is needed beside it"
    ]


def test_a_terminal_gets_ruled_tables(gns, folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "──" in "\n".join(gns("advise", "a")[1])


def test_the_path_of_a_file_may_look_like_a_pair(gns, tmp_path):
    folder = running.recorded(tmp_path / "lr=1e-4", running.of(100))
    throughput.write(folder / "throughput.json", CURVE)
    code, out, _ = gns("advise", "lr=1e-4")
    assert code == 0 and row(out, "throughput")[2] == "lr=1e-4/throughput.json"
    assert gns("advise", "lr=1e-4", "--throughput", "lr=1e-4/throughput.json")[0] == 0


@pytest.mark.parametrize("command", ["advise", "report"])
@pytest.mark.parametrize("rate", ["2e-4", -1, True, 10**400])
def test_a_recorded_learning_rate_that_is_none_gives_way_to_that_of_the_steps(
    gns, folder, command, rate, monkeypatch
):
    monkeypatch.setattr("gns.report.drawn", lambda found: [])
    write_summary(folder, load(folder), settings={**SETTINGS, "learning_rate": rate}, batch_size=16)
    code, out, err = gns(command, "a")
    assert code == 0 and not err
    if command == "advise":
        assert row(out, "learning rate")[1] == "0.001 at batch 16"


def test_parameters_that_were_recorded_win_over_those_of_the_coverage(gns, folder):
    coverage = Coverage({"a": 300}, {"b": 100}, {"b": "no rule"})
    for settings, count in ((SETTINGS, "10,000"), ({**SETTINGS, "trainable_parameters": None}, "400")):
        write_summary(folder, load(folder), coverage=coverage, settings=settings, batch_size=16)
        assert row(gns("advise", "a")[1], "data and adapters")[1].endswith(f"against {count} parameters")
