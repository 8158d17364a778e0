"""SLoRB and scales of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import nn


def layer(seed=0, inputs=16, outputs=8):
  rng = np.random.default_rng(seed)
  kernel = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
  return kernel, js.asp().instant_sparsify({"w": kernel})[1]["w"]


@pytest.mark.parametrize("block", [2, 4, 16])
def test_slorb_is_dense_on_inputs_constant_in_blocks(block):
  kernel, mask = layer()
  x = jnp.repeat(jnp.asarray(np.random.default_rng(1).normal(size=(5, 16 // block)), jnp.float32), block, axis=1)
  sparse = x @ jnp.where(mask, kernel, 0)
  np.testing.assert_allclose(sparse + nn.slorb(x, nn.init_slorb(kernel, mask, block)), x @ kernel, rtol=1e-5, atol=1e-5)
  too_large = nn.slorb(x, nn.init_slorb(kernel, mask, block, "sum"))
  np.testing.assert_allclose(too_large, block * (x @ kernel - sparse), rtol=1e-4, atol=1e-4)


def test_slorb_trains_beside_a_sparse_kernel():
  kernel, mask = layer()
  params = {"kernel": kernel, "slorb": nn.init_slorb(kernel, mask, 4)}
  updater = js.ast(structure=js.NM(2, 4), rules=js.Rules(("slorb", None)))
  tx = updater.wrap_optax(js.adamw_nm(0.01, masked_decay="l2", strength=1e-3))
  state, (x, y) = tx.init(params), (jnp.asarray(np.random.default_rng(2).normal(size=(2, 32, 16)), jnp.float32))

  def loss(params, state):
    p = updater.forward_params(params, state)
    return jnp.mean(jnp.square(x @ p["kernel"] + nn.slorb(x, p["slorb"]) - y[:, :8]))

  first = float(loss(params, state))
  for _ in range(20):
    updates, state = jax.jit(tx.update)(jax.grad(loss)(params, state), state, params)
    params = optax.apply_updates(params, updates)
  assert float(loss(params, state)) < first
  assert isinstance(js.get_masks(state)["slorb"]["up"], optax.MaskedNode)


def test_group_scales():
  kernel, mask = layer()
  structure = js.NM(2, 4)
  scale = nn.init_group_scale(kernel, structure)
  assert scale.shape == (4, 1, 8)
  np.testing.assert_array_equal(nn.scale_groups(kernel, scale, structure), kernel)
  scale = scale.at[1, 0, 3].set(2.0)
  want = np.array(kernel)
  want[4:8, 3] *= 2
  np.testing.assert_array_equal(nn.scale_groups(kernel, scale, structure), want)
  scaled = nn.scale_groups(jnp.where(mask, kernel, 0), scale, structure)
  np.testing.assert_array_equal(scaled != 0, mask)


def test_errors():
  with pytest.raises(ValueError, match=r"divisible by block=64, got \(130, 8\)"):
    nn.init_slorb(jnp.ones((130, 8)), jnp.ones((130, 8), bool))
  with pytest.raises(ValueError, match="init must be"):
    nn.init_slorb(jnp.ones((64, 8)), jnp.ones((64, 8), bool), init="xavier")
