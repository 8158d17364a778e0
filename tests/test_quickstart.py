"""`make quickstart` at toy size: what it prints and writes."""

import importlib.util
import json
import pathlib

import pytest

import jaxsparse as js

SCRIPT = pathlib.Path(__file__).parents[1] / "experiments/quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
  spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_quickstart_writes_table_plot_and_json(quickstart, monkeypatch, tmp_path, capsys):
  chosen = [m for m in quickstart.methods() if m.label in ("dense", "magnitude", "sr_ste 2:4")]
  monkeypatch.setattr(quickstart, "methods", lambda: chosen)
  quickstart.main(["--steps", "40", "--seeds", "1", "--rounds", "2", "--out", str(tmp_path)])
  printed = capsys.readouterr()
  assert "100%" in printed.err  # the progress bar
  result = json.loads((tmp_path / "quickstart.json").read_text())
  assert [m["method"] for m in result["methods"]] == ["dense", "magnitude", "sr_ste 2:4"]
  for method, target in zip(result["methods"], (0.0, 0.9, 0.5)):
    assert method["method"] in printed.out
    assert method["sparsity"] == pytest.approx(target, abs=1e-3)
    assert method["step_ms"] > 0
    assert 0 < method["flops_kept"] <= method["parameters_kept"] <= 1
  assert result["methods"][0]["step_time_to_dense"] == 1
  assert (tmp_path / "quickstart.png").stat().st_size > 10_000


def test_quickstart_targets_are_what_updaters_aim_at(quickstart):
  for method in quickstart.methods():
    updater = method.make(100) if method.make else js.no_prune()
    assert updater.sparsity in (method.target, None)
