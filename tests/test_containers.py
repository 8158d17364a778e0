"""Parameters in every kind of container: plain trees, dataclasses, Flax linen and Flax NNX."""

from typing import NamedTuple

import chex
import flax.linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import jaxsparse as js

SWAPS = dict(every=2, start=1, stop=11)


class Pair(NamedTuple):
  first: jax.Array
  second: jax.Array


@chex.dataclass(frozen=True)
class Node:
  first: jax.Array
  second: jax.Array


A, B = (jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in ((8, 16), (16, 4)))
CONTAINERS = {
  "dict": {"first": A, "second": B},
  "list": [A, B],
  "tuple": (A, (B,)),
  "namedtuple": Pair(A, B),
  "dataclass": Node(first=A, second=B),
  "none": {"first": A, "nothing": None, "second": B},
  "array": A,
}


@pytest.mark.parametrize("name", ["rigl", "sr_ste"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(kind, name):
  params = CONTAINERS[kind]
  updater = js.get_algorithm(name)(sparsity=0.75, **SWAPS)
  tx = updater.wrap_optax(optax.adam(0.01))
  state = tx.init(params)
  params = updater.sparse_params(params, state)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: sum(jnp.sum((w - 1) ** 2) for w in jax.tree.leaves(updater.forward_params(p, state))))(
      params
    )
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(4):
    params, state = step(params, state)
  masks = js.get_masks(state)
  assert jax.tree.structure(masks) == jax.tree.structure(params) == jax.tree.structure(CONTAINERS[kind])
  leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True))
  assert sum(int(m.sum()) for _, m in leaves) == sum(m.size for _, m in leaves) // 4
  for w, m in leaves:
    assert (w[m] != 0).any() and ((w[~m] == 0).all() or name == "sr_ste")
  assert step._cache_size() == 1


