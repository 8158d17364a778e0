"""Decoding with 2:4 weights against dense: whole Llama-style blocks at 8B shapes.

  PYTHONPATH=. python benchmarks/decoder_block.py [--layers=8] [--batch=16] [--length=1024] [--out=results/decoder_block]

Each step runs `layers` blocks with weights and caches of their own, so that weights come from memory and not from a cache,
and several steps run in one compiled loop, as in generation. Dense and sparse blocks take turns in one process; both
have their queries, keys and values in one product, and the gate and up projections in one. Times are wall-clock of the
loop, divided by steps and layers; device time by kind of kernel stands beside them. The sparse result is checked
against dense blocks with the same pruned weights.
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

from experiments import llama
from jaxsparse import ops

_LAYERS = flags.DEFINE_integer("layers", 8, "Blocks with weights of their own.")
_BATCH = flags.DEFINE_integer("batch", 16, "Sequences.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Length of the key-value cache.")
_STEPS = flags.DEFINE_integer("steps", 32, "Decoding steps in one compiled loop.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds in which the variants take turns; medians are reported.")
_LAYOUTS = flags.DEFINE_list("layouts", ["decode", "hopper"], "Layouts of the sparse weights to time.")
_SCALE = flags.DEFINE_integer("scale", 1, "Divides the widths: to try the script on a CPU.")
_OUT = flags.DEFINE_string("out", "results/decoder_block", "Where the JSON and the plot go, without suffix.")

WEIGHTS = ("qkv", "out", "gate_up", "down")


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


@functools.partial(jax.jit, static_argnums=3)
def decode(layers, caches, x, config):
  """x through all layers at each of the last positions of the cache: `[steps, B, D]`."""

  def step(caches, position):
    y, updated = x, []
    for layer, cache in zip(layers, caches):
      cache, y = llama.decode_block(layer, cache, y, position, config)
      updated.append(cache)
    return updated, y

  steps = min(_STEPS.value, _LENGTH.value)
  return jax.lax.scan(step, caches, _LENGTH.value - steps + jnp.arange(steps))[1]


def group(name: str) -> str:
  """What a kernel does, by its name."""
  if "nm_matmul" in name or "prune" in name:
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


def main(argv):
  del argv
  scale = _SCALE.value
  config = llama.Config(dim=4096 // scale, heads=32 // scale, kv_heads=max(1, 8 // scale), hidden=14336 // scale)
  init = jax.jit(llama.init_layer, static_argnums=1)
  dense = [init(key, config) for key in jax.random.split(jax.random.key(0), _LAYERS.value)]
  shape = (_BATCH.value, config.kv_heads, _LENGTH.value, config.head_dim)
  random_cache = jax.jit(lambda key: llama.Cache(*jax.random.normal(key, (2, *shape), jnp.bfloat16)))
  caches = [random_cache(key) for key in jax.random.split(jax.random.key(1), _LAYERS.value)]
  x = jax.random.normal(jax.random.key(2), (_BATCH.value, config.dim), jnp.bfloat16)

  variants, notes = {"dense": dense}, {}
  for layout in _LAYOUTS.value:
    try:
      layers = [change_weights(layer, lambda w: packed(w, layout)) for layer in dense]
      choices = {}
      for name in WEIGHTS:
        w = getattr(layers[0], name)
        choice = ops.which_nm_matmul(jax.ShapeDtypeStruct((_BATCH.value, w.shape[0]), x.dtype), w)
        choices[name] = choice.implementation
      variants[f"2:4, {layout} layout"], notes[f"2:4, {layout} layout"] = layers, choices
      print(layout, choices, flush=True)
    except (ImportError, ValueError, NotImplementedError) as error:
      print(f"{layout}: {error}", flush=True)

  # A small stack is enough to see that the blocks compute what pruned dense ones do.
  first = lambda layers: decode(layers[:1], caches[:1], x, config).astype(jnp.float32)
  want = first([change_weights(dense[0], pruned)])
  errors = {name: float(jnp.linalg.norm(first(v) - want) / jnp.linalg.norm(want)) for name, v in variants.items()}
  print("relative difference to pruned dense blocks (one layer):", errors, flush=True)

  times = collections.defaultdict(list)
  for turn in range(_ROUNDS.value + 1):
    for name, layers in variants.items():
      start = time.perf_counter()
      jax.block_until_ready(decode(layers, caches, x, config))
      if turn:  # the first round compiles
        times[name].append(time.perf_counter() - start)
  blocks = _LAYERS.value * min(_STEPS.value, _LENGTH.value)
  cache_bytes = sum(a.nbytes for a in jax.tree.leaves(caches[0]))
  rows = []
  for name, layers in variants.items():
    us = 1e6 * statistics.median(times[name]) / blocks
    weight_bytes = sum(a.nbytes for a in jax.tree.leaves(layers[0]))
    kernels = device_ms(lambda *args: decode(*args, config), layers, caches, x)
    parts = collections.defaultdict(float)
    for kernel, ms in kernels.items():
      parts[f"{group(kernel)} us"] += 1e3 * ms / blocks
    row = {"case": name, "us a block": us, "device us": sum(parts.values()), **parts}
    row |= {"MB a block": (weight_bytes + cache_bytes) / 1e6, "TB/s": (weight_bytes + cache_bytes) / us / 1e6}
    rows.append(row | {"error": errors[name], "runs on": notes.get(name, "xla"), "kernels": kernels})
  for row in rows:
    row["speed-up"] = rows[0]["us a block"] / row["us a block"]
  settings = {"batch": _BATCH.value, "length": _LENGTH.value, "layers": _LAYERS.value, "steps": _STEPS.value}
  report.write_json(f"{_OUT.value}.json", rows, **settings)
  columns = ["case", "us a block", "speed-up", "device us", "sparse product us", "dense product us", "others us"]
  report.print_table(rows, columns + ["MB a block", "TB/s", "error"])
  title = f"A decoder block at 8B shapes, B = {_BATCH.value}, {_LENGTH.value} cached positions, against dense"
  speed_ups = [row["speed-up"] for row in rows]
  report.bar_plot(f"{_OUT.value}.png", [row["case"] for row in rows], speed_ups, title, "speed-up", target=1.5)


if __name__ == "__main__":
  app.run(main)
