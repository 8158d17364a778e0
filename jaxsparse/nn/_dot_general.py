"""Stand-ins for what `nnx.Linear` lets its user inject: the dot product, and the promotion of dtypes before it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import ops
from jaxsparse.arrays import NMArray


def nm_dot_general(
  inputs: jax.Array,
  kernel: Any,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
  *,
  out_sharding: Any = None,
  implementation: str | None = None,
) -> jax.Array:
  """`jax.lax.dot_general` whose second operand may be an `NMArray` or a packed weight.

  Args:
    inputs: `[*B, K]`.
    kernel: `[K, O]`: `NMArray`, what `jaxsparse.ops.pack` made of one, or an array, which goes to `jax.lax.dot_general`.
    dimension_numbers: for a sparse kernel: the last axis of `inputs` with the first of `kernel`, no batch axes.
    precision: for dense kernels only; sparse products are summed in float32.
    preferred_element_type: dtype of the result.
    out_sharding: for dense kernels only.
    implementation: of `jaxsparse.ops.nm_matmul`, bound with `functools.partial`.

  Returns:
    `[*B, O]`.

  Raises:
    ValueError: another contraction, or an `out_sharding`, with a sparse kernel.
  """
  if isinstance(kernel, jax.Array):
    kwargs = {} if out_sharding is None else {"out_sharding": out_sharding}
    return jax.lax.dot_general(
      inputs, kernel, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type, **kwargs
    )
  (contract_x, contract_w), (batch_x, batch_w) = dimension_numbers
  if tuple(contract_x) != (inputs.ndim - 1,) or tuple(contract_w) != (0,) or batch_x or batch_w:
    raise ValueError(
      f"{kernel!r} is contracted along its first axis with the last of the input; dimension_numbers={dimension_numbers} "
      "asks for another product. Keep this layer dense."
    )
  if out_sharding is not None:
    raise ValueError(f"{kernel!r}: out_sharding={out_sharding} is not supported with a sparse kernel; use shard_map.")
  return ops.nm_matmul(inputs, kernel, implementation=implementation, preferred_element_type=preferred_element_type)


def promote_dtype(args: tuple[Any, ...], *, dtype: Any = None, inexact: bool = True) -> tuple[Any, ...]:
  """`flax.nnx.nn.dtypes.promote_dtype` for (inputs, kernel, bias) with a sparse kernel.

  Args:
    args: arrays, `NMArray`s, packed weights or None.
    dtype: of the computation; None takes that of a packed weight, which cannot be cast, else the widest of the
      arguments. Quantised weights go with any dtype and have no part in it.
    inexact: as in Flax: whether the dtype must be floating point.

  Returns:
    The arguments in the dtype; packed and quantised weights pass as they are.
  """
  plain = [a for a in args if a is not None and not _is_fixed(a)]
  packed = [a for a in args if _is_fixed(a) and jnp.issubdtype(jnp.dtype(a.dtype), jnp.floating) and not _has_scales(a)]
  if dtype is None:
    with jax.numpy_dtype_promotion("standard"):
      dtype = jnp.result_type(*(a.dtype for a in packed or plain))
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
      dtype = jnp.promote_types(jnp.float32, dtype)
  cast = lambda a: a.astype(dtype) if isinstance(a, NMArray) else jnp.asarray(a, dtype)
  return tuple(a if a is None or _is_fixed(a) else cast(a) for a in args)


def _has_scales(a: Any) -> bool:
  return getattr(a, "scales", None) is not None


def _is_fixed(a: Any) -> bool:
  """Whether a is packed or quantised, and so has a dtype that cannot be changed."""
  return isinstance(a, NMArray) and _has_scales(a) or type(a).__name__ in ("SparseTensorCoreLayout", "DecodeLayout")
