"""N:M matmul against the dense dot: every shape of `arg_specs`, every pattern, every number of rows, losing ones included.

  python benchmarks/nm_matmul.py [--quick] [--budget=250] [--patterns=2:4,1:8] [--resume] [--out=results/nm_matmul]

One row for every kernel that runs, and for decompression with a dense dot ("xla") where none does, `*` at the one that
`nm_matmul` takes by itself. All products with one weight shape and number of rows take turns with XLA's dense dot, and at
2:4 with cuSPARSELt and the algorithm that its search finds (where torch with CUDA can be imported). Times are device
time (CUPTI) on a GPU and wall clock elsewhere, medians over the turns, on random data. Up to 64 rows of x, weights rotate
through copies that together exceed four times the L2 cache (at most 32 copies).

The error is that of the norm against float64 on a sample of outputs; the memory of a result holds NaN before, all of it is
looked at, and quantised weights are taken as stored. Kernels are compiled by all cores while others are timed; the dense dot
is compiled with nothing else on the device, as XLA tunes it there.

With `--budget` (seconds) no new shape is begun once they are over; weights come in order of interest, and what needs
decompression last. The JSON is written as it goes, and `--resume` adds what is missing in it. Without a GPU it runs at toy
size, to check itself. `nm_matmul_table.py` makes the table and the plot.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import threading
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

from absl import app
from absl import flags
import cusparselt
import device_time
import jax
import jax.numpy as jnp
import nm_matmul_table
import numpy as np
import report
import tqdm

import jaxsparse as js
from jaxsparse.ops.nm_matmul import arg_specs
from jaxsparse.ops.nm_matmul import preference

_QUICK = flags.DEFINE_bool("quick", False, "Four shapes, five numbers of rows, 2:4 and 1:8.")
_BUDGET = flags.DEFINE_float("budget", None, "Seconds after which no new row is begun; default: none.")
_PATTERNS = flags.DEFINE_list("patterns", None, "Patterns such as 2:4, or 2:4+int8 and 2:4+int4; default: all.")
_SHAPES = flags.DEFINE_list("shapes", None, "Names of `arg_specs`; default: all.")
_BATCHES = flags.DEFINE_list("batches", None, "Numbers of rows of x; default: those of `arg_specs`.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds in which programs take turns; the median is reported.")
_ITERATIONS = flags.DEFINE_integer("iterations", 5, "Calls in a turn, at least.")
_CUSPARSELT = flags.DEFINE_bool("cusparselt", True, "Time cuSPARSELt where torch is at hand.")
_XLA = flags.DEFINE_bool("xla", True, "Also time what decompresses, where no kernel runs.")
_RESUME = flags.DEFINE_bool("resume", False, "Keep the rows of the JSON and measure what is missing.")
_TOY = flags.DEFINE_bool("toy", None, "Toy shapes; default: where there is no GPU.")
_OUT = flags.DEFINE_string("out", "results/nm_matmul", "Where the JSON and the plot go, without suffix.")

_INTERESTING = (
  "llama3-8b/up", "square/8192", "square/4096", "llama3-8b/down", "llama3-70b/down", "llama3-70b/up", "llama3-8b/q",
  "llama3-70b/q", "llama3-8b/gate_up", "llama3-8b/qkv", "llama3-70b/qkv",
)  # fmt: skip
_QUICK_SHAPES = ("llama3-8b/up", "llama3-8b/down", "square/4096", "square/8192")
_QUICK_BATCHES = (1, 16, 512, 4096, 8192)
_ROTATED = 64  # rows of x up to which the weight must come from memory
_COPIES = 32
_TOLERANCE = 8e-3  # two roundings to bfloat16 and some; sums of products in float32 add little
_SAMPLE = (16, 64)  # outputs that are checked
_COLUMNS = (
  "shape", "K", "O", "pattern", "B", "implementation", "us", "dense us", "ratio", "TFLOP/s", "TB/s", "of copy",
  "cuSPARSELt us", "error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
  """One product: a weight's shape and pattern, and the rows of x."""

  shape: str
  k: int
  o: int
  n: int
  m: int
  bits: int
  batch: int

  @property
  def pattern(self):
    return f"{self.n}:{self.m}" + (f"+int{self.bits}" if self.bits else "")

  @property
  def form(self):
    """What a weight is made from."""
    return self.k, self.o, self.n, self.m, self.bits

  @property
  def key(self):
    return self.shape, self.pattern, self.batch

  @property
  def decompresses(self):
    """Whether no kernel is meant for it."""
    return self.batch > _ROTATED and bool(self.bits or self.n > 2)


