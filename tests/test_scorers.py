"""Scorers, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import scorers

RNG = np.random.default_rng(0)
W, G = RNG.normal(size=(2, 6, 5)).astype(np.float32)
KEY = jax.random.key(0)


def inputs(param=W, grad=G, **extra):
  return scorers.LeafInputs(jnp.asarray(param), None if grad is None else jnp.asarray(grad), KEY, extra)


@pytest.mark.parametrize(
  "scorer,want",
  [
    (scorers.Magnitude(), np.abs(W)),
    (scorers.GradientMagnitude(), np.abs(G)),
    (scorers.WeightTimesGradient(), np.abs(W * G)),
  ],
)
def test_instant(scorer, want):
  assert scorer.init(jnp.asarray(W)) == () and scorer.accumulate((), inputs()) == ()
  np.testing.assert_array_equal(scorer.score((), inputs()), want)


def steps(scorer, grads, params=None):
  state = scorer.init(jnp.asarray(W))
  assert state.dtype == jnp.float32 and state.shape == W.shape and not state.any()
  for i, g in enumerate(grads):
    state = scorer.accumulate(state, inputs(W if params is None else params[i], g))
  return np.asarray(scorer.score(state, inputs()))


GRADS = RNG.normal(size=(4, 6, 5)).astype(np.float32)


def test_momentum():
  want = sum(0.2 * 0.8 ** (3 - i) * g for i, g in enumerate(GRADS))
  np.testing.assert_allclose(steps(scorers.Momentum(0.8), GRADS), np.abs(want), rtol=1e-5, atol=1e-7)


def test_fisher():
  want = sum(0.3 * 0.7 ** (3 - i) * g**2 for i, g in enumerate(GRADS))
  np.testing.assert_allclose(steps(scorers.Fisher(0.7), GRADS), W**2 * want / 2, rtol=1e-5, atol=1e-7)


def test_movement():
  """Sanh et al.: -sum w g, so weights that move away from zero score high; signed."""
  params = RNG.normal(size=(4, 6, 5)).astype(np.float32)
  got = steps(scorers.Movement(), GRADS, params)
  np.testing.assert_allclose(got, -(params * GRADS).sum(0), rtol=1e-4, atol=1e-6)
  assert (got < 0).any() and (got > 0).any()


def test_adam_fisher_reads_nu():
  nu = np.abs(GRADS[0])
  np.testing.assert_allclose(
    scorers.AdamFisher().score((), inputs(grad=None, nu=jnp.asarray(nu))), W**2 * nu / 2, rtol=1e-6
  )
  # In training: the state's own nu, as it was before this update.
  updater = js.adam_fisher(sparsity=0.5, schedule=js.schedules.OneShot(1))
  tx = updater.wrap_optax(optax.adam(0.01))
  params = {"w": jnp.asarray(W)}
  updates, state = tx.update({"w": jnp.asarray(GRADS[0])}, tx.init(params), params)
  params = optax.apply_updates(params, updates)
  score = np.asarray(params["w"]) ** 2 * np.asarray(state.inner_state[0].nu["w"])
  _, state = tx.update({"w": jnp.asarray(GRADS[1])}, state, params)
  np.testing.assert_array_equal(js.get_masks(state)["w"].ravel(), np.argsort(np.argsort(-score.ravel())) < 15)


def test_random_is_uniform_and_follows_the_key():
  scorer = scorers.Random()
  big = inputs(np.zeros((256, 1024), np.float32))
  score = scorer.score((), big)
  assert score.dtype == jnp.uint16
  np.testing.assert_array_equal(score, scorer.score((), big))
  # Every byte equally often (chi-square of 255 degrees of freedom: mean 255, deviation 23), neighbours unrelated.
  values = np.asarray(score).astype(np.int64)
  for byte in (values >> 8, values & 255):
    counts = np.bincount(byte.ravel(), minlength=256)
    assert ((counts - 1024) ** 2 / 1024).sum() < 255 + 5 * 23
  unit = values / 2**16 - 0.5
  other = np.asarray(scorer.score((), big._replace(key=jax.random.key(1)))) / 2**16 - 0.5
  for pair in (unit[:, 1:] * unit[:, :-1], unit[1:] * unit[:-1], unit * other):
    assert abs(pair.mean()) * 12 * np.sqrt(pair.size) < 5
  assert (score != scorer.score((), big._replace(key=jax.random.key(1)))).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_buffers_are_float32(dtype):
  """A moving average with decay 0.999 does not move in bfloat16."""
  for scorer in (scorers.Momentum(), scorers.Fisher(), scorers.Movement()):
    state = scorer.init(jnp.asarray(W, dtype))
    state = scorer.accumulate(state, inputs(jnp.asarray(W, dtype), jnp.asarray(G, dtype)))
    assert state.dtype == jnp.float32
    assert scorer.score(state, inputs(jnp.asarray(W, dtype))).shape == W.shape


@pytest.mark.parametrize(
  "make",
  [
    lambda: scorers.Momentum(1.0),
    lambda: scorers.Fisher(-0.1),
    lambda: scorers.Fisher(float("nan")),
    lambda: scorers.SynFlow(0),
  ],
)
def test_impossible_scorers(make):
  with pytest.raises(ValueError):
    make()


def test_mean_gradient_is_the_gradient_of_the_mean():
  params, batches = {"w": jnp.asarray(W)}, [jnp.float32(1), jnp.float32(2), jnp.float32(6)]
  got = scorers.mean_gradient(lambda p, b: b * (p["w"] ** 2).sum(), params, batches)
  np.testing.assert_allclose(got["w"], 2 * 3 * W, rtol=1e-6)


def test_nan_scores_rank_lowest():
  grads = G.copy()
  grads[0] = np.nan
  updater = js.saliency(sparsity=5 / 30, schedule=js.schedules.OneShot(0))
  tx = updater.wrap_optax(optax.sgd(0.0))
  params = {"w": jnp.asarray(W)}
  _, state = tx.update({"w": jnp.asarray(grads)}, tx.init(params), params)
  np.testing.assert_array_equal(js.get_masks(state)["w"], ~np.isnan(grads))
