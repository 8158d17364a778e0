"""The notebooks run from the first cell to the last, at toy size."""

import pathlib
import warnings

import pytest

COLABS = pathlib.Path(__file__).parents[1] / "colabs"


@pytest.mark.parametrize("name", ["deep_dive", "prune_a_language_model", "quick_start"])
def test_colab_runs(name, monkeypatch, tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the notebook machinery; the notebook's own code runs in another process
    import nbclient
    import nbformat

    notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    monkeypatch.setenv("JAXSPARSE_COLAB_STEPS", "12")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in less time; toy sizes need no speed
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
  pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
  assert pictures


@pytest.mark.parametrize("name", ["deep_dive", "prune_a_language_model", "quick_start"])
def test_colab_is_stored_without_outputs(name):
  import nbformat

  notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
  assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
