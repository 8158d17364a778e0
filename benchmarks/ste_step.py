"""Step time of methods that choose N:M masks anew in every step, against the same optimizer alone.

  python benchmarks/ste_step.py [--rounds=60] [--n=2 --m=4] [--out=results/ste_step]

A 5.8M-parameter MLP (784-2048-2048-10), batch 128, Adam: whole training steps (masked forward pass, gradient, update,
new masks), all variants in turn in every round, median of the ratios to the dense step of the same round. The last
layer of 10 outputs is masked too. Target: 1.15 for 2:4.
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
_N = flags.DEFINE_integer("n", 2, "Entries kept of each group.")
_M = flags.DEFINE_integer("m", 4, "Group size.")
_ONLY = flags.DEFINE_list("only", [], "Variants to time beside the dense one: parts of their names; all if empty.")
_OUT = flags.DEFINE_string("out", "results/ste_step", "Where the JSON and the plot go, without suffix.")


def _variants() -> dict[str, tuple[js.Updater, optax.GradientTransformation]]:
  nm = dict(structure=js.NM(_N.value, _M.value))
  adam, pull = optax.adam(1e-3), js.adamw_nm(1e-3, masked_decay="l2", strength=6e-5)
  switched = js.adamw_nm(1e-3, b2=0.5, freeze_nu=js.AutoSwitch(latest=0))
  return {
    "dense": (js.no_prune(), adam),
    "dense again": (js.no_prune(), adam),
    "magnitude_ste": (js.magnitude_ste(**nm), adam),
    "magnitude_ste, packed": (js.magnitude_ste(**nm, pack_masks=True), adam),
    "sr_ste": (js.sr_ste(**nm), adam),
    "mdgf": (js.mdgf(**nm, stop=10**6), adam),
    "mdgf, chain": (js.mdgf(**nm, stop=10**6, flow="chain"), adam),
    "step, after the switch": (js.step(**nm), switched),
    "ast, masks every 10": (js.ast(**nm), pull),
    "magnitude_ste, masks every 10": (js.magnitude_ste(**nm, every=10), adam),
  }


def _variant(updater, inner, params, x, y):
  """(compiled step, carry) of one variant; parameters and state are donated, as training loops do."""
  tx = updater.wrap_optax(inner)

  def step(params, state):
    grads = jax.grad(lambda p: mlp.loss(updater.forward_params(p, state), x, y))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
  for _ in range(3):
    carry = step(*carry)
  return step, carry


def main(argv):
  del argv
  key = jax.random.key(0)
  params = mlp.init_params(key)
  x = jax.random.normal(jax.random.fold_in(key, 1), (128, mlp.SIZES[0]))
  y = jax.random.randint(jax.random.fold_in(key, 2), (128,), 0, mlp.SIZES[-1])
  chosen = {n: p for n, p in _variants().items() if n == "dense" or not _ONLY.value or any(o in n for o in _ONLY.value)}
  variants = {name: _variant(*pair, params, x, y) for name, pair in chosen.items()}
  carries = {name: variant[1] for name, variant in variants.items()}
  seconds = {name: [] for name in variants}
  for _ in tqdm.trange(_ROUNDS.value):
    names = list(variants)
    random.shuffle(names)
    for name in names:
      jax.block_until_ready(carries[name])
      start = time.perf_counter()
      carries[name] = jax.block_until_ready(variants[name][0](*carries[name]))
      seconds[name].append(time.perf_counter() - start)
  rows = []
  base = np.array(seconds["dense"])
  for name in variants:
    times = np.array(seconds[name])
    rows.append(
      {
        "variant": name,
        "step ms": float(np.median(times) * 1e3),
        "ratio": float(np.median(times) / np.median(base)),
        "paired ratio": float(np.median(times / base)),
        "min ratio": float(times.min() / base.min()),
      }
    )
  report.print_table(rows, list(rows[0]))
  report.write_json(_OUT.value + ".json", rows, rounds=_ROUNDS.value, pattern=f"{_N.value}:{_M.value}")
  report.bar_plot(
    pathlib.Path(_OUT.value + ".png"),
    [r["variant"] for r in rows[1:]],
    [r["paired ratio"] for r in rows[1:]],
    f"Training step with {_N.value}:{_M.value} masks, against Adam alone (5.8M parameters, batch 128)",
    "step time / dense step time",
    1.15,
  )


if __name__ == "__main__":
  app.run(main)
