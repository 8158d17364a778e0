"""Models with sparse kernels: nnx.Linear converted in place, SparseDense for linen."""

from flax import linen
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
import jaxsparse.nn as jsnn

UPDATER = js.magnitude(structure=js.NM(2, 4), schedule=js.schedules.OneShot(at=0))
X = jax.random.normal(jax.random.key(0), (5, 8))


class Net(nnx.Module):
  def __init__(self, rngs, **kwargs):
    self.embed = nnx.Embed(16, 8, rngs=rngs)
    self.up = nnx.Linear(8, 16, rngs=rngs, **kwargs)
    self.blocks = nnx.List([nnx.Linear(16, 8, use_bias=False, rngs=rngs, **kwargs)])
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, 10, rngs=rngs, **kwargs)

  def __call__(self, x):
    return self.head(self.norm(self.blocks[0](nnx.relu(self.up(x)))))


def pruned_net(**kwargs):
  model = Net(nnx.Rngs(0), **kwargs)
  model.eval()
  pruned, masks = UPDATER.instant_sparsify(nnx.state(model, nnx.Param))
  nnx.update(model, pruned)
  return model, masks


def test_nnx_in_place():
  model, masks = pruned_net()
  want = model(X)
  layer = model.up
  report = jsnn.compress_linears(model, masks, structure=js.NM(2, 4))
  assert model.up is layer and isinstance(model.up.kernel[...], js.NMArray)
  found = {leaf.name: leaf for leaf in report.leaves}
  assert {name for name, leaf in found.items() if leaf.pattern} == {"up/kernel", "blocks/0/kernel", "head/kernel"}
  assert found["embed/embedding"].reason == "it is no kernel of an nnx.Linear."
  assert found["norm/scale"].reason == found["up/bias"].reason == "it has no mask."
  assert not isinstance(model.embed.embedding[...], js.NMArray)
  np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, X), want, rtol=1e-5, atol=1e-6)
  graph, state = nnx.split(model)
  np.testing.assert_allclose(nnx.merge(graph, state)(X), want, rtol=1e-5, atol=1e-6)
  with pytest.raises(TypeError, match="cannot be indexed"):
    model.up.kernel[0]


def test_nnx_from_zeros_and_rules():
  """Without masks zeros count; a layer that does not fit stays as it was."""
  model, _ = pruned_net()
  model.head.kernel[...] = jnp.ones((8, 10))
  head = model.head.kernel
  report = jsnn.compress_linears(model)
  assert model.head.kernel is head and model.head.dot_general is jax.lax.dot_general
  assert [leaf.pattern for leaf in report.leaves if leaf.name == "up/kernel"] == ["2:4"]
  assert "none of" in next(leaf.reason for leaf in report.leaves if leaf.name == "head/kernel")
  assert model(X).shape == (5, 10)


