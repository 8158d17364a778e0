"""`prune_matmul`: products and gradients against float64, and training with it."""

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import prune_pack as slow

from jaxsparse.ops import _mosaic_gpu
from jaxsparse.ops.nm_matmul import _prune_pack
from jaxsparse.ops.nm_matmul import _prune_matmul
from jaxsparse.ops.nm_matmul._prune_matmul import prune_matmul
from jaxsparse.ops.nm_matmul._prune_pack import prune_and_pack

TOLERANCE = {jnp.bfloat16: 1e-2, jnp.float16: 2e-3, jnp.float32: 2e-6}
_no_compiler = _mosaic_gpu.unavailable() or ahead_of_time.unavailable()
needs_compiler = pytest.mark.skipif(_no_compiler is not None, reason=str(_no_compiler))


def operands(rows=24, reduction=64, outputs=96, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, reduction), (reduction, outputs), (rows, outputs))
  ]


def masks(w, mask):
  forward = np.asarray(_prune_pack.transposable_mask(w)) if mask == "transposable" else slow.two_of_four(w)
  return forward, slow.two_of_four(np.asarray(w).T).T if mask == "bdwp" else forward


def close(got, want, dtype):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.linalg.norm(got - want) <= TOLERANCE[dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("gradient", _prune_matmul.GRADIENTS)
@pytest.mark.parametrize("mask", _prune_pack.MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_and_gradients_against_float64(mask, gradient, dtype):
  x, w, dy = operands(dtype=dtype)
  y, pull = jax.vjp(lambda x, w: prune_matmul(x, w, mask=mask, gradient=gradient), x, w)
  dx, dw = pull(dy)
  assert y.dtype == dx.dtype == dw.dtype == dtype
  forward, backward = masks(w, mask)
  x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
  close(y, x64 @ np.where(forward, w64, 0), dtype)
  close(dx, dy64 @ np.where(backward, w64, 0).T, dtype)
  dense = x64.T @ dy64
  close(dw, np.where(forward, dense, 0) if gradient == "masked" else dense, dtype)


def test_dx_is_the_exact_gradient_of_the_forward_product():
  x, w, dy = operands()
  pruned = jnp.where(_prune_pack.transposable_mask(w), w, 0)
  loss = lambda x: jnp.vdot(jnp.sin(x @ pruned), dy)
  np.testing.assert_allclose(
    jax.grad(lambda x: jnp.vdot(jnp.sin(prune_matmul(x, w)), dy))(x), jax.grad(loss)(x), rtol=1e-4, atol=1e-5
  )


def test_a_float32_master_gets_a_float32_gradient():
  x, _, dy = operands(dtype=jnp.bfloat16)
  _, w, _ = operands()
  y, pull = jax.vjp(prune_matmul, x, w)
  dx, dw = pull(dy)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  close(dw, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64), jnp.float32)


@pytest.mark.parametrize("mask", _prune_pack.MASKS)
def test_a_weight_packed_once_serves_many_calls(mask):
  x, w, _ = operands()
  loss = lambda w, packed: prune_matmul(x, w, packed, mask=mask).sum()
  once = jax.value_and_grad(loss)(w, prune_and_pack(w, mask=mask, dtype=jnp.float32))
  each = jax.value_and_grad(loss)(w, None)
  jax.tree.map(np.testing.assert_array_equal, once, each)


def test_leading_axes_ragged_sides_jit_and_scan():
  x, w, _ = operands(12, 36, 20)
  x = x.reshape(2, 6, 36)
  want = x @ jnp.where(_prune_pack.transposable_mask(w), w, 0)
  np.testing.assert_allclose(jax.jit(prune_matmul)(x, w), want, rtol=1e-5, atol=1e-5)
  layers = jnp.stack([w, -w])
  step = lambda carry, w: (carry, prune_matmul(carry, w))
  np.testing.assert_allclose(jax.lax.scan(step, x, layers)[1], jnp.stack([want, -want]), rtol=1e-5, atol=1e-5)
  assert jax.grad(lambda w: prune_matmul(x, w).sum())(w).shape == w.shape


def test_training_moves_masks_and_lowers_the_loss():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((256, 16)), jnp.float32)
  target = jnp.sin(x @ jnp.asarray(rng.standard_normal((16, 16)), jnp.float32) / 4)
  w = [jnp.asarray(rng.standard_normal(s) / s[0] ** 0.5, jnp.float32) for s in ((16, 64), (64, 16))]
  tx = optax.adam(3e-3)

  def loss(w):
    return jnp.mean((prune_matmul(jax.nn.relu(prune_matmul(x, w[0])), w[1]) - target) ** 2)

  @jax.jit
  def train(w):
    def step(carry, _):
      w, state = carry
      value, grads = jax.value_and_grad(loss)(w)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(w, updates), state), value

    return jax.lax.scan(step, (w, tx.init(w)), length=200)

  (trained, _), losses = train(w)
  assert losses[-1] < 0.4 * losses[0]
  assert (_prune_pack.transposable_mask(trained[0]) != _prune_pack.transposable_mask(w[0])).mean() > 0.01
  assert (trained[0] != 0).all()  # straight-through: what is pruned keeps a value