class Linen(nn.Module):
  boxed: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    init = nn.with_partitioning(init, (None, "model")) if self.boxed else init
    x = jnp.tanh(nn.Dense(16, kernel_init=init)(x))
    return nn.Dense(8, kernel_init=init)(nn.LayerNorm()(x))


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("name", ["rigl", "sr_ste", "global_magnitude"])
def test_linen(name, boxed):
  model = Linen(boxed)
  x, y = (a[0] for a in laws.make_batches())
  params = model.init(jax.random.key(0), x)
  updater = js.get_algorithm(name)(sparsity=0.75, every=2, start=0, stop=6)
  tx = updater.wrap_optax(optax.adam(0.01))
  state = tx.init(params)
  params = updater.sparse_params(params, state)

  @jax.jit
  def step(params, state):
    loss = lambda p: jnp.mean((model.apply(updater.forward_params(p, state), x) - y) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  losses = []
  for _ in range(6):
    params, state, loss = step(params, state)
    losses.append(float(loss))
  assert losses[-1] < losses[0] and step._cache_size() == 1
  masks, plain = js.get_masks(state), nn.meta.unbox(params)
  bools = jax.tree.leaves(masks)
  assert [m.shape for m in bools] == [(16, 16), (16, 8)], "kernels are masked, biases and scales are not"
  assert sum(int(m.sum()) for m in bools) == 384 // 4
  if name != "sr_ste":
    kernels = [plain["params"][f"Dense_{i}"]["kernel"] for i in range(2)]
    assert all((np.asarray(k)[~np.asarray(m)] == 0).all() for k, m in zip(kernels, bools))
  if boxed:
    assert isinstance(params["params"]["Dense_0"]["kernel"], nn.Partitioned), "the boxes are kept"


class Net(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(16, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.out = nnx.Linear(16, 8, rngs=rngs)

  def __call__(self, x):
    return self.out(jnp.tanh(self.norm(self.hidden(x))))


@pytest.mark.parametrize("name", ["rigl", "sr_ste", "magnitude"])
def test_nnx_optimizer(name):
  model = Net(nnx.Rngs(0))
  updater = js.get_algorithm(name)(sparsity=0.75, every=2, start=1, stop=8)
  optimizer = nnx.Optimizer(model, updater.wrap_optax(optax.adam(0.01)), wrt=nnx.Param)
  nnx.update(model, updater.sparse_params(nnx.state(model, nnx.Param), optimizer.opt_state))
  x, y = (a[0] for a in laws.make_batches())

  @nnx.jit
  def step(model, optimizer):
    def loss_fn(model):
      graph, params, rest = nnx.split(model, nnx.Param, ...)
      masked = nnx.merge(graph, updater.forward_params(params, optimizer.opt_state), rest)
      loss = jnp.mean((masked(x) - y) ** 2)
      nnx.update(model, nnx.state(masked, nnx.BatchStat))
      return loss

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss

  mean = np.asarray(model.norm.mean[...])
  losses = [float(step(model, optimizer)) for _ in range(8)]
  assert losses[-1] < losses[0]
  assert (mean != np.asarray(model.norm.mean[...])).any(), "batch statistics are updated"
  masks = js.get_masks(optimizer.opt_state)
  bools = jax.tree.leaves(masks)
  assert [(m.shape, m.dtype) for m in bools] == [((16, 16), bool), ((16, 8), bool)]
  assert sum(int(m.sum()) for m in bools) == 384 // 4
  for kernel, mask in ((model.hidden.kernel, bools[0]), (model.out.kernel, bools[1])):
    off = np.asarray(kernel[...])[~np.asarray(mask)]
    assert (off != 0).any() if name == "sr_ste" else (off == 0).all()
  final, _ = updater.export(nnx.state(model, nnx.Param), optimizer.opt_state)
  for kernel, mask in zip((final["hidden"]["kernel"], final["out"]["kernel"]), bools):
    assert (np.asarray(kernel[...])[~np.asarray(mask)] == 0).all()


def test_nnx_variables_do_not_come_out():
  """What is read from the optimizer state is arrays, as the docstrings say, whatever nnx puts around them."""
  model = Net(nnx.Rngs(0))
  updater = js.rigl(sparsity=0.75, every=2, start=1, stop=8)
  optimizer = nnx.Optimizer(model, updater.wrap_optax(optax.adam(0.01)), wrt=nnx.Param)
  masks = js.get_masks(optimizer.opt_state)
  assert isinstance(masks["hidden"]["kernel"], jax.Array) and isinstance(masks["hidden"]["bias"], optax.MaskedNode)
  state = js.get_sparsity_state(optimizer.opt_state)
  assert isinstance(state.count, jax.Array) and isinstance(state.masks["out"]["kernel"], jax.Array)


@pytest.mark.parametrize("kind", ["plain", "linen", "nnx"])
def test_one_rule_fits_every_kind_of_model(kind):
  """The box that flax puts around an array is not part of the name."""
  plain = {"hidden": {"kernel": A, "bias": A[0]}, "out": {"kernel": B, "bias": B[0]}}
  box = {"plain": lambda a: a, "linen": lambda a: nn.Partitioned(a, (None,) * a.ndim), "nnx": nnx.Param}[kind]
  params = jax.tree.map(box, plain)
  params = nnx.State(params) if kind == "nnx" else params
  updater = js.magnitude(sparsity=0.5, stop=1, rules=js.Rules((r"out/kernel$", None), (r"^hidden/kernel$", 0.75)))
  masks = js.get_masks(updater.wrap_optax(optax.sgd(0.1)).init(params))
  assert [m.shape for m in jax.tree.leaves(masks)] == [A.shape]
  report = js.summarize_sparsity(updater.instant_sparsify(params)[1])
  assert {name: float(value) for name, value in report.items()} == {"hidden/kernel": 0.75, "_total_sparsity": 0.75}


def test_nnx_set_masks():
  model = Net(nnx.Rngs(0))
  updater = js.static_sparse(sparsity=0.5)
  optimizer = nnx.Optimizer(model, updater.wrap_optax(optax.sgd(0.1)), wrt=nnx.Param)
  first = js.get_masks(optimizer.opt_state)
  flipped = jax.tree.map(lambda m: ~m, first)
  changed = js.set_masks(optimizer.opt_state, flipped)
  jax.tree.map(np.testing.assert_array_equal, js.get_masks(changed), flipped)
  assert jax.tree.structure(changed) == jax.tree.structure(optimizer.opt_state), "the optimizer's variables are gone"
  optimizer.opt_state = changed
  nnx.update(model, updater.sparse_params(nnx.state(model, nnx.Param), optimizer.opt_state))

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((4, 16))).sum())(model))

  step(model, optimizer)
  jax.tree.map(np.testing.assert_array_equal, js.get_masks(optimizer.opt_state), flipped)
  for kernel, mask in zip((model.hidden.kernel, model.out.kernel), jax.tree.leaves(flipped)):
    assert (np.asarray(kernel[...])[~np.asarray(mask)] == 0).all()


