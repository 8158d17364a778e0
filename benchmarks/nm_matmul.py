"""N:M matmul against the dense dot: every shape of `arg_specs`, every pattern, every number of rows, losing ones included.

  python benchmarks/nm_matmul.py [--quick] [--budget=240] [--patterns=2:4,1:8] [--xla] [--out=results/nm_matmul]

One row for every kernel that runs, and for decompression with a dense dot ("xla") where none does, `*` at the one that
`nm_matmul` takes by itself. Times are device time (CUPTI) on a GPU and wall clock elsewhere, medians over rounds that
alternate with XLA's dense dot in the same process, on random data. Up to 64 rows of x, weights rotate through copies that together exceed four times the L2 cache (at most 32 copies).
The error is against float64 on a sample of outputs. Rows come in order of interest, so that `--budget` (seconds) leaves
out the least interesting ones; what was left out is counted. 2:4 is also timed through cuSPARSELt with its algorithm
search where torch with CUDA can be imported. Without a GPU it runs at toy size, to check itself.
"""

import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import json
import os
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

from absl import app
from absl import flags
import device_time
import jax
import jax.numpy as jnp
import numpy as np
import report
import tqdm

import jaxsparse as js
from jaxsparse.ops.nm_matmul import arg_specs

_QUICK = flags.DEFINE_bool("quick", False, "Four shapes, four numbers of rows, 2:4 and 1:8.")
_BUDGET = flags.DEFINE_float("budget", None, "Seconds after which no new row is begun; default: none.")
_PATTERNS = flags.DEFINE_list("patterns", None, "Patterns such as 2:4, or 2:4+int8 and 2:4+int4; default: all.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Alternating rounds; the median is reported.")
_ITERATIONS = flags.DEFINE_integer("iterations", 5, "Calls in a round.")
_TORCH = flags.DEFINE_bool("torch", True, "Time cuSPARSELt where torch is at hand.")
_TOY = flags.DEFINE_bool("toy", None, "Toy shapes; default: where there is no GPU.")
_XLA = flags.DEFINE_bool("xla", False, "Also time decompression with a dense dot where a kernel is taken.")
_SHOW = flags.DEFINE_string("show", None, "Runs nothing: prints the JSON of an earlier run as a Markdown table.")
_OUT = flags.DEFINE_string("out", "results/nm_matmul", "Where the JSON and the plot go, without suffix.")

