"""The small experiment that separates sparse-training methods: digits at 98 % sparsity.

  python benchmarks/digits.py [--seeds=10] [--steps=2400] [--out=results/digits]

scikit-learn's digits (1200 images to train, 597 to test, one fixed split), an MLP 64-128-128-10 with He initialisation, SGD
with momentum 0.9 and a cosine learning rate from 0.1, batches of 128, masks refreshed every 50 of 2400 steps until 75 % of them. Every
method gets the same steps, seeds, data order and initial weights. At this sparsity the order of the literature shows: static
uniform < static ERK < SET < RigL < GraNet; at 80-90 % it does not. No method's settings were tuned.
"""

import math
import pathlib

from absl import app
from absl import flags
import digits_mlp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import tqdm

import jaxsparse as js

_SEEDS = flags.DEFINE_integer("seeds", 10, "Seeds of every method.")
_STEPS = flags.DEFINE_integer("steps", 2400, "Training steps.")
_SPARSITY = flags.DEFINE_float("sparsity", 0.98, "Fraction of the kernels' weights that is removed in the end.")
_OUT = flags.DEFINE_string("out", "results/digits", "Where the JSON and the plot go, without suffix.")

_BATCH = 128
# Each should beat the one before it by more than two standard errors.
_ORDER = ("static uniform", "static ERK", "SET ERK", "RigL ERK", "GraNet 0.5")


def _updaters(sparsity: float, steps: int) -> dict[str, js.Updater]:
  stop = 3 * steps // 4
  swaps = dict(sparsity=sparsity, every=max(1, steps // 48), stop=stop)
  set_ = js.get_algorithm("set")
  ramp = dict(ramp_stop=steps // 2, **swaps)
  return {
    "dense": js.no_prune(),
    "static uniform": js.static_sparse(sparsity=sparsity, distribution=js.Uniform()),
    "static ERK": js.static_sparse(sparsity=sparsity),
    "SET uniform": set_(distribution=js.Uniform(), **swaps),
    "SET ERK": set_(**swaps),
    "RigL uniform": js.rigl(distribution=js.Uniform(), **swaps),
    "RigL ERK": js.rigl(**swaps),
    "SRigL ERK": js.srigl(**swaps),
    "MEST soft ERK": js.mest(distribution=js.ERK(), **swaps),
    "Chase": js.chase(**swaps),
    "GraNet 0.5": js.granet(initial_sparsity=0.5, **ramp),
    "GraNet dense start": js.granet(initial_sparsity=0.0, **ramp),
    "GMP global": js.global_magnitude(**swaps),
  }


def _accuracy_of(updater: js.Updater, steps: int, train, test):
  """seed key -> (test accuracy, kept share of the kernels' weights), one compiled program."""
  images, labels = train
  per_epoch = len(labels) // _BATCH

  def loss(params, state, batch):
    logits = digits_mlp.logits(updater.forward_params(params, state), images[batch])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

  @jax.jit
  def run(key):
    init_key, mask_key, data_key = jax.random.split(key, 3)
    tx = updater.wrap_optax(optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9), key=mask_key)
    params = digits_mlp.init_params(init_key)
    state = tx.init(params)
    params = updater.sparse_params(params, state)

    def step(carry, t):
      params, state = carry
      order = jax.random.permutation(jax.random.fold_in(data_key, t // per_epoch), len(labels))
      batch = jax.lax.dynamic_slice_in_dim(order, t % per_epoch * _BATCH, _BATCH)
      updates, state = tx.update(jax.grad(loss)(params, state, batch), state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), jnp.arange(steps))
    params, masks = updater.export(params, state)
    hits = jnp.argmax(digits_mlp.logits(params, test[0]), -1) == test[1]
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    masks = {name: layer["kernel"] for name, layer in masks.items()}
    return 100 * hits.mean(), 1 - js.summarize_sparsity(masks, True, kernels)["_total_sparsity"]

  return run


def _gaps(means: dict[str, float], errors: dict[str, float]):
  """(lower, higher, difference in standard errors) along the expected order."""
  for low, high in zip(_ORDER, _ORDER[1:]):
    yield low, high, (means[high] - means[low]) / math.hypot(errors[low], errors[high])


def main(argv):
  del argv
  train, test = digits_mlp.load()
  rows = []
  for name, updater in tqdm.tqdm(_updaters(_SPARSITY.value, _STEPS.value).items()):
    run = _accuracy_of(updater, _STEPS.value, train, test)
    results = np.array([run(jax.random.key(seed)) for seed in range(_SEEDS.value)])
    accuracy, kept = results[:, 0], results[:, 1].mean()
    rows.append(
      {
        "method": name,
        "accuracy, %": float(accuracy.mean()),
        "standard error": float(accuracy.std(ddof=1) / math.sqrt(len(accuracy))),
        "kept": float(kept),
        "call": repr(updater),
        "accuracies": accuracy.tolist(),
      }
    )
  report.print_table(rows, list(rows[0])[:4])
  means, errors = ({row["method"]: row[key] for row in rows} for key in ("accuracy, %", "standard error"))
  gaps = [{"lower": low, "higher": high, "standard errors": gap} for low, high, gap in _gaps(means, errors)]
  print()
  report.print_table(gaps, list(gaps[0]))
  report.write_json(
    _OUT.value + ".json", rows, gaps=gaps, seeds=_SEEDS.value, steps=_STEPS.value, sparsity=_SPARSITY.value
  )
  report.bar_plot(
    pathlib.Path(_OUT.value + ".png"),
    list(means),
    list(means.values()),
    f"Digits, MLP 64-128-128-10 at {_SPARSITY.value:.0%} sparsity, {_SEEDS.value} seeds",
    "test accuracy, %",
    errors=list(errors.values()),
  )


if __name__ == "__main__":
  app.run(main)
