"""Block-sparse products against the dense dot: every shape, block, density and number of rows, losing ones included.

  python benchmarks/block_matmul.py [--quick] [--budget=300] [--products=fwd,dx,dw] [--out=results/block_matmul]

Forward, dx (transposed) and dw (sampled at the kept blocks), random patterns and skewed ones (a power law of blocks per
column). A row says which implementation was timed and which one is taken by itself. Times are device time (CUPTI) on a GPU
and wall clock elsewhere, medians of calls that alternate with XLA's dense dot of the same product in the same process,
on random data. Up to 64 rows of x, weights rotate through copies that together exceed four times the L2 cache (at most
32 copies). The error is against float64 on a sample of outputs.

Weights have room for the densest pattern of a class (0.5 and 0.25; the rest), so that one program serves all its patterns:
masks change without compiling. Programs are compiled by processes of their own. Beside each ratio stands its bound:
dense time over the largest of what tensor cores, loads through the L2 cache and device memory need at the rates named
below.

Cells come in order of interest, `--budget` (seconds) leaves out the least interesting ones, and figures are written as
they come: the next run with the same `--out` fills in what is missing. `--measured` also writes the densities at which the
dense dot wins, by which `block_matmul` chooses. Without a GPU it runs at toy size, to check itself.
"""

import collections
import concurrent.futures
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import time

from absl import app
from absl import flags
import device_time
import jax
from jax.experimental import serialize_executable
import jax.numpy as jnp
import numpy as np
import report
import tqdm

import jaxsparse as js
from jaxsparse.ops.block_matmul import _hopper
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import arg_specs
from jaxsparse.ops.block_matmul import vjp

_QUICK = flags.DEFINE_bool("quick", False, "Three shapes, two or three numbers of rows, densities 0.5, 0.1 and 0.05.")
_BUDGET = flags.DEFINE_float("budget", None, "Seconds after which no new cell is begun; default: none.")
_PRODUCTS = flags.DEFINE_list("products", ["fwd", "dx", "dw"], "Which products.")
_BLOCKS = flags.DEFINE_list("blocks", None, "Block sizes such as 128x128; default: all.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Alternating rounds.")
_ITERATIONS = flags.DEFINE_integer("iterations", 4, "Calls in a round; the median of all is reported.")
_WORKERS = flags.DEFINE_integer("workers", min(14, os.cpu_count() or 1), "Processes that compile.")
_TOY = flags.DEFINE_bool("toy", None, "Toy shapes; default: where there is no GPU.")
_OUT = flags.DEFINE_string("out", "results/block_matmul", "Where the JSON and the plot go, without suffix.")
_MEASURED = flags.DEFINE_string("measured", None, "Where the densities go at which dense wins, as JSON.")

_QUICK_SHAPES = {"square/8192": (8192,), "llama3-8b/up": (16, 4096), "llama3-8b/down": (4096,)}
_QUICK_DENSITIES = (0.5, 0.1, 0.05)
_CLASSES = (0.5, 0.1)  # densities that a weight has room for
_ROTATED = 64  # rows of x up to which the weight must come from memory
_COPIES = 32
# What bounds a kernel on the H100: bfloat16 operations a second that XLA's dot reaches at 8192^3, bytes a second through
# the L2 cache (the crossbar was 88 % busy at 7.9e12) and from memory.
_RATES = {"tensor cores": 800e12, "L2": 8e12, "memory": 3e12}
_NAME = ("shape", "block", "density", "pattern", "B", "product")
_COLUMNS = (
  *_NAME, "implementation", "taken", "us", "dense us", "ratio", "bound", "of bound", "bound by", "error",
)  # fmt: skip