_QUICK_SHAPES = ("llama3-8b/up", "llama3-8b/down", "square/4096", "square/8192")
_QUICK_BATCHES = (1, 16, 512, 4096, 8192)
_ROTATED = 64  # rows of x up to which the weight must come from memory
_COPIES = 32
_TOLERANCE = 8e-3  # two roundings to bfloat16 and some; sums of products in float32 add little
_CHUNK = 8  # cases compiled together
_COLUMNS = (
  "shape", "K", "O", "pattern", "B", "implementation", "us", "dense us", "ratio", "TFLOP/s", "TB/s", "of copy",
  "cuSPARSELt us", "error",
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def random_weight(k: int, o: int, n: int, m: int, key: jax.Array) -> js.NMArray:
  """A random n:m weight `[K, O]` in bfloat16, every choice of positions equally likely."""
  choices = jnp.asarray(list(itertools.combinations(range(m), n)), jnp.uint8)
  keys = jax.random.split(key)
  values = jax.random.normal(keys[0], (k // m, n, o), jnp.bfloat16)
  positions = choices[jax.random.randint(keys[1], (k // m, o), 0, len(choices))]
  return js.NMArray(values, positions.transpose(0, 2, 1), n=n, m=m)


def weight(key) -> dict:
  """name -> form of the weight of a case (see `weight_key`): the NMArray, dense, and each layout that holds it."""
  k, o, (n, m), bits = key
  w = random_weight(k, o, n, m, jax.random.key(k + o))
  if bits:
    w = js.quant.quantize(w, bits, min(128, k))
  forms = {"w": w, "dense": jax.jit(lambda w: w.to_dense(jnp.bfloat16))(w)}
  for name in ("hopper", "decode"):
    with contextlib.suppress(ValueError):  # the layout cannot hold it
      forms[name] = js.ops.pack(w, name)
  # What is still being made must not run into a measurement.
  return jax.block_until_ready(forms)


def weight_key(case):
  return case["K"], case["O"], case["nm"], case["bits"]


def cases():
  """Every (shape, pattern, B), most interesting first."""
  toy = jax.default_backend() != "gpu" if _TOY.value is None else _TOY.value
  patterns = [(n, m, bits) for bits, nms in ((0, arg_specs.PATTERNS), (8, [(2, 4)]), (4, [(2, 4)])) for n, m in nms]
  out = []
  for spec, (n, m, bits) in itertools.product(arg_specs.ARG_SPECS, patterns):
    pattern = f"{n}:{m}" + (f"+int{bits}" if bits else "")
    if _PATTERNS.value is not None and pattern not in _PATTERNS.value:
      continue
    quick = spec.name in _QUICK_SHAPES and pattern in ("2:4", "1:8")
    shape = spec.toy() if toy else spec
    for batch in shape.batches:
      first = quick and (toy or batch in _QUICK_BATCHES)
      if _QUICK.value and not first:
        continue
      rank = (not first, pattern != "2:4", batch not in _QUICK_BATCHES, patterns.index((n, m, bits)))
      out.append(
        (rank, dict(shape=spec.name, K=shape.k, O=shape.o, pattern=pattern, nm=(n, m), bits=bits, B=batch, first=first))
      )
  return [case for _, case in sorted(out, key=lambda item: item[0])]


def copies_for(nbytes: int, batch: int) -> int:
  if batch > _ROTATED or jax.default_backend() != "gpu":
    return 1
  l2 = getattr(jax.devices()[0], "l2_cache_size_bytes", None) or 50 * 2**20
  return min(_COPIES, max(1, -(-4 * l2 // nbytes)))


@functools.partial(jax.jit, static_argnums=0)
def apply_all(implementation, x, weights):
  """The product with every copy of the weight."""
  if implementation == "dense":
    return [jnp.dot(x, w) for w in weights]
  return [js.ops.nm_matmul(x, w, implementation=implementation) for w in weights]


def prepare(case, forms):
  """Compiles what a case needs: {"case", "x", "taken", "errors", "programs": name -> (program, weights)}, or an "error"."""
  try:
    x = jax.random.normal(jax.random.key(case["B"]), (case["B"], case["K"]), jnp.bfloat16)
    best = js.ops.pack(forms["w"], batch=case["B"]) if {"hopper", "decode"} & set(forms) else forms["w"]
    taken = js.ops.which_nm_matmul(x, best).implementation
    programs = {"dense": spread("dense", x, forms["dense"], case["B"])}
    for name in ("hopper", "decode"):
      with contextlib.suppress(KeyError, NotImplementedError):
        js.ops.which_nm_matmul(x, forms[name], implementation=name)
        programs[name] = spread(name, x, forms[name], case["B"])
    if taken == "xla" or _XLA.value:
      programs["xla"] = spread("xla", x, best, None)
    # Against the weight as it is stored: quantisation is no error of the product.
    errors = {name: sampled_error(f(x, ws)[0], x, forms["dense"]) for name, (f, ws) in programs.items()}
    jax.block_until_ready((x, [weights for _, weights in programs.values()]))
    return dict(case=case, x=x, programs=programs, taken=taken, errors=errors)
  except Exception as error:  # noqa: BLE001  One bad shape must not lose the table.
    return dict(case=case, error=f"{type(error).__name__}: {str(error)[-200:]}")


_programs = {}


def spread(name, x, w, batch):
  """(program, copies of the weight)."""
  copies = 1 if batch is None else copies_for(w.nbytes, batch)
  weights = [w] + [jax.tree.map(lambda a: jnp.array(a, copy=True), w) for _ in range(copies - 1)]
  key = (name, x.shape, copies, str(jax.tree.map(jnp.shape, w)))  # one dense program for all patterns
  if key not in _programs:
    _programs[key] = apply_all.lower(name, x, weights).compile()
  return _programs[key], weights


@functools.partial(jax.jit, static_argnums=(3, 4))
def sample(y, x, dense, rows, cols):
  """Evenly spread rows and columns of a product, and what they were made of."""
  row, col = (
    slice(None, rows * (y.shape[0] // rows), y.shape[0] // rows),
    slice(0, cols * (y.shape[1] // cols), y.shape[1] // cols),
  )
  return y[row, col], x[row], dense[:, col].astype(jnp.float32)


def sampled_error(y, x, dense) -> float:
  """Norm of the error relative to the norm of the result, in float64, on at most 16 x 64 outputs."""
  y, x, dense = (np.asarray(a, np.float64) for a in sample(y, x, dense, min(16, y.shape[0]), min(64, y.shape[1])))
  return float(np.linalg.norm(y - x @ dense) / np.linalg.norm(x @ dense))


def measure(prepared, time_of, bandwidth):
  """Rows of the table for one case."""
  case, x, programs = (prepared[k] for k in ("case", "x", "programs"))
  times = {name: [] for name in programs}
  for _ in range(_ROUNDS.value):
    for name, (program, weights) in programs.items():
      times[name] += time_of(program, x, weights)
  dense_us = statistics.median(times["dense"])
  rows = []
  for name, (_, weights) in programs.items():
    if name == "dense":
      continue
    us = statistics.median(times[name])
    nbytes = weights[0].nbytes + x.nbytes + 2 * case["B"] * case["O"]
    rows.append({
      **{k: case[k] for k in ("shape", "K", "O", "pattern", "B")},
      "implementation": name + ("*" if name == prepared["taken"] else ""),
      "us": us,
      "dense us": dense_us,
      "ratio": dense_us / us,
      "TFLOP/s": 2 * case["B"] * case["K"] * case["O"] / us / 1e6,
      "TB/s": nbytes / us / 1e6,
      "of copy": nbytes / us / 1e6 / bandwidth,
      "copies": len(weights),
      "error": prepared["errors"][name],
    })  # fmt: skip
  return rows


def copy_bandwidth(time_of) -> float:
  """TB/s, read and written, of a copy that is far larger than the cache."""
  big = jnp.ones(2**28 if jax.default_backend() == "gpu" else 2**22, jnp.bfloat16)
  program = jax.jit(lambda x, weights: [x - w for w in weights])
  return 2 * big.nbytes / statistics.median(time_of(program, big[:1], [big])) / 1e6


def import_torch():
  """(torch, note): torch with CUDA and cuSPARSELt, or None and why not."""
  if not _TORCH.value:
    return None, "not asked for"
  if jax.default_backend() != "gpu":
    return None, "no GPU"
  try:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
      return None, f"torch {torch.__version__} sees no CUDA device"
    version = torch.backends.cusparselt.version()
  except Exception as error:  # noqa: BLE001  A broken installation is as good as none.
    return None, f"{type(error).__name__}: {str(error)[:100]}"
  if not version:
    return None, f"torch {torch.__version__} has no cuSPARSELt"
  return torch, f"torch {torch.__version__}, cuSPARSELt {version}"


def torch_time(torch, case) -> float | None:
  """Median microseconds of the product through cuSPARSELt with the algorithm that its search finds; None if it fails."""
  try:
    groups = torch.randn(case["O"], case["K"] // 4, 4, device="cuda", dtype=torch.bfloat16)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, torch.rand_like(groups).topk(2, dim=2).indices, True)
    dense = torch.where(keep, groups, 0).reshape(case["O"], case["K"])
    b = torch.randn(case["B"], case["K"], device="cuda", dtype=torch.bfloat16).T
    packed = [torch._cslt_compress(dense)]
    packed += [packed[0].clone() for _ in range(copies_for(packed[0].nbytes, case["B"]) - 1)]
    best = torch._cslt_sparse_mm_search(packed[0], b)
    run = lambda: [torch._cslt_sparse_mm(p, b, alg_id=best) for p in packed]
    for _ in range(2):
      run()
    times = []
    for _ in range(_ROUNDS.value * _ITERATIONS.value):
      start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
      start.record()
      run()
      stop.record()
      stop.synchronize()
      times.append(1e3 * start.elapsed_time(stop) / len(packed))
    return statistics.median(times)
  except Exception as error:  # noqa: BLE001  cuSPARSELt refuses some shapes.
    tqdm.tqdm.write(f"cuSPARSELt, {case['shape']}, B = {case['B']}: {str(error)[:120]}", file=sys.stderr)
    return None


def plot(path, rows, title):
  """Ratio to dense over B, one panel a pattern, one line a shape: the fastest implementation of each."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  patterns = list(dict.fromkeys(row["pattern"] for row in rows))
  fig, axes = plt.subplots(
    1, len(patterns), figsize=(3.6 * len(patterns) + 3, 4), squeeze=False, sharey=True, constrained_layout=True
  )
  shapes = list(dict.fromkeys(row["shape"] for row in rows))
  for ax, pattern in zip(axes[0], patterns):
    for i, shape in enumerate(shapes):
      best = {}
      for row in rows:
        if (row["pattern"], row["shape"]) == (pattern, shape):
          best[row["B"]] = max(best.get(row["B"], 0), row["ratio"])
      ax.plot(*zip(*sorted(best.items())), marker=".", color=plt.cm.tab20(i % 20), label=shape) if best else None
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_title(pattern, fontsize=10)
    ax.set_xlabel("rows of x")
  axes[0][0].set_ylabel("dense time / sparse time")
  fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
  fig.suptitle(title, fontsize=9, x=0.01, horizontalalignment="left")
  fig.savefig(path, dpi=130)
  plt.close(fig)


def show(path):
  """The table of an earlier run, for the README."""
  with open(path) as file:
    found = json.load(file)
  environment = found["environment"]
  print(f"{environment['device']}, jax {environment['jax']}, copy {found['copy_tb_per_s']:.3g} TB/s:\n")
  columns = {"shape": "shape", "K": "K", "O": "O", "pattern": "pattern", "B": "B", "implementation": "kernel"}
  numbers = {"us": "us", "dense us": "dense, us", "ratio": "ratio", "TFLOP/s": "TFLOP/s", "TB/s": "TB/s"}
  numbers |= {"of copy": "of copy", "cuSPARSELt us": "cuSPARSELt, us", "error": "error"}
  print("| " + " | ".join([*columns.values(), *numbers.values()]) + " |")
  print("|" + " --- |" * len(columns) + " ---: |" * len(numbers))
  for row in found["rows"]:
    cells = [str(row[k]) for k in columns] + [f"{row[k]:.4g}" if k in row else "" for k in numbers]
    print("| " + " | ".join(cells) + " |")


def main(argv):
  del argv
  if _SHOW.value:
    return show(_SHOW.value)
  began = time.monotonic()
  over = lambda: _BUDGET.value is not None and time.monotonic() - began > _BUDGET.value
  time_of = device_time.timer(_ITERATIONS.value)
  torch_note = "not reached"
  bandwidth = copy_bandwidth(time_of)
  todo, rows, failed, forms, done = cases(), [], [], {}, 0
  order = {spec.name: i for i, spec in enumerate(arg_specs.ARG_SPECS)}

  def write():
    rows.sort(key=lambda r: (r["pattern"] != "2:4", r["pattern"], order[r["shape"]], r["B"]))
    missing = [[c["shape"], c["pattern"], c["B"]] for c in todo[done:]]
    note = dict(copy_tb_per_s=bandwidth, cusparselt=torch_note, failed=failed, not_measured=missing)
    report.write_json(_OUT.value + ".json", rows, **note)

  workers = min(2 * _CHUNK, os.cpu_count() or 1)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool, tqdm.tqdm(total=len(todo)) as bar:
    for at in range(0, len(todo), _CHUNK):
      if over():
        break
      # Compiling tunes the dense dot on the device, so nothing is timed meanwhile.
      chunk = todo[at : at + _CHUNK]
      keys = list(dict.fromkeys(map(weight_key, chunk)))
      forms = {key: forms[key] for key in keys if key in forms}
      new = [key for key in keys if key not in forms]
      forms |= dict(zip(new, pool.map(weight, new)))
      for prepared in list(pool.map(lambda case: prepare(case, forms[weight_key(case)]), chunk)):
        case = prepared["case"]
        try:
          if "error" in prepared:
            raise RuntimeError(prepared["error"])
          rows += measure(prepared, time_of, bandwidth)
        except Exception as error:  # noqa: BLE001  One bad shape must not lose the table.
          failed.append({k: case[k] for k in ("shape", "pattern", "B")} | {"error": str(error)[-200:]})
        done += 1
        bar.update()
      write()
  forms.clear()
  torch, torch_note = import_torch()
  for case in todo[:done] if torch else []:
    if over():
      torch_note += ", not all in the budget"
      break
    if case["pattern"] == "2:4":
      us = torch_time(torch, case)
      for row in rows:
        if us and all(row[k] == case[k] for k in ("shape", "pattern", "B")):
          row["cuSPARSELt us"] = us
  write()
  if rows:
    report.print_table(rows, _COLUMNS)
  environment = report.environment()
  print(f"{environment['device']}, jax {environment['jax']}; copy {bandwidth:.3g} TB/s; cuSPARSELt: {torch_note}")
  print("* is what nm_matmul takes by itself; a ratio below 1 is slower than the dense dot.")
  print(f"{done} of {len(todo)} cases, {len(failed)} failed, {time.monotonic() - began:.0f} s")
  for case in failed:
    print("failed:", json.dumps(case))
  if rows:
    title = f"N:M matmul against XLA's dense bfloat16 dot ({environment['device']}, jax {environment['jax']})"
    plot(_OUT.value + ".png", rows, title)
  wrong = [row for row in rows if not row["error"] < _TOLERANCE]  # NaN is wrong, too
  if wrong:
    raise SystemExit(f"{len(wrong)} results are wrong, the first: {wrong[0]}")


if __name__ == "__main__":
  app.run(main)
