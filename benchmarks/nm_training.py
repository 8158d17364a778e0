"""Training with 2:4 weights against dense: prune-and-pack, an 8B-shaped MLP, and the loss of a small transformer.

  PYTHONPATH=. python benchmarks/nm_training.py [--part=pack,mlp] [--tokens=8192] [--out=results/nm_training]
  PYTHONPATH=. python benchmarks/nm_training.py --loss_curve [--steps=400] [--out=results/nm_training]

`pack`: time of pruning and packing a weight, and the share of the bandwidth of a plain copy on the same device.
`mlp`: forward and backward (gradients of the input and of every weight) of a SwiGLU MLP, 4096 -> 2 x 14336 -> 4096, with
pruning and packing in every step. The dense MLP is timed with the gate and up projections as one product, as two, and as
one with every intermediate gradient written out once, in the same process and in turn with the sparse one; the best is
the baseline. Times are wall-clock for a queue of steps, and device time by kernel beside them, so that one sees where a
step goes.
`--loss_curve`: a decoder of a few layers on the source of Python's standard library, byte by byte, dense and with every
product of its blocks 2:4 from the first step.
"""

import collections
import functools
import pathlib
import statistics
import sysconfig
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

from experiments import llama
from jaxsparse import ops

_PART = flags.DEFINE_list("part", ["pack", "mlp"], "What to time: pack, mlp.")
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens of the MLP's batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which the variants take turns; medians are reported.")
_SCALE = flags.DEFINE_integer("scale", 1, "Divides every side of a weight: to try the script on a CPU.")
_LOSS_CURVE = flags.DEFINE_bool("loss_curve", False, "Train the small transformer instead of timing.")
_STEPS = flags.DEFINE_integer("steps", 400, "Training steps of the small transformer.")
_WIDTH = flags.DEFINE_integer("width", 512, "Width of the small transformer.")
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences in a batch of the small transformer.")
_LENGTH = flags.DEFINE_integer("length", 256, "Bytes in its sequences.")
_OUT = flags.DEFINE_string("out", "results/nm_training", "Where the JSON and the plots go, without suffix.")

WEIGHTS = ((8192, 8192), (4096, 28672), (14336, 4096))
DIM, HIDDEN = 4096, 14336


def device_ms(fn, *args, iterations: int = 8) -> tuple[float, dict[str, float]]:
  """Milliseconds on the device of a jitted call, the median, and their split by kernel; wall-clock on a CPU."""
  jax.block_until_ready(fn(*args))
  if jax.default_backend() != "gpu":
    return wall_ms(fn, *args, queued=1), {}
  from jax.experimental.mosaic.gpu import profiler

  _, runs = profiler.measure(fn, iterations=iterations, aggregate=False)(*args)
  runs = [runs] if isinstance(runs[0][0], str) else runs
  kernels = collections.defaultdict(float)
  for run in runs:
    for name, ms in run:
      kernels[name] += ms / len(runs)
  return statistics.median(sum(ms for _, ms in run) for run in runs), dict(kernels)


def wall_ms(fn, *args, queued: int = 10) -> float:
  """Wall-clock milliseconds a call, with `queued` calls in flight."""
  jax.block_until_ready(fn(*args))
  start = time.perf_counter()
  out = None
  for _ in range(queued):
    out = fn(*args)
  jax.block_until_ready(out)
  return 1e3 * (time.perf_counter() - start) / queued


# -- Prune and pack ----------------------------------------------------------------------------------------------------


