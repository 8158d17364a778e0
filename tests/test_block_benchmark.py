"""The benchmark of the block-sparse products at toy size, and that documentation holds what its results say."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def table():
  spec = importlib.util.spec_from_file_location("block_matmul_table", ROOT / "benchmarks" / "block_matmul_table.py")
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    spec.loader.exec_module(module)
  return module


def run(*arguments):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "benchmarks/block_matmul.py", *arguments]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_toy_size(tmp_path, table):
  arguments = ["--shapes=square/8192", "--densities=0.5,0.1", "--blocks=64x64", "--rounds=1", "--iterations=1",
               "--workers=1", f"--out={tmp_path}/block"]  # fmt: skip
  assert "3 of 3 cells, 0 failed" in run(*arguments, "--products=dx")
  first = json.loads((tmp_path / "block.json").read_text())["rows"]
  assert "3 of 3 cells, 0 failed" in run(*arguments, "--products=fwd", "--resume")
  found = json.loads((tmp_path / "block.json").read_text())
  assert len(found["rows"]) == 6 and all(row in found["rows"] for row in first), "what is there is not measured again"
  assert not found["failed"] and not found["not_measured"]
  for row in found["rows"]:
    assert row["implementation"] == "xla" and row["error"] < 4e-3 and row["us"] > 0
  made = table.tables(found)
  assert "| 256 x 256 | 9 | 64x64 |" in made["grid"] and "| 256 x 256 | 9 |" in made["skewed"]
  assert '[256, 256, "64x64", 9, "dx",' in table.measured(found)


def rows(**ratios):
  """Rows of one shape: density -> ratio."""
  base = dict(shape="s", K=8192, O=8192, block="64x64", B=8192, product="fwd", pattern="random", us=1.0, kept=1)
  return [base | dict(density=float(d.replace("_", "0.", 1)), ratio=r) for d, r in ratios.items()]


def test_break_even(table):
  at = lambda **ratios: table.break_even(rows(**ratios))[0]["dense wins above"]
  assert at(_1=4.0, _4=1.0) == pytest.approx(0.4)
  assert at(_1=4.0, _4=0.25) == pytest.approx(0.2)  # ratio = 0.04 / density^2
  assert at(_1=4.0, _4=2.0) == pytest.approx(0.8)  # beyond the last: ratio * density stays
  assert at(_1=4.0, _5=3.0) == 1.0
  assert at(_1=0.5, _4=0.25) == 0.0


def test_pictures(table, tmp_path):
  """Both are drawn from the measurements there are, every weight among them."""
  found = json.loads((RESULTS / "block_matmul_h100.json").read_text())
  assert {row["shape"] for row in found["rows"]} == set(table.block_matmul_plot._WEIGHTS)
  table.plot(tmp_path / "all.png", found)
  assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("all.png", "all_rows.png"))


def test_goals(table):
  text = table.goals(rows(_5=1.5, _1=5.9))
  assert "| 0.5 | 1.7 |  |  |  | 1.5 | **1.5** |" in text and "| 0.1 | 7 |  |  |  | 6 | 5.9 |" in text


def test_documentation_holds_the_results(table):
  """`block_matmul_table.py` with the arguments in docs/block_matmul.md changes nothing."""
  found = json.loads((RESULTS / "block_matmul_h100.json").read_text())
  trained = json.loads((RESULTS / "block_sparse_transformer_h100.json").read_text())
  made = table.tables(found, trained)
  text = {path: (ROOT / path).read_text() for path in ("docs/block_matmul.md", "README.md")}
  for path, now in text.items():
    assert table.fill(now, made) == now, path
  for name in made:
    assert any(f"<!-- table: {name} -->" in now for now in text.values()), name
  measured = ROOT / "jaxsparse" / "ops" / "block_matmul" / "measured" / "nvidia_h100.json"
  assert table.measured(found) == measured.read_text()
