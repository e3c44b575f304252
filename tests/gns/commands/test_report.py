import pytest

from gns.estimate import estimate
from gns.records import STEPS, read_summary, write_steps, write_summary
from tests.gns.report.conftest import draw

pytestmark = pytest.mark.usefixtures("undrawn")  # of single runs; that of the comparison is drawn


@pytest.fixture
def report(gns, tmp_path):
    """Run `gns report` above two runs, a and b; give exit code, lines of standard output and of error."""
    for seed, (name, signal) in enumerate((("a", 1 / 10), ("b", 1 / 100))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        steps = draw(40, 16, signal, seed=seed)
        write_steps(tmp_path / "runs" / name / STEPS, steps)
        write_summary(tmp_path / "runs" / name, estimate(steps), settings={"seed": seed})
    return lambda *arguments: gns("report", *arguments)


def test_several_runs_are_compared_beside_the_first(report, tmp_path):
    code, out, err = report("runs/a", "runs/b")
    assert code == 0 and not err
    assert out[-1] == "Comparison: runs/comparison.html"
    page = (tmp_path / "runs" / "comparison.html").read_text(encoding="utf-8")
    assert "All noise scales differ" in page and "data:image/png;base64," in page
    assert (tmp_path / "runs" / "a" / "report.html").exists()
    assert read_summary(tmp_path / "runs" / "b").settings == {"seed": 1}


def test_the_page_goes_where_it_is_told(report, tmp_path):
    code, out, _ = report("runs/a", "runs/b", "--out", "pages/both.html")
    assert code == 0 and out[-1] == "Comparison: pages/both.html"
    assert (tmp_path / "pages" / "both.html").exists()
    assert not (tmp_path / "runs" / "comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("runs/a", "--out", "x.html"), "name two or more runs"),
        (("runs/a", "runs/a"), "a run is named twice"),
        (("runs/a", "runs/../runs/a"), "a run is named twice"),
        (("runs/a", "runs/b", "--out", "runs"), "is a folder; the name of a page is needed"),
        (("runs/a", "nope"), "nope is not there"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(report, tmp_path, arguments, said):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = report(*arguments)
    assert code == 2 and not out and len(err) == 1 and said in err[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_one_run_makes_no_comparison(report, tmp_path):
    code, out, _ = report("runs/a")
    assert code == 0 and "Comparison" not in "\n".join(out) and not list(tmp_path.rglob("comparison.html"))