def test_layers_of_flax_take_it_as_their_product():
  linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
  jsnn = pytest.importorskip("jaxsparse.nn")
  x, w, _ = operands()
  want = x @ jnp.where(_prune_pack.transposable_mask(w), w, 0)
  layer = nnx.Linear(64, 96, use_bias=False, dot_general=jsnn.prune_dot_general, rngs=nnx.Rngs(0))
  layer.kernel[...] = w
  np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-5)
  module = linen.Dense(96, use_bias=False, dot_general=jsnn.prune_dot_general)
  np.testing.assert_allclose(module.apply({"params": {"kernel": w}}, x), want, rtol=1e-5, atol=1e-5)
  grads = jax.grad(lambda p: module.apply(p, x).sum())({"params": {"kernel": w}})
  np.testing.assert_allclose(grads["params"]["kernel"], x.T @ jnp.ones_like(want), rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="Keep this layer dense"):
    jsnn.prune_dot_general(x, w.T, (((1,), (1,)), ((), ())))


def test_errors_name_what_is_wrong():
  x, w, _ = operands()
  with pytest.raises(ValueError, match="gradient must be one of .*'masked'"):
    prune_matmul(x, w, gradient="sparse")
  with pytest.raises(ValueError, match=r"x has shape \(24, 64\) and w \(96, 64\)"):
    prune_matmul(x, w.T)
  with pytest.raises(TypeError, match="x is bfloat16 and w float16"):
    prune_matmul(x.astype(jnp.bfloat16), w.astype(jnp.float16))
  with pytest.raises(ValueError, match=r"packed has shape \(64, 32\)"):
    prune_matmul(x, w, prune_and_pack(w[:, :32]))
  with pytest.raises(TypeError, match="packed holds bfloat16"):
    prune_matmul(x, w, prune_and_pack(w))
  with pytest.raises(ValueError, match="'hoper' is unknown"):
    prune_matmul(x, w, implementation="hoper")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what is missing on a CPU")
def test_what_runs_can_be_asked():
  x, w, _ = operands()
  plan = _prune_matmul.which_prune_matmul(x, w)
  assert {name: choice.implementation for name, choice in plan.items()} == dict.fromkeys(plan, "xla")
  assert "NVIDIA GPU" in plan["dx"].rejected["hopper"]
  with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
    prune_matmul(x, w, implementation="hopper")


@needs_compiler
@pytest.mark.parametrize("mask", _prune_pack.MASKS)
def test_a_step_compiles_for_an_h100(mask):
  x, w, dy = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(512, 256, 512, jnp.bfloat16))
  with jax.sharding.use_abstract_mesh(ahead_of_time.h100_mesh()):
    plan = _prune_matmul.which_prune_matmul(x, w, mask=mask)
  sparse = ["forward"] if mask == "columnwise" else ["forward", "dx"]
  assert [name for name, choice in plan.items() if choice.implementation == "hopper"] == sparse
  step = lambda x, w, dy: jax.vjp(lambda x, w: prune_matmul(x, w, mask=mask), x, w)[1](dy)
  assert "mosaic_gpu" in ahead_of_time.compile_for_h100(step, x, w, dy).as_text()
