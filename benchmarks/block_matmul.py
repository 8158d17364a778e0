"""Block-sparse products against the dense dot: every shape, block, density and number of rows, losing ones included.

  python benchmarks/block_matmul.py [--quick] [--budget=300] [--products=fwd,dx,dw] [--out=results/block_matmul]

Forward, dx (transposed) and dw (sampled at the kept blocks), random patterns and skewed ones (a power law of blocks per
column). One row for every implementation that is timed; `*` marks the one that is taken by itself. Times are device time
(CUPTI) on a GPU and wall clock elsewhere, medians over rounds that alternate with XLA's dense dot of the same product in
the same process, on random data. Up to 64 rows of x, weights rotate through copies that together exceed four times the
L2 cache (at most 32 copies). The error is against float64 on a sample of outputs.

Beside each ratio stands its bound: dense time over the largest of what tensor cores, loads through the L2 cache and device
memory need at the rates named below. Rows come in order of interest, so that `--budget` (seconds) leaves out the least
interesting ones; what was left out is counted. Last come the densities at which dense wins. Without a GPU it runs at toy
size, to check itself.
"""

import collections
import concurrent.futures
import functools
import itertools
import json
import math
import os
import statistics
import time

from absl import app
from absl import flags
import check_block_matmul
import device_time
import jax
import jax.numpy as jnp
import numpy as np
import report
import tqdm

import jaxsparse as js
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import arg_specs

_QUICK = flags.DEFINE_bool("quick", False, "Three shapes, two or three numbers of rows, densities 0.5, 0.1 and 0.05.")
_BUDGET = flags.DEFINE_float("budget", None, "Seconds after which no new row is begun; default: none.")
_PRODUCTS = flags.DEFINE_list("products", ["fwd", "dx", "dw"], "Which products.")
_BLOCKS = flags.DEFINE_list("blocks", None, "Block sizes such as 128x128; default: all.")
_PORTABLE = flags.DEFINE_bool("portable", False, "Time the xla path too, where a kernel runs.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Alternating rounds; the median is reported.")
_ITERATIONS = flags.DEFINE_integer("iterations", 5, "Calls in a round.")
_TOY = flags.DEFINE_bool("toy", None, "Toy shapes; default: where there is no GPU.")
_OUT = flags.DEFINE_string("out", "results/block_matmul", "Where the JSON and the plot go, without suffix.")

_QUICK_SHAPES = {"square/8192": (8192,), "llama3-8b/up": (16, 4096), "llama3-8b/down": (4096,)}
_QUICK_DENSITIES = (0.5, 0.1, 0.05)
_ROTATED = 64  # rows of x up to which the weight must come from memory
_COPIES = 32
_CHUNK = 16  # cases compiled together
# What bounds a kernel on the H100: bfloat16 operations a second that XLA's dot reaches at 8192^3, bytes a second through
# the L2 cache and from memory, as seen with other kernels.
_RATES = {"tensor cores": 800e12, "L2": 8e12, "memory": 3e12}
_COLUMNS = (
  "shape", "block", "density", "pattern", "B", "product", "implementation", "us", "dense us", "ratio", "bound",
  "of bound", "bound by", "error",
)  # fmt: skip


def cases():
  """Every (shape, block, density, pattern, B, product), most interesting first."""
  toy = jax.default_backend() != "gpu" if _TOY.value is None else _TOY.value
  out = []
  axes = (arg_specs.ARG_SPECS, arg_specs.BLOCKS, arg_specs.DENSITIES, ("random", "skewed"), _PRODUCTS.value)
  for spec, block, density, pattern, product in itertools.product(*axes):
    if _BLOCKS.value is not None and "{}x{}".format(*block) not in _BLOCKS.value:
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
      rank = (not (quick or skew), pattern == "skewed", spec.name != "square/8192", product != "fwd", product)
      case = dict(shape=spec.name, K=shape.k, O=shape.o, block=block, density=density, pattern=pattern)
      out.append((rank, case | dict(B=batch, product=product)))
  return [case for _, case in sorted(out, key=lambda item: item[0])]


@functools.lru_cache(8)
def weight(k, o, block, density, pattern):
  return check_block_matmul.weight(k, o, block, density, skew=pattern == "skewed", seed=k + o)


def operands(case):
  """(sparse function of (args, weight), args, dense function, dense args): of the product of a case."""
  w = weight(case["K"], case["O"], case["block"], case["density"], case["pattern"])
  x, dy = (jax.random.normal(jax.random.key(i), (case["B"], case[n]), jnp.bfloat16) for i, n in enumerate("KO"))
  full = jax.random.normal(jax.random.key(2), w.shape, jnp.bfloat16)
  if case["product"] == "fwd":
    return lambda x, w, **k: js.ops.block_matmul(x, w, **k), x, w, lambda x, w: x @ w, full
  if case["product"] == "dx":
    return lambda dy, w, **k: js.ops.block_matmul_transposed(dy, w, **k), dy, w, lambda dy, w: dy @ w.T, full
  both = lambda a, w, **k: js.ops.sampled_matmul(*a, w, **k)
  return both, (x, dy), w, lambda a, w: a[0].T @ a[1], jnp.zeros(())


