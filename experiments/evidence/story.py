"""The notebook that tells the evidence, run again in place so that it says what the rows say now."""

from __future__ import annotations

import os
import warnings
from pathlib import Path


def rerun(path: Path, timeout: float = 600) -> Path:
    """Run a notebook from its own folder, on one thread, and write it with its outputs.

    Args:
        path: of the notebook.
        timeout: of one cell, seconds.

    Raises:
        ImportError: nbclient or nbformat is missing.
        nbclient.exceptions.CellExecutionError: a cell fails; the file is then left as it was.
    """
    import nbformat

    root = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONPATH")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kernel client's own event-loop and transport warnings
        from nbclient import NotebookClient

        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(path.parent)}}
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        try:
            NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=where).execute()
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: another file at every run
    nbformat.write(notebook, path)
    return path
