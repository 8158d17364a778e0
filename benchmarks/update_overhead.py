"""Step time of wrapped optimizers between refreshes, against the same optimizer alone.

  python benchmarks/update_overhead.py [--rounds=60] [--out=results/update_overhead]

A 5.8M-parameter MLP (784-2048-2048-10), batch 128, Adam; each variant's whole training step and its `tx.update` alone,
all variants in turn in every round, median of the ratios to the dense step of the same round.
"""

import pathlib
import random
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import mlp
import numpy as np
import optax
import report
import tqdm

import jaxsparse as js

_ROUNDS = flags.DEFINE_integer("rounds", 60, "Timed rounds over all variants.")
_OUT = flags.DEFINE_string("out", "results/update_overhead", "Where the JSON and the plot go, without suffix.")
_DONATE = flags.DEFINE_bool("donate", True, "Donate parameters and optimizer state, as training loops do.")

_NEVER = dict(every=10**6, stop=10**6 + 1, start=1)  # one refresh in the warm-up, none in the timing


def _updaters() -> dict[str, js.Updater | None]:
  algorithms = {name: js.get_algorithm(name) for name in ("magnitude", "set", "rigl", "snfs")}
  variants = {name: make(sparsity=0.9, **_NEVER) for name, make in algorithms.items()}
  packed = {f"{name}, packed": make(sparsity=0.9, pack_masks=True, **_NEVER) for name, make in algorithms.items()}
  return {"dense": None, "dense again": None} | variants | packed


def _variant(updater, params, x, y):
  """(compiled step, compiled update, carry) of one variant, past its first refresh."""
  inner = optax.adam(1e-3)
  tx = inner if updater is None else updater.wrap_optax(inner)
  donate = (0, 1) if _DONATE.value else ()

  def step(params, state):
    grads = jax.grad(mlp.loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  step, update = jax.jit(step, donate_argnums=donate), jax.jit(update, donate_argnums=donate)
  carry = jax.tree.map(jnp.copy, (params, state))
  for _ in range(3):
    carry = step(*carry)
  return step, update, carry


def main(argv):
  del argv
  key = jax.random.key(0)
  params = mlp.init_params(key)
  x = jax.random.normal(jax.random.fold_in(key, 1), (128, mlp.SIZES[0]))
  y = jax.random.randint(jax.random.fold_in(key, 2), (128,), 0, mlp.SIZES[-1])
  grads = jax.grad(mlp.loss)(params, x, y)
  variants = {name: _variant(updater, params, x, y) for name, updater in _updaters().items()}
  carries = {name: variant[2] for name, variant in variants.items()}
  seconds = {kind: {name: [] for name in variants} for kind in ("step", "update")}
  for _ in tqdm.trange(_ROUNDS.value):
    names = list(variants)
    random.shuffle(names)
    for name in names:
      for kind, fn, args in (("step", variants[name][0], ()), ("update", variants[name][1], (grads,))):
        jax.block_until_ready(carries[name])
        start = time.perf_counter()
        carries[name] = jax.block_until_ready(fn(*carries[name], *args))
        seconds[kind][name].append(time.perf_counter() - start)
  rows = []
  for name in variants:
    row = {"variant": name}
    for kind in ("step", "update"):
      times, base = np.array(seconds[kind][name]), np.array(seconds[kind]["dense"])
      row |= {
        f"{kind} ms": float(np.median(times) * 1e3),
        f"{kind} ratio": float(np.median(times) / np.median(base)),
        f"{kind} paired ratio": float(np.median(times / base)),
        f"{kind} min ratio": float(times.min() / base.min()),
      }
    rows.append(row)
  report.print_table(rows, list(rows[0]))
  report.write_json(_OUT.value + ".json", rows, rounds=_ROUNDS.value, donate=_DONATE.value)
  shown = [row for row in rows if row["variant"] != "dense"]
  report.bar_plot(
    pathlib.Path(_OUT.value + ".png"),
    [r["variant"] for r in shown],
    [r["step paired ratio"] for r in shown],
    "Step between refreshes, against Adam alone (5.8M parameters)",
    "step time / dense step time",
    1.02,
  )


if __name__ == "__main__":
  app.run(main)
