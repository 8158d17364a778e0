"""Tiles of `block_matmul` against each other, for 65 to 1024 rows of x: what `tuning.best_tuning` is fitted to.

  python benchmarks/block_matmul_tuning.py [--budget=60] [--rows=256,128] [--out=results/block_matmul_tuning]

Forward products with random patterns. All densities of a weight share a program: blocks have room for density 0.5. Times are
device time (CUPTI), medians; all tilings of a product take turns with XLA's dense dot. Each result is compared with that of
the first tiling, and that one with float64 on a sample of outputs. Programs are compiled by other processes.
"""

import concurrent.futures
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import time

from absl import app
from absl import flags
import block_matmul as cells
import device_time
import jax
from jax.experimental import serialize_executable
import jax.numpy as jnp
import numpy as np
import report

import jaxsparse as js
from jaxsparse.ops.block_matmul import _decode
from jaxsparse.ops.block_matmul import _heads
from jaxsparse.ops.block_matmul import _hopper
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import arg_specs
from jaxsparse.ops.block_matmul import tuning as tunings

_ROWS = flags.DEFINE_list("rows", ["256", "128", "1024", "512"], "Rows of x, the most interesting ones first.")
_ONLY = flags.DEFINE_list("only", None, "Names of tilings; default: those worth trying.")
_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
_BLOCKS = (128, 64, 32)


def names_of(batch: int) -> tuple[str, ...]:
  """Tilings to try: p for tiles from a counter, o for one tile to a cluster of so many, d for the kernel for few rows."""
  return {
    128: ("p128", "o128/1", "o128/2", "o128/4", "o128/8", "o64/1", "o64/2", "o64/4", "d1", "d2"),
    256: ("p256", "o256/1", "o256/2", "o256/4", "o128/1", "o128/2", "o128/4", "o64/1", "d1"),
    512: ("p256", "p128", "o256/1", "o256/2", "o128/1", "o128/2"),
    1024: ("p256", "p128", "o256/1", "o256/2", "o128/1"),
  }[batch]


