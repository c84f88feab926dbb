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
    """The notebooks; those that take longest on one thread run with the slow tests (one of each kind of model stays)."""
    slow = (
        "a_study_that_continues",
        "does_the_circuit_explain_the_model",
        "interventions_are_values",
        "one_graph_from_pixels_to_action",
        "pixels_to_actions_in_pi0",
        "steering_a_robots_words",
        "what_a_vit_sees",
        "your_first_circuit",
    )
    paths = sorted(FOLDER.glob("*.ipynb"))
    return [pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in slow else ()) for path in paths]


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


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_outputs_tell_nothing_of_the_machine_they_were_made_on(path: Path) -> None:
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert "site-packages" not in path.read_text(encoding="utf-8")


def test_there_are_notebooks() -> None:
    assert len(list(FOLDER.glob("*.ipynb"))) >= 1
