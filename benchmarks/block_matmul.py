"""Block-sparse products against the dense dot: shapes, blocks, densities and numbers of rows, losing ones included.

  python benchmarks/block_matmul.py [--budget=240] [--resume] [--stages=0,1] [--products=fwd,dx,dw] [--out=results/block_matmul]

Forward, dx (transposed) and dw (sampled at the kept blocks), random patterns and skewed ones (a power law of blocks per
column). Timed is what `block_matmul` takes where the dense dot is no choice; a row says which that is, and what is taken by
itself. All products with one weight shape and number of rows take turns with XLA's dense dot, which they share. Times are
device time (CUPTI) on a GPU and wall clock elsewhere, medians over the turns, on random data. Up to 64 rows of x, weights
rotate through copies that together exceed four times the L2 cache (at most 32 copies). The error is against float64 on a
sample of outputs.

Beside each ratio stands its bound: dense time over the largest of what tensor cores, loads through the L2 cache and device
memory need at the rates named below.

Left out is what tells nothing new: dx and dw below 1024 rows (nobody trains with fewer), skewed patterns at other densities
than 0.1 and other numbers of rows than 16, 4096 and 8192, and density 1 but for the two largest goals. The rest comes in
four stages of falling interest; `--budget` (seconds) leaves out the last ones, and figures are written as they come:
`--resume` fills in what is missing. Programs are compiled by other processes while those before them are timed; the dense
dots first, with nothing else on the device, as XLA tunes them there. Without a GPU it runs at toy size, to check itself.

`block_matmul_table.py` makes the tables of docs/block_matmul.md, the plot, and the densities by which `block_matmul` chooses.
"""

import concurrent.futures
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import time
from unittest import mock

from absl import app
from absl import flags
import device_time
import jax
from jax.experimental import serialize_executable
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import report
import tqdm

import jaxsparse as js
from jaxsparse.arrays import _block_positions
from jaxsparse.ops.block_matmul import _narrow
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import arg_specs
from jaxsparse.ops.block_matmul import preference
from jaxsparse.ops.block_matmul import vjp

_BUDGET = flags.DEFINE_float("budget", None, "Seconds after which nothing new is begun; default: none.")
_STAGES = flags.DEFINE_list("stages", ["0", "1", "2", "3"], "Which stages of interest.")
_PRODUCTS = flags.DEFINE_list("products", ["fwd", "dx", "dw"], "Which products.")
_BLOCKS = flags.DEFINE_list("blocks", None, "Block sizes such as 128x128; default: all.")
_DENSITIES = flags.DEFINE_list("densities", None, "Which densities; default: all.")
_SHAPES = flags.DEFINE_list("shapes", None, "Which shapes; default: all.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of every program.")
_ITERATIONS = flags.DEFINE_integer("iterations", 4, "Calls in a turn; the median of all is reported.")
_WORKERS = flags.DEFINE_integer("workers", min(14, os.cpu_count() or 1), "Processes that compile.")
_TOY = flags.DEFINE_bool("toy", None, "Toy shapes; default: where there is no GPU.")
_RESUME = flags.DEFINE_bool("resume", False, "Keep the rows that --out has, and add what is missing.")
_OUT = flags.DEFINE_string("out", "results/block_matmul", "Where the JSON goes, without suffix.")

_ROTATED = 64  # rows of x up to which the weight must come from memory
_COPIES = 32
_SKEWED_ROWS = (16, 4096, 8192)
_TRAINING_ROWS = 1024
_WRONG = 5e-3  # error of a bfloat16 result that is no rounding
_PATIENCE = 120  # seconds that a program may take to compile
# What bounds a kernel on the H100: bfloat16 operations a second that XLA's dot reaches at 8192^3, bytes a second through
# the L2 cache (the crossbar was 88 % busy at 7.9e12) and from memory.
_RATES = {"tensor cores": 800e12, "L2": 8e12, "memory": 3e12}
_NAME = ("shape", "block", "density", "pattern", "B", "product")
_COLUMNS = (
  *_NAME, "implementation", "kernels", "taken", "us", "dense us", "ratio", "bound", "of bound", "bound by", "error",
)  # fmt: skip


# -- What is measured --------------------------------------------------------------------------------------------------


