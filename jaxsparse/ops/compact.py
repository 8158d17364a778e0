"""Dense products over what a mask leaves of one axis: gather, one dense dot, scatter.

For tiles that are smaller than tensor cores like. Along an axis whose order does not matter (rows of x, or the axis that
is summed over), tiles that are kept may be moved together (PIT, https://arxiv.org/abs/2301.10936).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_positions
from jaxsparse.ops import _float32_sums


_DTYPES = ("bfloat16", "float16", "float32")


class Compact(NamedTuple):
  """Where a mask is True.

  Attributes:
    indices: `[capacity]`, int32, ascending; the mask's size in places that are left over.
    count: int32, how many there are: more than the capacity if some have no place.
  """

  indices: jax.Array
  count: jax.Array


def compact(mask: Any, capacity: int) -> Compact:
  """Moves what a mask keeps together; works on traced masks, with static shapes.

  Args:
    mask: bool `[n]`.
    capacity: places, static.

  Raises:
    ValueError: the mask is not one-dimensional, or there are no places.

  >>> compact(jnp.array([False, True, False, True]), 3).indices.tolist()
  [1, 3, 4]
  """
  mask = jnp.asarray(mask).astype(bool)
  if mask.ndim != 1:
    raise ValueError(f"compact: mask has shape {mask.shape}; one dimension is needed.")
  capacity = _block_positions.check_capacity(capacity, "compact")
  indices = jnp.nonzero(mask, size=capacity, fill_value=mask.size)[0]
  return Compact(indices.astype(jnp.int32), mask.sum(dtype=jnp.int32))


def compact_matmul(x: Any, w: Any, mask: Any, *, axis: str, capacity: int) -> jax.Array:
  """`x @ w` over the tiles of one axis that a mask keeps; the rest is taken as 0 whatever it is.

  Kept tiles are gathered to a dense operand, so the cost is that of a dense product of `capacity` tiles. Where more are
  kept, the whole product is computed (`jax.lax.cond`): slower, never wrong.

  Args:
    x: `[B, K]`, bfloat16, float16 or float32.
    w: `[K, O]`, of x's dtype.
    mask: bool `[n]`: which of n equal tiles of the axis are kept; n divides the axis.
    axis: "rows", the B of x (what is masked is 0 in the result too), or "reduction", K.
    capacity: tiles that there is room for, static.

  Returns:
    `[B, O]`, of x's dtype, summed in float32; differentiable in x and w.

  Raises:
    TypeError: dtypes do not fit.
    ValueError: shapes do not fit, or the axis is unknown.
  """
  x, w, mask = jnp.asarray(x), jnp.asarray(w), jnp.asarray(mask).astype(bool)
  if axis not in ("rows", "reduction"):
    raise ValueError(f"compact_matmul: axis={axis!r}; allowed are 'rows' and 'reduction'.")
  if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
    raise ValueError(f"compact_matmul: x has shape {x.shape} and w {w.shape}; allowed are [B, K] and [K, O].")
  if x.dtype.name not in _DTYPES or w.dtype != x.dtype:
    raise TypeError(
      f"compact_matmul: x is {x.dtype} and w {w.dtype}; one of {', '.join(_DTYPES)} is needed for both: x.astype(w.dtype)."
    )
  size = x.shape[0 if axis == "rows" else 1]
  if mask.ndim != 1 or mask.size == 0 or size % mask.size:
    raise ValueError(
      f"compact_matmul: mask has shape {mask.shape}; its length must divide the axis {axis!r} of {size}."
    )
  tile = size // mask.size
  indices, count = compact(mask, capacity)
  keep = jnp.repeat(mask, tile)
  dot = lambda a, b: _float32_sums.dot(a, b).astype(x.dtype)

  def dense(x, w):
    if axis == "rows":
      return dot(jnp.where(keep[:, None], x, 0), w)
    return dot(jnp.where(keep, x, 0), jnp.where(keep[:, None], w, 0))

  def gathered(x, w):
    if axis == "rows":
      part = x.reshape(-1, tile, x.shape[1]).at[indices].get(mode="fill", fill_value=0)
      y = dot(part.reshape(-1, x.shape[1]), w).reshape(-1, tile, w.shape[1])
      return jnp.zeros((mask.size, tile, w.shape[1]), y.dtype).at[indices].set(y, mode="drop").reshape(size, -1)
    part = x.reshape(x.shape[0], -1, tile).at[:, indices].get(mode="fill", fill_value=0)
    rows = w.reshape(-1, tile, w.shape[1]).at[indices].get(mode="fill", fill_value=0)
    return dot(part.reshape(x.shape[0], -1), rows.reshape(-1, w.shape[1]))

  return jax.lax.cond(count > capacity, dense, gathered, x, w)
