"""Symmetric int8 and int4 with one scale for each run of entries along the reduction axis."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _nm_array


def quantize(w: _nm_array.NMArray, bits: int = 8, group: int = 128, *, scale_dtype: Any = jnp.float32):
  """Rounds the kept values of an N:M array to integers, with a scale for each run of `group` dense rows.

  For every column and run: `scale = max |v| / q_max` with q_max = 127 or 7, `q = round(v / scale)`, ties to even. The
  most negative integer is not used, so the range is symmetric. The error of a value is at most scale / 2.

  Args:
    w: an `NMArray` with floating-point values, `[*S, K, O]`.
    bits: 8 or 4.
    group: entries along the dense K axis that share a scale; a multiple of m that divides K. `group=K`: one scale a
      column. A run of 128 rows of a 2:4 weight holds 64 values.
    scale_dtype: float32, bfloat16 or float16. Values are divided by the scale as rounded to it.

  Returns:
    An `NMArray` with int8 or int4 values and scales `[*S, K / group, O]`.

  Raises:
    ValueError: other bits, or a group that does not fit.
    TypeError: w is no NMArray, or is quantised already.

  >>> w = _nm_array.NMArray.from_dense(jnp.array([[0.], [1.27], [-0.5], [0.]]), 2, 4)
  >>> quantize(w, 8, group=4).values.ravel().tolist()
  [127, -50]
  """
  if not isinstance(w, _nm_array.NMArray):
    raise TypeError(f"quantize takes an NMArray, got {type(w).__name__}; compress the weight first.")
  if w.scales is not None:
    raise TypeError(f"{w!r} is quantised already; dequantize it first.")
  if bits not in (8, 4):
    raise ValueError(f"bits={bits!r}: 8 and 4 are allowed.")
  k = w.shape[-2]
  if not (isinstance(group, int) and group > 0 and group % w.m == 0 and k % group == 0):
    raise ValueError(f"group={group!r} for {w!r}: it must be a multiple of {w.m} that divides K = {k}.")
  values, scales = _quantize(w.values, bits, group // w.m, jnp.dtype(scale_dtype))
  return _nm_array.NMArray(values, w.indices, scales, n=w.n, m=w.m)


def dequantize(w: _nm_array.NMArray, dtype: Any = None) -> _nm_array.NMArray:
  """An `NMArray` with floating-point values, `values * scales` rounded once.

  Args:
    w: quantised `NMArray`.
    dtype: of the values; None takes the dtype of the scales.

  Raises:
    TypeError: w is not quantised.
  """
  if not isinstance(w, _nm_array.NMArray) or w.scales is None:
    raise TypeError(f"dequantize takes a quantised NMArray, got {w!r}.")
  dtype = w.dtype if dtype is None else jnp.dtype(dtype)
  per_group = jnp.repeat(w.scales.astype(jnp.float32), w.scale_group // w.m, axis=-2)[..., :, None, :]
  values = (w.values.astype(jnp.float32) * per_group).astype(dtype)
  return dataclasses.replace(w, values=values, scales=None)


@jax.jit(static_argnums=(1, 2, 3))
def _quantize(values, bits, groups, scale_dtype):
  *stack, total, n, outputs = values.shape
  runs = values.astype(jnp.float32).reshape(*stack, total // groups, groups, n, outputs)
  limit = 2 ** (bits - 1) - 1
  scales = (jnp.abs(runs).max((-3, -2)) / limit).astype(scale_dtype)
  # A run of zeros, or one so small that its scale rounds to 0, has no scale of its own: any will do.
  scales = jnp.where(scales > 0, scales, jnp.ones_like(scales))
  q = jnp.round(runs / scales.astype(jnp.float32)[..., :, None, None, :])
  dtype = jnp.int8 if bits == 8 else jnp.int4
  # A scale that was rounded down would take the largest value past the limit.
  return jnp.clip(q, -limit, limit).astype(jnp.int8).astype(dtype).reshape(values.shape), scales
