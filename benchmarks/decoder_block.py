"""Decoding with 2:4 weights against dense: whole Llama-style blocks at 8B shapes.

  PYTHONPATH=. python benchmarks/decoder_block.py [--layers=4] [--batch=16] [--length=1024] [--out=results/decoder_block]

Each step runs `layers` blocks with weights and caches of their own, so that weights come from memory and not from a cache,
and several steps run in one compiled loop, as in generation. Dense and sparse blocks take turns in one process; both
have their queries, keys and values in one product, and the gate and up projections in one. Times are wall-clock of the
loop, divided by steps and layers; device time by kind of kernel stands beside them. The attention is XLA's or one kernel
(`experiments/decode_attention.py`), whichever is faster, the same for all. The sparse result is checked against dense
blocks with the same pruned weights.
"""

import collections
import functools
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import report

from experiments import decode_attention
from experiments import llama
from jaxsparse import ops

_LAYERS = flags.DEFINE_integer("layers", 4, "Blocks with weights of their own.")
_BATCH = flags.DEFINE_integer("batch", 16, "Sequences.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Length of the key-value cache.")
_STEPS = flags.DEFINE_integer("steps", 32, "Decoding steps in one compiled loop.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds in which the variants take turns; medians are reported.")
_LAYOUTS = flags.DEFINE_list("layouts", ["hopper", "decode"], "Layouts of the sparse weights to time.")
_SCALE = flags.DEFINE_integer("scale", 1, "Divides the widths: to try the script on a CPU.")
_OUT = flags.DEFINE_string("out", "results/decoder_block", "Where the JSON and the plot go, without suffix.")

WEIGHTS = ("qkv", "out", "gate_up", "down")
ATTENTIONS = {"reference": decode_attention.reference, "kernel": decode_attention.attention}


def change_weights(layer: llama.Layer, change) -> llama.Layer:
  """A layer with `change` applied to its four weights."""
  return layer._replace(**{name: change(getattr(layer, name)) for name in WEIGHTS})


@functools.partial(jax.jit, static_argnums=1)
def packed(w: jax.Array, layout: str):
  """The two largest of every four weights along the reduction, packed."""
  kept = ops.prune_and_pack(w, mask="columnwise").forward
  return kept if layout == "hopper" else ops.pack(kept.unpack(), layout)


@jax.jit
def pruned(w: jax.Array) -> jax.Array:
  return ops.prune_and_pack(w, mask="columnwise").dense()


@functools.partial(jax.jit, static_argnums=(3, 4))
def decode(layers, caches, x, config, attend):
  """x through all layers at each of the last positions of the cache: `[steps, B, D]`."""

  def step(caches, position):
    y, updated = x, []
    for layer, cache in zip(layers, caches):
      cache, y = llama.decode_block(layer, cache, y, position, config, attend=attend)
      updated.append(cache)
    return updated, y

  steps = min(_STEPS.value, _LENGTH.value)
  return jax.lax.scan(step, caches, _LENGTH.value - steps + jnp.arange(steps))[1]


def group(name: str) -> str:
  """What a kernel does, by its name."""
  if "decode_attention" in name:
    return "attention"
  if "mosaic_gpu" in name:
    return "sparse product"
  return "dense product" if any(part in name for part in ("gemm", "nvjet", "cutlass", "cublas", "gemv")) else "others"


def device_ms(fn, *args) -> dict[str, float]:
  """Milliseconds on the device by kernel."""
  if jax.default_backend() != "gpu":
    return {}
  from jax.experimental.mosaic.gpu import profiler

  _, runs = profiler.measure(fn, iterations=3, aggregate=False)(*args)
  runs = [runs] if isinstance(runs[0][0], str) else runs
  kernels = collections.defaultdict(float)
  for name, ms in runs[-1]:
    kernels[name] += ms
  return dict(kernels)