def test_nnx_dtypes():
  model, masks = pruned_net(dtype=jnp.bfloat16)
  want = model(X)
  jsnn.compress_linears(model, masks, dtype=jnp.bfloat16)
  assert model.up.kernel[...].dtype == jnp.bfloat16 and model(X).dtype == want.dtype
  np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (model(X), want)), rtol=0.05, atol=0.02)
  model, masks = pruned_net()
  want = model(X)
  jsnn.compress_linears(model, masks, implementation="reference")
  model.up.kernel = jsnn.SparseParam(js.quant.quantize(model.up.kernel[...], 8, 8))
  assert model(X).dtype == jnp.float32
  np.testing.assert_allclose(model(X), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", ["auto", "hopper", "decode"])
def test_nnx_packed(layout):
  """Packed layers compute in the dtype of the packed weight, whatever comes in."""
  model, masks = pruned_net()
  want = model(X)
  jsnn.compress_linears(model, masks, dtype=jnp.bfloat16, layout=layout)
  assert not isinstance(model.up.kernel[...], js.NMArray)
  y = nnx.jit(lambda m, x: m(x))(model, X)
  np.testing.assert_allclose(np.asarray(y, np.float32), want, rtol=0.05, atol=0.05)


def test_nnx_errors():
  model, masks = pruned_net()
  with pytest.raises(ValueError, match="no nnx.Linear"):
    jsnn.compress_linears(nnx.Embed(4, 4, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="different trees"):
    jsnn.compress_linears(model, {"w": jnp.ones((4, 4), bool)})
  with pytest.raises(ValueError, match=r"params\['blocks'\]\[0\]\['kernel'\].*the mask is not 1:4"):
    jsnn.compress_linears(model, masks, structure=js.NM(1, 4), on_mismatch="error")
  jsnn.compress_linears(model, masks)
  own = nnx.Linear(4, 4, rngs=nnx.Rngs(0), dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs))
  with pytest.raises(ValueError, match="dot_general of its own"):
    jsnn.compress_linears(own)
  with pytest.raises(ValueError, match="asks for another product"):
    jsnn.nm_dot_general(X, model.up.kernel[...], (((0,), (0,)), ((), ())))


def test_nnx_fine_tuning():
  """Kept values and biases train, through split and merge; positions do not."""
  model, masks = pruned_net()
  jsnn.compress_linears(model, masks)
  before = model.up.kernel[...]
  labels = jnp.arange(5)
  graph, weights, rest = nnx.split(model, nnx.Param, ...)
  trainable, fixed = js.arrays.partition(weights)
  tx = optax.adam(1e-2)
  state = tx.init(trainable)

  @jax.jit
  def step(trainable, state):
    def loss(trainable):
      net = nnx.merge(graph, js.arrays.combine(trainable, fixed), rest, copy=True)
      return optax.softmax_cross_entropy_with_integer_labels(net(X), labels).mean()

    value, grads = jax.value_and_grad(loss)(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value

  values = []
  for _ in range(10):
    trainable, state, value = step(trainable, state)
    values.append(float(value))
  assert values[-1] < values[0]
  nnx.update(model, js.arrays.combine(trainable, fixed))
  after = model.up.kernel[...]
  assert (after.indices == before.indices).all() and (after.values != before.values).any()


@pytest.mark.parametrize("n,m", [(2, 4), (1, 8)])
def test_linen_layer(n, m):
  layer = jsnn.SparseDense(6, n=n, m=m, activation="silu")
  variables = layer.init(jax.random.key(0), X)
  shape = (8 // m, n, 6)
  assert variables["params"]["values"].shape == variables["sparse"]["indices"].shape == shape
  w = js.NMArray(variables["params"]["values"], variables["sparse"]["indices"], n=n, m=m)  # holds the invariants
  y = layer.apply(variables, X)
  np.testing.assert_allclose(y, jax.nn.silu(X @ w.to_dense()), rtol=1e-5, atol=1e-6)
  grads = jax.grad(lambda p: layer.apply({"params": p, "sparse": variables["sparse"]}, X).sum())(variables["params"])
  assert grads["values"].shape == shape and bool((grads["bias"] != 0).any())
  with pytest.raises(ValueError, match=f"{n}:{m} needs inputs divisible by {m}, got 6"):
    layer.init(jax.random.key(0), X[:, :6])


def test_linen_initialisation_has_the_variance_of_dense():
  x = jax.random.normal(jax.random.key(1), (64, 256))
  sparse = jsnn.SparseDense(128).init_with_output(jax.random.key(0), x)[0]
  assert 0.9 < float(sparse.std()) < 1.1


def test_linen_from_a_trained_model():
  dense = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(4, use_bias=False)])
  sparse = linen.Sequential([jsnn.SparseDense(8), linen.relu, jsnn.SparseDense(4, use_bias=False)])
  pruned, masks = UPDATER.instant_sparsify(dense.init(jax.random.key(0), X)["params"])
  variables = jsnn.linen_variables(js.compress(pruned, masks))
  made = jax.eval_shape(lambda: sparse.init(jax.random.key(0), X))
  assert jax.tree.structure(variables) == jax.tree.structure(dict(made))
  np.testing.assert_allclose(sparse.apply(variables, X), dense.apply({"params": pruned}, X), rtol=1e-5, atol=1e-6)
  packed = {"layers_0": {"kernel": js.quant.quantize(js.compress(pruned, masks)["layers_0"]["kernel"], 8, 8)}}
  with pytest.raises(TypeError, match="layers_0/kernel is NMArray.*floating-point NMArray"):
    jsnn.linen_variables(packed)