def cases() -> list[dict]:
  """Every (shape, block, density, pattern, B, product), most interesting stage first."""
  toy = jax.default_backend() != "gpu" if _TOY.value is None else _TOY.value
  densities = (1.0, *arg_specs.DENSITIES)
  axes = (arg_specs.ARG_SPECS, arg_specs.BLOCKS, densities, ("random", "skewed"), _PRODUCTS.value)
  wanted = lambda flag, value: flag.value is None or str(value) in flag.value
  found = []
  for spec, block, density, pattern, product in itertools.product(*axes):
    size = "{}x{}".format(*block)
    if not (wanted(_BLOCKS, size) and wanted(_SHAPES, spec.name) and wanted(_DENSITIES, f"{density:g}")):
      continue
    for real in spec.batches:
      stage = stage_of(spec.name, density, pattern, real, product)
      if stage is not None and str(stage) in _STAGES.value:
        shape, batch = (spec.toy(), real // 1024 + 1) if toy else (spec, real)
        found.append(dict(stage=stage, shape=spec.name, K=shape.k, O=shape.o, block=size, density=density,
                          pattern=pattern, B=batch, product=product))  # fmt: skip
  found.sort(key=lambda case: case["stage"])
  unique = {name_of(case): case for case in reversed(found)}  # toy shapes may coincide
  return [case for case in found if unique.get(name_of(case)) is case]


def stage_of(shape: str, density: float, pattern: str, batch: int, product: str) -> int | None:
  """How soon a case is of interest, 0 to 3; None: never.

  >>> stage_of("square/8192", 0.1, "skewed", 8192, "dw"), stage_of("square/8192", 0.05, "skewed", 8192, "dw")
  (0, None)
  """
  goals = (shape, batch) in (("square/8192", 8192), ("llama3-8b/up", 4096))
  if product != "fwd" and batch < _TRAINING_ROWS or density == 1 and not goals:
    return None
  if pattern == "skewed":
    if density != 0.1 or batch not in _SKEWED_ROWS:
      return None
    return 0 if shape == "square/8192" else 1 if goals else 3
  if goals or (shape, batch) == ("llama3-8b/up", 16):
    return 0
  if shape.startswith("llama3-8b") and batch in (16, 64, 4096):
    return 1
  if shape.startswith("square") or (shape.startswith("llama3-8b") and (product == "fwd" or batch > 1024)):
    return 2
  return 3


def name_of(row) -> tuple:
  return tuple(row[key] for key in _NAME)


def sides(case) -> tuple[int, int]:
  return tuple(map(int, case["block"].split("x")))


def positions_of(case) -> _block_positions.StaticPositions:
  """Where the blocks of a case's weight lie; there is one at least."""
  (bk, bo), rng = sides(case), np.random.default_rng(case["K"] + case["O"])
  grid = (case["K"] // bk, case["O"] // bo)
  share = np.full(grid[1], case["density"])
  if case["pattern"] == "skewed":  # block column c keeps blocks in proportion to 1 / (c + 1)
    share = rng.permutation(1 / (1 + np.arange(grid[1])))
    low, high = 0.0, 1.0 / share.min()
    for _ in range(50):
      mid = (low + high) / 2
      low, high = (mid, high) if np.minimum(mid * share, 1).mean() < case["density"] else (low, mid)
    share = np.minimum(mid * share, 1)
  keep = (rng.random(grid) < share).T
  keep[0, 0] |= not keep.any()
  cols, rows = np.nonzero(keep)
  return _block_positions.StaticPositions(rows.astype(np.int32), cols.astype(np.int32))


def weight(case, positions, blocks) -> js.BlockArray:
  """A dynamic weight that carries its plan, as NumPy arrays; `blocks` may be a type."""
  shape = (case["K"], case["O"])
  static = js.BlockArray.tree_unflatten((shape, positions), (blocks,))
  plan = _plan.plans_of(static)
  return js.BlockArray.tree_unflatten((shape, None), (blocks, positions.rows, positions.cols, plan))


def types_of(w):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), w)


def operands(case):
  """(sparse function of (*args, w), dense function of (*args, full), types of args): of the product of a case."""
  x, dy = (jax.ShapeDtypeStruct((case["B"], case[n]), jnp.bfloat16) for n in "KO")
  if case["product"] == "fwd":
    return js.ops.block_matmul, lambda x, w: x @ w, (x,)
  if case["product"] == "dx":
    return js.ops.block_matmul_transposed, lambda dy, w: dy @ w.T, (dy,)
  return js.ops.sampled_matmul, lambda x, dy: x.T @ dy, (x, dy)