def tuning_of(name: str, case, w):
  """The tuning of a name, or None where blocks are too narrow for it."""
  side = int(case["block"].split("x")[0])
  if name[0] == "d":
    if cells.sides(case)[1] < 64 and case["B"] > 128:
      return None
    return _decode.best_tuning(case["B"], w).__class__(
      **{**vars(_decode.best_tuning(case["B"], w)), "split": int(name[1])}
    )
  tile, split = (*map(int, name[1:].split("/")), 1)[:2]
  step = min(64, side)
  stages = {256: 4, 128: 6, 64: 8}[tile] * (64 // step if name[0] == "o" else 1)
  if name[0] == "p":
    return tunings.Tuning(tile, stages)
  return tunings.Tuning(tile, stages, split, once=True, step=step)


def weight(case, blocks=None) -> js.BlockArray:
  """A dynamic weight with room for density 0.5 that carries its forward plan, as NumPy arrays; types of blocks by default."""
  positions, most = cells.positions_of(case), cells.positions_of(case | dict(density=0.5)).rows.size
  (bk, bo), grid = cells.sides(case), [case[n] // side for n, side in zip("KO", cells.sides(case), strict=True)]
  pad = lambda a, fill: np.concatenate([a, np.full(most - a.size, fill, np.int32)])
  rows, cols = pad(positions.rows, 0), pad(positions.cols, grid[1])
  live = cols < grid[1]
  forward = _plan._plan(np, live, rows, grid[0], bk, *_plan._tiles(np, live, cols, grid[1], rows, grid[0], bo))
  plans = _plan.Plans(forward, None, None, _heads.make(np, rows, cols, grid, (bk, bo)), None)
  blocks = jax.ShapeDtypeStruct((most, bk, bo), jnp.bfloat16) if blocks is None else blocks
  return js.BlockArray.tree_unflatten(((case["K"], case["O"]), None), (blocks, rows, cols, plans))


def product(x, w, *, tuning):
  if isinstance(tuning, _decode.Tuning):
    return _decode.block_matmul_decode(x, w, w.plan.heads, tuning=tuning)
  return _hopper.block_matmul_hopper(x, w, tuning=tuning)


def compile_one(case, name):
  """(serialised program or None, why not)."""
  try:
    w = cells.types_of(weight(case))
    tuning = tuning_of(name, case, w)
    if tuning is None:
      return None, ""
    x = jax.ShapeDtypeStruct((case["B"], case["K"]), jnp.bfloat16)
    options = {"xla_gpu_experimental_enable_fusion_autotuner": False}
    program = jax.jit(functools.partial(product, tuning=tuning)).lower(x, w).compile(options)
    return serialize_executable.serialize(program)[0], ""
  except Exception as error:  # noqa: BLE001
    return None, f"{type(error).__name__}: {str(error)[-300:]}"


@jax.jit
def _apart(a, b):
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


@functools.cache
def _operand(shape, seed):
  return cells.operand.__wrapped__(shape, seed)


def measure(group, programs, dense, weights, rows, failed):
  """Rows of all tilings and densities of one (shape, rows, block)."""
  case, loaded = group[0], {}
  x_here, x = _operand((case["B"], case["K"]), 0)
  dense_call = functools.partial(dense, x, _operand((case["K"], case["O"]), 2)[1])
  jax.block_until_ready(dense_call())
  for case in group:
    w = weights[cells.name_of(case)].result(timeout=120)
    blocks_here, blocks = _operand(w.blocks.shape, 3)
    live = w.cols < w.grid[1]
    count = live.sum()
    here = js.BlockArray.tree_unflatten((w.shape, None), (blocks_here[:count], w.rows[live], w.cols[live], None))
    w = jax.device_put(js.BlockArray.tree_unflatten((w.shape, None), (blocks, w.rows, w.cols, w.plan)))
    if case is group[0]:
      spec = jax.tree.structure(((x, w), {}))
      for name, program in programs.items():
        binary, why = program.result(timeout=120)
        if binary is not None:
          loaded[name] = serialize_executable.deserialize_and_load(binary, spec, jax.tree.structure(0))
        elif why:
          failed.append(case | dict(tuning=name, error=why))
    calls, errors, first = {"dense": [dense_call]}, {}, None
    for name, program in loaded.items():
      y = program(x, w)
      errors[name] = cells.sampled_error(case, y, (x_here,), here) if first is None else float(_apart(y, first))
      first = y if first is None else first
      if errors[name] < 5e-3:
        calls[name] = [functools.partial(program, x, w)]
      else:
        failed.append(case | dict(tuning=name, error=errors[name]))
    us = device_time.in_turn(calls, 3, 2)
    names = [name for name in calls if name != "dense"]
    shown = {key: case[key] for key in ("K", "O", "B", "block", "density")}
    rows += [
      shown | dict(tuning=name, us=round(us[name], 2), dense=round(us["dense"], 2), error=errors[name])
      for name in names
    ]
    best = min(names, key=us.get)
    print(
      *shown.values(), f"dense {us['dense']:.1f} best {best}", *(f"{name}:{us[name]:.1f}" for name in names), flush=True
    )


def main(argv):
  del argv
  importlib.import_module("jax.experimental.mosaic.gpu.profiler")
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  began, rows, failed = time.monotonic(), [], []
  budget = cells._BUDGET.value or 1e9
  pool = concurrent.futures.ProcessPoolExecutor(cells._WORKERS.value, multiprocessing.get_context("spawn"))
  groups, programs, weights = [], {}, {}
  for batch, block, (k, o) in itertools.product(map(int, _ROWS.value), _BLOCKS, _SHAPES):
    case = dict(shape=f"{k}x{o}", K=k, O=o, B=batch, block=f"{block}x{block}", pattern="random", product="fwd")
    group = [case | dict(density=d) for d in arg_specs.DENSITIES]
    groups.append(group)
    most = case | dict(density=0.5)
    for each in group:
      key = cells.name_of(each)
      shared = next((f for other, f in weights.items() if other[:4] == key[:4] and other[5:] == key[5:]), None)
      weights[key] = shared or pool.submit(weight, each)
    programs[cells.name_of(case | dict(density=0))] = {
      name: pool.submit(compile_one, most, name) for name in names_of(batch) if not _ONLY.value or name in _ONLY.value
    }
  dense = {}
  for batch, (k, o) in itertools.product(map(int, _ROWS.value), _SHAPES):
    types = jax.ShapeDtypeStruct((batch, k), jnp.bfloat16), jax.ShapeDtypeStruct((k, o), jnp.bfloat16)
    dense[k, o, batch] = jax.jit(lambda x, w: x @ w).lower(*types).compile()
  path = pathlib.Path(cells._OUT.value + ".json")
  try:
    for group in groups:
      if time.monotonic() - began > budget:
        break
      case = group[0]
      try:
        measure(group, programs[cells.name_of(case | dict(density=0))], dense[case["K"], case["O"], case["B"]],
                weights, rows, failed)  # fmt: skip
      except Exception as error:  # noqa: BLE001
        failed.append(case | dict(error=f"{type(error).__name__}: {str(error)[-300:]}"))
      report.write_json(path, rows, failed=failed)
  finally:
    workers = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
      worker.kill()
  for case in failed:
    print("failed:", json.dumps(case))
  print(f"{len(rows)} rows, {len(failed)} failed, {time.monotonic() - began:.0f} s", flush=True)
  os._exit(0)  # programs that are still being compiled are not waited for


if __name__ == "__main__":
  app.run(main)