def test_loss_scaling_does_not_scale_the_decay():
  """float16 with a loss scale of 1024: gradients are unscaled before tx.update, SR-STE's pull is lr * decay * w."""
  updater = js.sr_ste(structure=js.NM(2, 4), decay=0.25)
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float16)}
  tx = updater.wrap_optax(optax.sgd(0.5))
  state, start = tx.init(params), np.asarray(params["w"], np.float32)
  mask = np.asarray(js.get_masks(state)["w"])

  @jax.jit
  def step(params, state):
    loss = lambda p: 1024 * (updater.forward_params(p, state)["w"] * jnp.float16(0)).sum().astype(jnp.float32)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / 1024, jax.grad(loss)(params))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for t in range(1, 4):
    params, state = step(params, state)
    w = np.asarray(params["w"], np.float32)
    np.testing.assert_allclose(w[~mask], start[~mask] * 0.875**t, rtol=4e-3)
    np.testing.assert_array_equal(w[mask], start[mask])


def test_the_decay_does_not_pass_through_the_loss():
  """forward_params alone gives the data gradient: whatever scales the loss leaves the decay alone."""
  updater = js.sr_ste(sparsity=0.5, decay=100.0)
  params = {"w": A}
  state = updater.wrap_optax(optax.sgd(0.5)).init(params)
  grads = jax.grad(lambda p: (3.0 * updater.forward_params(p, state)["w"]).sum())(params)
  np.testing.assert_array_equal(grads["w"], np.full(A.shape, 3.0))


def test_first_step_of_a_regrown_weight_under_adam():
  """Fresh moments under an old count: (1 - b1) / sqrt(1 - b2) = 3.16 learning rates at most, then less."""
  updater = js.rigl(sparsity=0.5, every=5, start=2, stop=13, drop_fraction=0.5)
  tx = updater.wrap_optax(optax.adam(0.01))
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
  state = tx.init(params)
  params = updater.sparse_params(params, state)
  grad = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), jnp.float32)
  # As after 4000 updates with this gradient.
  settled = {"w": jnp.where(js.get_masks(state)["w"], grad, 0)}
  inner = state.inner_state[0]._replace(count=jnp.int32(4000), mu=settled, nu=jax.tree.map(jnp.square, settled))
  state = state._replace(inner_state=(inner, *state.inner_state[1:]))

  def step(carry, _):
    params, state = carry
    updates, state = tx.update({"w": grad}, state, params)
    return (optax.apply_updates(params, updates), state), (updates["w"], js.get_masks(state)["w"], params["w"])

  _, (updates, masks, weights) = jax.jit(lambda c: jax.lax.scan(step, c, length=4))((params, state))
  updates, masks, weights = (np.asarray(a) for a in (updates, masks, weights))
  grown = masks[2] & ~masks[1]
  assert grown.any() and (updates[2] == -weights[2] * ~masks[2]).all(), "RigL takes no step at a refresh"
  first = np.abs(updates[3][grown]) / 0.01
  assert 3.0 < first.max() <= 3.2, first
  steady = np.abs(updates[1][masks[1]]) / 0.01
  assert steady.max() < 1.01
