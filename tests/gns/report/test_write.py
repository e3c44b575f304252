import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from gns import load, probe
from gns.advice import advise
from gns.advising import throughput
from gns.advising.throughput import Speed, Throughput
from gns.advising.wording import START
from gns.estimate import estimate, format_count
from gns.probing.file import write_probe
from gns.records import RecordsError, StepsWriter, read_steps, read_summary
from gns.report import redraw, write_report
from gns.report.page import ticked
from gns.report.text import signal, verdict
from gns.statistics.drift import drift
from gns.statistics.views import progress_weighted
from gns.sums import Layout
from tests.gns.report.conftest import covered, draw

EVIL = '<script>alert("x")</script>'
NAMES = ("noise_scale", "trade_off", "learning_rates", "signal_and_noise", "modules", "depth", "factors")
PNGS = {f"{name}.png" for name in NAMES}


class Page(HTMLParser):
    """Collects what a browser would: tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset") and v]

    def handle_data(self, data):
        self.text += data


def page_of(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


KEPT = {"settings": {"note": "kept", "learning_rate": 1e-3}, "batch_size": 24, "level": 0.9}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, runs):
    """A folder and what was returned: one report with every figure, which take seconds to draw."""
    folder = tmp_path_factory.mktemp("whole") / "a" / "b"
    return folder, write_report(folder, runs["measured"], coverage=covered(), **KEPT)


def test_report_writes_everything_and_returns_the_page(whole, runs, coverage):
    folder, path = whole
    assert path == folder / "report.html"
    assert set(os.listdir(path.parent)) == {"report.html", "steps.jsonl", "summary.json", *PNGS}
    loaded = load(path.parent)
    expected = estimate(runs["measured"], level=0.9)
    assert replace(loaded, history=(), coverage=None) == expected
    assert loaded.coverage == coverage.share


def test_page_is_self_contained(whole):
    folder, _ = whole
    page = page_of(folder)
    assert "script" not in page.tags and "link" not in page.tags and page.tags.count("img") == len(NAMES)
    assert page.addresses and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert page.tags.count("source") == len(NAMES)  # each also for dark pages
    style = re.search(r"<style>.*?</style>", (folder / "report.html").read_text(), re.S)
    assert (
        style and "url(" not in style[0] and "@import" not in style[0] and "prefers-color-scheme" in style[0]
    )


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "status", ["measured", "lower bound", "not detectable", "collecting", "skipped", "empty"]
)
def test_verdict_comes_first_for_every_status(tmp_path, runs, status):
    page = page_of(write_report(tmp_path, runs[status]).parent)
    result = estimate(runs[status])
    if status not in ("skipped", "empty"):
        assert result.status == status
    said = verdict(result)
    places = [
        page.text.index(part)
        for part in (said.title, said.sure, "What to do", "Settings of the run", "Words used")
    ]
    assert places == sorted(places)
    assert "nan" not in page.text.lower().split() and "None of 0" in page.text or status != "empty"


@pytest.mark.usefixtures("undrawn")
def test_page_answers_what_how_sure_and_what_to_do(tmp_path, runs, coverage):
    settings = {"learning_rate": 2e-4, "dataset_size": 5000, "versions": {"torch": "2.13"}}
    page = page_of(write_report(tmp_path, runs["measured"], coverage=coverage, settings=settings).parent)
    for part in (
        "in examples",
        "examples (mean 100 tokens)",
        "95 % sure that its average over these steps lies between",
        "If time and examples matter equally",
        f"{START} See",
        "One epoch of 5,000 examples",
        "Learning rate 0.0002 at batch 16 becomes",
        "factor A",
        "16 (in use)",
        "versions.torch",
        "8 of 9 trainable parameters, 80 % of their numbers",
        "a gradient of this step is not finite",
        "B_simple is not the critical batch size itself",
    ):
        assert part in page.text, part


@pytest.mark.usefixtures("undrawn")
def test_warnings_signal_and_outlook_stand_at_the_top(tmp_path, runs):
    steps = [replace(s, mean_fourth=50.0, top_sq_norms=(15.0, 1.0)) for s in runs["measured"] if s.usable]
    result = estimate(steps)
    assert result.warnings, "these steps are meant to have heavy tails"
    page = page_of(write_report(tmp_path, steps).parent)
    top = page.text[: page.text.index("Settings of the run")]
    assert top.count(f"Careful: {result.warnings[0]}") == 1 and signal(result.p_value) in top
    assert result.outlook() in top and "Any signal at all?" in top and "For ±20 %" in top
    assert "learning rate0.0002" in top and "clippingnot recorded" in top


@pytest.mark.usefixtures("undrawn")
def test_no_limit_is_named_where_the_noise_comes_out_below_zero(tmp_path, runs):
    """Legal with unequal weights: then no upper end can be promised."""
    said = "can give an upper end to a noise scale of at most"
    loud = [replace(row, rows=None, layout=None) for row in runs["measured"] if row.usable]
    quiet = [replace(row, mean_sq_norm=row.sq_norm_of_mean * (0.5 + row.step % 3 / 50)) for row in loud]
    assert estimate(quiet).trace_sigma < 0
    assert said in page_of(write_report(tmp_path / "a", loud).parent).text
    text = page_of(write_report(tmp_path / "b", quiet).parent).text
    assert said not in text and "at most ?" not in text


def test_a_frozen_probe_is_reported_as_what_it_is(tmp_path):
    model = torch.nn.Linear(4, 1)
    batches = torch.randn(30, 8, 4, generator=torch.Generator().manual_seed(0))
    found = probe(model, batches, loss=lambda model, x: (model(x) - 1).square().mean())
    write_probe(tmp_path, found)
    page = page_of(redraw(tmp_path).parent)
    assert found.status == "measured" and verdict(found).title in page.text
    for part in (
        "95 % sure that it, at these weights, lies between",
        "30 batches at frozen weights × 8 examples",
        "all pairs of examples at one parameter point",
    ):
        assert part in page.text, part
    assert "Two averages" not in page.text and "optimizer steps × " not in page.text
    assert not (tmp_path / "noise_scale.png").exists() and (tmp_path / "trade_off.png").exists()
    assert load(tmp_path).b_simple == found.b_simple  # the probe stays the probe


@pytest.mark.usefixtures("undrawn")
def test_two_averages_each_named(tmp_path, runs):
    page = page_of(write_report(tmp_path / "a", runs["measured"]).parent)
    ratio, progress = estimate(runs["measured"]), progress_weighted(runs["measured"], batch_size=16)
    table = page.text[page.text.index("Two averages over the run") :]
    assert ratio.view in table and progress.view in table and ratio.view != progress.view
    assert table.index(ratio.view) < table.index(progress.view) < table.index("More advice")
    assert f"{format_count(progress.low)} … {format_count(progress.high)}" in table
    page = page_of(write_report(tmp_path / "b", runs["lower bound"], batch_size=10**6).parent)
    assert "The progress-weighted mean is not resolved by these steps" in page.text
    assert "Two averages" not in page_of(write_report(tmp_path / "c", runs["empty"]).parent).text


@pytest.mark.usefixtures("undrawn")
def test_texts_from_outside_are_escaped(tmp_path, runs, coverage):
    settings = {EVIL: EVIL, "nested": {EVIL: [EVIL]}}
    steps = [*runs["measured"], replace(runs["skipped"][0], reason=f"because {EVIL}")]
    folder = tmp_path / "<script>alert(1)<" / "run"  # a hostile folder name above changes nothing either
    text = write_report(folder, steps, coverage=coverage, settings=settings).read_text()
    assert "<script" not in text
    page = Page(text)
    assert page.tags.count("script") == 0
    assert page.text.count(EVIL) >= 6  # shown as text: two of coverage, one reason, four of settings


def test_hostile_names_of_modules_are_drawn_as_they_are(tmp_path, runs):
    evil = [f"layers.{i}.{EVIL}$\\frac{{1}}$.lora_{f}.default.weight" for i in range(4) for f in "AB"]
    layout = Layout(tuple(evil))
    steps = [replace(s, layout=layout) for s in runs["measured"] if s.usable]
    text = write_report(tmp_path, steps).read_text()
    assert "<script" not in text and (tmp_path / "modules.png").exists()


def test_page_is_drawn_anew_from_the_records_alone(whole, tmp_path):
    path = shutil.copytree(whole[0], tmp_path / whole[0].name) / "report.html"
    tmp_path = path.parent
    first, records = path.read_text(), (tmp_path / "steps.jsonl").read_bytes()
    for name in (*PNGS, "report.html"):
        (tmp_path / name).unlink()
    assert redraw(str(tmp_path)) == path
    assert path.read_text() == first
    assert (tmp_path / "steps.jsonl").read_bytes() == records
    summary = read_summary(tmp_path)
    assert (summary.level, summary.batch_size, summary.settings["note"]) == (0.9, 24, "kept")


@pytest.mark.usefixtures("undrawn")
def test_redraw_of_a_killed_run_keeps_the_good_records_and_says_so(tmp_path, runs):
    writer = StepsWriter(tmp_path / "steps.jsonl")
    for step in runs["measured"]:
        writer.write(step)
    cut = (tmp_path / "steps.jsonl").read_bytes()[:-30]
    (tmp_path / "steps.jsonl").write_bytes(cut)
    with pytest.warns(UserWarning, match="cut short"):
        redraw(tmp_path)
    page = page_of(tmp_path)
    assert "cut short" in page.text and "Noise scale ≈" in page.text
    assert (tmp_path / "steps.jsonl").read_bytes() == cut
    assert json.loads((tmp_path / "summary.json").read_text())["estimate"]["n_steps"] == 58


def test_redraw_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no steps\.jsonl"):
        redraw(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"text": "data"}\n')
    with pytest.raises(RecordsError, match="not a gns-steps header"):
        redraw(tmp_path)
    assert os.listdir(tmp_path) == ["steps.jsonl"]


@pytest.mark.usefixtures("undrawn")
def test_records_of_a_sink_are_not_written_again(tmp_path, runs):
    writer = StepsWriter(tmp_path / "steps.jsonl")
    for step in runs["measured"]:
        writer.write(step)
    before = os.stat(tmp_path / "steps.jsonl")
    write_report(tmp_path, runs["measured"][20:])  # a bounded history has forgotten the first
    after = os.stat(tmp_path / "steps.jsonl")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert load(tmp_path).n_steps == estimate(runs["measured"]).n_steps
    writer.write(replace(runs["measured"][-1], step=60))
    assert len(read_steps(tmp_path / "steps.jsonl")) == 61


def test_a_later_report_leaves_no_figure_of_an_earlier_one(tmp_path, runs):
    write_report(tmp_path, runs["measured"])
    write_report(tmp_path, runs["collecting"])
    left = {name for name in NAMES if (tmp_path / f"{name}.png").exists()}
    assert left == {"noise_scale", "signal_and_noise", "depth", "factors"}
    assert page_of(tmp_path).tags.count("img") == len(left)


@pytest.mark.usefixtures("undrawn")
def test_batch_size_in_use_defaults_to_the_usual_step(tmp_path, runs):
    write_report(tmp_path, runs["measured"])
    assert read_summary(tmp_path).batch_size == 16


@pytest.mark.usefixtures("undrawn")
def test_settings_that_make_no_sense_do_not_stop_the_report(tmp_path, runs):
    settings = {"learning_rate": "cosine", "dataset_size": 3}
    text = write_report(tmp_path, runs["measured"], settings=settings).read_text()
    assert "cosine" in text and "One epoch" not in text


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_shown_twice_in_the_settings(tmp_path, runs):
    settings = {"lr": 2e-4, "learning_rate": 2e-4, "batch_size": 16, "steps": 9}
    settings["steps_made"] = 9
    path = write_report(tmp_path / "a", runs["measured"], settings=settings, batch_size=16)
    assert [row for row in rows_of(path) if not row[0].startswith(("versions.", "commit"))] == [
        ("batch size in use (examples per optimizer step)", "16"),
        ("learning_rate", "0.0002"),
        ("steps_made", "9"),
    ]
    differ = {"lr": 1e-4, "learning_rate": 2e-4, "batch_size": 8}
    path = write_report(tmp_path / "b", runs["measured"], settings=differ, batch_size=16)
    assert [row[0] for row in rows_of(path)][-3:] == ["lr", "learning_rate", "batch_size"]
    assert read_summary(tmp_path / "a").settings.items() >= settings.items()


def rows_of(path):
    table = path.read_text().split("Settings of the run")[1].split("Words used")[0]
    return re.findall(r"<tr><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td></tr>", table)


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_moved_is_reported_by_its_last_third(tmp_path):
    rising = [replace(s, step=i) for i, s in enumerate(draw(40, 16, 1 / 4) + draw(80, 16, 1 / 100, seed=6))]
    path, change = write_report(tmp_path, rising), drift(rising)
    whole = estimate(rising)
    assert change is not None and change.moved
    page = page_of(path.parent)
    assert f"{verdict(whole, change).title}" in page.text and "on average, and rising" in page.text
    assert "95 % sure that its average" not in page.text and "measured, but moving" in page.text
    assert page.text.count("The noise scale moved during the run") == 1
    assert "LoRA factors and parts of the ratio, over all steps" in page.text
    last = "for the last third of the run, steps 80–119"
    assert (
        f"What to do, {last}" in page.text and f"Steps and examples at each batch size, {last}" in page.text
    )
    for line in advise(change.last, batch_size=16, learning_rate=2e-4).sentences:
        assert line in page.text
    assert json.loads((tmp_path / "summary.json").read_text())["estimate"]["b_simple"] == whole.b_simple
    assert load(tmp_path).low == whole.low
    more = [format_count(part.more_examples(0.2)) for part in (change.last, whole)]
    assert more[0] != more[1] and f"For ±20 %, last third{more[0]} more" in page.text


@pytest.mark.usefixtures("undrawn")
def test_the_page_is_in_plain_english(tmp_path, runs):
    page = page_of(write_report(tmp_path, runs["measured"], settings={"learning_rate": 1e-3}).parent)
    for hard in ("dearer", "from infinity", "alike", "mostly noise, but"):
        assert hard not in page.text
    assert "makes good use of every example, but needs many optimizer steps" in page.text


LORA = {
    "trainable_parameters": 10_000,
    "first_epoch_loss": 2.0,
    "loss_tokens": 200_000,
    "adapted_layers": [[64, 64, 4, 8]],
}


@pytest.mark.usefixtures("undrawn")
def test_capacity_cost_and_measured_speed_stand_on_the_page(tmp_path, runs):
    curve = Throughput((Speed(16, 16, 1, 0.2, 0.2, 0.2, 7), Speed(64, 64, 1, 0.4, 0.4, 0.4, 7)), "…")
    throughput.write(tmp_path / "throughput.json", replace(curve, settings={"tokens_per_example": 1000}))
    page = page_of(
        write_report(tmp_path, runs["measured"], settings={**LORA, "first_epoch_share": 0.2}).parent
    )
    for part in (
        "at most 577 kbit (log-loss of the first 20 % of an epoch, as if the rest were like it)",
        "the adapters hold about 20 kbit (2 for each of 10,000 parameters)",
        "A training step of LoRA takes 79 % of the multiply-adds",
        "On this machine the soonest in wall-clock time among the batches timed: 64.",
        "Careful: the throughput was timed with 1000 tokens an example, the run's have a loss on 100",
    ):
        assert part in page.text, part


@pytest.mark.usefixtures("undrawn")
def test_parameters_that_no_setting_tells_come_from_the_coverage(tmp_path, runs, coverage):
    settings = {name: value for name, value in LORA.items() if name != "trainable_parameters"}
    page = page_of(write_report(tmp_path, runs["measured"], settings=settings, coverage=coverage).parent)
    assert "2 for each of 400 parameters" in page.text


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_throughput_file_does_not_stop_the_report(tmp_path, runs):
    (tmp_path / "throughput.json").write_text("{")
    page = page_of(write_report(tmp_path, runs["measured"]).parent)
    assert "throughput.json: damaged or foreign; a file that gns throughput wrote is needed" in page.text
    assert "If time and examples matter equally" in page.text and "soonest" not in page.text


@pytest.mark.usefixtures("undrawn")
def test_no_backtick_is_shown_and_names_between_them_are_code(tmp_path, runs):
    for status in ("measured", "lower bound"):
        folder = write_report(tmp_path / status, runs[status]).parent
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert "`" not in text and "<code>gns throughput</code>" in text
    assert ticked("`<b>` & c") == "<code>&lt;b&gt;</code> &amp; c"
