import re
from dataclasses import replace

import pytest

from gns.estimate import estimate
from gns.records import STEPS, Summary, read_summary, write_steps, write_summary
from gns.report import compare
from gns.report.comparison import _apart, differing, told
from gns.report.findings import findings
from tests.gns.report.conftest import EVIL, draw
from tests.gns.report.test_write import Page


def found(steps, name="run", level=0.95, **settings):
    return findings(name, steps, Summary(level, None, settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three runs: two whose noise scales differ, one too short."""
    root = tmp_path_factory.mktemp("runs")
    runs = {
        "small": draw(40, 16, 1 / 10),
        "large": draw(60, 16, 1 / 100, seed=3),
        "short": draw(6, 8, 1 / 10),
    }
    for name, steps in runs.items():
        (root / name).mkdir()
        write_steps(root / name / STEPS, steps)
        settings = {"seed": len(name), "note": f"{EVIL} {name}"}
        write_summary(root / name, estimate(steps), settings=settings)
    return [root / name for name in runs]


def test_the_page_is_self_contained_and_lies_beside_the_first_run(folders):
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    path = compare(folders)
    assert path == folders[0].parent / "comparison.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "<script" not in text
    assert page.tags.count("img") == page.tags.count("source") == 1
    assert all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert before == {path: path.read_bytes() for folder in folders for path in folder.iterdir()}


def test_verdict_then_figure_then_table_then_settings(folders, tmp_path):
    page = Page(compare(folders, tmp_path / "new" / "all.html").read_text(encoding="utf-8"))
    parts = (
        "All noise scales differ",
        "is below large (",
        "Too early to compare: short",
        "The runs",
        "Settings that",
    )
    places = [page.text.index(part) for part in parts]
    assert places == sorted(places)
    rows = re.findall(r"(small|large|short)([≥\d., ]+?)(\S+ … \S+?)95 %(measured|collecting)", page.text)
    assert [(row[0], row[3]) for row in rows] == [
        ("small", "measured"),
        ("large", "measured"),
        ("short", "collecting"),
    ]
    assert f"{EVIL} large" in page.text and "seed 5 5 5" not in page.text


def test_runs_that_cannot_be_told_apart_are_said_to_be_so():
    runs = {"a": found(draw(40, 16, 1 / 50)), "b": found(draw(40, 16, 1 / 50, seed=9))}
    said = told(runs)
    assert said.title == "No difference can be told" and "meet" in said.sentences[0] and not said.warnings


def test_fewer_than_two_intervals_are_no_comparison():
    said = told({"a": found(draw(40, 16, 1 / 50)), "b": found(draw(5, 16, 1 / 50))})
    assert said.title == "Too early to compare"


def test_what_makes_runs_hard_to_compare_is_named():
    plain = draw(40, 16, 1 / 20)
    runs = {
        "a": found(plain),
        "rate": found([replace(s, learning_rate=1e-3) for s in plain]),
        "long": found([replace(s, n_tokens=9000) for s in plain]),
        "level": found(plain, level=0.8),
        "uncounted": found([replace(s, call_seen=False) for s in plain]),
        "moving": found(
            [replace(s, step=i) for i, s in enumerate(draw(40, 16, 1 / 4) + draw(80, 16, 1 / 100))]
        ),
    }
    said = " ".join(told(runs).warnings)
    for part in (
        "different units",
        "tokens on average",
        "different levels",
        "learning rate differ",
        "was rising",
    ):
        assert part in said, part
    assert told({"a": runs["a"], "b": found(draw(40, 16, 1 / 20, seed=8))}).warnings == ()


def test_only_settings_that_differ_are_listed_and_what_is_missing_too():
    steps = draw(30, 16, 1 / 20)
    rows = dict(
        differing({"a": found(steps, seed=1, optim="adamw", rank=8), "b": found(steps, seed=2, rank=8)})
    )
    assert rows["seed"] == ["1", "2"] and rows["optimizer"] == ["adamw", "not recorded"]
    assert "rank" not in rows and "learning rate" not in rows


def test_a_comparison_needs_two_different_runs(folders):
    with pytest.raises(ValueError, match="1 run"):
        compare(folders[:1])
    with pytest.raises(ValueError, match="twice"):
        compare([folders[0], folders[0]])
    with pytest.raises(FileNotFoundError, match=r"holds no steps\.jsonl"):
        compare([folders[0], folders[0].parent / "nope"])
    assert read_summary(folders[0]).settings["seed"] == 5


def test_intervals_that_meet_are_not_apart_wherever_their_points_lie():
    result = estimate(draw(40, 16, 1 / 50))
    a, b = replace(result, b_simple=20, low=10, high=40), replace(result, b_simple=60, low=39, high=90)
    assert not _apart(a, b) and not _apart(b, a)
    assert _apart(a, replace(b, low=41)) and _apart(replace(b, low=41), a)


def test_many_pairs_are_said_to_differ_by_chance_more_often():
    apart = {name: found(draw(40, 16, 1 / b, seed=b)) for name, b in (("a", 10), ("b", 100))}
    assert not any("by chance" in w for w in told(apart).warnings)
    many = {f"r{i}": found(draw(40, 16, 1 / 50, seed=i)) for i in range(4)} | apart
    assert any(w.startswith("15 pairs are compared") for w in told(many).warnings)
