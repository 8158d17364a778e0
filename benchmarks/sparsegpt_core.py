"""SparseGPT of one large layer: seconds, memory, and the objective against a float64 implementation.

  PYTHONPATH=. python benchmarks/sparsegpt_core.py [--shapes=4096x4096] [--scale=1] [--blocks=64,128,256]
    [--out=results/sparsegpt_core]

The layer and its calibration inputs are random, with inputs that are correlated. Seconds are wall-clock for one finished
call, compilation apart; the goals are for an H100. The reference follows the paper to the letter (the inverse of H, its
Cholesky factor, one row after the other) in float64, for some of the outputs where these are independent. Rows are written as they come, and kept by a later run with the same --out.
"""

from concurrent import futures
import functools
import json
import pathlib
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import report

from jaxsparse import calibration
from jaxsparse import structures

_SCALE = flags.DEFINE_integer("scale", 1, "Divides every side: to try the script on a CPU.")
_SHAPES = flags.DEFINE_list("shapes", None, "Any of 4096x4096, 4096x14336 and 14336x4096; all of them by default.")
_BLOCKS = flags.DEFINE_list("blocks", ["64", "128", "256"], "Rows of a block.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Calls; the median is reported.")
_OUT = flags.DEFINE_string("out", "results/sparsegpt_core", "Where the JSON goes, without suffix.")

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
STRUCTURES = (structures.NM(2, 4), structures.FixedFanIn(), structures.Unstructured())
GOALS = {(4096, 4096): 1.0, (4096, 14336): 4.0, (14336, 4096): 4.0}
REFERENCE_OUTPUTS = 256


@functools.partial(jax.jit, static_argnums=(1, 2))
def make_layer(key, rows, outputs):
  """A weight, and the Gram matrix of inputs that share a few directions."""
  a, b, c, d = jax.random.split(key, 4)
  shared = jax.random.normal(a, (2 * rows, rows // 16))
  x = jax.random.normal(b, (2 * rows, rows)) + shared @ jax.random.normal(c, (rows // 16, rows)) / 4
  return jax.random.normal(d, (rows, outputs)), jnp.matmul(x.T, x, precision="highest")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def textbook(w, gram, structure, block, damping=0.01):
  """The paper's algorithm for structures that rank each output by itself."""
  k = w.shape[0]
  h = gram + jnp.eye(k) * damping * jnp.mean(jnp.diagonal(gram))
  u = jnp.linalg.cholesky(jnp.linalg.inv(h)).T
  local = isinstance(structure, structures.NM)
  run = structure.m if local else block
  keep = structure.n if local else run // 2

  def one_run(s, state):
    w, done = state
    here = (
      jax.lax.dynamic_slice_in_dim(w, s * run, run)
      / jax.lax.dynamic_slice_in_dim(jnp.diagonal(u), s * run, run)[:, None]
    )
    rank = jnp.argsort(jnp.argsort(-jnp.abs(here), axis=0, stable=True), axis=0, stable=True)

    def one_row(i, state):
      w, done = state
      at = s * run + i
      row = jnp.where(rank[i] < keep, w[at], 0)
      error = (w[at] - row) / u[at, at]
      return w - u[at][:, None] * error[None], done.at[at].set(row)

    return jax.lax.fori_loop(0, run, one_row, (w, done))

  return jax.lax.fori_loop(0, k // run, one_run, (w, jnp.zeros_like(w)))[1]


@jax.jit
def objective(w, start, gram):
  """||X (w - start)||^2 / ||X start||^2, in float64."""
  w, start, gram = (a.astype(jnp.float64) for a in (w, start, gram))
  away = w - start
  return jnp.sum(away * (gram @ away)) / jnp.sum(start * (gram @ start))


def compile_case(shape, structure, block):
  k, outputs = shape
  spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  keep = jnp.int32(calibration.keep_units(structure, shape, 0.5))
  start = time.perf_counter()
  compiled = calibration.sparsegpt.lower(spec(k, outputs), spec(k, k), structure, keep, block=block).compile()
  seconds = time.perf_counter() - start
  return lambda w, gram: compiled(w, gram, keep), seconds


def measure(call, w, gram):
  seconds = []
  for _ in range(_ROUNDS.value):
    start = time.perf_counter()
    result = jax.block_until_ready(call(w, gram))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds), result


def main(argv):
  del argv
  out = pathlib.Path(_OUT.value + ".json")
  shapes = SHAPES if _SHAPES.value is None else [tuple(map(int, shape.split("x"))) for shape in _SHAPES.value]
  if unknown := [shape for shape in shapes if shape not in SHAPES]:
    raise app.UsageError(f"--shapes: {unknown} are not among {SHAPES}.")
  cases = [
    (tuple(n // _SCALE.value for n in s), st, int(b), s) for s in shapes for st in STRUCTURES for b in _BLOCKS.value
  ]
  key_of = lambda row: (tuple(row["shape"]), row["structure"], row["block"])
  results = json.loads(out.read_text())["rows"] if out.exists() else []
  layer, truth = (None, None), {}
  with futures.ThreadPoolExecutor(8) as pool:
    compiled = [pool.submit(compile_case, *case[:3]) for case in cases]
    print(
      f"{'K':>6} {'O':>6} {'structure':>12} {'block':>5} {'compile':>8} {'seconds':>8} {'goal':>5} {'objective':>10} {'float64':>10}"
    )
    for (shape, structure, block, full), future in zip(cases, compiled):
      if layer[0] != shape:
        layer = None, None
        layer = shape, make_layer(jax.random.key(0), *shape)
      w, gram = layer[1]
      call, compile_seconds = future.result()
      seconds, pruned = measure(call, w, gram)
      row = dict(shape=shape, structure=repr(structure), block=block, compile=compile_seconds, seconds=seconds)
      few = slice(0, REFERENCE_OUTPUTS)
      independent = not isinstance(structure, structures.Unstructured)
      with jax.enable_x64(True):
        row["objective"] = float(objective(pruned.weight[:, few], w[:, few], gram))
        key = (shape, structure, None if isinstance(structure, structures.NM) else block)
        if independent and key not in truth:
          exact = textbook(w[:, few].astype(jnp.float64), gram.astype(jnp.float64), structure, block)
          truth[key] = float(objective(exact, w[:, few], gram))
      row["float64"] = truth.get(key)
      row["goal"] = GOALS[full]
      results = [old for old in results if key_of(old) != key_of(row)] + [row]
      report.write_json(out, results)
      reference = "-" if row["float64"] is None else f"{row['float64']:.6f}"
      print(
        f"{shape[0]:6} {shape[1]:6} {type(structure).__name__:>12} {block:5} {compile_seconds:8.2f} {seconds:8.3f} "
        f"{row['goal']:5.1f} {row['objective']:10.6f} {reference:>10}",
        flush=True,
      )


if __name__ == "__main__":
  app.run(main)
