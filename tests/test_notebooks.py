"""The notebooks run, in short form, and their committed outputs are there."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SHORT = {"MAX_STEPS": 80, "SEEDS": 1}


def test_sources_have_executed_notebooks() -> None:
    nbformat = pytest.importorskip("nbformat")
    sources = sorted(NOTEBOOKS.glob("*.py"))
    assert len(sources) == 4
    for source in sources:
        notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert any(cell.outputs for cell in code)
        assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1_first_search", "2_comparing_honestly", "3_inside_a_decision", "4_your_own_search"])
@pytest.mark.filterwarnings("ignore")
def test_runs(name: str) -> None:
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    source = (NOTEBOOKS / f"{name}.py").read_text()
    for parameter, value in SHORT.items():
        source = re.sub(rf"^{parameter} = \d+", f"{parameter} = {value}", source, flags=re.MULTILINE)
    notebook = jupytext.reads(source, fmt="py:percent")
    handler = signal.getsignal(signal.SIGINT)
    try:
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    finally:
        signal.signal(signal.SIGINT, handler)  # the client takes it, and gives back the default
