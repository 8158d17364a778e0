"""The laws in bfloat16, float32 and their mixtures, and jaxsparse's own arithmetic under strict promotion."""

import contextlib

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import jaxsparse as js

BF16 = jnp.bfloat16
to_bf16 = lambda grads: jax.tree.map(lambda g: g.astype(BF16), grads)
MIXTURES = {
  "bf16": lambda: (optax.sgd(0.05, momentum=0.9), {"dtype": BF16}),
  "bf16_adam": lambda: (optax.adam(0.01), {"dtype": BF16}),
  "f16": lambda: (optax.sgd(0.05, momentum=0.9), {"dtype": jnp.float16}),
  "bf16_params_f32_moments": lambda: (optax.sgd(0.05, momentum=0.9, accumulator_dtype=jnp.float32), {"dtype": BF16}),
  "bf16_params_f32_mu": lambda: (optax.adam(0.01, mu_dtype=jnp.float32), {"dtype": BF16}),
  "f32_params_bf16_grads": lambda: (optax.adam(0.01), {"cast": to_bf16}),
  "f32_params_bf16_mu": lambda: (optax.adam(0.01, mu_dtype=BF16), {}),
}


@pytest.mark.parametrize("name", ["rigl", "sr_ste", "global_magnitude"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_laws_hold(mixture, name):
  inner, arguments = MIXTURES[mixture]()
  h = laws.train(name, inner, **arguments)
  laws.check(h)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(h.params)}
  assert dtypes == {jnp.dtype(arguments.get("dtype", jnp.float32))}, "the parameters changed their dtype"


@pytest.mark.parametrize("u,p", [(BF16, jnp.float32), (jnp.float32, BF16), (jnp.float16, BF16), (BF16, BF16)])
def test_updates_in_the_wider_dtype_land_on_zero(u, p):
  """-p rounded down to the dtype of u would leave a remainder; u rounded down would differ from plain Optax."""
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), p)}
  # A plain cast: the inner optimizer hands out updates of dtype u.
  inner = optax.stateless(lambda g, _: jax.tree.map(lambda x: (x * 0.1).astype(u), g))
  tx = js.magnitude(sparsity=0.5, schedule=js.schedules.OneShot(0)).wrap_optax(inner)
  updates, state = tx.update(params, tx.init(params), params)
  mask = np.asarray(js.get_masks(state)["w"])
  assert updates["w"].dtype == jnp.promote_types(u, p)
  new = np.asarray(optax.apply_updates(params, updates)["w"], np.float32)
  assert (new[~mask] == 0).all()
  plain = optax.apply_updates(params, inner.update(params, inner.init(params), params)[0])
  np.testing.assert_array_equal(new[mask], np.asarray(plain["w"], np.float32)[mask])


@contextlib.contextmanager
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.mark.parametrize("dtype", [jnp.float32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", sorted(laws.EXPECTED))
def test_no_implicit_promotion(name, dtype):
  """init, update (both branches of the refresh), forward_params, sparse_params and get_masks under strict rules."""
  updater = js.get_algorithm(name)(**laws.EXPECTED[name].arguments)
  # What the N:M optimizers tell an updater; they are Optax's code in part, which is not strict.
  told = {"freeze_nu": (), "masked_decay": (), "frozen_at": jnp.int32(0)}
  tells = optax.GradientTransformation(lambda params: told, lambda updates, state, params=None: (updates, state))
  tx = updater.wrap_optax(optax.chain(optax.sgd(0.1), tells))
  params = laws.make_params(dtype)
  grads = jax.tree.map(lambda p: p * 2, params)
  if isinstance(updater.drop, js.scorers.AbstractModelScorer):
    loss = lambda p, scale: sum((leaf * leaf * leaf).sum() for leaf in jax.tree.leaves(p))
    with strict():
      params, masks = updater.instant_sparsify(params, loss_fn=loss, batches=[jnp.ones((), dtype)])
      state = js.set_masks(tx.init(params), masks)
  else:
    with strict():
      state = jax.eval_shape(tx.init, params)
  extra = laws.needed(updater, state, grads)

  def everything(params, state, grads, extra):
    updates, new = tx.update(grads, state, params, **extra)
    return updates, new, updater.forward_params(params, state), updater.sparse_params(params, state)

  with strict():
    updates, new, forward, projected = jax.eval_shape(everything, params, state, grads, extra)
  for tree in (updates, forward, projected):
    assert all(a.dtype == dtype for a in jax.tree.leaves(tree))
  # A weak type or another dtype in the new state would compile every later step again.
  kinds = lambda tree: jax.tree.map(lambda a: (a.shape, jnp.dtype(a.dtype), getattr(a, "weak_type", False)), tree)
  assert kinds(new) == kinds(jax.eval_shape(lambda s: s, state))


@pytest.mark.parametrize("structure", [js.NM(2, 4), js.Block((2, 2)), js.Channel(), js.FixedFanIn()], ids=repr)
@pytest.mark.parametrize("name", ["rigl", "magnitude", "sr_ste"])
def test_no_implicit_promotion_in_structures(name, structure):
  sparsity = None if isinstance(structure, js.NM) else 0.75
  arguments = {**laws.EXPECTED[name].arguments, "sparsity": sparsity, "structure": structure}
  tx = js.get_algorithm(name)(**arguments, distribution=js.Uniform()).wrap_optax(optax.sgd(0.1))
  params = laws.make_params(BF16)
  with strict():
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(BF16)}
