"""The architecture: imports go down the layers, and only the allowed packages come in."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jaxsparse

ROOT = pathlib.Path(jaxsparse.__file__).parent
ALLOWED = {"jax", "numpy", "optax", "chex", "absl", "ml_collections"} | set(sys.stdlib_module_names)

# Lowest first; a module may import from its own layer and from those below.
LAYERS = (
  {"_tree", "_threshold", "_hold", "_zero_map"},
  {"selection", "masks"},
  {"structures", "distributions", "schedules", "scorers", "forwards"},
  {"rules"},
  {"_plan", "_state", "_compress"},
  {"_choice"},
  {"_engine"},
  {"_compact", "_instant"},
  {"_updater", "gradient_masking", "soft_threshold"},
  {"algorithms", "metrics", "recipes", "calibration", "nn", "optimizers"},
  {"config"},
)
STORAGE = {"arrays", "ops", "quant"}  # kernels and storage know nothing of training
OPTIONAL = {  # imported where they are used, with an error that says what is missing
  "arrays/_safetensors.py": {"safetensors"},
  "ops/_mosaic_async.py": {"jaxlib"},
  "ops/_mosaic_gpu.py": {"jaxlib"},
  "ops/_words.py": {"jaxlib"},
}
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
  """(module, line) of every import, dotted names in full."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno} has a relative import"
      # `from jaxsparse import masks` names a module, `from jaxsparse.rules import Rules` a name in one.
      whole = node.module == "jaxsparse"
      yield from ((f"jaxsparse.{a.name}" if whole else node.module, node.lineno) for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
  own = path.relative_to(ROOT).with_suffix("").parts[0]
  for module, line in imports(path):
    parts = module.split(".")
    where = f"{path}:{line} imports {module}"
    if parts[0] != "jaxsparse":
      if own not in ("nn",):
        allowed = ALLOWED | OPTIONAL.get(str(path.relative_to(ROOT)), set())
        assert parts[0] in allowed, f"{where}: allowed are {sorted(ALLOWED - set(sys.stdlib_module_names))}"
      continue
    if own == "__init__":
      continue
    assert len(parts) > 1, f"{where}: the package itself"
    other = parts[1]
    if own in STORAGE or other in STORAGE:
      assert own not in STORAGE or other in STORAGE | {"_tree"}, f"{where}: kernels know nothing of training"
      continue
    assert own in LEVEL and other in LEVEL, f"{where}: give the new module a layer in this test"
    assert LEVEL[other] <= LEVEL[own], f"{where}: upwards"


def test_axes_do_not_know_optax():
  for axis in LAYERS[2]:
    for path in sorted((ROOT / axis).rglob("*.py")):
      for module, line in imports(path):
        assert module.split(".")[0] != "optax", f"{path}:{line}: the axes are Optax-free"


def test_every_module_is_in_a_layer():
  modules = {p.relative_to(ROOT).with_suffix("").parts[0] for p in FILES} - {"__init__", "testing"} - STORAGE
  assert modules <= set(LEVEL), f"no layer for {sorted(modules - set(LEVEL))}"


def test_import_does_not_bring_flax_or_touch_devices():
  code = (
    "import sys, jaxsparse\n"
    "heavy = {'flax', 'orbax', 'safetensors', 'torch', 'tensorflow', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "kernels = [m for m in sys.modules if m.startswith(('jax.experimental.pallas', 'jax.experimental.mosaic'))]\n"
    "assert not kernels, kernels\n"
    "import jax\n"
    "assert not jax._src.xla_bridge._backends, 'importing jaxsparse starts a backend'\n"
  )
  done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_public_names():
  assert len(set(jaxsparse.__all__)) == len(jaxsparse.__all__) and "__version__" in jaxsparse.__all__
  for name in jaxsparse.__all__:
    assert hasattr(jaxsparse, name), name
  assert not {"set", "random", "jax", "jnp"} & set(jaxsparse.__all__)


def test_files_stay_short():
  for path in FILES:
    lines = len(path.read_text().splitlines())
    assert lines <= 600, f"{path} has {lines} lines; the limit is 600"


@pytest.mark.parametrize(
  "path", sorted((pathlib.Path(__file__).parent / "references").glob("*.py")), ids=lambda p: p.name
)
def test_references_are_independent(path):
  names = {module.split(".")[0] for module, _ in imports(path)}
  assert not names & {"jaxsparse", "jax", "optax"}, f"{path.name} imports {names}"
