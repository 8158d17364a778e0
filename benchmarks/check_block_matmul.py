"""Checks the block-sparse products on the device at hand, and times them: the first thing to run after a change of a kernel.

  python benchmarks/check_block_matmul.py [--implementation=hopper] [--notimes]

Every block size, empty, full, ragged and skewed patterns, both forms, three dtypes of the result; forward, transposed and
sampled product, also as gradients. Errors are relative to float32 products of XLA of the same operands. The last
lines are a table of times at 8192 x 8192 x 8192 beside the dense dot. Exits with 1 if anything is wrong.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import os
import statistics
import sys
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import report

import jaxsparse as js
from jaxsparse.ops.block_matmul import tuning

_IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Default: hopper on a GPU, xla elsewhere.")
_TIMES = flags.DEFINE_bool("times", True, "Time 8192 x 8192 x 8192, and several tunings of it.")

_BLOCKS = ((128, 128), (64, 64), (32, 32), (256, 64), (64, 256), (32, 128), (128, 32), (64, 32), (32, 64))
_TUNINGS = (
  tuning.Tuning(256, 4, 1, 1), tuning.Tuning(256, 4, 1, 8), tuning.Tuning(256, 4, 1, 1, cluster=2),
  tuning.Tuning(256, 4, 1, 1, cluster=4), tuning.Tuning(256, 3, 1, 1), tuning.Tuning(192, 4, 1, 1),
)  # fmt: skip
_LIMIT = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 2e-5}


def weight(k, o, block, density, *, seed=0, skew=False, extra=0, static=False, dtype=jnp.bfloat16):
  """A random weight; skewed: block column c keeps blocks in proportion to 1 / (c + 1)."""
  rng = np.random.default_rng(seed)
  grid = (k // block[0], o // block[1])
  share = np.full(grid[1], density)
  if skew:
    share = rng.permutation(1 / (1 + np.arange(grid[1])))
    low, high = 0.0, 1.0 / share.min()
    for _ in range(50):
      mid = (low + high) / 2
      low, high = (mid, high) if np.minimum(mid * share, 1).mean() < density else (low, mid)
    share = np.minimum(mid * share, 1)
  keep = rng.random(grid) < share
  rows, cols = np.nonzero(keep.T)[::-1]
  capacity = max(1, rows.size) + extra
  pad = (0, capacity - rows.size)
  blocks = jax.random.normal(jax.random.key(seed), (capacity, *block), dtype)
  rows, cols = np.pad(rows, pad).astype(np.int32), np.pad(cols, pad, constant_values=grid[1]).astype(np.int32)
  w = js.BlockArray(blocks, jnp.asarray(rows), jnp.asarray(cols), shape=(k, o))
  return w.freeze() if static else js.ops.plan_blocks(w)


def error(got, want) -> float:
  got, want = got.astype(jnp.float32), want.astype(jnp.float32)
  return float(jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-20))


def check(name, make, batch, out, implementation) -> bool:
  """The three products of one weight, the last two as gradients of the first unless `out` is given; prints a line."""
  w = make()
  x, dy = (jax.random.normal(jax.random.key(i), (batch, n), w.dtype) for i, n in enumerate(w.shape))

  def products(x, dy, w, **kwargs):
    if out is None:
      y, pull = jax.vjp(lambda x, b: js.ops.block_matmul(x, dataclasses.replace(w, blocks=b), **kwargs), x, w.blocks)
      return y, *pull(dy)
    kwargs["preferred_element_type"] = out
    return (
      js.ops.block_matmul(x, w, **kwargs),
      js.ops.block_matmul_transposed(dy, w, **kwargs),
      js.ops.sampled_matmul(x, dy, w, **kwargs),
    )

  try:
    got = jax.jit(functools.partial(products, implementation=implementation))(x, dy, w)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, (x, dy, w))
    want = jax.jit(functools.partial(products, implementation="reference"))(*wide)
    errors = [error(a, b) for a, b in zip(got, want)]
  except Exception as problem:  # noqa: BLE001  One failure must not hide the others.
    print(f"FAILED {name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
    return False
  good = all(e < _LIMIT[jnp.dtype(out or w.dtype).name] for e in errors)  # false for NaN
  print(f"{'ok    ' if good else 'WRONG '} {name}: " + " ".join(f"{e:.2e}" for e in errors), flush=True)
  return good


def checks():
  """(name, function that makes the weight, rows of x, dtype of the result)."""
  make = lambda *args, **kwargs: functools.partial(weight, *args, **kwargs)
  big = jax.default_backend() == "gpu"
  k, o = (1024, 1536) if big else (256, 512)
  for i, block in enumerate(_BLOCKS):
    size = "x".join(map(str, block))
    yield f"{size}, 0.3", make(k, o, block, 0.3, seed=i), 300, None
  for block in _BLOCKS[:3]:
    size = "x".join(map(str, block))
    yield f"{size}, empty", make(k, o, block, 0.0), 64, None
    yield f"{size}, full, float32", make(k, o, block, 1.0), 96, jnp.float32
    yield f"{size}, skewed, room for more", make(k, o, block, 0.2, skew=True, extra=7), 520, None
    yield f"{size}, static", make(k, o, block, 0.2, static=True), 128, None
    yield f"{size}, 1 row", make(k, o, block, 0.2), 1, None
    yield f"{size}, 17 rows", make(k, o, block, 0.2), 17, None
    yield f"{size}, float16", make(k, o, block, 0.2, dtype=jnp.float16), 256, None
    if big:  # more tiles than multiprocessors: fetched from the counter, by clusters where that pays
      yield f"{size}, many tiles", make(2048, 4096, block, 0.4), 2500, None
    yield f"{size}, ragged tiles", make(block[0] * 7, block[1] * 5, block, 0.5), 136, None


def times(implementation):
  """Rows of a table: 8192 x 8192 x 8192, three products; and of the forward product with several tunings."""
  profiler = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
  n = 8192
  x, dy, full = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(3))
  dense = {
    "fwd": (jnp.dot, x, full),
    "dx": (lambda dy, w: dy @ w.T, dy, full),
    "dw": (lambda x, dy: x.T @ dy, x, dy),
  }
  jobs = {("dense", name): args for name, args in dense.items()}
  for block, density in itertools.product(_BLOCKS[:3], (1.0, 0.5, 0.1, 0.05)):
    w, key = weight(n, n, block, density), ("x".join(map(str, block)), density)
    bind = lambda op: functools.partial(op, implementation=implementation)
    jobs[*key, "fwd"] = (bind(js.ops.block_matmul), x, w)
    jobs[*key, "dx"] = (bind(js.ops.block_matmul_transposed), dy, w)
    jobs[*key, "dw"] = (bind(js.ops.sampled_matmul), x, dy, w)
    if implementation == "hopper" and density == 0.1:
      from jaxsparse.ops.block_matmul import _hopper

      for t in _TUNINGS:
        jobs[*key, f"fwd, {t}"] = (functools.partial(_hopper.block_matmul_hopper, tuning=t), x, w)

  def prepare(job):
    try:
      return jax.jit(job[0]).lower(*job[1:]).compile()
    except Exception as problem:  # noqa: BLE001
      return f"{type(problem).__name__}: {str(problem)[:300]}"

  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    programs = dict(zip(jobs, pool.map(prepare, jobs.values())))
  samples = {key: [] for key in jobs}
  for _, (key, program) in itertools.product(range(2), programs.items()):
    if isinstance(program, str):
      continue
    try:
      _, measured = profiler.measure(program, iterations=5)(*jobs[key][1:])
      samples[key] += measured if isinstance(measured, list) else [measured]
    except Exception as problem:  # noqa: BLE001
      programs[key] = f"{type(problem).__name__}: {str(problem)[:300]}"
  us = {key: 1e3 * statistics.median(found) for key, found in samples.items() if found}
  for key, program in programs.items():
    if isinstance(program, str):
      print(f"FAILED {key}: {program}", flush=True)
  for key, found in us.items():
    if "Tuning" in key[-1]:
      print(f"{key[0]}, {key[1]}: {found:.1f} us, {key[-1]}", flush=True)
  rows = []
  for block, density in dict.fromkeys(key[:2] for key in jobs if len(key) == 3):
    row = {"block": block, "density": density}
    for name in dense:
      if (block, density, name) in us:
        ratio = us["dense", name] / us[block, density, name]
        row |= {f"{name} us": us[block, density, name], f"{name} ratio": ratio, f"{name} of ideal": ratio * density}
    rows.append(row)
  return rows, {f"dense {name} us": us.get(("dense", name)) for name in dense}


def main(argv):
  del argv
  began = time.monotonic()
  gpu = jax.default_backend() == "gpu"
  implementation = _IMPLEMENTATION.value or ("hopper" if gpu else "xla")
  # Compiling takes most of the time.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    good = list(pool.map(lambda case: check(*case, implementation), checks()))
  if gpu and _TIMES.value:
    rows, baseline = times(implementation)
    report.print_table(rows, list(dict.fromkeys(key for row in rows for key in row)))
    print(baseline)
  environment = report.environment()
  print(f"{sum(good)} of {len(good)} right with {implementation!r}; {environment['device']}, jax {environment['jax']}, "
        f"{time.monotonic() - began:.0f} s")  # fmt: skip
  sys.exit(not all(good))


if __name__ == "__main__":
  app.run(main)
