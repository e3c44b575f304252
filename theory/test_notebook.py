"""The notebook runs top to bottom, from its own folder, and is committed with outputs."""

import pathlib
import re
import warnings

import nbformat
import numpy as np
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "lemma_4_1.ipynb"


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    """The notebook as it lies in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


def text_of(notebook: nbformat.NotebookNode) -> str:
    """Printed text and tables of every code cell; pictures and reprs of objects left out."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in outputs)


def numbers(text: str) -> list[float]:
    """Every number in a text."""
    return [float(v.replace(",", "")) for v in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]


def test_notebook_runs_from_its_own_folder(committed) -> None:
    """Every cell runs, as a user would open it, and prints the committed numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kernel client's own event-loop and transport warnings
        from nbclient import NotebookClient

        fresh = nbformat.from_dict(nbformat.v4.upgrade(committed))
        where = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(fresh, timeout=600, kernel_name="python3", resources=where).execute()
    seen, stored = text_of(fresh), text_of(committed)
    assert re.sub(r"[-+\d., ]+", "#", seen) == re.sub(r"[-+\d., ]+", "#", stored)
    np.testing.assert_allclose(numbers(seen), numbers(stored), rtol=0.02, atol=0.3)


def test_notebook_is_committed_with_outputs(committed) -> None:
    """Every code cell has run, in order, without error; at least seven figures are there."""
    cells = [c for c in committed.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    assert not any(o.get("name") == "stderr" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 7


def test_notebook_tells_and_does_not_define(committed) -> None:
    """It imports from theory, calls and shows: no def, no class, no path of the machine it ran on."""
    source = "\n".join(c.source for c in committed.cells if c.cell_type == "code")
    assert "from theory import" in source and "def " not in source and "class " not in source
    everything = nbformat.writes(committed)
    for machine in ("/home/", "/root/", "/Users/", "site-packages", str(NOTEBOOK.parents[1])):
        assert machine not in everything
