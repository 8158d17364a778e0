"""N:M training from scratch on scikit-learn's digits: test accuracy of every method over seeds.

  python benchmarks/digits_nm.py [--seeds=10] [--steps=2400] [--out=results/digits_nm]

An MLP 64-32-32-10 with 1:16 in the hidden kernels; the output layer stays dense (or not: --nodense_last). Batch 64,
constant learning rate (SGD 0.1, Adam 3e-3), trained on 1200 images and tested on 597. Decays end at
80 % of training, ASP prunes at 50 %; no setting is tuned to a method. All seeds of a method are one vmapped program.
"""

from collections.abc import Callable
import math

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import tqdm

import jaxsparse as js

_SEEDS = flags.DEFINE_integer("seeds", 10, "Number of seeds.")
_STEPS = flags.DEFINE_integer("steps", 2400, "Updates.")
_HIDDEN = flags.DEFINE_integer("hidden", 32, "Width of the two hidden layers.")
_N = flags.DEFINE_integer("n", 1, "Entries kept of each group.")
_M = flags.DEFINE_integer("m", 16, "Group size.")
_DENSE_LAST = flags.DEFINE_bool("dense_last", True, "Leave the output layer dense.")
_ONLY = flags.DEFINE_list("only", [], "Methods to run: parts of their names; all if empty.")
_OUT = flags.DEFINE_string("out", "results/digits_nm", "Where the JSON goes, without suffix.")

_BATCH = 64
_SGD, _ADAM = 0.1, 3e-3


def _methods() -> dict[str, tuple[js.Updater, Callable[[], optax.GradientTransformation]]]:
  rules = js.Rules(("^2/kernel", None)) if _DENSE_LAST.value else js.Rules()
  nm = dict(structure=js.NM(_N.value, _M.value), rules=rules)
  stop = _STEPS.value * 8 // 10
  ending = dict(stop=stop, rate=math.log(100) / stop)  # an exponential that has come down to 1 % when it is cut off
  common = {
    "dense": js.no_prune(),
    "asp": js.asp(at=_STEPS.value // 2, **nm),
    "ste": js.magnitude_ste(**nm),
    "sr_ste 2e-4": js.sr_ste(decay=2e-4, **nm),
    "sr_ste 2e-2": js.sr_ste(decay=2e-2, **nm),
    "mdgf exponential": js.mdgf(**ending, **nm),
    "mdgf exponential chain": js.mdgf(**ending, flow="chain", **nm),
    "mdgf linear": js.mdgf(decay="linear", stop=stop, **nm),
    "mdgf linear chain": js.mdgf(decay="linear", stop=stop, flow="chain", **nm),
    "sdgf sparsify": js.sdgf(_N.value, _M.value, frames="sparsify", stop=stop, rules=rules),
  }
  sgd, adam = lambda: optax.sgd(_SGD), lambda: optax.adam(_ADAM)
  # AutoSwitch's threshold, Adam's eps, is not reached here: the switch comes at `latest`.
  switch = dict(freeze_nu=js.AutoSwitch(_STEPS.value // 10, _STEPS.value // 2))
  rising, mixing = (optax.linear_schedule(0.0, top, stop) for top in (1e-2, 1.0))
  falling = optax.cosine_decay_schedule(_ADAM, _STEPS.value)
  own = {
    "step": (js.step(**nm), lambda: js.adamw_nm(_ADAM, **switch)),
    "step without floor": (js.step(**nm), lambda: js.adamw_nm(_ADAM, nu_floor=0.0, **switch)),
    "ast 1e-2": (js.ast(**nm), lambda: js.adamw_nm(_ADAM, masked_decay="l2", strength=rising)),
    "cast 1e-2 cosine": (js.cast(**nm), lambda: js.adamw_nm(falling, masked_decay="l1", strength=1e-2, mix=mixing)),
  }
  methods = {f"sgd: {name}": (updater, sgd) for name, updater in common.items()}
  methods |= {f"adam: {name}": (updater, adam) for name, updater in common.items()}
  return methods | {f"adam: {name}": pair for name, pair in own.items()}


def _data():
  from sklearn import datasets

  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order], jnp.int32)
  return images[:1200], labels[:1200], images[1200:], labels[1200:]


def _logits(params, x):
  for i, layer in enumerate(params):
    x = x @ layer["kernel"] + layer["bias"]
    x = jax.nn.relu(x) if i < len(params) - 1 else x
  return x


def _accuracy(updater, inner, key, data):
  """Test accuracy, in percent, of the exported model of one seed."""
  x, y, test_x, test_y = data
  sizes = (x.shape[1], _HIDDEN.value, _HIDDEN.value, 10)
  key, *keys = jax.random.split(key, len(sizes))
  params = [
    {"kernel": jax.random.normal(k, (a, b)) * math.sqrt(2 / a), "bias": jnp.zeros(b)}
    for k, a, b in zip(keys, sizes, sizes[1:])
  ]
  tx = updater.wrap_optax(inner)

  def loss(params, state, chosen):
    logits = _logits(updater.forward_params(params, state), x[chosen])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[chosen]).mean()

  def step(carry, t):
    params, state = carry
    chosen = jax.random.randint(jax.random.fold_in(key, t), (_BATCH,), 0, len(y))
    updates, state = tx.update(jax.grad(loss)(params, state, chosen), state, params)
    return (optax.apply_updates(params, updates), state), None

  state = tx.init(params)
  (params, state), _ = jax.lax.scan(step, (params, state), jnp.arange(_STEPS.value))
  params, masks = updater.export(params, state)
  kept = jnp.mean(params[1]["kernel"] != 0)
  return 100 * jnp.mean(_logits(params, test_x).argmax(-1) == test_y), kept


def main(argv):
  del argv
  data, rows = _data(), []
  keys = jax.vmap(jax.random.key)(jnp.arange(_SEEDS.value))
  methods = {name: pair for name, pair in _methods().items() if not _ONLY.value or any(o in name for o in _ONLY.value)}
  for name, (updater, inner) in tqdm.tqdm(methods.items()):
    run = jax.jit(jax.vmap(lambda key: _accuracy(updater, inner(), key, data)))
    found, kept = (np.asarray(a, np.float64) for a in run(keys))
    error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    row = {"method": name, "accuracy": found.mean(), "standard error": error, "kept": kept.max()}
    rows.append({**row, "accuracies": found.tolist(), "updater": repr(updater)})
  report.print_table(rows, ("method", "accuracy", "standard error", "kept"))
  settings = {f.name: f.value for f in (_SEEDS, _STEPS, _HIDDEN, _N, _M, _DENSE_LAST)}
  report.write_json(_OUT.value + ".json", rows, **settings)


if __name__ == "__main__":
  app.run(main)
