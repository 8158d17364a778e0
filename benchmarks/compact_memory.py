"""Memory of an output layer with a million labels: compact fixed fan-in, trained with Adam, grown once.

  python benchmarks/compact_memory.py [--labels=1000000] [--inputs=4096] [--fan_in=128] [--batch=64] [--steps=8]

Dense weights, gradients and Adam's moments of 4096 x 1,000,000 in float32 take 65.5 GB. Here all four are `[fan_in, labels]`,
beside 16-bit indices. The peak is what the device's allocator saw (GPU) or the growth of the resident set above what the
imports take (CPU); programs, batches and the logits are in it. One refresh moves 30 % of the connections (SRigL's constant fan-in:
smallest weights out, largest gradients in, of a sample of the inputs). Classes are softmax targets of random features: the
loss falls because few examples are seen again and again; it shows that training runs, not that it is good.
"""

import functools
import json
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax
import report

import jaxsparse as js

_LABELS = flags.DEFINE_integer("labels", 1_000_000, "Outputs of the layer.")
_INPUTS = flags.DEFINE_integer("inputs", 4096, "Inputs of the layer.")
_FAN_IN = flags.DEFINE_integer("fan_in", 128, "Inputs that each output keeps.")
_BATCH = flags.DEFINE_integer("batch", 64, "Examples of a step.")
_STEPS = flags.DEFINE_integer("steps", 8, "Updates, of which one is the refresh.")
_SAMPLE = flags.DEFINE_integer(
  "sample", 512, "Inputs that are looked at for growth, drawn anew for every chunk of outputs."
)
_DROP = flags.DEFINE_float("drop", 0.3, "Share of the connections that the refresh replaces.")
_OUT = flags.DEFINE_string("out", "results/compact_memory", "Where the JSON goes, without suffix.")


def resident_bytes(field: str) -> int:
  """VmRSS (now) or VmHWM (peak) of this process."""
  with open("/proc/self/status") as status:
    line = next(line for line in status if line.startswith(field + ":"))
  return int(line.split()[1]) * 1024


def batches(key: jax.Array, inputs: int, labels: int, batch: int, count: int) -> list[tuple[jax.Array, jax.Array]]:
  """A few batches of (features, labels)."""
  keys = jax.random.split(key, 2 * count)
  return [
    (jax.random.normal(keys[2 * i], (batch, inputs)), jax.random.randint(keys[2 * i + 1], (batch,), 0, labels))
    for i in range(count)
  ]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean over the batch; holds a few arrays of the logits' size."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(argv):
  del argv
  inputs, labels, fan_in = _INPUTS.value, _LABELS.value, _FAN_IN.value
  on_cpu = jax.default_backend() == "cpu"
  jax.block_until_ready(jnp.ones(8) + 1)
  floor = resident_bytes("VmRSS")
  updater = js.srigl(
    structure=js.Compact(js.FixedFanIn(fan_in), (inputs, labels)),
    every=_STEPS.value,
    start=_STEPS.value // 2,
    stop=_STEPS.value,
    drop_fraction=js.schedules.ConstantFraction(_DROP.value),
  )
  tx = updater.wrap_optax(optax.adam(3e-3), key=1)
  params, masks = updater.compact_init(jax.ShapeDtypeStruct((inputs, labels), jnp.float32), key=0)
  opt_state = js.set_masks(tx.init(params), masks)
  del masks

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, opt_state, batch):
    def loss(params):
      return cross_entropy(js.ops.fan_in_matmul(batch[0], updater.forward_params(params, opt_state)), batch[1])

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params, candidate_scores=None)
    return optax.apply_updates(params, updates), opt_state, value

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def refresh_step(params, opt_state, batch, key):
    features, targets = batch
    layer = lambda params: js.ops.fan_in_matmul(features, updater.forward_params(params, opt_state))
    logits, pull = jax.vjp(layer, params)
    value, dy = jax.value_and_grad(cross_entropy)(logits, targets)
    count = min(_SAMPLE.value, int(_DROP.value * fan_in) + 2)
    weight = updater.forward_params(params, opt_state)
    scores = js.ops.fan_in_candidates(features, dy, weight, count, sample=_SAMPLE.value, key=key)
    updates, opt_state = tx.update(pull(dy)[0], opt_state, params, candidate_scores=scores)
    return optax.apply_updates(params, updates), opt_state, value

  data = batches(jax.random.key(2), inputs, labels, _BATCH.value, 2)
  rows, times = [], {"train": [], "refresh": []}
  train = train_step.lower(params, opt_state, data[0]).compile()
  refresh = refresh_step.lower(params, opt_state, data[0], jax.random.key(3)).compile()
  before = js.get_masks(opt_state).indices[:, :1000]
  for i in range(_STEPS.value):
    due = bool(updater.due(opt_state))
    start = time.perf_counter()
    if due:
      params, opt_state, loss = refresh(params, opt_state, data[i % 2], jax.random.key(3))
    else:
      params, opt_state, loss = train(params, opt_state, data[i % 2])
    loss = float(jax.block_until_ready((params, opt_state, loss))[2])
    times["refresh" if due else "train"].append(time.perf_counter() - start)
    rows.append({"step": i, "refresh": due, "loss": loss, "seconds": time.perf_counter() - start})
    print(json.dumps(rows[-1]), flush=True)
  after = js.get_masks(opt_state)
  moved = float(jnp.mean(before != after.indices[:, :1000]))
  if after.problem():
    raise RuntimeError(after.problem())

  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  state = js.get_sparsity_state(opt_state)
  dense = 4 * inputs * labels
  peak = resident_bytes("VmHWM") - floor if on_cpu else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
  memory = {
    "dense weights, gradients, moments": 4 * dense,
    "weights": size(params),
    "indices": size(state.masks),
    "moments": size(state.inner_state),
    "peak": peak,
  }
  print(
    f"\n{labels:,} labels x {inputs} inputs, fan-in {fan_in}, batch {_BATCH.value}; moved {moved:.1%} of the connections"
  )
  print(f"train step {min(times['train']):.3f} s, refresh {max(times['refresh']):.2f} s")
  report.print_table([{"what": k, "GB": v / 1e9} for k, v in memory.items()], ["what", "GB"])
  problem = {"labels": labels, "inputs": inputs, "fan_in": fan_in, "batch": _BATCH.value, "moved": moved}
  report.write_json(f"{_OUT.value}.json", rows, problem=problem, memory=memory)


if __name__ == "__main__":
  app.run(main)
