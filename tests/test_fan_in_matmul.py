"""Weights with a fixed fan-in: storage, products and gradients against float64, candidates for growth, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.ops import candidates
from jaxsparse.ops.fan_in_matmul import reference as paths


def case(inputs, outputs, fan_in, batch, dtype=jnp.float32, seed=0):
  """(x, weight, dy), random; indices in no order."""
  rng = np.random.default_rng(seed)
  indices = np.stack([rng.permutation(inputs)[:fan_in] for _ in range(outputs)], 1)
  values, x, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in (indices.shape, (*batch, inputs), (*batch, outputs)))
  return x, js.FixedFanInArray(values, jnp.asarray(indices, jnp.uint16), inputs=inputs), dy


def products64(x, w, dy):
  """y, dx and dvalues, output after output in NumPy."""
  x, values, dy = (np.asarray(a).astype(np.float64) for a in (x, w.values, dy))
  indices = np.asarray(w.indices).astype(int)
  y, dx, dvalues = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(values.shape)
  for o in range(values.shape[1]):
    for f, k in enumerate(indices[:, o]):
      y[..., o] += x[..., k] * values[f, o]
      dx[..., k] += dy[..., o] * values[f, o]
      dvalues[f, o] = (x[..., k] * dy[..., o]).sum()
  return y, dx, dvalues


@pytest.mark.parametrize("shape", [(7, 5, 3, (4,)), (16, 9, 9, (2, 3)), (6, 4, 1, ()), (6, 4, 6, (3,))], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_gradients(shape, dtype):
  x, w, dy = case(*shape, jnp.dtype(dtype))

  @jax.jit
  def every(x, w, dy):
    loss = lambda x, values: jnp.sum(dy.astype(jnp.float32) * js.ops.fan_in_matmul(x, with_values(w, values)))
    plain = js.ops.fan_in_matmul(x, w, implementation="reference")
    return js.ops.fan_in_matmul(x, w), plain, *jax.grad(loss, (0, 1))(x, w.values)

  y, plain, dx, dvalues = every(x, w, dy)
  limit = {"float32": 1e-6, "bfloat16": 8e-3}[dtype]
  for got, want in zip((y, plain, dx, dvalues), (products64(x, w, dy)[0], *products64(x, w, dy))):
    assert got.dtype == x.dtype and got.shape == want.shape
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= limit * np.linalg.norm(want)


def with_values(w, values):
  return js.FixedFanInArray.tree_unflatten(w.inputs, (values, w.indices))


def test_wider_result_and_vmap():
  x, w, _ = case(7, 5, 3, (4,), jnp.bfloat16)
  y = js.ops.fan_in_matmul(x, w, preferred_element_type=jnp.float32)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, products64(x, w, np.zeros((4, 5)))[0], rtol=1e-5, atol=1e-6)
  stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), w)
  each = jax.vmap(js.ops.fan_in_matmul, (None, 0))(x, stacked)
  np.testing.assert_array_equal(each[1], js.ops.fan_in_matmul(x, jax.tree.map(lambda a: a[1], stacked)))


def test_memory_is_that_of_operands_and_result():
  """Gathering all kept inputs at once would hold 64 * 512 * 32 numbers, 4 MB; so would the dense gradient."""
  inputs, outputs, fan_in, batch = 2048, 512, 32, 64
  x, w, dy = case(inputs, outputs, fan_in, (batch,))

  def gradients(x, values, indices, dy):
    loss = lambda x, v: jnp.sum(dy * js.ops.fan_in_matmul(x, js.FixedFanInArray.tree_unflatten(inputs, (v, indices))))
    return jax.grad(loss, (0, 1))(x, values)

  memory = jax.jit(gradients).lower(x, w.values, w.indices, dy).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 2 * (batch * (2 * outputs + 2 * inputs) + fan_in * outputs) < 4 << 20


def test_round_trip():
  dense = jax.random.normal(jax.random.key(0), (9, 6)).astype(jnp.bfloat16)
  mask = js.selection.topk_mask(jnp.abs(dense), 4, axis=0)
  w = js.FixedFanInArray.from_dense(dense, 4, mask)
  np.testing.assert_array_equal(w.to_dense(), jnp.where(mask, dense, 0))
  assert w.indices.dtype == jnp.uint8 and (jnp.diff(w.indices.astype(int), axis=0) > 0).all()
  again = js.FixedFanInArray.from_dense(w.to_dense(), 4)
  np.testing.assert_array_equal(again.indices, w.indices)
  assert w.nbytes == 4 * 6 * 3 and w.shape == (9, 6) and w.fan_in == 4 and w.pattern == "fan-in 4"
  room = js.FixedFanInArray.from_dense(jnp.eye(4), 2)  # a free slot holds a zero somewhere else
  np.testing.assert_array_equal(room.to_dense(jnp.bfloat16), jnp.eye(4, dtype=jnp.bfloat16))
  assert (jnp.diff(room.indices.astype(int), axis=0) > 0).all()
  trainable, fixed = js.arrays.partition(w)
  assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [(4, 6)]
  np.testing.assert_array_equal(js.arrays.combine(trainable, fixed).to_dense(), w.to_dense())
  assert w.astype(jnp.float32).dtype == jnp.float32 and "4 of 9 inputs" in repr(w)


def test_safetensors(tmp_path):
  pytest.importorskip("safetensors")
  _, w, _ = case(12, 7, 4, (5,), jnp.bfloat16)
  path = tmp_path / "w.safetensors"
  js.arrays.save_safetensors(path, {"head": w, "bias": jnp.ones(7)})
  for like in (None, {"head": w, "bias": jnp.ones(7)}):
    back = js.arrays.load_safetensors(path, like)
    assert isinstance(back["head"], js.FixedFanInArray) and back["head"].inputs == 12
    jax.tree.map(np.testing.assert_array_equal, (back["head"].values, back["head"].indices), (w.values, w.indices))
  with pytest.raises(ValueError, match="'head'"):
    js.arrays.load_safetensors(path, {"head": jnp.ones((12, 7), jnp.bfloat16), "bias": jnp.ones(7)})


@pytest.mark.parametrize("sample", [None, 12])
def test_candidates_are_the_largest_gradients(sample, monkeypatch):
  """Of absent inputs; in chunks of outputs, the last of which reaches back; a sample of all is all."""
  monkeypatch.setattr(candidates, "_CHUNK", 12 * 4)
  x, w, dy = case(12, 7, 4, (5,))
  found = js.ops.fan_in_candidates(x, dy, w, 3, sample=sample, key=jax.random.key(0))
  gradient = np.abs(np.asarray(x).T @ np.asarray(dy))
  gradient[np.asarray(w.indices).astype(int), np.arange(7)] = -1
  order = np.argsort(-gradient, axis=0)[:3]
  np.testing.assert_array_equal(found.indices, order)
  np.testing.assert_allclose(found.scores, np.take_along_axis(gradient, order, 0), rtol=1e-5)


def test_candidates_of_a_sample():
  """Absent inputs of the sample only; outputs that run out of them have scores of -inf."""
  x, w, dy = case(12, 50, 4, (5,))
  found = js.ops.fan_in_candidates(x, dy, w, 5, sample=6, key=jax.random.key(0))
  gradient = np.abs(np.asarray(x).T @ np.asarray(dy))
  indices, scores = np.asarray(found.indices), np.asarray(found.scores)
  kept = (np.asarray(w.indices).astype(int)[None] == indices[:, None]).any(1)
  assert (np.isneginf(scores) == kept).all() and len(np.unique(indices)) == 6
  np.testing.assert_allclose(scores[~kept], np.take_along_axis(gradient, indices, 0)[~kept], rtol=1e-5)


def test_block_gradient_scores(monkeypatch):
  monkeypatch.setattr(candidates, "_CHUNK", 8 * 6)
  x, _, dy = case(8, 12, 2, (3, 2))
  gradient = np.abs(np.einsum("abk,abo->ko", x, dy))
  want = gradient.reshape(2, 4, 4, 3).sum((1, 3))
  np.testing.assert_allclose(js.ops.block_gradient_scores(x, dy, (4, 3)), want, rtol=1e-5)


BAD = {
  "dense weight": (lambda x, w, dy: js.ops.fan_in_matmul(x, w.to_dense()), TypeError, "FixedFanInArray"),
  "positions": (lambda x, w, dy: js.ops.fan_in_matmul(x, js.arrays.partition(w)[0]), ValueError, "indices"),
  "width": (lambda x, w, dy: js.ops.fan_in_matmul(x[:, 1:], w), ValueError, "last axis of x must be 12"),
  "dtypes": (lambda x, w, dy: js.ops.fan_in_matmul(x.astype(jnp.bfloat16), w), TypeError, "make them equal"),
  "result": (lambda x, w, dy: js.ops.fan_in_matmul(x, w, preferred_element_type=jnp.int32), TypeError, "preferred"),
  "name": (lambda x, w, dy: js.ops.fan_in_matmul(x, w, implementation="hopper"), ValueError, "unknown"),
  "operands": (lambda x, w, dy: js.ops.fan_in_candidates(x, dy[:, 1:], w, 1), ValueError, "needs"),
  "count": (lambda x, w, dy: js.ops.fan_in_candidates(x, dy, w, 13), ValueError, "count=13"),
  "key": (lambda x, w, dy: js.ops.fan_in_candidates(x, dy, w, 1, sample=4), ValueError, "key="),
  "tiles": (lambda x, w, dy: js.ops.block_gradient_scores(x, dy, (5, 1)), ValueError, "blocks of 5x1 need two axes"),
  "twice": (lambda x, w, dy: js.FixedFanInArray(w.values, w.indices * 0, inputs=12), ValueError, "output 0"),
  "outside": (lambda x, w, dy: js.FixedFanInArray(w.values, w.indices, inputs=11), ValueError, "different numbers"),
  "negative": (
    lambda x, w, dy: js.FixedFanInArray(w.values, w.indices.astype(jnp.int32).at[0, 2].set(-1), inputs=12),
    ValueError,
    "output 2",
  ),
  "shapes": (lambda x, w, dy: js.FixedFanInArray(w.values[1:], w.indices, inputs=12), ValueError, "shape"),
  "floats": (lambda x, w, dy: js.FixedFanInArray(w.values, w.values, inputs=12), TypeError, "indices"),
  "fan-in": (lambda x, w, dy: js.FixedFanInArray(w.values, w.indices, inputs=3), ValueError, "of inputs=3"),
  "too many kept": (lambda x, w, dy: js.FixedFanInArray.from_dense(jnp.ones((4, 2)), 3), ValueError, "keeps 4"),
  "no fan-in": (lambda x, w, dy: js.FixedFanInArray.from_dense(jnp.ones((4, 2)), 5), ValueError, "fan-in of 5"),
  "integers": (lambda x, w, dy: js.FixedFanInArray.from_dense(jnp.ones((4, 2), int), 4), TypeError, "values"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
  call, kind, words = BAD[name]
  x, w, dy = case(12, 7, 4, (5,))
  with pytest.raises(kind, match=words):
    call(x, w, dy)


def test_paths_agree_on_one_output():
  """The loops take shapes of any size, one output and one example too."""
  x, w, dy = case(3, 1, 2, (1,))
  np.testing.assert_allclose(paths.product(x, w.values, w.indices, jnp.float32), products64(x, w, dy)[0], rtol=1e-5)