def copies_for(nbytes: int, batch: int) -> int:
  if batch > _ROTATED or jax.default_backend() != "gpu":
    return 1
  l2 = getattr(jax.devices()[0], "l2_cache_size_bytes", None) or 50 * 2**20
  return min(_COPIES, max(1, -(-4 * l2 // nbytes)))


def spread(fn, x, w, copies):
  """One program that applies `fn` to every copy of the weight, and its arguments."""
  weights = [w] + [jax.tree.map(lambda a: jnp.array(a, copy=True), w) for _ in range(copies - 1)]
  program = jax.jit(lambda x, weights: [fn(x, w) for w in weights])
  return program.lower(x, weights).compile(), x, weights


def prepare(case):
  """Compiles what a case needs: {"case", "w", "programs", "taken"}, or an "error"."""
  try:
    fn, x, w, dense_fn, dense_w = operands(case)
    batch = case["B"]
    if case["product"] == "dw":
      choice = js.ops.which_sampled_matmul(*x, w)
    else:
      choice = js.ops.which_block_matmul(x, w, transposed=case["product"] == "dx")
    names = ["xla"] if "hopper" in choice.rejected and "NVIDIA GPU" in choice.rejected["hopper"] else ["hopper"]
    names += ["xla"] if _PORTABLE.value and names != ["xla"] else []
    programs = {"dense": spread(dense_fn, x, dense_w, copies_for(max(1, dense_w.nbytes), batch))}
    for name in names:
      programs[name] = spread(functools.partial(fn, implementation=name), x, w, copies_for(w.blocks.nbytes, batch))
    return dict(case=case, w=w, programs=programs, taken=choice.implementation)
  except Exception as error:  # noqa: BLE001  One bad shape must not lose the table.
    return dict(case=case, error=f"{type(error).__name__}: {str(error)[-200:]}")


def bound(case, w) -> tuple[float, str]:
  """(microseconds, what takes them): the least that the kernel's way of working needs at `_RATES`."""
  batch, (bk, bo), (k, o) = case["B"], w.block_shape, w.shape
  count = int(w.count)
  kept = count * bk * bo
  needed = {"memory": 2 * (batch * (k + o) + kept)}
  if case["product"] == "dw":
    plan = w.plan.sampled
    shared = max(1, _plan.sampled_rows(bk) // bk)
    slots = np.asarray(plan.slots).reshape(-1, shared)
    lengths = np.diff(np.asarray(plan.starts)) * max(1, bk // _plan.sampled_rows(bk))
    entries = int((slots < w.capacity).any(1).sum())
    # Neighbouring rows of 32 share an instruction of 64.
    needed["tensor cores"] = 2 * batch * (entries * 64 * bo if bk < 64 else kept)
    tiles = int(np.ceil(lengths / _plan.sampled_entries(bo)).sum())
    needed["L2"] = 2 * batch * (tiles * _plan.sampled_rows(bk) + int(lengths.sum()) * bo)
  else:
    plan, size, depth = (w.plan.forward, bo, bk) if case["product"] == "fwd" else (w.plan.transposed, bk, bo)
    slots = np.asarray(plan.slots).reshape(-1, max(1, _plan.TILE // size)) < w.capacity
    entries = int(np.diff(np.asarray(plan.starts)).sum()) * max(1, size // _plan.TILE)
    pairs = int((slots[:, ::2] | slots[:, 1::2]).sum()) if size < 64 else 0
    needed["tensor cores"] = 2 * batch * (pairs * 64 * depth if size < 64 else kept)
    needed["L2"] = 2 * (batch * entries * depth + math.ceil(batch / 256) * kept)
  times = {name: 1e6 * amount / _RATES[name] for name, amount in needed.items()}
  name = max(times, key=times.get)
  return times[name], name


def sampled_error(case, y, x, w) -> float:
  """Norm of the error relative to the norm of the result, in float64, on some outputs."""
  rng = np.random.default_rng(0)
  as64 = lambda a: np.asarray(a).astype(np.float64)
  pick = lambda n, most: np.sort(rng.choice(n, min(most, n), replace=False))
  if case["product"] == "dw":
    some, (bk, bo) = pick(int(w.count), 8), w.block_shape
    if not some.size:
      return 0.0
    rows, cols = (np.asarray(a)[some] for a in (w.rows, w.cols))
    x, dy = x
    want = np.stack(
      [as64(x[:, r * bk : (r + 1) * bk]).T @ as64(dy[:, c * bo : (c + 1) * bo]) for r, c in zip(rows, cols)]
    )
    got = as64(y[some])
  else:
    full = w.to_dense().T if case["product"] == "dx" else w.to_dense()
    rows, cols = pick(x.shape[0], 16), pick(full.shape[1], 64)
    want, got = as64(x[rows]) @ as64(full[:, cols]), as64(y[rows][:, cols])
  return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def measure(prepared, time_of):
  """Rows of the table for one case."""
  case, w, programs = (prepared[k] for k in ("case", "w", "programs"))
  times = {name: [] for name in programs}
  for _ in range(_ROUNDS.value):
    for name, args in programs.items():
      times[name] += time_of(*args)
  dense_us = statistics.median(times["dense"])
  bound_us, bound_by = bound(case, w)
  on_gpu = jax.default_backend() == "gpu"  # bounds are those of an H100
  rows = []
  for name, (program, x, weights) in programs.items():
    if name == "dense":
      continue
    us = statistics.median(times[name])
    rows.append({
      **{k: case[k] for k in ("shape", "K", "O", "density", "pattern", "B", "product")},
      "block": "{}x{}".format(*case["block"]),
      "kept": int(w.count),
      "implementation": name + ("*" if name == prepared["taken"] else ""),
      "us": us,
      "dense us": dense_us,
      "ratio": dense_us / us,
      **({"bound": dense_us / bound_us, "of bound": bound_us / us, "bound by": bound_by} if on_gpu else {}),
      "TFLOP/s": 2 * case["B"] * int(w.count) * math.prod(w.block_shape) / us / 1e6,
      "copies": len(weights),
      "error": sampled_error(case, program(x, weights)[0], x, w),
    })  # fmt: skip
  return rows


def break_even(rows) -> list[dict]:
  """For each (shape, block, B, product) of random patterns the density at which the fastest implementation meets dense."""
  groups = collections.defaultdict(dict)
  for row in rows:
    if row["pattern"] == "random":
      best = groups[row["shape"], row["block"], row["B"], row["product"]]
      best[row["density"]] = max(best.get(row["density"], 0), row["ratio"])
  out = []
  for key, best in groups.items():
    points = sorted(best.items())
    if len(points) < 2:
      continue
    at = ""
    if points[0][1] < 1:
      at = f"below {points[0][0]:g}"
    elif points[-1][1] > 1:
      # Time grows with density, so the ratio falls like its inverse: extend the last point.
      at = f"about {min(1, points[-1][0] * points[-1][1]):.2g} (extended)"
    for (low, fast), (high, slow) in zip(points, points[1:]):
      if fast >= 1 > slow:
        at = f"{math.exp(math.log(low) + math.log(high / low) * math.log(fast) / math.log(fast / slow)):.2g}"
    out.append(dict(zip(("shape", "block", "B", "product"), key)) | {"dense wins above": at})
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
    ax.minorticks_off()
    ax.set_title(f"{product}, {block}", fontsize=10)
    ax.set_xlabel("density")
  axes[0][0].set_ylabel("dense time / sparse time")
  handles = {}
  for ax in axes.flat:
    handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
  fig.legend(handles.values(), handles, loc="outside right upper", fontsize=7)
  fig.suptitle(title + "; thin lines: bounds", fontsize=10)
  fig.savefig(path, dpi=130)
  plt.close(fig)


def main(argv):
  del argv
  began = time.monotonic()
  time_of = device_time.timer(_ITERATIONS.value)
  todo, rows, failed = cases(), [], []
  done = 0
  name = lambda case: {k: case[k] for k in ("shape", "block", "density", "pattern", "B", "product")}
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, tqdm.tqdm(total=len(todo)) as bar:
    for at in range(0, len(todo), _CHUNK):
      if _BUDGET.value is not None and time.monotonic() - began > _BUDGET.value:
        break
      # Compiling tunes the dense dot on the device, so nothing is timed meanwhile.
      for prepared in list(pool.map(prepare, todo[at : at + _CHUNK])):
        if "error" in prepared:
          failed.append(name(prepared["case"]) | {"error": prepared["error"]})
        elif _BUDGET.value is not None and time.monotonic() - began > 1.1 * _BUDGET.value:
          continue
        else:
          try:
            rows += measure(prepared, time_of)
          except Exception as error:  # noqa: BLE001
            failed.append(name(prepared["case"]) | {"error": str(error)[-200:]})
        done += 1
        bar.update()
  order = {spec.name: i for i, spec in enumerate(arg_specs.ARG_SPECS)}
  rows.sort(key=lambda r: (r["product"], r["pattern"], order[r["shape"]], r["B"], r["block"], -r["density"]))
  crossings = break_even(rows)
  if rows:
    report.print_table(rows, _COLUMNS)
  if crossings:
    report.print_table(crossings, list(crossings[0]))
  environment = report.environment()
  print(f"{environment['device']}, jax {environment['jax']}; bounds at "
        + ", ".join(f"{rate / 1e12:g} T/s {what}" for what, rate in _RATES.items()))  # fmt: skip
  print("* is what is taken by itself; a ratio below 1 is slower than the dense dot.")
  print(f"{done} of {len(todo)} cases, {len(failed)} failed, {time.monotonic() - began:.0f} s")
  for case in failed:
    print("failed:", json.dumps(case))
  missing = [list(name(case).values()) for case in todo[done:]]
  report.write_json(_OUT.value + ".json", rows, break_even=crossings, rates=_RATES, failed=failed, not_measured=missing)
  if rows:
    title = (
      f"Block-sparse products against XLA's dense bfloat16 dot ({environment['device']}, jax {environment['jax']})"
    )
    plot(_OUT.value + ".png", rows, title)


if __name__ == "__main__":
  app.run(main)