def time_packing() -> list[dict]:
  """Rows: implementation, mask, weight, microseconds, share of copy bandwidth."""
  scale = _SCALE.value
  big = jax.random.normal(jax.random.key(0), ((1 << 29) // scale**2,), jnp.bfloat16)
  ms, _ = device_ms(jax.jit(lambda x: x * 2), big)
  copy = 4 * big.size / ms / 1e9  # TB/s, bytes read and written
  del big
  rows = [{"case": "copy, 1 GiB", "us": 1e3 * ms, "TB/s": copy, "of copy": 1.0}]
  gpu = jax.default_backend() == "gpu"
  for shape in [tuple(n // scale for n in s) for s in WEIGHTS]:
    for dtype in (jnp.bfloat16, jnp.float32):
      if dtype == jnp.float32 and shape != (WEIGHTS[0][0] // scale,) * 2:
        continue
      copies = [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(3)]  # beyond what a cache holds
      for mask in ("columnwise", "transposable", "bdwp"):
        for name in ("mosaic_gpu", "xla") if gpu else ("xla",):
          if name == "xla" and gpu and (dtype == jnp.float32 or shape != WEIGHTS[0]):
            continue
          prune = functools.partial(ops.prune_and_pack, mask=mask, dtype=jnp.bfloat16, implementation=name)
          ms, _ = device_ms(jax.jit(lambda ws: [prune(w) for w in ws]), copies)
          written = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(prune, copies[0])))
          rate = 3 * (copies[0].nbytes + written) / ms / 1e9
          what = f"{mask}, {'w' if mask == 'columnwise' else 'w and w.T'}, {shape[0]} x {shape[1]} {copies[0].dtype}"
          rows.append({"case": f"{name}: {what}", "us": 1e3 * ms / 3, "TB/s": rate, "of copy": rate / copy})
          print(rows[-1], flush=True)
  return rows


# -- The MLP -----------------------------------------------------------------------------------------------------------


def two_products(gate, up, down, x):
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


@jax.custom_vjp
def kept_gradient(x, w):
  """A dense product that computes dy once, for dx and dw, as the sparse one does."""
  return x @ w


def _kept_gradient_bwd(residuals, dy):
  x, w = residuals
  dy = jax.lax.optimization_barrier(dy)
  return dy @ w.T, x.T @ dy


kept_gradient.defvjp(lambda x, w: (x @ w, (x, w)), _kept_gradient_bwd)


def mlp_step(mlp):
  """Jitted (weights, x, dy) -> y and the gradients of x and the weights."""

  @jax.jit
  def step(weights, x, dy):
    y, pull = jax.vjp(lambda weights, x: mlp(*weights, x), weights, x)
    # As in training, the backward pass starts after the forward one.
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, pull(dy)

  return step


def group(name: str) -> str:
  """What a kernel does, by its name."""
  for part, of in (("prune_and_pack", "pack"), ("sparse", "sparse product"), ("nm_matmul", "sparse product")):
    if part in name:
      return of
  return "dense product" if any(part in name for part in ("gemm", "nvjet", "cutlass", "cublas")) else "elementwise"


def time_mlp() -> list[dict]:
  """Rows: variant, wall-clock and device milliseconds, speed-up, and device milliseconds by kind of kernel."""
  tokens, dim, hidden = _TOKENS.value // _SCALE.value, DIM // _SCALE.value, HIDDEN // _SCALE.value
  keys = jax.random.split(jax.random.key(0), 5)
  normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  x, dy = normal(keys[0], tokens, dim), normal(keys[1], tokens, dim)
  gate_up = normal(keys[2], dim, 2 * hidden) * dim**-0.5
  down = normal(keys[3], hidden, dim) * hidden**-0.5
  fused, apart = (gate_up, down), (gate_up[:, :hidden], gate_up[:, hidden:], down)
  variants = {
    "dense, gate and up as one": (mlp_step(llama.mlp), fused),
    "dense, gate and up as two": (mlp_step(two_products), apart),
    "dense, gradients kept": (mlp_step(functools.partial(llama.mlp, product=kept_gradient)), fused),
  }
  for mask in ("transposable", "bdwp"):
    product = functools.partial(ops.prune_matmul, mask=mask)
    variants[f"2:4 {mask}"] = (mlp_step(functools.partial(llama.mlp, product=product)), fused)
  masked = functools.partial(ops.prune_matmul, gradient="masked")
  variants["2:4 transposable, masked dw"] = (mlp_step(functools.partial(llama.mlp, product=masked)), fused)
  for w in fused:
    plan = ops.which_prune_matmul(jax.ShapeDtypeStruct((tokens, w.shape[0]), w.dtype), w)
    print("which_prune_matmul", w.shape, {part: choice.implementation for part, choice in plan.items()}, flush=True)
  walls = collections.defaultdict(list)
  for _ in range(_ROUNDS.value):
    for name, (step, weights) in variants.items():
      walls[name].append(wall_ms(step, weights, x, dy))
  medians = {name: statistics.median(times) for name, times in walls.items()}
  dense = min(ms for name, ms in medians.items() if name.startswith("dense"))
  rows = []
  for name, (step, weights) in variants.items():
    ms, kernels = device_ms(step, weights, x, dy)
    parts = collections.defaultdict(float)
    for kernel, kernel_ms in kernels.items():
      parts[group(kernel)] += kernel_ms
    row = {"case": name, "wall ms": medians[name], "speed-up": dense / medians[name], "device ms": ms, **parts}
    rows.append(row | {"kernels": kernels})
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
  return rows


# -- Where the time of a product goes ----------------------------------------------------------------------------------


def time_products() -> list[dict]:
  """Rows: each product of the MLP's step by itself, dense and sparse."""
  tokens, scale = _TOKENS.value // _SCALE.value, _SCALE.value
  rows = []
  for name, k, o in (("gate and up", DIM // scale, 2 * HIDDEN // scale), ("down", HIDDEN // scale, DIM // scale)):
    keys = jax.random.split(jax.random.key(k), 3)
    x, dy = jax.random.normal(keys[0], (tokens, k), jnp.bfloat16), jax.random.normal(keys[1], (tokens, o), jnp.bfloat16)
    w = jax.random.normal(keys[2], (k, o), jnp.bfloat16)
    packed = jax.jit(ops.prune_and_pack)(w)
    forward = jax.jit(lambda x, w, packed: ops.prune_matmul(x, w, packed))
    backward = jax.jit(lambda x, w, packed, dy: jax.vjp(lambda x: ops.prune_matmul(x, w, packed), x)[1](dy)[0])
    cases = {
      "y": (jax.jit(lambda x, w: x @ w), (x, w), forward, (x, w, packed)),
      "dx": (jax.jit(lambda dy, w: dy @ w.T), (dy, w), backward, (x, w, packed, dy)),
      "dw": (jax.jit(lambda x, dy: x.T @ dy), (x, dy), None, ()),
    }
    for part, (dense, dense_args, sparse, sparse_args) in cases.items():
      dense_ms = device_ms(dense, *dense_args)[0]
      sparse_ms = device_ms(sparse, *sparse_args)[0] if sparse else dense_ms
      rate = lambda ms: 2e-9 * tokens * k * o / ms
      row = {"case": f"{name}: {part}", "dense ms": dense_ms, "2:4 ms": sparse_ms, "speed-up": dense_ms / sparse_ms}
      rows.append(row | {"dense TFLOP/s": rate(dense_ms), "2:4 TFLOP/s": rate(sparse_ms)})
    pack_ms = device_ms(jax.jit(ops.prune_and_pack), w)[0]
    rows.append({"case": f"{name}: pack", "2:4 ms": pack_ms})
  return rows


# -- The loss of a small transformer -----------------------------------------------------------------------------------


def standard_library() -> np.ndarray:
  """The source of Python's standard library as bytes, uint8."""
  files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
  return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)


def train(product, text, config, *, layers: int = 4) -> np.ndarray:
  """Loss (nats a byte) of every step. The same seed gives the same batches and the same first weights."""
  batch, length = _BATCH.value, _LENGTH.value
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "embedding": jax.random.normal(keys[0], (256, config.dim)) * 0.02,
    "layers": jax.vmap(lambda key: llama.init_layer(key, config, jnp.float32))(jax.random.split(keys[1], layers)),
    "norm": jnp.ones(config.dim),
  }
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      optax.warmup_cosine_decay_schedule(0, 2e-3, _STEPS.value // 10, _STEPS.value, 1e-4), b2=0.95, weight_decay=0.1
    ),
  )

  def loss(params, tokens):
    x = params["embedding"].astype(jnp.bfloat16)[tokens[:, :-1]]
    # Norms scale in the dtype of the stream; the weights stay float32 masters.
    narrow = lambda layer: layer._replace(
      attention_norm=layer.attention_norm.astype(x.dtype), mlp_norm=layer.mlp_norm.astype(x.dtype)
    )
    body = lambda x, layer: (llama.block(narrow(layer), x, config, product), None)
    x, _ = jax.lax.scan(body, x, params["layers"])
    logits = llama.rms_norm(x, params["norm"].astype(x.dtype)) @ params["embedding"].astype(x.dtype).T
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

  @jax.jit
  def run(params, text):
    def step(carry, key):
      params, state = carry
      starts = jax.random.randint(key, (batch, 1), 0, text.size - length - 1)
      value, grads = jax.value_and_grad(loss)(params, text[starts + jnp.arange(length + 1)].astype(jnp.int32))
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(keys[2], _STEPS.value))[1]

  return np.asarray(run(params, text))


def dense_product(x, w):
  return x @ w.astype(x.dtype)


def loss_curve() -> list[dict]:
  """Rows: variant, loss of every step and the mean of the last tenth. Writes the plot."""
  width = _WIDTH.value
  config = llama.Config(dim=width, heads=width // 64, kv_heads=width // 128, head_dim=64, hidden=3 * width)
  text = jnp.asarray(standard_library())
  variants = {
    "dense": dense_product,
    "2:4 transposable": ops.prune_matmul,
    "2:4 bdwp": functools.partial(ops.prune_matmul, mask="bdwp"),
  }
  w = jax.ShapeDtypeStruct((width, 6 * width), jnp.float32)
  plan = ops.which_prune_matmul(jax.ShapeDtypeStruct((_BATCH.value, _LENGTH.value, width), jnp.bfloat16), w)
  ran = {part: choice.implementation for part, choice in plan.items()}
  settings = {"steps": _STEPS.value, "width": width, "batch": _BATCH.value, "length": _LENGTH.value}
  rows = []
  for name, product in variants.items():
    start = time.perf_counter()
    losses = train(product, text, config)
    last = float(losses[-max(1, len(losses) // 10) :].mean())
    rows.append({"case": name, "last tenth": last, "seconds": time.perf_counter() - start, "losses": losses.tolist()})
    rows[-1] |= {"ran on": ran} if "2:4" in name else {"text bytes": int(text.size)}
    print(name, "first", losses[0], "last tenth", last, flush=True)
    # After every variant, so that a run that is cut short leaves what it has.
    report.write_json(f"{_OUT.value}_loss.json", rows, **settings)
    plot_losses(rows)
  return rows


def plot_losses(rows):
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  fig, ax = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
  smooth = np.ones(9) / 9
  for row, color in zip(rows, ("#000000", "#0072B2", "#D55E00")):
    ax.plot(np.convolve(row["losses"], smooth, "valid"), label=f"{row['case']} ({row['last tenth']:.3f})", color=color)
  ax.set(xlabel="step", ylabel="loss, nats a byte (mean of 9 steps)", title="2:4 from the first step, beside dense")
  ax.legend()
  path = pathlib.Path(f"{_OUT.value}_loss.png")
  path.parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path, dpi=130)
  plt.close(fig)


def main(argv):
  del argv
  if _LOSS_CURVE.value:
    report.print_table(loss_curve(), ["case", "last tenth", "seconds"])
    return
  if "pack" in _PART.value:
    rows = time_packing()
    report.write_json(f"{_OUT.value}_pack.json", rows)
    report.print_table(rows, ["case", "us", "TB/s", "of copy"])
  if "mlp" in _PART.value:
    products = time_products()
    report.print_table(products, ["case", "dense ms", "2:4 ms", "speed-up", "dense TFLOP/s", "2:4 TFLOP/s"])
    rows = time_mlp()
    report.write_json(f"{_OUT.value}_mlp.json", rows, products=products, tokens=_TOKENS.value)
    parts = ["pack", "sparse product", "dense product", "elementwise"]
    report.print_table(rows, ["case", "wall ms", "speed-up", "device ms", *parts])
    names = [row["case"] for row in rows]
    title = f"MLP forward + backward, {_TOKENS.value} tokens, against dense"
    report.bar_plot(f"{_OUT.value}_mlp.png", names, [row["speed-up"] for row in rows], title, "speed-up", target=1.2)


if __name__ == "__main__":
  app.run(main)
