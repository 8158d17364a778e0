"""Symmetric integers with group scales for a weight in dense layout: what a pruned weight is before it is packed."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _nm_array
from jaxsparse.quant import _symmetric


def quantize_dense(
  w: jax.Array, bits: int = 8, group: int = 128, *, scale_dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
  """Rounds a weight `[K, O]` as `quantize` rounds an `NMArray`: zeros stay zeros and do not widen a scale.

  Args:
    w: `[K, O]`, any floating dtype.
    bits, group, scale_dtype: as `quantize`; group only has to divide K.

  Returns:
    int8 values (within 4 bits for `bits=4`) `[K, O]` and scales `[K / group, O]`.

  Raises:
    ValueError: other bits, or a group that does not divide K.
  """
  check_group(w.shape, bits, group)
  values, scales = _symmetric._quantize(w[:, None, :], bits, group, jnp.dtype(scale_dtype))
  return values[:, 0].astype(jnp.int8), scales


def dequantize_dense(values: jax.Array, scales: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """`[K, O]`, values times the scale of their run, rounded once."""
  group = values.shape[0] // scales.shape[0]
  return (values.astype(jnp.float32) * jnp.repeat(scales.astype(jnp.float32), group, axis=0)).astype(dtype)


def pack(values: jax.Array, scales: jax.Array, mask: jax.Array, n: int, m: int, bits: int = 8) -> _nm_array.NMArray:
  """The `NMArray` that kernels read, from integers in dense layout.

  Args:
    values: int8 `[K, O]`, within the range of `bits`.
    scales: `[K / group, O]`, group a multiple of m.
    mask: bool `[K, O]`, n:m along K.
    n, m: the pattern.
    bits: 8 or 4, of the stored values.

  Raises:
    ValueError: as `NMArray.from_dense` and the constructor of `NMArray`.
  """
  # Integers up to 127 are exact in float32, the form that packing takes.
  packed = _nm_array.NMArray.from_dense(values.astype(jnp.float32), n, m, mask)
  dtype = jnp.int8 if bits == 8 else jnp.int4
  return _nm_array.NMArray(packed.values.astype(jnp.int8).astype(dtype), packed.indices, scales, n=n, m=m)


def check_group(shape: tuple[int, ...], bits: int, group: int) -> None:
  """ValueError unless integers of `bits` with a scale for each run of `group` rows fit a weight `[K, O]`."""
  if bits not in (8, 4):
    raise ValueError(f"bits={bits!r}: 8 and 4 are allowed.")
  if len(shape) != 2 or not (isinstance(group, int) and group > 0 and shape[0] % group == 0):
    raise ValueError(f"group={group!r} for a weight of shape {tuple(shape)}: it must divide K of [K, O].")