def choose_attention(config: llama.Config, x, cache) -> tuple[str, dict[str, float]]:
  """The faster of the two attentions, which must agree; both are used with every kind of weights."""
  if jax.default_backend() != "gpu":
    return "reference", {}
  q = jax.random.normal(
    jax.random.key(3), (x.shape[0], config.kv_heads, config.heads // config.kv_heads, config.head_dim), x.dtype
  )
  position = jnp.int32(cache.shape[3] - 1)
  found, outputs = {}, {}
  for name, attend in ATTENTIONS.items():
    try:
      fn = jax.jit(attend)
      outputs[name] = jax.block_until_ready(fn(q, cache, position)).astype(jnp.float32)
      found[name] = 1e3 * sum(device_ms(fn, q, cache, position).values())
    except Exception as error:  # a kernel that cannot be built or run leaves the reference
      print(f"attention {name}: {str(error)[-200:]}", flush=True)
  for name in list(found):
    error = float(jnp.linalg.norm(outputs[name] - outputs["reference"]) / jnp.linalg.norm(outputs["reference"]))
    print(
      f"attention {name}: {found[name]:.1f} us, {cache.nbytes / found[name] / 1e6:.2f} TB/s, {error=:.2g}", flush=True
    )
    if not error < 1e-2:
      del found[name]
  return min(found, key=found.get), found


def main(argv):
  del argv
  start, scale = time.perf_counter(), _SCALE.value
  config = llama.Config(dim=4096 // scale, heads=32 // scale, kv_heads=max(1, 8 // scale), hidden=14336 // scale)
  init = jax.jit(llama.init_layer, static_argnums=1)
  dense = [init(key, config) for key in jax.random.split(jax.random.key(0), _LAYERS.value)]
  shape = (_BATCH.value, 2, config.kv_heads, _LENGTH.value, config.head_dim)
  random_cache = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
  caches = [random_cache(key) for key in jax.random.split(jax.random.key(1), _LAYERS.value)]
  x = jax.random.normal(jax.random.key(2), (_BATCH.value, config.dim), jnp.bfloat16)
  attention, attention_us = choose_attention(config, x, caches[0])
  run = lambda layers: decode(layers, caches, x, config, ATTENTIONS[attention])

  variants, rows = {"dense": dense}, {"dense": {"case": "dense", "runs on": "xla"}}
  times = collections.defaultdict(list)
  blocks = _LAYERS.value * min(_STEPS.value, _LENGTH.value)
  settings = {"batch": _BATCH.value, "length": _LENGTH.value, "layers": _LAYERS.value, "steps": _STEPS.value}
  settings |= {"attention": attention, "attention us": attention_us}

  def take_turns():
    for _ in range(_ROUNDS.value):
      for name, layers in variants.items():
        begin = time.perf_counter()
        jax.block_until_ready(run(layers))
        times[name].append(time.perf_counter() - begin)
    for name, row in rows.items():
      row["us a block"] = 1e6 * statistics.median(times[name]) / blocks
      row["speed-up"] = rows["dense"]["us a block"] / row["us a block"]
      moved = sum(a.nbytes for a in jax.tree.leaves(variants[name][0])) + caches[0].nbytes
      row |= {"MB a block": moved / 1e6, "TB/s": moved / row["us a block"] / 1e6}
    report.write_json(f"{_OUT.value}.json", list(rows.values()), **settings)

  want = run([change_weights(layer, pruned) for layer in dense]).astype(jnp.float32)
  for layout in _LAYOUTS.value:
    name = f"2:4, {layout} layout"
    try:
      layers = [change_weights(layer, lambda w: packed(w, layout)) for layer in dense]
      weights = [getattr(layers[0], weight) for weight in WEIGHTS]
      specs = [jax.ShapeDtypeStruct((_BATCH.value, w.shape[0]), x.dtype) for w in weights]
      choices = {n: ops.which_nm_matmul(s, w).implementation for n, s, w in zip(WEIGHTS, specs, weights)}
      error = float(jnp.linalg.norm(run(layers).astype(jnp.float32) - want) / jnp.linalg.norm(want))
      variants[name], rows[name] = layers, {"case": name, "runs on": choices, "error": error}
      take_turns()
      print(f"{time.perf_counter() - start:.0f} s, {name}: {choices}", flush=True)
      print(f"  {rows[name]['speed-up']:.3f} of dense, {error=:.2g} to pruned dense blocks", flush=True)
    except Exception as problem:  # the other layouts are still worth timing
      print(f"{name}: {str(problem)[-300:]}", flush=True)
  columns = ["case", "us a block", "speed-up", "MB a block", "TB/s", "error"]
  report.print_table(list(rows.values()), columns)
  for name, layers in variants.items():
    try:
      kernels = device_ms(run, layers)
    except RuntimeError as problem:
      print(f"{name}: no device times, {problem}", flush=True)
      continue
    parts = collections.defaultdict(float)
    for kernel, ms in kernels.items():
      parts[f"{group(kernel)} us"] += 1e3 * ms / blocks
    rows[name] |= {"device us": sum(parts.values()), **parts}
    rows[name]["kernels"] = {kernel: 1e3 * ms / blocks for kernel, ms in kernels.items()}
  report.write_json(f"{_OUT.value}.json", list(rows.values()), **settings)
  parts = ["device us", "sparse product us", "dense product us", "attention us", "others us"]
  report.print_table(list(rows.values()), ["case", "us a block", "speed-up", *parts])
  title = f"A decoder block at 8B shapes, B = {_BATCH.value}, {_LENGTH.value} cached positions, against dense"
  speed_ups = [row["speed-up"] for row in rows.values()]
  report.bar_plot(f"{_OUT.value}.png", list(rows), speed_ups, title, "speed-up", target=1.5)


if __name__ == "__main__":
  app.run(main)
