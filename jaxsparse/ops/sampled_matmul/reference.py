"""The specification of `sampled_matmul`, and the paths that run on every platform."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _float32_sums

# Numbers that the gathered path holds at a time.
_CHUNK = 1 << 26


def reference(x, dy, at: _block_array.BlockArray, out_dtype: Any) -> jax.Array:
  """`(x.T @ dy)` in float32, of which the blocks of `at` are taken; slots without a block are 0.

  Args:
    x: `[B, K]`.
    dy: `[B, O]`.
    at: positions in `[K, O]`; its values are not read.
    out_dtype: of the result.

  Returns:
    `[N, bk, bo]`.
  """
  full = jnp.dot(x.astype(jnp.float32).T, dy.astype(jnp.float32), precision="highest")
  return _take(full, at).astype(out_dtype)


def dense(x, dy, at: _block_array.BlockArray, out_dtype: Any) -> jax.Array:
  """One dense dot with float32 accumulation, of which the blocks are taken."""
  return _take(_float32_sums.einsum("bk,bo->ko", x, dy), at).astype(out_dtype)


def xla(x, dy, at: _block_array.BlockArray, out_dtype: Any) -> jax.Array:
  """A batched dot of gathered columns of x and dy; sums are float32. Blocks are taken in chunks where they are many."""
  (bk, bo), (block_rows, block_cols) = at.block_shape, at.grid
  rows, cols = jnp.asarray(at.rows), jnp.asarray(at.cols)
  parts = x.reshape(x.shape[0], block_rows, bk), dy.reshape(x.shape[0], block_cols, bo)

  def product(position):
    row, col = position
    out = _float32_sums.einsum("bk,bo->ko", parts[0][:, row], parts[1][:, jnp.minimum(col, block_cols - 1)])
    return jnp.where(col < block_cols, out, 0).astype(out_dtype)

  chunk = max(1, _CHUNK // max(1, x.shape[0] * (bk + bo)))
  if chunk >= at.capacity:
    return jax.vmap(product)((rows, cols))
  return jax.lax.map(product, (rows, cols), batch_size=chunk)


def _take(full, at):
  (bk, bo), (block_rows, block_cols) = at.block_shape, at.grid
  tiles = full.reshape(block_rows, bk, block_cols, bo).transpose(0, 2, 1, 3)
  rows, cols = jnp.asarray(at.rows), jnp.asarray(at.cols)
  taken = tiles[rows, jnp.minimum(cols, block_cols - 1)]
  return jnp.where((cols < block_cols)[:, None, None], taken, 0)