def cases():
  """Every (shape, block, density, pattern, B, product), most interesting first."""
  toy = jax.default_backend() != "gpu" if _TOY.value is None else _TOY.value
  out = []
  axes = (arg_specs.ARG_SPECS, arg_specs.BLOCKS, arg_specs.DENSITIES, ("random", "skewed"), _PRODUCTS.value)
  for spec, block, density, pattern, product in itertools.product(*axes):
    size = "{}x{}".format(*block)
    if _BLOCKS.value is not None and size not in _BLOCKS.value:
      continue
    shape = spec.toy() if toy else spec
    for batch in shape.batches:
      quick = spec.name in _QUICK_SHAPES and (toy or batch in _QUICK_SHAPES[spec.name]) and density in _QUICK_DENSITIES
      quick = quick and pattern == "random"
      # Of skewed patterns, one density for each shape is of first interest; training shapes matter for dx and dw.
      skew = spec.name == "square/8192" and density == 0.1 and pattern == "skewed"
      if _QUICK.value and not (quick or skew):
        continue
      if product != "fwd" and batch < 256 and not toy:
        continue
      rank = (
        not (quick or skew),
        pattern == "skewed" and density != 0.1,
        spec.name != "square/8192",
        batch not in (16, 4096),
      )
      out.append((rank, dict(shape=spec.name, K=shape.k, O=shape.o, block=size, density=density, pattern=pattern,
                             B=batch, product=product)))  # fmt: skip
  return [case for _, case in sorted(out, key=lambda item: item[0])]


def name_of(row) -> tuple:
  return tuple(row[key] for key in _NAME)


def sides(case) -> tuple[int, int]:
  return tuple(map(int, case["block"].split("x")))


def room(case) -> int:
  """Blocks that the weight of a case has room for."""
  (bk, bo), most = sides(case), min(c for c in _CLASSES if c >= case["density"])
  cells = case["K"] // bk * (case["O"] // bo)
  return math.ceil(1.02 * most * cells) + 32


def pattern_of(case):
  """NumPy: (rows, cols, plans) of a case's weight, padded to its room, and how many blocks are kept."""
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
  cols, rows = np.nonzero((rng.random(grid) < share).T)
  capacity = room(case)
  kept = np.sort(rng.choice(rows.size, min(capacity, rows.size), replace=False))
  pad = (0, capacity - kept.size)
  rows = np.pad(rows[kept], pad).astype(np.int32)
  cols = np.pad(cols[kept], pad, constant_values=grid[1]).astype(np.int32)
  return rows, cols, _plan._make(np, rows, cols, grid, (bk, bo)), kept.size


def weight(case, blocks, pattern) -> js.BlockArray:
  """A dynamic weight that carries its plan; `blocks` may be types, and so may the pattern's arrays."""
  rows, cols, plans, _ = pattern
  like = js.BlockArray.tree_unflatten(((case["K"], case["O"]), None), (blocks, rows, cols, plans))
  return jax.tree.map(jnp.asarray, like) if isinstance(blocks, jax.Array) else like


def operands(case):
  """(sparse function of (*args, w), dense function of (*args, full), types of args): of the product of a case."""
  x, dy = (jax.ShapeDtypeStruct((case["B"], case[n]), jnp.bfloat16) for n in "KO")
  if case["product"] == "fwd":
    return js.ops.block_matmul, lambda x, w: x @ w, (x,)
  if case["product"] == "dx":
    return js.ops.block_matmul_transposed, lambda dy, w: dy @ w.T, (dy,)
  return js.ops.sampled_matmul, lambda x, dy: x.T @ dy, (x, dy)


def choice_for(case):
  """Which implementation is taken by itself, for a weight without room to spare."""
  (bk, bo), kept = (
    sides(case),
    math.ceil(case["density"] * (case["K"] // sides(case)[0]) * (case["O"] // sides(case)[1])),
  )
  shape = jax.ShapeDtypeStruct
  leaves = shape((max(1, kept), bk, bo), jnp.bfloat16), *[shape((max(1, kept),), jnp.int32)] * 2, None
  w, args = js.BlockArray.tree_unflatten(((case["K"], case["O"]), None), leaves), operands(case)[2]
  if case["product"] == "dw":
    return js.ops.which_sampled_matmul(*args, w)
  return js.ops.which_block_matmul(*args, w, transposed=case["product"] == "dx")


def program_of(case) -> tuple:
  """Cases with the same program."""
  return case["K"], case["O"], case["block"], case["B"], case["product"], room(case)


def spec_of(case):
  """Types of the weight of a case."""
  types = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.int32), pattern_of(case)[:3])
  return weight(case, jax.ShapeDtypeStruct((room(case), *sides(case)), jnp.bfloat16), (*types, 0))


