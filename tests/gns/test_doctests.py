"""The examples in public docstrings run."""

import doctest
import importlib

import pytest

WITH_EXAMPLES = [
    "gns.monitor",
    "gns.commands.display",
    "gns.report.text",
    "gns.finetuning.sources",
    "gns.hessian",
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_run(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0 and failed == 0
