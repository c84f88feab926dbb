"""Every notebook of the tutorials runs from its first cell to its last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

_PLOTLY = "application/vnd.plotly.v1+json"
FOLDER = Path(__file__).parents[1] / "tutorials"


def _runs() -> list[Any]:
    """The notebooks; the one that runs 500 pairs through two models takes a minute, and tests/studies runs its study on a few pairs."""
    slow = {"a_study_that_continues": pytest.mark.slow}
    paths = sorted(FOLDER.glob("*.ipynb"))
    return [pytest.param(path, id=path.stem, marks=slow.get(path.stem, ())) for path in paths]


@pytest.mark.parametrize("path", _runs())
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.cell_type == "code" for cell in notebook.cells)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    # Threads of several small processes wait for one another: eight times slower beside other tests.
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "CIRCUITVISION_PNG": "0"})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_figures_carry_a_png(path: Path) -> None:
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    figures = [output.data for output in outputs if _PLOTLY in output.get("data", {})]
    assert figures
    assert all("image/png" in data for data in figures)
    assert all(len(data["image/png"]) < 200_000 for data in figures)


def test_there_are_notebooks() -> None:
    assert len(list(FOLDER.glob("*.ipynb"))) >= 1
