"""The specification of `fan_in_matmul`, and the path that runs on every platform.

The products of a layer, all float32 inside, as loops over the fan-in: a pass takes one input of every output, so that
nothing larger than the operands and the result exists (a gather of all kept inputs would hold `B * O * F` numbers).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.ops import _shard_map

_UNROLL = 8  # inputs a pass, which reads and writes the sums once


def reference(x: jax.Array, values: jax.Array, indices: jax.Array, out_dtype: Any) -> jax.Array:
  """`x @ dense(w)` in float32, rounded once.

  Args:
    x: `[B, K]`.
    values: `[F, O]`.
    indices: `[F, O]`.
    out_dtype: of the result.

  Returns:
    `[B, O]`.
  """
  dense = jnp.zeros((x.shape[1], values.shape[1]), jnp.float32)
  dense = dense.at[indices, jnp.arange(values.shape[1])].set(values.astype(jnp.float32))
  return jnp.dot(x.astype(jnp.float32), dense, precision="highest").astype(out_dtype)


def product(x: jax.Array, values: jax.Array, indices: jax.Array, out_dtype: Any) -> jax.Array:
  """y[b, o] = sum_f x[b, indices[f, o]] values[f, o]."""
  rows = x.T.astype(jnp.float32)

  def add(total, entry):
    value, index = entry
    return total + _rows(rows, index) * value.astype(jnp.float32)[:, None], None

  total = _shard_map.like_operands(jnp.zeros((values.shape[1], x.shape[0]), jnp.float32), x, values, indices)
  return jax.lax.scan(add, total, (values, indices), unroll=_unroll(values))[0].T.astype(out_dtype)


def inputs_gradient(dy: jax.Array, values: jax.Array, indices: jax.Array, inputs: int, out_dtype: Any) -> jax.Array:
  """dx[b, k] = sum of dy[b, o] values[f, o] over all (f, o) with indices[f, o] = k."""
  columns = dy.T.astype(jnp.float32)

  def add(total, entry):
    value, index = entry
    part = columns * value.astype(jnp.float32)[:, None]
    return total.at[index.astype(jnp.int32)].add(part, mode="promise_in_bounds"), None

  total = _shard_map.like_operands(jnp.zeros((inputs, dy.shape[0]), jnp.float32), dy, values, indices)
  return jax.lax.scan(add, total, (values, indices))[0].T.astype(out_dtype)


def values_gradient(x: jax.Array, dy: jax.Array, indices: jax.Array, out_dtype: Any) -> jax.Array:
  """dvalues[f, o] = sum_b x[b, indices[f, o]] dy[b, o]."""
  rows, columns = x.T.astype(jnp.float32), dy.T.astype(jnp.float32)

  def gather(_, index):
    return None, jnp.sum(_rows(rows, index) * columns, axis=1).astype(out_dtype)

  return jax.lax.scan(gather, None, indices)[1]


def _rows(rows, index):
  return rows.at[index.astype(jnp.int32)].get(mode="promise_in_bounds")


def _unroll(values):
  return min(_UNROLL, max(1, values.shape[0]))
