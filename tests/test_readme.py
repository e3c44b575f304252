"""The README's example runs as it stands there."""

import re
import warnings
from pathlib import Path

import pytest

from experiments.markdown import marks

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_run_and_measure(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for an attribute it renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        exec(compile(code, str(README), "exec"), names := {})
    said = capsys.readouterr().out
    estimate = names["monitor"].estimate()
    assert said.startswith("B_simple") and "25 steps × 8" in said
    assert estimate.coverage == 1 and estimate.n_examples == 200
    assert "56 of 56 trainable parameters measured" in said
    assert not names["monitor"].attached


@pytest.mark.parametrize("target", ["demo", "test"])
def test_its_two_commands_are_targets_of_the_makefile(target):
    assert f"make {target}" in README.read_text()
    assert re.search(rf"^{target}: ", (README.parent / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("page", [README, README.parent / "experiments" / "README.md"])
def test_what_it_says_of_the_evidence_is_what_the_rows_say(page):
    first, last = marks("evidence")
    part = page.read_text().partition(f"{first}\n")[2].partition(last)[0]
    evidence = README.parent / "experiments" / "results" / "evidence" / "README.md"
    answer = part.partition(" [Every number")[0]
    assert "configurations" in answer and answer in evidence.read_text()


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README.read_text())
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
