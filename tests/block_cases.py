"""Random block-sparse problems, and their products in NumPy, block after block."""

import jax.numpy as jnp
import numpy as np

import jaxsparse as js


def case(block, grid, density, batch, dtype=jnp.float32, *, extra=0, static=False, seed=0, mask=None):
  """(x, weight, dy), random; the weight has room for `extra` more blocks."""
  rng = np.random.default_rng(seed)
  keep = rng.random(grid) < density if mask is None else np.asarray(mask, bool)
  k, o = grid[0] * block[0], grid[1] * block[1]
  w = jnp.asarray(rng.normal(size=(k, o)), dtype)
  capacity = max(1, int(keep.sum())) + extra
  x, dy = (jnp.asarray(rng.normal(size=(batch, n)), dtype) for n in (k, o))
  return x, js.BlockArray.from_dense(w, block, keep, capacity=capacity, static=static), dy


def float64(a):
  return np.asarray(a).astype(np.float64)


def dense64(w):
  """Obvious and slow: block after block in NumPy."""
  (bk, bo), blocks = w.block_shape, float64(w.blocks)
  dense = np.zeros(w.shape)
  for i, (r, c) in enumerate(zip(np.asarray(w.rows), np.asarray(w.cols))):
    if c < w.grid[1]:
      dense[r * bk : (r + 1) * bk, c * bo : (c + 1) * bo] = blocks[i]
  return dense


def blocks64(full, w):
  """The blocks of a dense `[K, O]`, 0 in slots without one."""
  (bk, bo), out = w.block_shape, np.zeros(w.blocks.shape)
  for i, (r, c) in enumerate(zip(np.asarray(w.rows), np.asarray(w.cols))):
    if c < w.grid[1]:
      out[i] = full[r * bk : (r + 1) * bk, c * bo : (c + 1) * bo]
  return out


def relative_error(got, want):
  return np.linalg.norm(float64(got) - want) / max(np.linalg.norm(want), 1e-30) if want.any() else np.abs(got).max()


def limit(dtype):
  return {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-6}[jnp.dtype(dtype).name]


def all_products64(x, w, dy):
  x, dy, dense = float64(x), float64(dy), dense64(w)
  return x @ dense, dy @ dense.T, blocks64(x.T @ dy, w)
