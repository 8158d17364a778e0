"""Continual learning on split digits: five tasks of two classes each, one after the other.

  python benchmarks/split_digits.py [--part=replay --part=task_masks] [--seeds=5] [--steps=300]

Task masks (the task is known at test time): every task draws connections of its own among the unused ones, trains them with
SET or leaves them as they are, and freezes them; the output layer is each task's own. The first task's logits are compared
bit for bit after all five.

Replay (the task is not known): one network for ten classes and a buffer of 20 examples of every class seen; dense, and with
SparCL's masks and gradient masking, by which 25 % of the weights and at most 20 % of their gradients are computed with.
"""

import dataclasses
import math

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
from jaxsparse import recipes

_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of every method.")
_STEPS = flags.DEFINE_integer("steps", 300, "Training steps of a task.")
_PART = flags.DEFINE_multi_enum("part", ["replay", "task_masks"], ["replay", "task_masks"], "Which of the two.")
_OUT = flags.DEFINE_string("out", "results/split_digits", "Where the JSON goes, without suffix.")

TASKS, BATCH, BUFFER = 5, 64, 20


def _part(data, task: int, size: int | None = None):
  """Images and labels of the two classes of a task; repeated to a size, so that all tasks share one program."""
  images, labels = (np.asarray(a) for a in data)
  chosen = np.flatnonzero(labels // 2 == task)
  chosen = chosen if size is None else np.resize(chosen, size)
  return jnp.asarray(images[chosen]), jnp.asarray(labels[chosen])


def _accuracy(values, labels) -> float:
  return 100 * float((jnp.argmax(values, -1) == labels).mean())


def _fit(tx, updater, loss):
  """(params, state, key, extra, *data) -> (params, state) after one task; `loss(params, key, *data)` draws its batch."""

  def run(params, state, key, extra, *data):
    def step(carry, t):
      params, state = carry
      draw = jax.random.fold_in(key, t)
      grads = jax.grad(lambda p: loss(updater.forward_params(p, state), draw, *data))(params)
      updates, state = tx.update(grads, state, params, **extra)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jnp.arange(_STEPS.value))[0]

  return jax.jit(run)


# -- Task masks --------------------------------------------------------------------------------------------------------


