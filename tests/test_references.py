"""Whole training runs against the slow, obvious NumPy loops: masks exactly, weights to rounding."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from references import network, training
from references import selection as ref

import jaxsparse as js
from jaxsparse import scorers

LR = 0.2
STEPS = 24


def run(updater, *, extra=None, steps=STEPS, params=None, lr=LR):
  """Masks and parameters after every update, as NumPy, and the masks before the first."""
  tx = updater.wrap_optax(optax.sgd(lr))
  params = laws.make_params() if params is None else params
  state = tx.init(params)
  params = updater.sparse_params(params, state) if updater.forward.storage == "hard" else params

  def step(carry, inputs):
    params, state = carry
    batch, extra = inputs
    grads = jax.grad(lambda p: laws.loss_fn(updater.forward_params(p, state), batch))(params)
    updates, state = tx.update(grads, state, params, **extra)
    params = optax.apply_updates(params, updates)
    return (params, state), (js.get_masks(state), params)

  first = {k: np.asarray(m["kernel"]) for k, m in js.get_masks(state).items()}
  _, history = jax.jit(lambda c, i: jax.lax.scan(step, c, i))((params, state), (laws.make_batches(steps), extra or {}))
  history = jax.tree.map(np.asarray, history)
  return first, network.double(params), [jax.tree.map(lambda a: a[t], history) for t in range(steps)]


def batches(steps=STEPS):
  return list(zip(*(np.asarray(a, np.float64) for a in laws.make_batches(steps))))


def compare(history, reference, refreshes=0):
  """Exact masks and near weights; returns how often the masks changed."""
  changes, before = 0, None
  for t, ((masks, params), (want_masks, want)) in enumerate(zip(history, reference, strict=True)):
    for k in want:
      np.testing.assert_array_equal(masks[k]["kernel"], want_masks[k], f"mask of {k} after update {t}")
      for n in ("kernel", "bias"):
        np.testing.assert_allclose(params[k][n], want[k][n], rtol=2e-4, atol=2e-6, err_msg=f"{k}/{n} after update {t}")
    changes += before is not None and any((before[k] != want_masks[k]).any() for k in want)
    before = want_masks
  assert changes >= refreshes, f"the masks changed {changes} times only"


class Score:
  """A score for `training.gradual` from a plain function."""

  def __init__(self, fn):
    self.fn = fn

  def __call__(self, k, weights, grad):
    return self.fn(weights, grad)


RAMP = dict(every=3, start=2, stop=22)
MAGNITUDE = Score(lambda w, g: np.abs(w))
SALIENCY = Score(lambda w, g: np.abs(w * g))


@pytest.mark.parametrize(
  "name,arguments,score,options",
  [
    ("magnitude", {}, MAGNITUDE, {}),
    ("gmp", {"initial_sparsity": 0.4}, MAGNITUDE, {"first": 0.4}),
    ("global_magnitude", {}, MAGNITUDE, {"joint": True}),
    ("saliency", {}, SALIENCY, {}),
    ("global_saliency", {}, SALIENCY, {"joint": True}),
  ],
)
def test_gradual_pruning(name, arguments, score, options):
  updater = js.get_algorithm(name)(sparsity=0.85, **RAMP, **arguments)
  _, params, history = run(updater)
  compare(history, training.gradual(params, batches(), LR, sparsity=0.85, score=score, **RAMP, **options), refreshes=6)


def test_iterative_nm():
  _, params, history = run(js.iterative_nm(1, 4, **RAMP))
  compare(history, training.stepwise_nm(params, batches(), LR, n=1, m=4, **RAMP), refreshes=3)


def test_fisher():
  ramp = js.schedules.Polynomial(**RAMP)
  _, params, history = run(js.Updater(schedule=ramp, drop=scorers.Fisher(0.7), sparsity=0.85))
  want = training.gradual(params, batches(), LR, sparsity=0.85, score=training.Fisher(0.7), **RAMP)
  compare(history, want, refreshes=6)


SWAPS = dict(every=3, start=2, stop=24)


@dataclasses.dataclass(frozen=True)
class Given(scorers.AbstractScorer):
  """Scores handed in from outside, so that random growth can be compared."""

  needs: ClassVar[tuple[str, ...]] = ("noise",)

  def score(self, state, inputs):
    return inputs.extra["noise"]


@pytest.mark.parametrize("name", ["set", "rigl", "snfs"])
def test_dynamic_sparse_training(name):
  updater = js.get_algorithm(name)(sparsity=0.8, drop_fraction=0.3, **SWAPS)
  rng = np.random.default_rng(5)
  noise = {k: {n: rng.random((STEPS, *w.shape)) for n, w in p.items()} for k, p in laws.make_params().items()}
  extra = {}
  if name == "set":
    updater = dataclasses.replace(updater, grow=Given())
    extra = {"noise": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), noise)}
  first, params, history = run(updater, extra=extra)
  want = training.dynamic(
    params,
    first,
    batches(),
    LR,
    fraction=0.3,
    growth={"set": "noise", "rigl": "gradient", "snfs": "momentum"}[name],
    skip=name != "snfs",
    smooth=0.9 if name == "snfs" else None,
    noise=[{k: p["kernel"][t] for k, p in noise.items()} for t in range(STEPS)],
    **SWAPS,
  )
  compare(history, want, refreshes=5)


def test_rigl_in_nm_groups():
  """2:4 RigL swaps one weight in each of the ceil(f_t kept) groups that gain most."""
  structure = js.NM(2, 4)
  first, params, history = run(js.rigl(structure=structure, drop_fraction=0.3, **SWAPS))
  units = {k: ref.units_of(p["kernel"].shape, "nm", m=4) for k, p in params.items()}
  # The library walks groups in the order (block of rows, column), which decides ties only; gains here are distinct.
  want = training.dynamic(
    params, first, batches(), LR, fraction=0.3, growth="gradient", skip=True, nm_units=units, **SWAPS
  )
  compare(history, want, refreshes=5)


def test_acdc():
  updater = js.acdc(sparsity=0.75, sparse_steps=4, dense_steps=3, start=2, stop=23)
  _, params, history = run(updater)
  want = training.alternating(params, batches(), LR, closes=(2, 9, 16, 23), opens=(6, 13, 20), sparsity=0.75)
  compare(history, want, refreshes=6)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_straight_through_nm(decay):
  structure = js.NM(1, 4)
  schedule = dict(every=2, start=0, stop=20)
  make = js.sr_ste(structure=structure, decay=decay, **schedule)
  updater = make if decay else js.magnitude_ste(structure=structure, **schedule)
  first, params, history = run(updater)
  want = training.straight_through(
    params, batches(), LR, due=range(0, 20, 2), select=training.nm_select(4, 1), decay=decay
  )
  compare(history, want, refreshes=5)
  for k, mask in first.items():
    np.testing.assert_array_equal(mask, training.nm_select(4, 1)(k, params[k]["kernel"]))


def test_sr_ste_closed_form():
  """Without a data gradient pruned weights shrink by exactly (1 - lr decay)^t and kept ones stay."""
  updater = js.sr_ste(structure=js.NM(2, 4), decay=0.25)
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)}
  tx = updater.wrap_optax(optax.sgd(0.5))
  state, start = tx.init(params), np.asarray(params["w"], np.float64)
  mask = np.asarray(js.get_masks(state)["w"])
  update = jax.jit(tx.update)
  for t in range(1, 9):
    updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(np.asarray(params["w"])[~mask], start[~mask] * (1 - 0.125) ** t, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(params["w"])[mask], start[mask].astype(np.float32))
    np.testing.assert_array_equal(js.get_masks(state)["w"], mask)


# -- before training -----------------------------------------------------------------------------------------------------


def kernel_masks(masks):
  return [np.asarray(m["kernel"]) for m in masks.values()]


def two_batches():
  return [jax.tree.map(lambda a: a[i], laws.make_batches(2)) for i in range(2)]


def test_snip():
  params = laws.make_params()
  _, masks = js.snip(sparsity=0.9).instant_sparsify(params, loss_fn=laws.loss_fn, batches=two_batches())
  p = network.double(params)
  grads = [network.gradients(p, x, y) for x, y in batches(2)]
  scores = [np.abs(p[k]["kernel"] * (grads[0][k]["kernel"] + grads[1][k]["kernel"]) / 2) for k in p]
  want = ref.global_topk(scores, ref.keep_count(sum(s.size for s in scores), 0.9))
  for got, mask in zip(kernel_masks(masks), want, strict=True):
    np.testing.assert_array_equal(got, mask)


def test_grasp():
  params = laws.make_params()
  _, masks = js.grasp(sparsity=0.6).instant_sparsify(params, loss_fn=laws.loss_fn, batches=two_batches()[:1])
  p = network.double(params)
  x, y = batches(2)[0]
  product = network.hessian_product(p, network.gradients(p, x, y), x, y)
  scores = [p[k]["kernel"] * product[k]["kernel"] for k in p]
  want = ref.global_topk(scores, ref.keep_count(sum(s.size for s in scores), 0.6))
  assert sum((g != m).sum() for g, m in zip(kernel_masks(masks), want, strict=True)) == 0


def test_grasp_keeps_what_the_gradient_flow_needs():
  """Straight from the definition: without the best tenth of the weights, made a little smaller, |g|^2 falls most."""
  params, batch = laws.make_params(), two_batches()[0]
  kernels = lambda tree: {k: v["kernel"] for k, v in tree.items()}
  flow = lambda p: sum(jnp.sum(g**2) for g in kernels(jax.grad(laws.loss_fn)(p, batch)).values())
  scores = kernels(scorers.Grasp().scores(params, laws.loss_fn, [batch], jax.random.key(0)))
  shrink = lambda sign: {
    k: v | {"kernel": jnp.where(sign * scores[k] > jnp.quantile(sign * scores[k], 0.9), 0.99, 1.0) * v["kernel"]}
    for k, v in params.items()
  }
  assert flow(shrink(1)) < flow(params) < flow(shrink(-1))


@pytest.mark.parametrize("rounds", [1, 7])
def test_synflow(rounds):
  rng = np.random.default_rng(0)
  params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in laws.SHAPES.items()}
  ones = jnp.ones((1, 16))
  flow = lambda p, x: (x @ p["a"] @ p["b"]).sum()
  pruned, masks = js.synflow(sparsity=0.95, iterations=rounds).instant_sparsify(params, loss_fn=flow, batches=[ones])
  want = training.synflow(list(params.values()), np.ones((1, 16)), 0.95, rounds)
  for k, mask in zip(params, want):
    np.testing.assert_array_equal(masks[k], mask)
    np.testing.assert_array_equal(pruned[k], np.where(mask, params[k], 0))


def test_synflow_never_collapses_a_layer():
  """With 100 rounds every layer keeps something where one round would empty the wide one (Tanaka et al., figure 1)."""
  rng = np.random.default_rng(0)
  params = {
    "a": jnp.asarray(rng.normal(size=(16, 64)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=(64, 4)), jnp.float32),
  }
  flow = lambda p, x: (x @ p["a"] @ p["b"]).sum()
  _, masks = js.synflow(sparsity=0.99).instant_sparsify(params, loss_fn=flow, batches=[jnp.ones((1, 16))])
  assert all(m.any() for m in masks.values())
  connected = np.asarray(masks["a"]).any(0) & np.asarray(masks["b"]).any(1)
  assert connected.any(), "no path is left through the network"


@pytest.mark.parametrize("name", ["saliency", "magnitude", "random"])
def test_instant_counts(name):
  updater = js.get_algorithm(name)(sparsity=0.7, stop=10)
  params = laws.make_params()
  pruned, masks = updater.instant_sparsify(params, key=3, loss_fn=laws.loss_fn, batches=two_batches())
  p = network.double(params)
  for k in p:
    mask = np.asarray(masks[k]["kernel"])
    assert mask.sum() == ref.keep_count(mask.size, 0.7)
    np.testing.assert_array_equal(pruned[k]["kernel"], np.where(mask, params[k]["kernel"], 0))
    np.testing.assert_array_equal(pruned[k]["bias"], params[k]["bias"])
  if name == "magnitude":
    for k in p:
      np.testing.assert_array_equal(
        masks[k]["kernel"], ref.topk(np.abs(p[k]["kernel"]), ref.keep_count(p[k]["kernel"].size, 0.7))
      )
  if name == "saliency":
    grads = [network.gradients(p, x, y) for x, y in batches(2)]
    for k in p:
      score = np.abs(p[k]["kernel"] * (grads[0][k]["kernel"] + grads[1][k]["kernel"]))
      np.testing.assert_array_equal(masks[k]["kernel"], ref.topk(score, ref.keep_count(score.size, 0.7)))


def test_random_masks_are_uniform():
  """Every entry is kept equally often: 2,000 draws of a 25 % mask of 64 entries, within five sigmas."""
  updater = js.static_sparse(sparsity=0.75, distribution=js.Uniform())
  params = {"w": jnp.ones((8, 8))}
  tx = lambda key: updater.wrap_optax(optax.sgd(0.1), key=key).init(params)
  masks = jax.jit(jax.vmap(lambda key: js.get_masks(tx(key))["w"]))(jax.random.split(jax.random.key(0), 2000))
  assert (masks.sum((1, 2)) == 16).all()
  kept = np.asarray(masks.mean(0))
  assert np.abs(kept - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 2000)
