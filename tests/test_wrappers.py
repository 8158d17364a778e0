"""jaxsparse inside and around other Optax transformations, vmap, and devices."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import _zero_map
from jaxsparse import _hold
from jaxsparse import _tree

SWAPS = dict(every=2, start=1, stop=11)
RAMP = dict(every=2, start=1, stop=10)


def make_program(tx, updater, **extra):
  """(parameters, state), batches -> the same after as many updates."""

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(lambda p: laws.loss_fn(updater.forward_params(p, state), batch))(params)
    updates, state = tx.update(grads, state, params, **extra)
    return (optax.apply_updates(params, updates), state), None

  return jax.jit(lambda c, b: jax.lax.scan(step, c, b)[0])


def train(tx, updater, params, steps=6, **extra):
  """Parameters and state after some steps, in one program."""
  state = tx.init(params)
  params = updater.sparse_params(params, state) if updater.forward.storage == "hard" else params
  return make_program(tx, updater, **extra)((params, state), laws.make_batches(steps))


def assert_same(a, b, what=""):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), what), a, b)


def kernels(tree):
  return {k: np.asarray(p["kernel"]) for k, p in tree.items()}


def assert_masked(params, masks):
  for k, mask in kernels(masks).items():
    assert not mask.all() and (kernels(params)[k][~mask] == 0).all(), k


# -- bit for bit the inner optimizer -------------------------------------------------------------------------------------

NOTHING = (
  js.no_prune(),
  js.magnitude(sparsity=0.0, **RAMP),
  js.rigl(sparsity=0.0, **SWAPS),
  js.sr_ste(sparsity=0.0),
)
NOTHING_YET = (
  js.global_magnitude(sparsity=0.9, every=5, start=10, stop=30),
  js.magnitude(sparsity=0.9, every=5, start=10, stop=30),
  js.magnitude_ste(sparsity=0.9, start=10),
  js.acdc(sparsity=0.9, sparse_steps=5, dense_steps=5, start=10, stop=30),
)


@functools.cache
def plain_run(optimizer, steps=6):
  inner = laws.OPTIMIZERS[optimizer]()
  params = laws.make_params()

  def step(carry, batch):
    params, state = carry
    updates, state = inner.update(jax.grad(laws.loss_fn)(params, batch), state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = (params, inner.init(params))
  return jax.jit(lambda c, b: jax.lax.scan(step, c, b)[0])(carry, laws.make_batches(steps))


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "adafactor_full"])
@pytest.mark.parametrize("updater", NOTHING, ids=lambda u: repr(u)[:30])
def test_sparsity_zero_is_the_inner_optimizer(updater, optimizer):
  inner = laws.OPTIMIZERS[optimizer]()
  params, state = plain_run(optimizer)
  got, got_state = train(updater.wrap_optax(inner), updater, laws.make_params())
  assert_same(got, params, "parameters")
  assert_same(got_state.inner_state, state, "the inner optimizer's state")


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@pytest.mark.parametrize("updater", NOTHING_YET, ids=lambda u: repr(u)[:30])
def test_before_the_first_refresh_is_the_inner_optimizer(updater, optimizer):
  """Masks of ones change no bit. Compiled, XLA may contract multiply-adds differently around them: to an ulp then."""
  inner = laws.OPTIMIZERS[optimizer]()
  tx = updater.wrap_optax(inner)
  params = want = laws.make_params()
  state, want_state = tx.init(params), inner.init(params)
  batch = jax.tree.map(lambda a: a[0], laws.make_batches())
  with jax.disable_jit():
    for _ in range(3):
      grads = jax.grad(laws.loss_fn)(want, batch)
      updates, state = tx.update(grads, state, params)
      plain, want_state = inner.update(grads, want_state, want)
      params, want = optax.apply_updates(params, updates), optax.apply_updates(want, plain)
      assert_same(params, want, "parameters")
      assert_same(state.inner_state, want_state, "the inner optimizer's state")


# -- wrappers around -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rigl", "sr_ste", "magnitude"])
def test_multi_steps(name):
  """Two gradients a step: the result is that of the averaged gradient, and between steps nothing moves."""
  updater = js.get_algorithm(name)(sparsity=0.8, **SWAPS)
  tx = optax.MultiSteps(updater.wrap_optax(optax.adam(0.01)), every_k_schedule=2)
  params = laws.make_params()
  grads = [jax.grad(laws.loss_fn)(params, jax.tree.map(lambda a: a[i], laws.make_batches(8))) for i in range(8)]
  state = tx.init(params)
  single = updater.wrap_optax(optax.adam(0.01))
  single_state, want = single.init(params), updater.sparse_params(params, state)
  got = want
  update, apply, single_update = jax.jit(tx.update), jax.jit(optax.apply_updates), jax.jit(single.update)
  for i in range(0, 8, 2):
    for g in grads[i : i + 2]:
      before, masks = got, js.get_masks(state)
      updates, state = update(g, state, got)
      got = apply(got, updates)
      if g is grads[i]:
        assert_same(got, before, "moved between steps")
        assert_same(js.get_masks(state), masks, "masks moved between steps")
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads[i : i + 2])
    updates, single_state = single_update(mean, single_state, want)
    want = apply(want, updates)
  assert_same(js.get_masks(state), js.get_masks(single_state))
  assert int(js.get_sparsity_state(state).count) == 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
  if updater.forward.storage == "hard":
    assert_masked(got, js.get_masks(state))


@pytest.mark.parametrize("name", ["rigl", "snfs", "magnitude", "magnitude_ste"])
def test_rejected_step_rejects_its_mask_change(name):
  when = {"schedule": js.schedules.OneShot(1)} if name == "magnitude" else SWAPS
  updater = js.get_algorithm(name)(sparsity=0.8, **when)
  tx = optax.apply_if_finite(updater.wrap_optax(optax.adam(0.01)), max_consecutive_errors=5)
  params = laws.make_params()
  state = tx.init(params)
  params = updater.sparse_params(params, state)
  grad = jax.grad(laws.loss_fn)
  update = jax.jit(tx.update)
  batches = laws.make_batches(8)
  step = lambda params, state, g: (lambda u, s: (optax.apply_updates(params, u), s))(*update(g, state, params))
  grads = [grad(params, jax.tree.map(lambda a: a[i], batches)) for i in range(4)]
  params, state = step(params, state, grads[0])
  assert updater.due(js.get_sparsity_state(state)), "the next update refreshes the masks"
  bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads[1])
  after, rejected = step(params, state, bad)
  assert_same(after, params, "parameters moved in a rejected step")
  assert_same(js.get_sparsity_state(rejected), js.get_sparsity_state(state), "the state moved in a rejected step")
  good = step(params, state, grads[2])
  late = step(after, rejected, grads[2])
  assert_same(late[0], good[0])
  assert_same(js.get_masks(late[1]), js.get_masks(good[1]))
  changed = any((kernels(js.get_masks(late[1]))[k] != m).any() for k, m in kernels(js.get_masks(state)).items())
  assert changed, "the accepted step refreshes"


@functools.cache
def without_injection(updater):
  return train(updater.wrap_optax(optax.sgd(0.01, momentum=0.9)), updater, laws.make_params())


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_inject_hyperparams(where):
  updater = js.rigl(sparsity=0.8, **SWAPS)
  if where == "inside":
    make = lambda lr: updater.wrap_optax(optax.inject_hyperparams(optax.sgd)(learning_rate=lr, momentum=0.9))
  else:
    make = optax.inject_hyperparams(lambda learning_rate: updater.wrap_optax(optax.sgd(learning_rate, momentum=0.9)))
  params, state = train(make(0.01), updater, laws.make_params())
  want, want_state = without_injection(updater)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, want)
  assert_same(js.get_masks(state), js.get_masks(want_state))
  assert_masked(params, js.get_masks(state))
  state = optax.tree.set(state, learning_rate=jnp.float32(0.0))
  frozen = jax.jit(make(0.01).update)(params, state, params)
  assert_same(optax.apply_updates(params, frozen[0]), params, "learning rate 0 must not move anything")


@pytest.mark.parametrize("schedule", [False, True])
def test_inject_hyperparams_of_the_chain(schedule):
  """Clipping outside the wrapper and a scheduled learning rate inside: masked weights stay zero."""
  updater = js.magnitude(sparsity=0.8, **RAMP)
  lr = optax.cosine_decay_schedule(0.01, 10) if schedule else 0.01
  tx = optax.chain(optax.clip_by_global_norm(0.1), updater.wrap_optax(optax.inject_hyperparams(optax.adamw)(lr)))
  params, state = train(tx, updater, laws.make_params(), steps=10)
  assert_masked(params, js.get_masks(state))


def test_extra_arguments_reach_the_inner_optimizer():
  updater = js.rigl(sparsity=0.8, **SWAPS)
  tx = updater.wrap_optax(optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau(patience=1, cooldown=0)))
  params, state = train(tx, updater, laws.make_params(), value=jnp.float32(1.0))
  assert_masked(params, js.get_masks(state))
  assert float(optax.tree.get(state, "scale")) < 1, "the plateau was never seen: value= did not arrive"
  with pytest.raises(TypeError, match="value"):
    tx.update(params, tx.init(params), params)


def test_masked_around():
  """A leaf that an outer optax.masked takes away is neither masked nor an error."""
  updater = js.magnitude(sparsity=0.8, schedule=js.schedules.OneShot(1))
  which = {"a": {"kernel": True, "bias": True}, "b": {"kernel": False, "bias": False}}
  tx = optax.chain(optax.masked(updater.wrap_optax(optax.sgd(0.1)), which), optax.identity())
  params = laws.make_params()
  state = tx.init(params)
  step = jax.jit(lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(p, s, p)))
  for _ in range(3):
    params, state = step(params, state)
  masks = js.get_masks(state)
  assert isinstance(masks["b"]["kernel"], optax.MaskedNode)
  assert masks["a"]["kernel"].sum() == 512 - int(512 * 0.8)
  assert (np.asarray(params["a"]["kernel"])[~masks["a"]["kernel"]] == 0).all()


MIXING = optax.chain(optax.centralize(), optax.trace(0.9))  # a zero gradient becomes minus the mean of its column


@pytest.mark.parametrize(
  "optimizer,once",
  [(o, o not in ("adafactor", "adafactor_full")) for o in laws.OPTIMIZERS] + [("mixing", False)],
)
def test_state_is_cleaned_twice_only_where_needed(optimizer, once):
  """The trial runs while tracing: it must come to a verdict there, and the right one."""
  inner = MIXING if optimizer == "mixing" else laws.OPTIMIZERS[optimizer]()
  verdict = []

  def step(params):
    leaves = _tree.flatten(params)
    verdict.append(_zero_map.ZeroMap().keeps_zeros(optax.with_extra_args_support(inner), leaves))
    return params

  params = {k: {"kernel": p["kernel"]} for k, p in laws.make_params().items()}
  if optimizer in ("masked", "partition"):
    params = laws.make_params()
  jax.eval_shape(step, params)
  assert verdict == [once]


def test_state_that_mixes_entries_is_clean():
  updater = js.magnitude(sparsity=0.8, schedule=js.schedules.OneShot(1))
  tx = updater.wrap_optax(optax.chain(MIXING, optax.scale(-0.01)))
  kernels_only = {k: {"kernel": p["kernel"]} for k, p in laws.make_params().items()}
  state = tx.init(kernels_only)
  params, update = kernels_only, jax.jit(tx.update)
  for _ in range(4):
    updates, state = update(kernels_only, state, params)
    params = optax.apply_updates(params, updates)
  assert_masked(params, js.get_masks(state))
  assert_masked(optax.tree.get(state, "trace"), js.get_masks(state))


def test_held_step_of_one_value_in_two_slots():
  """An optimizer may return one traced value in two places of its state, whose old values differ."""

  def update(grads, state, params=None):
    moved = jax.tree.map(lambda g, m: g + 0.9 * m, grads, state["trace"])
    return jax.tree.map(jnp.negative, moved), {"trace": moved, "last": moved, "steps": state["steps"] + 1}

  inner = optax.with_extra_args_support(optax.GradientTransformation(lambda p: None, update))
  state = {"trace": {"w": jnp.arange(3.0)}, "last": {"w": jnp.full(3, 7.0)}, "steps": jnp.int32(4)}
  grads = {"w": jnp.ones(3)}
  step = jax.jit(lambda hold: _hold.update_unless(hold, inner, grads, state, grads, {}))
  assert_same(step(True), ({"w": jnp.zeros(3)}, state))
  assert_same(step(False), update(grads, state))


# -- several updaters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["of branches", "of leaves"])
def test_updaters_over_different_leaves_are_merged(labels):
  first, second = js.magnitude(sparsity=0.5, schedule=js.schedules.OneShot(0)), js.static_sparse(sparsity=0.75)
  tx = optax.partition(
    {"x": first.wrap_optax(optax.sgd(0.1), tag="x"), "y": second.wrap_optax(optax.adam(0.1), tag="y")},
    {"a": "x", "b": "y"}
    if labels == "of branches"
    else {k: dict.fromkeys(("kernel", "bias"), v) for k, v in (("a", "x"), ("b", "y"))},
  )
  params = laws.make_params()
  state = tx.init(params)
  updates, state = jax.jit(tx.update)(params, state, params)
  masks = js.get_masks(state)
  assert (int(masks["a"]["kernel"].sum()), int(masks["b"]["kernel"].sum())) == (256, 64)
  assert len(jax.tree.leaves(js.get_masks(state, tag="x"))) == 1
  assert_same(js.get_masks(state, tag="y")["b"]["kernel"], masks["b"]["kernel"])
  pruned = first.sparse_params(params, js.get_sparsity_state(state, tag="x"))
  assert int((pruned["a"]["kernel"] != 0).sum()) == 256 and pruned["b"]["kernel"] is params["b"]["kernel"]
  assert "y" in js.get_sparsity_state(state, tag="y").tag
  with pytest.raises(ValueError, match="name one with tag="):
    js.get_sparsity_state(state)
  with pytest.raises(ValueError, match="No updater has the tag 'z'"):
    js.get_masks(state, tag="z")


def test_what_is_no_optimizer_state_or_key_is_an_error():
  updater, params = js.static_sparse(sparsity=0.5), laws.make_params()
  tx = updater.wrap_optax(optax.sgd(0.1))
  for state in (None, optax.adam(1e-3).init(params)):
    with pytest.raises(ValueError, match=f"what this optimizer's tx.init.*got {type(state).__name__}"):
      tx.update(params, state, params)
    with pytest.raises(ValueError, match="what this optimizer's tx.init"):
      updater.transform().update(params, state, params)
  with pytest.raises(TypeError, match=r"such as optax.adam\(1e-3\), got .* Call it: adam"):
    updater.wrap_optax(optax.adam)
  with pytest.raises(TypeError, match=r"such as optax.adam\(1e-3\), got 0.001"):
    updater.wrap_optax(1e-3)
  with pytest.raises(TypeError, match="key must be an integer.*got 0.5"):
    updater.wrap_optax(optax.sgd(0.1), key=0.5).init(params)
  with pytest.raises(TypeError, match="pass js.get_masks"):
    js.summarize_sparsity((tx.init(params),))
  masks = js.get_masks(tx.init(params))
  with pytest.raises(ValueError, match=r"Only in masks: nothing; only in the optimizer state: a/"):
    js.set_masks(tx.init(params), {name: mask for name, mask in masks.items() if name != "a"})


def test_overlapping_updaters_are_an_error():
  one, two = js.static_sparse(sparsity=0.5), js.static_sparse(sparsity=0.75)
  tx = optax.chain(one.wrap_optax(optax.sgd(0.1), tag="one"), two.transform(tag="two"))
  state = tx.init(laws.make_params())
  with pytest.raises(ValueError, match=r"Two updaters mask params\['a'\]\['kernel'\] \(shape"):
    js.get_masks(state)
  assert int(js.get_masks(state, tag="two")["a"]["kernel"].sum()) < int(
    js.get_masks(state, tag="one")["a"]["kernel"].sum()
  )


def test_no_updater_at_all():
  with pytest.raises(ValueError, match="no SparsityState"):
    js.get_masks(optax.adam(0.1).init(laws.make_params()))


# -- the chainable form ---------------------------------------------------------------------------------------------------


def test_transform_goes_last_and_fails_first():
  updater = js.magnitude(sparsity=0.8, schedule=js.schedules.OneShot(3))
  momentum = lambda: optax.sgd(0.05, momentum=0.9)
  last = optax.chain(momentum(), updater.transform())
  params, state = train(last, updater, laws.make_params(), steps=8)
  assert_masked(params, js.get_masks(state))
  first = optax.chain(updater.transform(), momentum())
  params, state = train(first, updater, laws.make_params(), steps=8)
  off = [kernels(params)[k][~m] for k, m in kernels(js.get_masks(state)).items()]
  assert all((w != 0).any() for w in off), "first-in-chain has become exact: say so in the README"


def test_transform_needs_gradients_for_gradient_scores():
  updater = js.rigl(sparsity=0.8, **SWAPS)
  tx = optax.chain(optax.sgd(0.05, momentum=0.9), updater.transform())
  params = laws.make_params()
  state = tx.init(params)
  with pytest.raises(ValueError, match="grads=grads"):
    tx.update(params, state, params)
  params = updater.sparse_params(params, state)

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(laws.loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params, grads=grads)
    return optax.apply_updates(params, updates), state

  first = kernels(js.get_masks(state))
  for i in range(6):
    params, state = step(params, state, jax.tree.map(lambda a: a[i], laws.make_batches()))
  assert_masked(params, js.get_masks(state))
  assert all((first[k] != m).any() and first[k].sum() == m.sum() for k, m in kernels(js.get_masks(state)).items())


# -- keys, vmap, devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set", "random_ste", "random", "static_sparse"])
def test_key_decides_the_masks(name):
  updater = js.get_algorithm(name)(sparsity=0.8, **({} if name == "static_sparse" else SWAPS))
  program = make_program(updater.wrap_optax(optax.sgd(0.1)), updater)

  def masks(key):
    params = laws.make_params()
    state = updater.wrap_optax(optax.sgd(0.1), key=key).init(params)
    return kernels(js.get_masks(program((updater.sparse_params(params, state), state), laws.make_batches(4))[1]))

  same, again, other = masks(7), masks(jax.random.key(7)), masks(8)
  for k in same:
    np.testing.assert_array_equal(same[k], again[k])
    assert (same[k] != other[k]).any() and same[k].sum() == other[k].sum()


def test_random_masks_are_redrawn_and_differ_between_leaves():
  updater = js.random_ste(sparsity=0.5)
  params = {"x": jnp.ones((16, 16)), "y": jnp.ones((16, 16))}
  tx = updater.wrap_optax(optax.sgd(0.0))
  state, seen = tx.init(params), []
  update = jax.jit(tx.update)
  for _ in range(3):
    _, state = update(params, state, params)
    seen += [js.get_masks(state)["x"], js.get_masks(state)["y"]]
  for i, a in enumerate(seen):
    for b in seen[:i]:
      assert 64 < int((a != b).sum()) < 192, "masks of independent draws differ in about half of 256 entries"


@pytest.mark.parametrize("name", ["rigl", "sr_ste"])
def test_vmap_over_seeds(name):
  updater = js.get_algorithm(name)(sparsity=0.8, **SWAPS)

  def run(key):
    tx = updater.wrap_optax(optax.sgd(0.05, momentum=0.9), key=key)
    params = jax.tree.map(lambda p: p + 0.01 * jax.random.normal(key, p.shape), laws.make_params())
    state = tx.init(params)
    params = updater.sparse_params(params, state) if updater.forward.storage == "hard" else params

    def step(carry, batch):
      params, state = carry
      grads = jax.grad(lambda p: laws.loss_fn(updater.forward_params(p, state), batch))(params)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), laws.make_batches(6))
    return params, js.get_masks(state)

  keys = jax.random.split(jax.random.key(0), 3)
  params, masks = jax.jit(jax.vmap(run))(keys)
  one = jax.jit(run)
  for i in range(3):
    want_params, want_masks = one(keys[i])
    assert_same(jax.tree.map(lambda m: m[i], masks), want_masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=1e-5), params, want_params)
  assert (np.asarray(masks["a"]["kernel"][0]) != masks["a"]["kernel"][1]).any()


def test_vmap_over_seeds_draws_masks_of_their_own():
  """The keys alone make the difference here: parameters are the same."""
  updater = js.random_ste(sparsity=0.8)

  def run(key):
    tx = updater.wrap_optax(optax.sgd(0.1), key=key)
    params = laws.make_params()
    first = tx.init(params)
    return js.get_masks(first), js.get_masks(tx.update(params, first, params)[1])

  masks = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
  assert all((m[0] != m[1]).any() and m[0].sum() == m[1].sum() for m in jax.tree.leaves(masks))


@pytest.mark.parametrize("name", ["rigl", "magnitude", "sr_ste"])
def test_vmap_over_members_that_are_not_in_step(name):
  """Only some of them refresh: `due` differs in a batch, and each does what it does alone."""
  updater = js.get_algorithm(name)(sparsity=0.8, every=2, start=1, stop=8)
  tx = updater.wrap_optax(optax.sgd(0.05, momentum=0.9))
  params = laws.make_params()
  member = lambda c: tx.init(params)._replace(count=c)
  counts = jnp.arange(4)
  update = lambda state: tx.update(params, state, params)
  together = jax.jit(jax.vmap(update))(jax.vmap(member)(counts))
  alone = jax.jit(update)
  for i in range(4):
    updates, state = alone(member(counts[i]))
    assert_same(jax.tree.map(lambda m: m[i], js.get_masks(together[1])), js.get_masks(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), together[0], updates)


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jaxsparse as js, laws
assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
put = lambda tree: jax.tree.map(
  lambda a: jax.device_put(a, NamedSharding(mesh, P("x", "y") if a.ndim == 2 else P())), tree)
shapes = {"a": (16, 32), "b": (32, 8)}
for name, more in (("rigl", {}), ("sr_ste", {"structure": js.NM(2, 4)}), ("global_magnitude", {}), ("set", {"pack_masks": True}),
                   ("magnitude", {"structure": js.Block((2, 2))})):
  arguments = dict(laws.EXPECTED[name].arguments, **more)
  if isinstance(more.get("structure"), js.NM):
    arguments["sparsity"] = None
  updater = js.get_algorithm(name)(**arguments)
  tx = updater.wrap_optax(optax.sgd(0.05, momentum=0.9))
  step = laws.make_step(updater, tx)
  run = jax.jit(lambda c, b: jax.lax.scan(step, c, b))
  params = laws.make_params()
  state = tx.init(params)
  params = updater.sparse_params(params, state)
  (plain, _), (_, _, plain_masks) = run((params, state), laws.make_batches(8))
  sharded = put(params)
  state = jax.jit(tx.init)(sharded)
  (got, state), (_, _, masks) = run((sharded, state), laws.make_batches(8))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), masks, plain_masks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, plain)
  for node in jax.tree.leaves(js.get_sparsity_state(state).masks):
    assert not node.sharding.is_fully_replicated, f"{name}: masks are gathered"
  for k, m in js.get_masks(state).items():
    if updater.forward.storage == "hard":
      assert (np.asarray(got[k]["kernel"])[~np.asarray(m["kernel"])] == 0).all()
# Packed rows are whole: bits of neighbouring columns lie in different bytes.
for packed, spec in ((False, P("x", "y")), (True, P(("x", "y")))):
  tx = js.rigl(sparsity=0.9, stop=100, pack_masks=packed).wrap_optax(optax.adam(0.1))
  place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec if a.ndim == 2 else P()))
  params = {"w": place(jax.ShapeDtypeStruct((4096, 8192), jnp.float32))}
  state = jax.tree.map(place, jax.eval_shape(tx.init, params))
  text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
  for line in text.splitlines():  # nothing as large as a shard may travel
    found = re.search(r"= .*?\\[([\\d,]*)\\].* (all-gather|all-to-all|collective-permute|all-reduce)\\(", line)
    size = np.prod([int(n) for n in found[1].split(",") if n] or [1]) if found else 0
    assert size <= 1 << 17, line
print("sharded ok")
"""


def test_sharded_equals_unsharded():
  here = pathlib.Path(__file__).parent
  env = dict(
    os.environ,
    XLA_FLAGS=os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    JAX_PLATFORMS="cpu",
    PYTHONPATH=os.pathsep.join([str(here.parent), str(here)]),
  )
  done = subprocess.run([sys.executable, "-W", "error", "-c", SHARDED], env=env, capture_output=True, text=True)
  assert done.returncode == 0 and "sharded ok" in done.stdout, done.stdout + done.stderr[-3000:]
