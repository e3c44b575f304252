"""The notebook that tells the evidence, run again in place so that it says what the rows say now."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])


def ran(path: Path, timeout: float = 600) -> Any:
    """Run a notebook from its own folder, on one thread, with the packages of this checkout.

    Args:
        path: of the notebook, which is left as it is.
        timeout: of one cell, seconds.

    Returns:
        The notebook with its outputs.

    Raises:
        ImportError: nbclient or nbformat is missing.
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import nbformat

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kernel client's own event-loop and transport warnings
        from nbclient import NotebookClient

        notebook = nbformat.v4.upgrade(nbformat.read(path, as_version=4))
        where = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=where)
        return client.execute(env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})


def rerun(path: Path) -> Path:
    """Run a notebook and write it with its outputs; one that fails is left as it was."""
    import nbformat

    notebook = ran(path)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: another file at every run
    nbformat.write(notebook, path)
    return path