def choice_for(case, w) -> str:
  """Which implementation is taken by itself."""
  args = operands(case)[2]
  if case["product"] == "dw":
    return js.ops.which_sampled_matmul(*args, w).implementation
  return js.ops.which_block_matmul(*args, w, transposed=case["product"] == "dx").implementation


def kernel_for(case, w) -> str:
  """Which implementation is timed: what is taken where dense is no choice."""
  if jax.default_backend() != "gpu":
    return "xla"
  with mock.patch.object(preference, "break_even", return_value=(math.inf, "not asked")):
    return choice_for(case, w)


# -- Compiling, in processes of their own ------------------------------------------------------------------------------


def compile_sparse(case) -> tuple:
  """(serialised program of a case, (implementation, kernels), positions), or (None, what went wrong, None)."""
  try:
    sparse, _, args = operands(case)
    positions = positions_of(case)
    bk, bo = sides(case)
    w = types_of(weight(case, positions, jax.ShapeDtypeStruct((positions.rows.size, bk, bo), jnp.bfloat16)))
    name = kernel_for(case, w)
    # Nothing but kernels that are timed shall run on the device.
    options = {"xla_gpu_experimental_enable_fusion_autotuner": False} if jax.default_backend() == "gpu" else {}
    program = jax.jit(functools.partial(sparse, implementation=name)).lower(*args, w).compile(options)
    # The plan is derived again where it is used: that is faster than sending it.
    return serialize_executable.serialize(program)[0], (name, kernels_of(program.as_text())), positions
  except Exception as error:  # noqa: BLE001  One bad shape must not lose the table.
    return None, f"{type(error).__name__}: {str(error)[-200:]}", None


def kernels_of(text: str) -> str:
  """The names of a program's Pallas kernels: "hopper" has several."""
  return ", ".join(dict.fromkeys(re.findall(r'"mosaic_gpu.*op_name="[^"]*/(\w+)/\w+"', text)))


def load(case, program: bytes, w):
  """The program that another process has compiled for arguments like these."""
  spec = jax.tree.structure(((*operands(case)[2], w), {}))
  return serialize_executable.deserialize_and_load(program, spec, jax.tree.structure(0))


def compile_dense(todo) -> dict:
  """The dense dots by (K, O, B, product)."""
  unique = {dense_key(case): case for case in todo}

  def make(case):
    _, fn, args = operands(case)
    full = () if case["product"] == "dw" else (jax.ShapeDtypeStruct((case["K"], case["O"]), jnp.bfloat16),)
    return jax.jit(fn).lower(*args, *full).compile()

  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    return dict(zip(unique, threads.map(make, unique.values())))


def dense_key(case) -> tuple:
  return case["K"], case["O"], case["B"], case["product"]


# -- Data, the bound and the error -------------------------------------------------------------------------------------


@functools.lru_cache(1)
def _numbers() -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.standard_normal(1 << 24, np.float32).astype(ml_dtypes.bfloat16)


