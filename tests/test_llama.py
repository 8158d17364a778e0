"""The Llama-style decoder of the experiments: decoding against whole sequences, sparse weights against pruned dense ones."""

import functools

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import causal_attention
from experiments import decode_attention
from experiments import llama
from jaxsparse import ops
from jaxsparse.ops import _mosaic_gpu

_no_compiler = _mosaic_gpu.unavailable() or ahead_of_time.unavailable()
needs_compiler = pytest.mark.skipif(_no_compiler is not None, reason=str(_no_compiler))

CONFIG = llama.Config(dim=64, heads=4, kv_heads=2, head_dim=16, hidden=96)
WEIGHTS = ("qkv", "out", "gate_up", "down")


def layer_and_input(length=6, dtype=jnp.float32):
  layer = llama.init_layer(jax.random.key(0), CONFIG, dtype)
  return layer, jax.random.normal(jax.random.key(1), (3, length, CONFIG.dim), dtype)


def change(layer, fn):
  return layer._replace(**{name: fn(getattr(layer, name)) for name in WEIGHTS})


def decode(layer, x):
  """The block, position by position."""
  shape = (x.shape[0], 2, CONFIG.kv_heads, x.shape[1], CONFIG.head_dim)
  cache = jnp.full(shape, 9, x.dtype)  # what is not written is not seen

  def step(cache, inputs):
    return llama.decode_block(layer, cache, inputs[0], inputs[1], CONFIG)

  return jax.lax.scan(step, cache, (x.swapaxes(0, 1), jnp.arange(x.shape[1])))[1].swapaxes(0, 1)


def test_decoding_agrees_with_the_whole_sequence():
  layer, x = layer_and_input()
  np.testing.assert_allclose(decode(layer, x), llama.block(layer, x, CONFIG), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_mosaic_gpu.unavailable() is not None, reason=str(_mosaic_gpu.unavailable()))
@pytest.mark.parametrize("position", [5, 127, 90])
def test_attention_kernel_interpreted(position):
  q = jax.random.normal(jax.random.key(0), (1, 2, 4, 128), jnp.bfloat16)
  cache = jax.random.normal(jax.random.key(1), (1, 2, 2, 128, 128), jnp.bfloat16)
  want = np.asarray(decode_attention.reference(q, cache, jnp.int32(position)), np.float32)
  interpret = _mosaic_gpu.Interpret(detect_races=True)
  got = np.asarray(decode_attention.attention(q, cache, jnp.int32(position), interpret=interpret), np.float32)
  assert np.linalg.norm(got - want) < 6e-3 * np.linalg.norm(want)


@needs_compiler
def test_attention_kernel_compiles_for_an_h100():
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  args = spec(16, 8, 4, 128), spec(16, 2, 8, 1024, 128), jax.ShapeDtypeStruct((), jnp.int32)
  assert "mosaic_gpu" in ahead_of_time.compile_for_h100(decode_attention.attention, *args).as_text()


@pytest.mark.parametrize("length, dtype, tolerance", [(70, jnp.float32, 1e-5), (128, jnp.bfloat16, 3e-2)])
def test_attention_in_blocks_of_queries(length, dtype, tolerance):
  draw = lambda key, heads: jax.random.normal(jax.random.key(key), (2, length, heads, 16), dtype)
  q, k, v = draw(0, 6), draw(1, 2), draw(2, 2)
  want = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  got = jax.jit(causal_attention.causal_attention)(q, k, v)
  assert got.dtype == dtype
  np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance)
  with pytest.raises(ValueError, match="dot_product_attention for anything else"):
    causal_attention.causal_attention(q, k, v, is_causal=False)


def test_positions_matter_only_relatively():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 16))
  at = lambda i, j: (llama.rope(q, jnp.array([i]), 1e4) * llama.rope(k, jnp.array([j]), 1e4)).sum(-1)
  np.testing.assert_allclose(at(7, 3), at(104, 100), rtol=1e-4, atol=1e-4)
  assert not np.allclose(at(7, 3), at(7, 4), rtol=1e-3)


def test_llama3_scaling_is_that_of_the_model_card():
  """Frequency by frequency, as the reference implementation of Llama 3.1 decides."""
  theta, half, factor, low, high, old = 5e5, 64, 8.0, 1.0, 4.0, 8192
  wanted = []
  for i in range(half):
    frequency = theta ** (-i / half)
    wave = 2 * np.pi / frequency
    smooth = (old / wave - low) / (high - low)
    middle = (1 - smooth) * frequency / factor + smooth * frequency
    wanted.append(frequency if wave < old / high else frequency / factor if wave > old / low else middle)
  scaling = llama.RopeScaling("llama3", factor, low, high, old)
  frequencies = theta ** (-np.arange(half) / half)
  np.testing.assert_allclose(scaling.scale(jnp.asarray(frequencies)), wanted, rtol=1e-5)
  assert 0 < np.sum((np.array(wanted) < frequencies) & (np.array(wanted) > frequencies / factor * 1.001)) < half

  x = np.random.RandomState(0).randn(1, 5, 2, 2 * half).astype(np.float32)
  at = np.arange(5) + 3000
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * at[:, None] * np.array(wanted))[:, None]
  found = llama.rope(jnp.asarray(x), jnp.asarray(at), theta, scaling)
  np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=2e-3)
  linear = llama.rope(jnp.asarray(x), 4.0 * jnp.arange(5), theta, llama.RopeScaling("linear", 4.0))
  np.testing.assert_allclose(linear, llama.rope(jnp.asarray(x), jnp.arange(5.0), theta), atol=1e-4)


@pytest.mark.parametrize("form", ["NMArray", "packed"])
def test_sparse_weights_give_what_pruned_dense_ones_give(form):
  layer, x = layer_and_input(dtype=jnp.bfloat16)
  prune = functools.partial(ops.prune_and_pack, mask="columnwise")
  as_sparse = lambda w: prune(w).forward if form == "packed" else prune(w).forward.unpack()
  sparse, dense = change(layer, as_sparse), change(layer, lambda w: prune(w).dense())
  want = np.asarray(decode(dense, x), np.float32)
  np.testing.assert_allclose(np.asarray(decode(sparse, x), np.float32), want, rtol=2e-2, atol=2e-2)


def test_training_prunes_in_the_product():
  layer, x = layer_and_input()
  pruned = change(layer, lambda w: jnp.where(ops.transposable_mask(w), w, 0))
  want = llama.block(pruned, x, CONFIG)
  np.testing.assert_allclose(llama.block(layer, x, CONFIG, ops.prune_matmul), want, rtol=1e-4, atol=1e-4)
  grads = jax.grad(lambda layer: llama.block(layer, x, CONFIG, ops.prune_matmul).sum())(layer)
  assert all((getattr(grads, name) != 0).mean() > 0.9 for name in WEIGHTS)
