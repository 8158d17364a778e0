"""Checks the block-sparse products on the device at hand, and times them: the first thing to run after a change of a kernel.

  python benchmarks/check_block_matmul.py [--implementation=hopper] [--notimes]

Every block size, empty, full, ragged and skewed patterns, few rows, more tiles than fit on the device at a time, both forms,
three dtypes of the result; forward, transposed and sampled product, also as gradients. Errors are relative to float32
products of NumPy of the same operands. Without a name each product takes what it takes by itself where the dense dot is no
choice. The last lines are a table of times at 8192 x 8192 x 8192 beside the dense dot. Exits with 1 if anything is wrong.

Nearly all of its time is compiling, in threads. What kernels derive from positions takes longer to compile than the three
kernels (12 against 5 s of a processor with blocks of 32), so NumPy derives it, except for the weights with room for more blocks, for
which the device does.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from unittest import mock

from absl import app
from absl import flags
import device_time
import jax
import jax.numpy as jnp
import numpy as np
import report

import jaxsparse as js
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import preference

_IMPLEMENTATION = flags.DEFINE_string(
  "implementation", None, "Default: chosen for each product, the dense dot excluded."
)
_TIMES = flags.DEFINE_bool("times", True, "Time 8192 x 8192 x 8192.")

_SQUARE = ((128, 128), (64, 64), (32, 32))
_BLOCKS = (*_SQUARE, (256, 64), (64, 256), (256, 256), (32, 128), (128, 32), (64, 32), (32, 64))
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
  blocks = jnp.asarray(rng.standard_normal((capacity, *block), np.float32), dtype)
  rows, cols = np.pad(rows, pad).astype(np.int32), np.pad(cols, pad, constant_values=grid[1]).astype(np.int32)
  w = js.BlockArray(blocks, rows, cols, shape=(k, o), static=True)
  if static:
    return w
  if extra:
    return js.ops.plan_blocks(w.thaw())
  return dataclasses.replace(w.thaw(), plan=jax.tree.map(jnp.asarray, _plan.plans_of(w)))


def products(x, dy, w, out, implementation):
  """The three products of a weight, the last two as gradients of the first unless a dtype of the result is named."""
  kwargs = dict(implementation=implementation)
  if out is None:
    y, pull = jax.vjp(lambda x, b: js.ops.block_matmul(x, dataclasses.replace(w, blocks=b), **kwargs), x, w.blocks)
    return y, *pull(dy)
  kwargs["preferred_element_type"] = out
  return (
    js.ops.block_matmul(x, w, **kwargs),
    js.ops.block_matmul_transposed(dy, w, **kwargs),
    js.ops.sampled_matmul(x, dy, w, **kwargs),
  )


def expected(x, dy, w):
  """The same in float32 by NumPy: nothing to compile, and no code in common with the library."""
  (bk, bo), (rows, cols), grid = w.block_shape, (np.asarray(w.rows), np.asarray(w.cols)), w.grid
  live = cols < grid[1]
  tiles = np.zeros((*grid, bk, bo), np.float32)
  tiles[rows[live], cols[live]] = np.asarray(w.blocks).astype(np.float32)[live]
  dense = tiles.transpose(0, 2, 1, 3).reshape(w.shape)
  x, dy = (np.asarray(a).astype(np.float32) for a in (x, dy))
  full = (x.T @ dy).reshape(grid[0], bk, grid[1], bo).transpose(0, 2, 1, 3)
  return x @ dense, dy @ dense.T, np.where(live[:, None, None], full[rows, np.minimum(cols, grid[1] - 1)], 0)


def error(got, want) -> float:
  got, want = np.asarray(got).astype(np.float32), np.asarray(want)
  return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-20))


def check(name, make, batch, out, implementation) -> bool:
  """Whether the three products of one weight are right; prints a line."""
  try:
    w = make()
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.standard_normal((batch, n), np.float32), w.dtype) for n in w.shape)
    got = jax.jit(functools.partial(products, out=out, implementation=implementation))(x, dy, w)
    errors = [error(a, b) for a, b in zip(got, expected(x, dy, w))]
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
    size = "{}x{}".format(*block)
    yield f"{size}, 300 rows", make(k, o, block, 0.3, seed=i), 300, None
    for rows in (1, 16, 64) if block in _SQUARE else (16,):
      yield f"{size}, {rows} rows", make(k, o, block, 0.2, seed=i), rows, jnp.float32 if rows == 16 else None
  for block in _SQUARE:
    size = "{}x{}".format(*block)
    yield f"{size}, empty", make(k, o, block, 0.0), 64, None
    yield f"{size}, full, float32", make(k, o, block, 1.0), 96, jnp.float32
    yield f"{size}, float16, float32", make(k, o, block, 0.2, dtype=jnp.float16), 40, jnp.float32
    yield f"{size}, float16", make(k, o, block, 0.2, dtype=jnp.float16), 256, None
    yield f"{size}, skewed, room for more", make(k, o, block, 0.2, skew=True, extra=7), 520, None
    yield f"{size}, few rows, skewed, room for more", make(k, o, block, 0.2, skew=True, extra=7), 17, None
    yield f"{size}, static", make(k, o, block, 0.2, static=True), 128, None
    yield f"{size}, ragged tiles", make(block[0] * 7, block[1] * 5, block, 0.5), 136, None
    yield f"{size}, few rows, ragged tiles", make(block[0] * 7, block[1] * 5, block, 0.5), 8, None
    if big:  # at least three tiles to a multiprocessor in each product: those fetched from a counter come round
      yield f"{size}, many tiles", make(4096, 4096, block, 0.8), 5000, None
      yield f"{size}, many tiles, skewed", make(4096, 4096, block, 0.2, skew=True, extra=9), 5000, None
      yield f"{size}, few rows, many tiles", make(4096, 14336, block, 0.1), 16, None
      yield f"{size}, few rows, lists that are cut", make(8192, 2048, block, 0.1, skew=True), 17, None
  if big:  # the kernel for many narrow blocks
    narrow = make(65 * 32, 66 * 32, (32, 32), 0.3, dtype=jnp.float16, extra=5)
    yield "32x32, many rows, ragged, float16, float32", narrow, 6100, jnp.float32
    yield "32x32, many rows, ragged B", make(4096, 4096, (32, 32), 0.1), 4100, None
    yield "32x32, many rows, empty", make(4096, 4096, (32, 32), 0.0, extra=8000), 5000, None


def times(implementation):
  """Rows of a table: 8192 x 8192 x 8192, three products, beside the dense dot."""
  n = 8192
  x, dy, full = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(3))
  jobs = {
    ("dense", "fwd"): (jnp.dot, x, full),
    ("dense", "dx"): (lambda dy, w: dy @ w.T, dy, full),
    ("dense", "dw"): (lambda x, dy: x.T @ dy, x, dy),
  }
  cases = list(itertools.product(_SQUARE, (1.0, 0.5, 0.25, 0.1, 0.05)))
  for block, density in cases:
    w, key = weight(n, n, block, density), ("{}x{}".format(*block), density)
    bind = lambda op: functools.partial(op, implementation=implementation)
    jobs[*key, "fwd"] = (bind(js.ops.block_matmul), x, w)
    jobs[*key, "dx"] = (bind(js.ops.block_matmul_transposed), dy, w)
    jobs[*key, "dw"] = (bind(js.ops.sampled_matmul), x, dy, w)

  def prepare(job):
    return jax.jit(job[0]).lower(*job[1:]).compile()

  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    programs = dict(zip(jobs, pool.map(prepare, jobs.values())))
  calls = {key: [functools.partial(programs[key], *job[1:])] for key, job in jobs.items()}
  jax.block_until_ready([call() for (call,) in calls.values()][-1])
  us = device_time.in_turn(calls, rounds=2, iterations=4)
  rows = []
  for block, density in dict.fromkeys(key[:2] for key in jobs if len(key) == 3):
    row = {"block": block, "density": density}
    for name in ("fwd", "dx", "dw"):
      ratio = us["dense", name] / us[block, density, name]
      row |= {f"{name} us": us[block, density, name], f"{name} ratio": ratio, f"{name} of ideal": ratio * density}
    rows.append(row)
  return rows, {f"dense {name} us": us["dense", name] for name in ("fwd", "dx", "dw")}


def main(argv):
  del argv
  began = time.monotonic()
  gpu, implementation = jax.default_backend() == "gpu", _IMPLEMENTATION.value
  with mock.patch.object(preference, "break_even", return_value=(math.inf, "not asked")):
    # Compiling takes most of the time.
    with concurrent.futures.ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
      good = list(pool.map(lambda case: check(*case, implementation), checks()))
    print(f"{sum(good)} of {len(good)} right after {time.monotonic() - began:.0f} s", flush=True)
    if gpu and _TIMES.value:
      rows, baseline = times(implementation)
      report.print_table(rows, list(dict.fromkeys(key for row in rows for key in row)))
      print(baseline)
  environment = report.environment()
  print(f"{sum(good)} of {len(good)} right with {implementation or 'what is taken'}; {environment['device']}, "
        f"jax {environment['jax']}, {time.monotonic() - began:.0f} s")  # fmt: skip
  sys.exit(not all(good))


if __name__ == "__main__":
  app.run(main)
