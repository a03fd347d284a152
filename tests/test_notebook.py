"""The notebook runs from top to bottom without an account and without earlier runs, and shows figures."""

import nbclient
import nbformat
import pytest

from conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs_and_shows_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    folder = ROOT / "report" / "plots"
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2 + 5  # of the runs, and of the comparison
    assert not [o for o in outputs if o.output_type == "error"]
