"""What is published is what the committed rows say."""

import shutil

import pytest

from experiments.evidence import calibrated
from experiments.evidence.__main__ import read
from experiments.redraw import RESULTS, STUDIES, main, redraw
from gns.advising.calibration import calibrations

FAST = ("frozen_rank", "gpu", "line_search", "live", "overhead", "packed")


def test_every_published_figure_has_a_study_that_draws_it():
    drawn = {path.parent.name for path in RESULTS.glob("*/*.png")}
    assert drawn and drawn <= set(STUDIES)


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in ("coverage", "evidence"))]
)
def test_pages_are_those_of_the_committed_rows(name, tmp_path):
    shutil.copytree(RESULTS / name, tmp_path / name)
    pictures = sorted(path.name for path in RESULTS.glob(f"{name}/*.png"))
    for path in tmp_path.glob(f"{name}/*.png"):
        path.unlink()
    written = redraw(name, tmp_path)
    assert sorted(path.name for path in written if path.suffix == ".png") == pictures
    for path in written:
        assert path.stat().st_size > 0
        if path.suffix == ".md":
            assert path.read_text() == (RESULTS / name / path.name).read_text()


@pytest.mark.slow
def test_the_package_names_the_constants_of_the_committed_rows():
    assert calibrated.calibrations(read(RESULTS / "evidence")) == list(calibrations())


def test_a_study_without_rows_and_one_that_is_unknown_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["live", "--results", str(tmp_path)])
    assert f"{tmp_path / 'live'}: no such folder of rows" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["lives"])
    assert "unknown study lives; known: coverage, evidence" in capsys.readouterr().err
