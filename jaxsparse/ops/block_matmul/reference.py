"""The specification of `block_matmul` and its transposed product, and the paths that run on every platform."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _float32_sums
from jaxsparse.ops import _shard_map

# Numbers that the gathered path holds at a time: blocks are taken in chunks of a scan beyond that.
_CHUNK = 1 << 26


def reference(x, w: _block_array.BlockArray, transposed: bool, out_dtype: Any) -> jax.Array:
  """`x @ dense(w)`, or `x @ dense(w).T`, in float32, rounded once to `out_dtype`.

  Args:
    x: `[B, K]`; `[B, O]` where transposed.
    w: `[K, O]`.
    transposed: which product.
    out_dtype: of the result.

  Returns:
    `[B, O]`; `[B, K]` where transposed.
  """
  dense = w.to_dense(jnp.float32)
  return jnp.dot(x.astype(jnp.float32), dense.T if transposed else dense, precision="highest").astype(out_dtype)


def dense(x, w: _block_array.BlockArray, transposed: bool, out_dtype: Any) -> jax.Array:
  """One dense dot with float32 accumulation; the dense weight is written and read again in every call."""
  full = w.to_dense(x.dtype)
  return _float32_sums.einsum("bk,ok->bo" if transposed else "bk,ko->bo", x, full).astype(out_dtype)


def xla(x, w: _block_array.BlockArray, transposed: bool, out_dtype: Any) -> jax.Array:
  """Gathers the parts of x, multiplies them by their blocks, adds up what belongs to one block column (row).

  Sums are float32. It holds `B` numbers for every column of every block, or takes the blocks in chunks.
  """
  bk, bo = w.block_shape
  take, size = (bo, bk) if transposed else (bk, bo)
  in_blocks, out_blocks = reversed(w.grid) if transposed else w.grid
  parts = x.reshape(x.shape[0], in_blocks, take).transpose(1, 0, 2)
  # A slot without a block has column O / bo: its part of x is any, its product is dropped.
  rows, cols = jnp.asarray(w.rows), jnp.asarray(w.cols)
  rows = jnp.where(cols < w.grid[1], rows, w.grid[0])
  minor, major = (cols, rows) if transposed else (rows, cols)

  def add(total, piece):
    blocks, minor, major = piece
    part = parts[jnp.minimum(minor, in_blocks - 1)]
    product = _float32_sums.einsum("nbo,nko->nbk" if transposed else "nbk,nko->nbo", part, blocks)
    return total.at[major].add(product, mode="drop"), None

  total = _shard_map.like_operands(jnp.zeros((out_blocks, x.shape[0], size), jnp.float32), x, w)
  pieces = (w.blocks, minor, major)
  chunk = max(1, _CHUNK // max(1, x.shape[0] * max(take, size)))
  if chunk >= w.capacity:
    total, _ = add(total, pieces)
  else:
    whole = w.capacity // chunk * chunk
    fold = lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:])
    total, _ = jax.lax.scan(add, total, jax.tree.map(fold, pieces))
    if whole < w.capacity:
      total, _ = add(total, jax.tree.map(lambda a: a[whole:], pieces))
  return total.transpose(1, 0, 2).reshape(x.shape[0], out_blocks * size).astype(out_dtype)
