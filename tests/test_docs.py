"""The pages in docs/ name tests; each of them is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "setups.md").read_text())))


def test_the_page_of_set_ups_names_tests():
    assert len(NAMED) > 40


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_is_there(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_a_table_names_a_test_or_stands_below_one_that_does():
    page = (ROOT / "docs" / "setups.md").read_text()
    for section in page.split("\n## ")[1:]:
        heading, above = section.splitlines()[0], section.split("\n|")[0]
        for row in re.findall(r"^\| (?!---)(.*) \|$", section, re.M)[1:]:
            assert "`tests/" in row or "`tests/" in above, f"{heading}: {row}"