def compile_sparse(case) -> bytes | str:
  """The serialised program of a case, or what went wrong; runs in a process of its own."""
  try:
    sparse, _, args = operands(case)
    program = jax.jit(functools.partial(sparse, implementation=kernel())).lower(*args, spec_of(case)).compile()
    return serialize_executable.serialize(program)[0]
  except Exception as error:  # noqa: BLE001  One bad shape must not lose the table.
    return f"{type(error).__name__}: {str(error)[-200:]}"


def kernel() -> str:
  return "hopper" if jax.default_backend() == "gpu" else "xla"


def load(case, program: bytes):
  lists = _plan.Plan(*[0] * len(_plan.Plan._fields))
  plans = _plan.Plans(lists, lists, _plan.Sampled(*[0] * len(_plan.Sampled._fields)), 0)
  w = js.BlockArray.tree_unflatten(((case["K"], case["O"]), None), (0, 0, 0, plans))
  spec = jax.tree.structure(((*operands(case)[2], w), {}))
  return serialize_executable.deserialize_and_load(program, spec, jax.tree.structure(0))


def copies_for(nbytes: int, batch: int) -> int:
  if batch > _ROTATED or jax.default_backend() != "gpu":
    return 1
  l2 = getattr(jax.devices()[0], "l2_cache_size_bytes", None) or 50 * 2**20
  return min(_COPIES, max(1, -(-4 * l2 // nbytes)))


@functools.lru_cache(12)
def random(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def bound(case, pattern) -> tuple[float, str]:
  """(microseconds, what takes them): the least that the kernel's way of working needs at `_RATES`."""
  batch, (bk, bo), (_, _, plans, count) = case["B"], sides(case), pattern
  kept = count * bk * bo
  needed = {"memory": 2 * (batch * (case["K"] + case["O"]) + kept)}
  forward = case["product"] == "fwd"
  plan, size, depth = (plans.forward, bo, bk) if forward else (plans.transposed, bk, bo)
  shared, own = max(1, _plan.TILE // size), max(1, _plan.UNIT // size)
  slots = np.asarray(plan.slots).reshape(-1, shared) < room(case)
  entries = int(plan.starts[-1]) * max(1, size // _plan.TILE)
  if case["product"] == "dw":
    # All of a tile is computed, and whoever lacks a block does not store it.
    height = _plan.sampled_height(bk, room(case) * bk * bo / (case["K"] * case["O"]))
    pieces, high = plans.sampled.items[: plans.sampled.counts[0], 1:], max(1, bk // height)
    loaded = int((pieces[:, 1] - pieces[:, 0]).sum()) * bo
    needed["tensor cores"] = 2 * batch * len(pieces) * high * _plan.TILE * _plan.SAMPLED_COLUMNS
    needed["L2"] = 2 * batch * high * (len(pieces) * height + loaded)
  else:
    # Two blocks of 32 share an instruction.
    together = slots.reshape(len(slots), -1, own).any(2).sum() if own > 1 else 0
    needed["tensor cores"] = 2 * batch * (int(together) * _plan.UNIT * depth if own > 1 else kept)
    tuning = _hopper.tuning_for(batch, spec_of(case), not forward)
    # A cluster of tiles along B loads w once.
    across = -(-batch // (tuning.tile_b * tuning.cluster))
    needed["L2"] = 2 * (batch * entries * depth + across * kept)
  times = {name: 1e6 * amount / _RATES[name] for name, amount in needed.items()}
  name = max(times, key=times.get)
  return times[name], name


def sampled_error(case, y, args, pattern) -> float:
  """Norm of the error relative to the norm of the result, in float64, on some outputs."""
  rng, (bk, bo), (rows, cols, _, kept) = np.random.default_rng(0), sides(case), pattern
  as64 = lambda a: np.asarray(a).astype(np.float64)
  if not kept:
    return float(np.abs(as64(y)).max())
  some = np.sort(rng.choice(kept, min(8, kept), replace=False))
  if case["product"] == "dw":
    x, dy = map(on_host, args)
    want = [as64(x[:, rows[i] * bk :][:, :bk]).T @ as64(dy[:, cols[i] * bo :][:, :bo]) for i in some]
    got = as64(y[some])
  else:
    # Some rows of x, and a few block columns of the result.
    forward, blocks = case["product"] == "fwd", on_host(blocks_of(case))
    major, minor, size, depth = (cols, rows, bo, bk) if forward else (rows, cols, bk, bo)
    at, want, got = np.sort(rng.choice(case["B"], min(16, case["B"]), replace=False)), [], []
    part, out = as64(on_host(args[0])[at]), as64(y[at])
    for column in np.unique(major[some])[:3]:
      total = np.zeros((len(at), size))
      for i in np.nonzero((major == column) & (cols < case["O"] // bo))[0]:
        block = as64(blocks[i])
        total += part[:, minor[i] * depth :][:, :depth] @ (block if forward else block.T)
      want.append(total)
      got.append(out[:, column * size :][:, :size])
  got, want = np.concatenate([a.reshape(-1) for a in got]), np.concatenate([a.reshape(-1) for a in want])
  return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


_HOST: dict[int, tuple] = {}


def on_host(a) -> np.ndarray:
  """A NumPy copy of an array that is asked for again and again."""
  if id(a) not in _HOST:
    if len(_HOST) > 8:
      _HOST.clear()
    _HOST[id(a)] = a, np.asarray(a)
  return _HOST[id(a)][1]


def blocks_of(case):
  return random((room(case), *sides(case)), 3)


def measure(case, pattern, program, dense) -> dict:
  """The row of a case."""
  args = [random(a.shape, i) for i, a in enumerate(operands(case)[2])]
  kept = pattern[3]
  used = max(1, kept) * math.prod(sides(case)) * 2
  copies = copies_for(used, case["B"])
  blocks = blocks_of(case)
  w = weight(case, blocks, pattern)
  weights = [w] + [vjp.with_blocks(w, jnp.array(blocks, copy=True)) for _ in range(copies - 1)]
  last = args if case["product"] == "dw" else [*args, random((case["K"], case["O"]), 2)]
  full = [last]
  if case["product"] != "dw":
    full += [[*args, jnp.array(last[-1], copy=True)] for _ in range(copies_for(last[-1].nbytes, case["B"]) - 1)]
  again = -(-_ITERATIONS.value // copies)
  rounds = lambda program, operands: [(program, o) for _ in range(again) for o in operands]
  times, dense_times = [], []
  program(*args, w), dense(*last)  # first calls load code
  for _ in range(_ROUNDS.value):
    dense_times += device_time.each(rounds(dense, full))
    times += device_time.each(rounds(program, [[*args, w] for w in weights]))
  us, dense_us = statistics.median(times), statistics.median(dense_times)
  bound_us, bound_by = bound(case, pattern)
  on_gpu = jax.default_backend() == "gpu"  # bounds are those of an H100
  return {
    **case,
    "kept": kept,
    "implementation": kernel(),
    "taken": choice_for(case).implementation,
    "us": us,
    "dense us": dense_us,
    "ratio": dense_us / us,
    **({"bound": dense_us / bound_us, "of bound": bound_us / us, "bound by": bound_by} if on_gpu else {}),
    "TFLOP/s": 2 * case["B"] * kept * math.prod(sides(case)) / us / 1e6,
    "copies": copies,
    "error": sampled_error(case, program(*args, w), args, pattern),
  }


def break_even(rows) -> list[dict]:
  """For each (K, O, block, B, product) of random patterns the density above which the dense dot wins.

  Between two densities the ratio is taken to follow a power of the density; beyond the last, its inverse.
  """
  groups = collections.defaultdict(dict)
  for row in rows:
    if row["pattern"] == "random":
      groups[tuple(row[key] for key in ("shape", "K", "O", "block", "B", "product"))][row["density"]] = row["ratio"]
  out = []
  for key, ratios in groups.items():
    points = sorted(ratios.items())
    at = min(1.0, points[-1][0] * points[-1][1]) if points[-1][1] >= 1 else 0.0
    for (low, fast), (high, slow) in zip(points, points[1:]):
      if fast >= 1 > slow:
        at = math.exp(math.log(low) + math.log(high / low) * math.log(fast) / math.log(fast / slow))
    if len(points) > 1:
      out.append(dict(zip(("shape", "K", "O", "block", "B", "product"), key)) | {"dense wins above": round(at, 3)})
  return out


def plot(path, rows, title):
  """Ratio to dense over density, one panel a product and block, one line a shape and B; thin: the bound."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  rows = [row for row in rows if row["pattern"] == "random"]
  products = [p for p in ("fwd", "dx", "dw") if any(row["product"] == p for row in rows)]
  blocks = sorted({row["block"] for row in rows}, key=lambda block: -int(block.split("x")[0]))
  if not rows:
    return
  fig, axes = plt.subplots(
    len(products), len(blocks), figsize=(3.6 * len(blocks) + 2.5, 3 * len(products) + 0.5), squeeze=False,
    constrained_layout=True,
  )  # fmt: skip
  lines = {line: i for i, line in enumerate(sorted({(row["shape"], row["B"]) for row in rows}))}
  for (i, product), (j, block) in itertools.product(enumerate(products), enumerate(blocks)):
    ax = axes[i][j]
    for (shape, batch), color in lines.items():
      mine = [r for r in rows if (r["product"], r["block"], r["shape"], r["B"]) == (product, block, shape, batch)]
      best = {}
      for row in mine:
        if row["density"] not in best or row["ratio"] > best[row["density"]][0]:
          best[row["density"]] = (row["ratio"], row.get("bound", math.nan))
      if best:
        x, y = zip(*sorted(best.items()))
        color = plt.cm.tab20(color % 20)
        ax.plot(x, [r for r, _ in y], marker=".", color=color, label=f"{shape}, B = {batch}")
        ax.plot(x, [b for _, b in y], linewidth=0.6, color=color)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(arg_specs.DENSITIES, [f"{d:g}" for d in arg_specs.DENSITIES])
    ax.set_yticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
    ax.set_ylim(0.6, 25)
    ax.minorticks_off()
    ax.set_title(f"{product}, {block}", fontsize=10)
    ax.set_xlabel("density")
  for ax in axes[:, 0]:
    ax.set_ylabel("dense time / sparse time")
  handles = {}
  for ax in axes.flat:
    handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
  fig.legend(handles.values(), handles, loc="outside right upper", fontsize=7)
  fig.suptitle(title + "; thin lines: bounds", fontsize=10)
  fig.savefig(path, dpi=130)
  plt.close(fig)


def compile_all(todo, pool):
  """(sparse programs by `program_of`, dense ones): the first as futures of bytes, the others compiled by threads."""
  unique = {program_of(case): case for case in reversed(todo)}
  order = dict.fromkeys(program_of(case) for case in todo)
  sparse = {key: pool.submit(compile_sparse, unique[key]) for key in order}
  dense = {}
  for case in todo:
    dense.setdefault((case["K"], case["O"], case["B"], case["product"]), case)

  def make(case):
    _, fn, args = operands(case)
    full = () if case["product"] == "dw" else (jax.ShapeDtypeStruct((case["K"], case["O"]), jnp.bfloat16),)
    return jax.jit(fn).lower(*args, *full).compile()

  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    return sparse, dict(zip(dense, threads.map(make, dense.values())))


def run(todo, rows, failed):
  """Appends a row for each case of `todo`, within the budget."""
  began = time.monotonic()
  over = lambda: _BUDGET.value is not None and time.monotonic() - began > _BUDGET.value
  pool = concurrent.futures.ProcessPoolExecutor(_WORKERS.value, multiprocessing.get_context("spawn"))
  try:
    sparse, dense = compile_all(todo, pool)
    pattern_key = lambda case: tuple(case[k] for k in ("K", "O", "block", "density", "pattern"))
    patterns = {}
    for case in todo:
      if pattern_key(case) not in patterns:
        patterns[pattern_key(case)] = pool.submit(pattern_of, case)
    # Nothing is timed while others compile.
    concurrent.futures.wait(sparse.values(), timeout=_BUDGET.value)
    loaded = {}
    for i, case in enumerate(tqdm.tqdm(todo)):
      if over():
        break
      key = program_of(case)
      try:
        if key not in loaded:
          program = sparse[key].result()
          if isinstance(program, str):
            raise RuntimeError(program)
          loaded[key] = load(case, program)
        pattern = patterns[pattern_key(case)].result()
        rows.append(measure(case, pattern, loaded[key], dense[case["K"], case["O"], case["B"], case["product"]]))
      except Exception as error:  # noqa: BLE001
        failed.append(dict(zip(_NAME, name_of(case))) | {"error": str(error)[-300:]})
      if i % 50 == 49:
        write(rows, failed, [])
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def write(rows, failed, missing):
  report.write_json(
    _OUT.value + ".json", rows, break_even=break_even(rows), rates=_RATES, failed=failed, not_measured=len(missing)
  )


def main(argv):
  del argv
  if jax.default_backend() == "gpu":
    importlib.import_module("jax.experimental.mosaic.gpu.profiler")  # what programs that were compiled elsewhere call
  began, path = time.monotonic(), pathlib.Path(_OUT.value + ".json")
  rows = json.loads(path.read_text())["rows"] if path.exists() else []
  todo, failed = cases(), []
  known = {name_of(row) for row in rows}
  run([case for case in todo if name_of(case) not in known], rows, failed)
  known = {name_of(row) for row in rows}
  missing = [case for case in todo if name_of(case) not in known]
  order = {spec.name: i for i, spec in enumerate(arg_specs.ARG_SPECS)}
  rows.sort(key=lambda r: (r["product"], r["pattern"], order[r["shape"]], r["B"], -sides(r)[0], -r["density"]))
  write(rows, failed, missing)
  crossings = break_even(rows)
  if rows:
    report.print_table(rows, _COLUMNS)
  if crossings:
    report.print_table(crossings, list(crossings[0]))
  environment = report.environment()
  print(f"{environment['device']}, jax {environment['jax']}; bounds at "
        + ", ".join(f"{rate / 1e12:g} T/s {what}" for what, rate in _RATES.items()))  # fmt: skip
  print("A ratio below 1 is slower than the dense dot.")
  print(f"{len(rows)} of {len(todo)} cells, {len(failed)} failed, {time.monotonic() - began:.0f} s")
  for case in failed:
    print("failed:", json.dumps(case))
  if rows:
    title = (
      f"Block-sparse products against XLA's dense bfloat16 dot ({environment['device']}, jax {environment['jax']})"
    )
    plot(_OUT.value + ".png", rows, title)
  if _MEASURED.value:
    write_measured(_MEASURED.value, crossings, environment)


def write_measured(path, crossings, environment):
  """What `jaxsparse.ops.block_matmul.preference` reads: one line a shape."""
  columns = ("K", "O", "block", "B", "product", "dense wins above")
  lines = [json.dumps([row[c] for c in columns]) for row in crossings]
  head = {key: environment[key] for key in ("device", "jax")} | {"dtype": "bfloat16", "columns": columns}
  text = json.dumps(head)[:-1] + ', "rows": [\n ' + ",\n ".join(lines) + "\n]}\n"
  pathlib.Path(path).write_text(text)


if __name__ == "__main__":
  app.run(main)