def _task_updaters() -> dict[str, js.Updater]:
  heads = js.Rules(("dense_2", None))  # without a mask: each task has its own
  swaps = dict(every=_STEPS.value // 12, stop=_STEPS.value * 3 // 4, drop_fraction=0.5, rules=heads)
  found = {}
  for sparsity in (0.9, 0.95, 0.98):
    for name, distribution in (("uniform", js.Uniform()), ("ERK", js.ERK())):
      common = dict(sparsity=sparsity, distribution=distribution)
      found[f"{sparsity:.0%} {name}, static"] = js.static_sparse(rules=heads, **common)
      found[f"{sparsity:.0%} {name}, SET"] = js.get_algorithm("set")(**common, **swaps)
  return found


def _task_learner(updater: js.Updater, train, test):
  """seed -> (mean test accuracy over the tasks after the last, share of the weights in use)."""
  updater = recipes.Tasks.updater(updater)
  tx = updater.wrap_optax(optax.sgd(0.05, momentum=0.9))
  run = _fit(tx, updater, _task_loss)
  empty = recipes.Tasks.start(updater, digits_mlp.init_params(jax.random.key(0)))
  begin = jax.jit(lambda used, params, key: dataclasses.replace(empty, used=used).begin(updater, tx, params, key))

  def learn(seed: int) -> tuple[float, float]:
    key = jax.random.key(seed)
    start = digits_mlp.init_params(key)
    tasks, first = recipes.Tasks.start(updater, start), None
    for task in range(TASKS):
      params, state = begin(tasks.used, start, jax.random.fold_in(key, task))
      images, labels = _part(train, task, 600)
      extra = {"used": tasks.used} if updater.grow else {}
      params, state = run(params, state, key, extra, images, labels, jnp.int32(task))
      tasks = tasks.finish(params, state)
      first = digits_mlp.logits(params, test[0]) if first is None else first
    if not (digits_mlp.logits(tasks.params(0), test[0]) == first).all():
      raise AssertionError("The first task has changed.")
    found = []
    for task in range(TASKS):
      images, labels = _part(test, task)
      values = digits_mlp.logits(tasks.params(task), images)[:, 2 * task : 2 * task + 2]
      found.append(_accuracy(values, labels - 2 * task))
    used = jax.tree.leaves(tasks.used)
    return float(np.mean(found)), float(sum(m.sum() for m in used) / sum(m.size for m in used))

  return learn


def _task_loss(params, key, images, labels, task):
  batch = jax.random.randint(key, (BATCH,), 0, len(labels))
  values = jax.lax.dynamic_slice_in_dim(digits_mlp.logits(params, images[batch]), 2 * task, 2, 1)
  return optax.softmax_cross_entropy_with_integer_labels(values, labels[batch] - 2 * task).mean()


def task_masks(train, test) -> list[dict]:
  """Rows: method, accuracy, what of the weights is in use."""
  rows = []
  for name, updater in tqdm.tqdm(_task_updaters().items(), desc="task masks"):
    learn = _task_learner(updater, train, test)
    try:
      found = [learn(seed) for seed in range(_SEEDS.value)]
    except ValueError as error:  # too few unused weights are left for the last tasks
      rows.append({"method": name, "why": str(error)})
      continue
    rows.append(_row(name, [accuracy for accuracy, _ in found]) | {"in use": found[0][1]})
  return rows


# -- Replay ------------------------------------------------------------------------------------------------------------


def _replay_loss(params, key, images, labels, old_images, old_labels, share):
  """Half of the batch from the task and half from the buffer; all from the task while `share` is 0."""
  new, old = jax.random.split(key)
  new = jax.random.randint(new, (BATCH // 2,), 0, len(labels))
  old = jax.random.randint(old, (BATCH // 2,), 0, len(old_labels))
  loss = lambda x, y: optax.softmax_cross_entropy_with_integer_labels(digits_mlp.logits(params, x), y).mean()
  return (1 - share) * loss(images[new], labels[new]) + share * loss(old_images[old], old_labels[old])


def _buffer(train, task: int):
  """The first 20 examples of every class of the tasks before; of class 0 for the first task, which does not use them."""
  images, labels = (np.asarray(a) for a in train)
  rows = np.concatenate([np.flatnonzero(labels == c)[:BUFFER] for c in range(max(1, 2 * task))])
  rows = np.resize(rows, 2 * TASKS * BUFFER)
  return jnp.asarray(images[rows]), jnp.asarray(labels[rows])


def _sequence_learner(updater: js.Updater, inner, replays: bool, train, test):
  """seed -> test accuracy over all classes after the last task."""
  tx = updater.wrap_optax(inner)
  run = _fit(tx, updater, _replay_loss)
  fresh, project = jax.jit(tx.init), jax.jit(updater.sparse_params)

  def learn(seed: int) -> float:
    key = jax.random.key(seed)
    params, masks = digits_mlp.init_params(key), None
    for task in range(TASKS):
      state = fresh(params)
      state = state if masks is None else js.set_masks(state, masks)  # the masks go on, the schedule starts anew
      share = jnp.float32(0.5 if replays and task else 0.0)
      data = (*_part(train, task, 600), *_buffer(train, task), share)
      params, state = run(project(params, state), state, jax.random.fold_in(key, task), {}, *data)
      masks = js.get_masks(state)
    return _accuracy(digits_mlp.logits(params, test[0]), test[1])

  return learn


def replay(train, test) -> list[dict]:
  """Rows: method, accuracy over all ten classes after the last task, training arithmetic relative to dense."""
  density, passed = 0.25, 0.2
  sgd = lambda: optax.sgd(0.05)
  every, stop = _STEPS.value // 10, _STEPS.value
  sparcl = js.sparcl(sparsity=1 - density, every=every, stop=stop)
  both = optax.chain(js.topk_gradient(passed, every=30), sgd())
  # Forward pass, gradient of the inputs, gradient of the weights: a third each.
  cost = (2 * density + passed) / 3
  methods = {
    "dense, no replay": (js.no_prune(), sgd(), False, 1.0),
    "dense": (js.no_prune(), sgd(), True, 1.0),
    "static sparse": (js.static_sparse(sparsity=1 - density), sgd(), True, density),
    "sparcl": (sparcl, sgd(), True, density),
    "sparcl, topk_gradient": (sparcl, both, True, cost),
  }
  rows = []
  for name, (updater, inner, replays, flops) in tqdm.tqdm(methods.items(), desc="replay"):
    learn = _sequence_learner(updater, inner, replays, train, test)
    rows.append(_row(name, [learn(seed) for seed in range(_SEEDS.value)]) | {"arithmetic": flops})
  return rows


def _row(name: str, found: list[float]) -> dict:
  error = float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) > 1 else 0.0
  return {"method": name, "accuracy": float(np.mean(found)), "standard error": error, "accuracies": found}


def main(argv):
  del argv
  train, test = digits_mlp.load()
  parts = {"replay": (replay, "arithmetic"), "task_masks": (task_masks, "in use")}
  for part in _PART.value:
    make, last = parts[part]
    rows = make(train, test)
    report.print_table(rows, ("method", "accuracy", "standard error", last))
    report.write_json(f"{_OUT.value}_{part}.json", rows, seeds=_SEEDS.value, steps=_STEPS.value)


if __name__ == "__main__":
  app.run(main)