def random(shape, seed) -> np.ndarray:
  """Normal numbers on the host, from which copies are made without compiling anything; they repeat after 2**24."""
  size = math.prod(shape)
  many = np.roll(_numbers(), 7919 * seed)
  return np.tile(many, -(-size // many.size))[:size].reshape(shape)


def bound(case, w) -> tuple[float, str]:
  """(microseconds, what takes them): the least that tiles of this kind need at `_RATES`."""
  batch, (bk, bo), plans = case["B"], sides(case), w.plan
  kept, used_k, used_o = w.blocks.size, np.unique(w.rows).size * bk, np.unique(w.cols).size * bo
  # All of the result is written, and of the operands the columns that meet a block are read.
  along = {"fwd": used_k + case["O"], "dx": used_o + case["K"], "dw": used_k + used_o}[case["product"]]
  needed = {"memory": 2 * (batch * along + kept), "tensor cores": 2 * batch * kept}
  plan, size, depth = (plans.forward, bo, bk) if case["product"] == "fwd" else (plans.transposed, bk, bo)
  if case["product"] == "dw":
    sampled, high = plans.sampled, max(1, bk // _plan.TILE)
    pieces = sampled.items[: sampled.counts[0]]
    columns = int((pieces[:, 2] - pieces[:, 1]).sum()) * bo
    needed["L2"] = 2 * batch * high * (len(pieces) * _plan.sampled_height(w.grid, w.block_shape, w.density) + columns)
  elif _narrow.pays(batch, case["O"] if case["product"] == "fwd" else case["K"], (bk, bo), w.density):
    columns = int(plans.narrow[case["product"] == "dx"].starts[-1]) * depth
    needed["L2"] = 2 * (batch * columns + -(-batch // _narrow.TILE_B) * kept)
  else:
    # Two tiles of 256 rows may share what they load of w.
    columns = int(plan.starts[-1]) * max(1, size // _plan.TILE) * depth
    needed["L2"] = 2 * (batch * columns + -(-batch // 512) * kept)
  times = {name: 1e6 * amount / _RATES[name] for name, amount in needed.items()}
  name = max(times, key=times.get)
  return times[name], name


_take = jax.jit(lambda a, at: a[at])


def sampled_error(case, y, args, w) -> float:
  """Norm of the error relative to the norm of the result, in float64, on some outputs; operands are those on the host."""
  rng, (bk, bo), (rows, cols) = np.random.default_rng(0), sides(case), (w.rows, w.cols)
  as64 = lambda a: np.asarray(a).astype(np.float64)
  some = np.sort(rng.choice(rows.size, 8))  # some of them more than once where there are fewer
  if case["product"] == "dw":
    x, dy = args
    want = [as64(x[:, rows[i] * bk :][:, :bk]).T @ as64(dy[:, cols[i] * bo :][:, :bo]) for i in some]
    got = as64(_take(y, some))
  else:
    # Some rows of x, and a few block columns of the result.
    forward = case["product"] == "fwd"
    major, minor, size, depth = (cols, rows, bo, bk) if forward else (rows, cols, bk, bo)
    at, want, got = np.sort(rng.choice(case["B"], 16)), [], []
    part, out = as64(args[0][at]), as64(_take(y, at))
    for column in np.unique(major[some])[:3]:
      total = np.zeros((len(at), size))
      for i in np.nonzero(major == column)[0]:
        block = as64(w.blocks[i])
        total += part[:, minor[i] * depth :][:, :depth] @ (block if forward else block.T)
      want.append(total)
      got.append(out[:, column * size :][:, :size])
  got, want = np.concatenate([a.reshape(-1) for a in got]), np.concatenate([a.reshape(-1) for a in want])
  return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def copies_for(nbytes: int, batch: int) -> int:
  if batch > _ROTATED or jax.default_backend() != "gpu":
    return 1
  l2 = getattr(jax.devices()[0], "l2_cache_size_bytes", None) or 50 * 2**20
  return min(_COPIES, max(1, -(-4 * l2 // nbytes)))


# -- Timing ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(4)
def operand(shape, seed) -> tuple[np.ndarray, jax.Array]:
  """Random numbers here and on the device."""
  here = random(shape, seed)
  return here, jax.device_put(here)


class Cell:
  """A case with its program and its operands on the device."""

  def __init__(self, case, compiled):
    program, what, positions = compiled
    if program is None:
      raise RuntimeError(what)
    self.name, self.kernels = what
    self.case = case
    self.w = weight(case, positions, random((positions.rows.size, *sides(case)), 3))
    self.program = load(case, program, self.w)
    here, self.args = zip(*(operand(a.shape, i) for i, a in enumerate(operands(case)[2])))
    self.copies = copies_for(self.w.blocks.nbytes, case["B"])
    weights = [jax.device_put(self.w)]
    weights += [vjp.with_blocks(weights[0], jax.device_put(self.w.blocks)) for _ in range(self.copies - 1)]
    self.calls = [functools.partial(self.program, *self.args, w) for w in weights]
    self.error = sampled_error(case, self.calls[0](), here, self.w)  # the first call loads code, too
    if not self.error < _WRONG:
      raise RuntimeError(f"the result is wrong: {self.error:.3g} relative to its norm")

  def row(self, us, dense_us) -> dict:
    return {
      **{key: value for key, value in self.case.items() if key != "stage"},
      "kept": self.w.capacity,
      "implementation": self.name,
      "kernels": self.kernels,
      "taken": choice_for(self.case, types_of(self.w)),
      "us": us,
      "dense us": dense_us,
      "ratio": dense_us / us,
      "TFLOP/s": 2 * self.case["B"] * self.w.blocks.size / us / 1e6,
      "copies": self.copies,
      "error": self.error,
    }

  def bounds(self, us, dense_us) -> dict:
    if jax.default_backend() != "gpu":  # they are those of an H100
      return {}
    bound_us, bound_by = bound(self.case, self.w)
    return {"bound": dense_us / bound_us, "of bound": bound_us / us, "bound by": bound_by}


def dense_calls(case, program) -> list:
  args = [operand(a.shape, i)[1] for i, a in enumerate(operands(case)[2])]
  if case["product"] == "dw":
    return [functools.partial(program, *args)]
  full = random((case["K"], case["O"]), 2)
  return [functools.partial(program, *args, jax.device_put(full)) for _ in range(copies_for(full.nbytes, case["B"]))]


def measure(group, dense, compiled, failed) -> list[dict]:
  """The rows of cases with one dense dot, which take turns with it; those that fail are noted."""
  cells = []

  def attempt(case, f):
    try:
      return f()
    except Exception as error:  # noqa: BLE001
      failed.append(dict(zip(_NAME, name_of(case))) | {"error": f"{type(error).__name__}: {str(error)[-300:]}"})

  for case in group:
    cells.append(attempt(case, lambda case=case: Cell(case, compiled[name_of(case)].result(timeout=_PATIENCE))))
  cells = [cell for cell in cells if cell]
  calls = dense_calls(group[0], dense)
  jax.block_until_ready([call() for call in calls])

  def times(cells):
    programs = {i: cell.calls for i, cell in enumerate(cells)} | {"dense": calls}
    us = device_time.in_turn(programs, _ROUNDS.value, _ITERATIONS.value)
    limits = lambda i, cell: attempt(cell.case, lambda: cell.bounds(us[i], us["dense"])) or {}
    return [cell.row(us[i], us["dense"]) | limits(i, cell) for i, cell in enumerate(cells)]

  try:
    return times(cells)
  except Exception:  # noqa: BLE001  Whose fault it is shows when each is timed alone.
    return list(itertools.chain(*(attempt(cell.case, lambda cell=cell: times([cell])) or [] for cell in cells)))


def run(todo, rows, failed) -> None:
  """Appends a row for each case of `todo`, within the budget."""
  began = time.monotonic()
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # of the processes that compile
  pool = concurrent.futures.ProcessPoolExecutor(_WORKERS.value, multiprocessing.get_context("spawn"))
  group_of = lambda case: (case["stage"], *dense_key(case))
  groups = [list(group) for _, group in itertools.groupby(sorted(todo, key=group_of), group_of)]
  try:
    compiled = {}
    dense = compile_dense(todo)
    for case in itertools.chain(*groups):
      compiled[name_of(case)] = pool.submit(compile_sparse, case)
    for group in tqdm.tqdm(groups):
      if _BUDGET.value is not None and time.monotonic() - began > _BUDGET.value:
        break
      rows += measure(group, dense[dense_key(group[0])], compiled, failed)
      write(rows, failed, len(todo) - len(rows))
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def write(rows, failed, missing) -> None:
  report.write_json(_OUT.value + ".json", rows, rates=_RATES, failed=failed, not_measured=missing)


def main(argv):
  del argv
  if jax.default_backend() == "gpu":
    importlib.import_module("jax.experimental.mosaic.gpu.profiler")  # what programs that were compiled elsewhere call
  began, path = time.monotonic(), pathlib.Path(_OUT.value + ".json")
  rows = json.loads(path.read_text())["rows"] if _RESUME.value and path.exists() else []
  todo, failed = cases(), []
  known = {name_of(row) for row in rows}
  run([case for case in todo if name_of(case) not in known], rows, failed)
  known = {name_of(row) for row in rows}
  missing = sum(name_of(case) not in known for case in todo)
  order = {spec.name: i for i, spec in enumerate(arg_specs.ARG_SPECS)}
  rows.sort(key=lambda r: (r["product"], r["pattern"], order[r["shape"]], r["B"], -sides(r)[0], -r["density"]))
  write(rows, failed, missing)
  report.print_table(rows, _COLUMNS)
  environment = report.environment()
  print(f"{environment['device']}, jax {environment['jax']}; bounds at "
        + ", ".join(f"{rate / 1e12:g} T/s {what}" for what, rate in _RATES.items()))  # fmt: skip
  print("A ratio below 1 is slower than the dense dot.")
  print(f"{len(todo) - missing} of {len(todo)} cells, {len(failed)} failed, {time.monotonic() - began:.0f} s")
  for case in failed:
    print("failed:", json.dumps(case))


if __name__ == "__main__":
  app.run(main)
