"""Step time of methods that choose N:M masks anew in every step, against the same optimizer alone.

  python benchmarks/ste_step.py [--rounds=60] [--n=2 --m=4] [--out=results/ste_step]
  PYTHONPATH=. python benchmarks/ste_step.py --model=transformer --steps=20

Whole training steps (masked forward pass, gradient, update, new masks), all variants in turn in every round, median of
the ratios to the dense step of the same round. `mlp`: 784-2048-2048-10, 5.8M parameters, batch 128, for a CPU; the last
layer of 10 outputs is masked too. `transformer`: the 2.6M-parameter decoder of configs/char_transformer.py, 64 x 256
tokens, for a GPU; `--steps` of a call run on the device without the host. Target: 1.15 for 2:4.
"""

from collections.abc import Callable
from concurrent import futures
import pathlib
import random
import time
from typing import Any, NamedTuple

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

_MODEL = flags.DEFINE_enum("model", "mlp", ["mlp", "transformer"], "What is trained.")
_ROUNDS = flags.DEFINE_integer("rounds", 60, "Timed rounds over all variants.")
_STEPS = flags.DEFINE_integer("steps", 1, "Steps of one timed call.")
_N = flags.DEFINE_integer("n", 2, "Entries kept of each group.")
_M = flags.DEFINE_integer("m", 4, "Group size.")
_ONLY = flags.DEFINE_list("only", [], "Variants to time beside the dense one: parts of their names; all if empty.")
_THREADS = flags.DEFINE_integer("threads", 1, "Variants that are compiled at the same time.")
_OUT = flags.DEFINE_string("out", "results/ste_step", "Where the JSON and the plot go, without suffix.")


class Model(NamedTuple):
  """What is trained: parameters, `loss(params)` on one batch, and the rules that say what is masked."""

  params: Any
  loss: Callable[[Any], jax.Array]
  rules: js.Rules
  what: str


def _mlp(key) -> Model:
  x = jax.random.normal(jax.random.fold_in(key, 1), (128, mlp.SIZES[0]))
  y = jax.random.randint(jax.random.fold_in(key, 2), (128,), 0, mlp.SIZES[-1])
  every = js.Rules(("kernel", js.NM(_N.value, _M.value)))
  return Model(mlp.init_params(key), lambda params: mlp.loss(params, x, y), every, "5.8M-parameter MLP, batch 128")


def _transformer(key) -> Model:
  from configs import char_transformer as char_config
  from experiments import char_transformer

  config = char_config.get_config()
  params = char_transformer.init_params(key, config, vocabulary=86)
  windows = jax.random.randint(jax.random.fold_in(key, 1), (config.batch_size, config.length + 1), 0, 86)
  rules = js.Rules((char_config.WEIGHTS, js.NM(_N.value, _M.value, axis=-2)), (".*", None))
  loss = lambda params: char_transformer.loss(params, windows, config)
  return Model(params, loss, rules, f"2.6M-parameter decoder, {config.batch_size} x {config.length} tokens")


def _variants(rules: js.Rules) -> dict[str, tuple[js.Updater, optax.GradientTransformation]]:
  nm = dict(rules=rules)
  adam, pull = optax.adam(1e-3), js.adamw_nm(1e-3, masked_decay="l2", strength=6e-5)
  pull_l1 = js.adamw_nm(1e-3, masked_decay="l1", strength=6e-5, mix=0.5)
  switched = js.adamw_nm(1e-3, b2=0.5, freeze_nu=js.AutoSwitch(latest=0))
  return {
    "dense": (js.no_prune(), adam),
    "dense again": (js.no_prune(), adam),
    "asp, after pruning": (js.asp(**nm), adam),
    "magnitude_ste": (js.magnitude_ste(**nm), adam),
    "magnitude_ste, packed": (js.magnitude_ste(**nm, pack_masks=True), adam),
    "sr_ste": (js.sr_ste(**nm), adam),
    "mdgf": (js.mdgf(**nm, stop=10**6), adam),
    "mdgf, chain": (js.mdgf(**nm, stop=10**6, flow="chain"), adam),
    "step, after the switch": (js.step(**nm), switched),
    "ast, masks every 10": (js.ast(**nm), pull),
    "cast, masks every 10": (js.cast(**nm), pull_l1),
    "magnitude_ste, masks every 10": (js.magnitude_ste(**nm, every=10), adam),
  }


def _compile(updater, inner, model):
  """(compiled steps, carry) of one variant; parameters and state are donated, as training loops do."""
  tx = updater.wrap_optax(inner)

  def step(params, state):
    grads = jax.grad(lambda p: model.loss(updater.forward_params(p, state)))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def steps(params, state):
    return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=_STEPS.value)[0]

  carry = jax.tree.map(jnp.copy, (model.params, tx.init(model.params)))
  # A loop of one step would be another program than the step that training loops call.
  return jax.jit(step if _STEPS.value == 1 else steps, donate_argnums=(0, 1)).lower(*carry).compile(), carry


def main(argv):
  del argv
  model = {"mlp": _mlp, "transformer": _transformer}[_MODEL.value](jax.random.key(0))
  pairs = _variants(model.rules)
  pairs = {n: p for n, p in pairs.items() if n == "dense" or not _ONLY.value or any(o in n for o in _ONLY.value)}
  with futures.ThreadPoolExecutor(_THREADS.value) as pool:
    compiled = dict(zip(pairs, pool.map(lambda pair: _compile(*pair, model), pairs.values())))
  programs = {name: program for name, (program, _) in compiled.items()}
  carries = {name: carry for name, (_, carry) in compiled.items()}
  for name in [*programs] * 3:
    carries[name] = jax.block_until_ready(programs[name](*carries[name]))
  seconds = {name: [] for name in programs}
  for _ in tqdm.trange(_ROUNDS.value):
    for name in random.sample(list(programs), len(programs)):
      start = time.perf_counter()
      carries[name] = jax.block_until_ready(programs[name](*carries[name]))
      seconds[name].append((time.perf_counter() - start) / _STEPS.value)
  rows = []
  base = np.array(seconds["dense"])
  for name, program in programs.items():
    times = np.array(seconds[name])
    rows.append(
      {
        "variant": name,
        "step ms": float(np.median(times) * 1e3),
        "ratio": float(np.median(times) / np.median(base)),
        "paired ratio": float(np.median(times / base)),
        "min ratio": float(times.min() / base.min()),
        "scratch MB": program.memory_analysis().temp_size_in_bytes / 1e6,
      }
    )
  report.print_table(rows, list(rows[0]))
  settings = dict(rounds=_ROUNDS.value, steps=_STEPS.value, pattern=f"{_N.value}:{_M.value}", model=model.what)
  report.write_json(_OUT.value + ".json", rows, **settings)
  report.bar_plot(
    pathlib.Path(_OUT.value + ".png"),
    [r["variant"] for r in rows[1:]],
    [r["paired ratio"] for r in rows[1:]],
    f"Training step with {_N.value}:{_M.value} masks, against Adam alone ({model.what})",
    "step time / dense step time",
    1.15,
  )


if __name__ == "__main__":
  app.run(main)