def cases() -> list[Case]:
  """Every case, most interesting first; those of a weight's shape together."""
  toy = jax.default_backend() != "gpu" if _TOY.value is None else _TOY.value
  rank = lambda spec: _INTERESTING.index(spec.name) if spec.name in _INTERESTING else len(_INTERESTING)
  forms = [(n, m, 0) for n, m in arg_specs.PATTERNS] + [(2, 4, 8), (2, 4, 4)]
  out = []
  for spec in sorted(arg_specs.ARG_SPECS, key=rank):
    shape = spec.toy() if toy else spec
    batches = shape.batches if _BATCHES.value is None else [int(b) for b in _BATCHES.value]
    for batch, (n, m, bits) in itertools.product(batches, forms):
      case = Case(spec.name, shape.k, shape.o, n, m, bits, batch)
      quick = spec.name in _QUICK_SHAPES and case.pattern in ("2:4", "1:8") and (toy or batch in _QUICK_BATCHES)
      asked = all(f is None or v in f for f, v in ((_PATTERNS.value, case.pattern), (_SHAPES.value, spec.name)))
      if asked and (quick or not _QUICK.value):
        out.append(case)
  return out


# -- Data --------------------------------------------------------------------------------------------------------------


def random_weight(form, key: jax.Array) -> js.NMArray:
  """A random n:m weight `[K, O]` in bfloat16, every choice of positions equally likely."""
  k, o, n, m, bits = form
  choices = jnp.asarray(list(itertools.combinations(range(m), n)), jnp.uint8)
  keys = jax.random.split(key)
  values = jax.random.normal(keys[0], (k // m, n, o), jnp.bfloat16)
  positions = choices[jax.random.randint(keys[1], (k // m, o), 0, len(choices))]
  w = js.NMArray(values, positions.transpose(0, 2, 1), n=n, m=m)
  return js.quant.quantize(w, bits, min(128, k), scale_dtype=jnp.bfloat16) if bits else w


def strided(size, of):
  count = min(size, of)
  return slice(0, count * (of // count), of // count)


def weight(form, key):
  """(columns for the check, {layout: packed weight}) of a random weight; for no layout the NMArray as "xla"."""
  w = random_weight(form, key)
  packed = {}
  for layout in ("hopper", "decode") if jax.default_backend() == "gpu" else ():
    try:
      packed[layout] = js.ops.pack(w, layout)
    except ValueError:  # it cannot hold this pattern
      continue
  if "hopper" in packed:  # one program serves every pattern that it holds
    packed["hopper"] = dataclasses.replace(packed["hopper"], pattern="2:4")
  columns = jax.tree.map(lambda a: a[..., strided(_SAMPLE[1], a.shape[-1])], w)
  return columns, packed or {"xla": w}


def dense_columns(columns: js.NMArray) -> np.ndarray:
  """float64 `[K, columns]`."""
  values, indices = np.asarray(columns.values).astype(np.float64), np.asarray(columns.indices)
  if columns.scales is not None:
    values *= np.repeat(np.asarray(columns.scales, np.float64), len(values) // len(columns.scales), axis=0)[:, None]
  dense = np.zeros((len(values), columns.m, values.shape[-1]))
  np.put_along_axis(dense, indices.astype(np.int64), values, axis=1)
  return dense.reshape(-1, values.shape[-1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_normal(shape, dtype, key):
  return jax.random.normal(key, shape, dtype)


def inspect(y):
  """A sample of a result, and whether all of it is finite."""
  return y[strided(_SAMPLE[0], y.shape[0]), strided(_SAMPLE[1], y.shape[1])], jnp.isfinite(y).all()


def poison(shape):
  return jnp.full(shape, jnp.nan, jnp.bfloat16)


def copies_for(nbytes: int, batch: int) -> int:
  if batch > _ROTATED or jax.default_backend() != "gpu":
    return 1
  l2 = getattr(jax.devices()[0], "l2_cache_size_bytes", None) or 50 * 2**20
  return min(_COPIES, max(1, -(-4 * l2 // nbytes)))


# -- Programs ----------------------------------------------------------------------------------------------------------


def product(implementation, x, w):
  return jnp.dot(x, w) if implementation == "dense" else js.ops.nm_matmul(x, w, implementation=implementation)


def spec(shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


# What has no product inside is not tuned: that would run on the device while others are timed.
_UNTUNED = {"xla_gpu_autotune_level": 0}


class Programs:
  """Programs that the device is not needed for, compiled by a pool."""

  def __init__(self, pool):
    self._pool, self._found, self._lock = pool, {}, threading.RLock()

  def ask(self, fn, static, *args):
    """Begins to compile `fn(*static, *args)` for arguments of these shapes: (shapes of its results, future)."""
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    key = (fn, static, str(jax.tree.map(lambda a: (a.shape, a.dtype), args)))
    with self._lock:
      if key not in self._found:
        traced = jax.jit(fn, static_argnums=range(len(static))).trace(*static, *args)
        options = _UNTUNED if jax.default_backend() == "gpu" else None
        self._found[key] = traced.out_info, self._pool.submit(lambda: traced.lower().compile(options))
      return self._found[key]

  def get(self, fn, static, *args):
    return self.ask(fn, static, *args)[1].result()

  def packed(self, form):
    """Layout -> shapes of a weight in it."""
    return self.ask(weight, (form,), jax.eval_shape(lambda: jax.random.key(0)))[0][1]

  def plan(self, case) -> tuple[str, tuple[str, ...]]:
    """(what `nm_matmul` takes by itself, what can run)."""
    key = case.form, case.batch
    if key not in self._found:
      x, packed, runs = spec((case.batch, case.k)), self.packed(case.form), []
      for name in sorted({"hopper", "decode"} & set(packed)):
        with contextlib.suppress(NotImplementedError):
          js.ops.which_nm_matmul(x, packed[name], implementation=name)
          runs.append(name)
      best = next(iter(packed.values()))
      if len(packed) > 1:
        shape = (case.k // case.m, case.n, case.o)
        w = js.NMArray.tree_unflatten((case.n, case.m), (spec(shape), spec(shape, jnp.uint8), None))
        best = packed[preference.layout(w, case.batch)]
      self._found[key] = js.ops.which_nm_matmul(x, best).implementation, tuple(runs)
    return self._found[key]

  def ask_all(self, todo):
    """Everything, in the order of use."""
    for case in todo:
      x, y = spec((case.batch, case.k)), spec((case.batch, case.o))
      self.ask(inspect, (), y)
      self.ask(poison, (y.shape,))
      for name in self.plan(case)[1]:
        self.ask(product, (name,), x, self.packed(case.form)[name])


# -- Measuring ---------------------------------------------------------------------------------------------------------


class Bench:
  """What is shared by all cases of one weight shape: weights, the dense one, and seconds spent."""

  def __init__(self, programs, torch):
    self.programs, self.torch, self.seconds = programs, torch, collections.Counter()
    self.weights, self.columns, self.rivals, self.shape, self.few = {}, {}, [], None, 1

  @functools.cached_property
  def copy_tb_per_s(self) -> float:
    """TB/s, read and written, of a copy that is far larger than the cache."""
    big = jnp.ones(2**28 if jax.default_backend() == "gpu" else 2**22, jnp.bfloat16)
    program = jax.jit(lambda x: x * 2)
    jax.block_until_ready(program(big))
    us = device_time.in_turn({"copy": [lambda: program(big)]}, 3, 5, lambda: None)["copy"]
    return 2 * big.nbytes / us / 1e6

  def begin(self, shape, batches):
    """Drops the weights of the shape before; makes the dense one and tunes products with it."""
    if self.shape == shape:
      return
    now = time.monotonic()
    if jax.default_backend() == "gpu":  # at once: XLA compiles its candidates side by side, and remembers what it took
      dots = jax.jit(lambda xs, ws: [product("dense", x, w) for x, w in zip(xs, ws)])
      dots.lower([spec((b, shape[0])) for b in batches], [spec(shape) for _ in batches]).compile()
    self.spent("tuning the dense dot", now)
    self.weights, self.columns, self.rivals, self.shape, self.few = {}, {}, [], shape, min(batches)
    k, o = shape
    keys = jax.random.split(jax.random.key(k + o), copies_for(2 * k * o, self.few))
    self.weights["dense"] = {"dense": [random_normal(shape, jnp.bfloat16, key) for key in keys]}

  def forms(self, case):
    """Makes the packed weights of a pattern, once."""
    if case.pattern in self.weights:
      return self.weights[case.pattern]
    specs, made = self.programs.packed(case.form), collections.defaultdict(list)
    wanted = {name: copies_for(specs[name].nbytes, self.few) for name in specs}
    for i in range(max(wanted.values())):
      key = jax.random.key(i)
      columns, packed = self.programs.get(weight, (case.form,), key)(key)
      for name in packed:
        if i < wanted[name]:
          made[name].append(packed[name])
      if i == 0:
        self.columns[case.pattern] = dense_columns(jax.device_get(columns))
    self.weights[case.pattern] = jax.block_until_ready(dict(made))
    return self.weights[case.pattern]

  def rival(self, case):
    """Calls of cuSPARSELt, or None."""
    try:
      if not self.rivals:
        self.rivals = cusparselt.weights(self.torch, case.k, case.o, copies_for(case.k * case.o * 9 // 8, self.few))
      copies = copies_for(case.k * case.o * 9 // 8, case.batch)
      return cusparselt.calls(self.torch, self.rivals[:copies], case.batch, case.k)
    except Exception as error:  # noqa: BLE001  cuSPARSELt refuses some shapes.
      tqdm.tqdm.write(f"cuSPARSELt, {case.shape}, B = {case.batch}: {str(error)[:120]}")
      return None

  def spent(self, what, since):
    self.seconds[what] += time.monotonic() - since
    return time.monotonic()

  def run(self, todo) -> tuple[list[dict], list[dict]]:
    """(rows, failures) of cases that share x and the dense weight."""
    first, now = todo[0], time.monotonic()
    x = random_normal((first.batch, first.k), jnp.bfloat16, jax.random.key(first.batch))
    ws = self.weights["dense"]["dense"][: copies_for(2 * first.k * first.o, first.batch)]
    dense = jax.jit(functools.partial(product, "dense")).lower(x, ws[0]).compile()
    calls = {"dense": [functools.partial(dense, x, w) for w in ws]}
    now = self.spent("tuning the dense dot", now)
    found, failed = {}, []
    for case in todo:
      taken, names = self.programs.plan(case)
      for name in names or ("xla",):
        try:
          forms = self.forms(case)
          ws = forms[name] if names else next(iter(forms.values()))
          ws = ws[: copies_for(ws[0].nbytes, case.batch)] if names else ws[:1]
          if names:
            program = self.programs.get(product, (name,), x, ws[0])
          else:
            program = jax.jit(functools.partial(product, "xla")).lower(x, ws[0]).compile()
          error, poisoned = self.check(functools.partial(program, x, ws[0]), x, case)
          calls[case.pattern, name] = [functools.partial(program, x, w) for w in ws]
          found[case.pattern, name] = dict(
            case=case, taken=taken == name, nbytes=ws[0].nbytes, copies=len(ws), error=error, poisoned=poisoned
          )
        except Exception as error:  # noqa: BLE001  One bad shape must not lose the table.
          failed.append(
            {"shape": case.shape, "pattern": case.pattern, "B": case.batch, "of": name, "error": str(error)[-200:]}
          )
    now = self.spent("weights, compiling and checking", now)
    if self.torch and any(pattern == "2:4" for pattern, _ in found):
      rival = self.rival(first)
      if rival:
        calls["cuSPARSELt"] = rival
    now = self.spent("cuSPARSELt's search", now)
    for call in calls["dense"]:
      jax.block_until_ready(call())
    finish = self.torch.cuda.synchronize if self.torch else lambda: None
    take_turns = functools.partial(device_time.in_turn, calls, _ROUNDS.value, _ITERATIONS.value, finish, ["cuSPARSELt"])
    try:
      times = take_turns()
    except RuntimeError:  # something else ran on the device
      times = take_turns()
    self.spent("timing", now)
    return [self.row(times, x, key, **info) for key, info in found.items()], failed

  def check(self, call, x, case) -> tuple[float, bool]:
    """(norm of the error relative to the norm of the result, whether the result's memory held NaN)."""
    shape = (case.batch, case.o)
    nan = jax.block_until_ready(self.programs.get(poison, (shape,))())
    place = nan.unsafe_buffer_pointer()
    del nan
    y = call()
    poisoned = y.unsafe_buffer_pointer() == place
    y, finite = jax.device_get(self.programs.get(inspect, (), y)(y))
    if not finite:
      return float("nan"), poisoned
    want = np.asarray(x[strided(_SAMPLE[0], case.batch)], np.float64) @ self.columns[case.pattern]
    return float(np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)), poisoned

  def row(self, times, x, key, case, taken, nbytes, copies, error, poisoned) -> dict:
    pattern, name = key
    us, dense_us = times[key], times["dense"]
    nbytes += x.nbytes + 2 * case.batch * case.o
    row = {
      "shape": case.shape,
      "K": case.k,
      "O": case.o,
      "pattern": pattern,
      "B": case.batch,
      "implementation": name + ("*" if taken else ""),
      "us": us,
      "dense us": dense_us,
      "ratio": dense_us / us,
      "TFLOP/s": 2 * case.batch * case.k * case.o / us / 1e6,
      "TB/s": nbytes / us / 1e6,
      "of copy": nbytes / us / 1e6 / self.copy_tb_per_s,
      "error": error,
    }
    if pattern == "2:4" and "cuSPARSELt" in times:
      row["cuSPARSELt us"] = times["cuSPARSELt"]
    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    return row | {"copies": copies, "poisoned": poisoned}


def main(argv):
  del argv
  began = time.monotonic()
  over = lambda: _BUDGET.value is not None and time.monotonic() - began > _BUDGET.value
  path = pathlib.Path(_OUT.value + ".json")
  rows, failed, notes = [], [], {}
  if _RESUME.value and path.exists():
    before = json.loads(path.read_text())
    if before["environment"] != report.environment():
      raise SystemExit(f"{path} was measured elsewhere: {before['environment']}; run without --resume.")
    rows, notes = before["rows"], {key: before[key] for key in ("notes",) if key in before}
  have = {(row["shape"], row["pattern"], row["B"]) for row in rows}
  everything = cases()
  todo = [case for case in everything if case.key not in have]
  todo = [c for c in todo if not c.decompresses] + [c for c in todo if c.decompresses and _XLA.value]
  order = [[shape.name for shape in arg_specs.ARG_SPECS], list(dict.fromkeys(case.pattern for case in everything))]

  # Importing and measuring come first: tracing and lowering leave other threads little of the interpreter.
  torch, note = cusparselt.load() if _CUSPARSELT.value else (None, "not asked for")
  pool = concurrent.futures.ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1)))
  programs = Programs(pool)
  bench = Bench(programs, torch)
  setup = {"copy_tb_per_s": bench.copy_tb_per_s, "cusparselt": note}
  threading.Thread(target=programs.ask_all, args=(todo,), daemon=True).start()
  bench.spent("starting", began)

  def write():
    rows.sort(key=lambda r: (order[1].index(r["pattern"]), order[0].index(r["shape"]), r["B"]))
    have = {(row["shape"], row["pattern"], row["B"]) for row in rows}
    missing = [case.key for case in everything if case.key not in have]
    seconds = {name: round(value, 1) for name, value in bench.seconds.items()}
    report.write_json(path, rows, **setup, **notes, seconds=seconds, failed=failed, not_measured=missing)

  groups = itertools.groupby(todo, key=lambda case: (case.decompresses, case.k, case.o, case.batch))
  groups = [list(group) for _, group in groups]
  for at, group in enumerate(tqdm.tqdm(groups, mininterval=5)):
    if over():
      break
    shape = (group[0].k, group[0].o)
    batches = [g[0].batch for g in groups[at:] if (g[0].k, g[0].o) == shape]
    try:
      bench.begin(shape, batches)
      found, wrong = bench.run(group)
      rows += found
      failed += wrong
    except Exception as error:  # noqa: BLE001  One bad shape must not lose the table.
      failed.append(
        {"shape": group[0].shape, "B": group[0].batch, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
      )
    write()
  pool.shutdown(cancel_futures=True)
  write()
  environment = report.environment()
  if rows:
    report.print_table(rows, _COLUMNS)
    nm_matmul_table.plot(_OUT.value + ".png", rows, nm_matmul_table.title(environment))
  print(f"{environment['device']}, jax {environment['jax']}; copy {bench.copy_tb_per_s:.3g} TB/s; cuSPARSELt: {note}")
  print("* is what nm_matmul takes by itself; a ratio below 1 is slower than the dense dot.")
  measured = len({(row["shape"], row["pattern"], row["B"]) for row in rows})
  print(
    f"{measured} of {len(everything)} cases, {len(failed)} failed, {time.monotonic() - began:.0f} s: {dict(bench.seconds)}"
  )
  for case in failed:
    print("failed:", json.dumps(case))
  wrong = [row for row in rows if not row["error"] < _TOLERANCE]  # NaN is wrong, too
  if wrong:
    raise SystemExit(f"{len(wrong)} results are wrong, the first: {wrong[0]}")


if __name__ == "__main__":
  app.run(main)
