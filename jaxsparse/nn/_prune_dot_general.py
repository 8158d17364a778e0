"""A 2:4 product for training, as the dot product that Flax's layers let their user inject."""

from typing import Any

import jax

from jaxsparse import ops


def prune_dot_general(
  inputs: jax.Array,
  kernel: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
  *,
  out_sharding: Any = None,
  mask: Any = "transposable",
  gradient: Any = "dense",
  implementation: str | None = None,
) -> jax.Array:
  """`jax.lax.dot_general` with the kernel pruned to 2:4 in every call: see `jaxsparse.ops.prune_matmul`.

  `nnx.Linear(..., dot_general=prune_dot_general)` or `linen.Dense(..., dot_general=prune_dot_general)` is a layer that
  trains with 2:4 weights; its kernel stays dense and gets dense gradients. Flax casts a float32 kernel to the layer's
  `dtype` before this sees it, so that weights which are equal then are ties.

  Args:
    inputs: `[*B, K]`.
    kernel: `[K, O]` of the same dtype, K and O divisible by 4.
    dimension_numbers: the last axis of `inputs` with the first of `kernel`, no batch axes.
    precision: None; sums are in float32.
    preferred_element_type: None or the dtype of `inputs`.
    out_sharding: None.
    mask, gradient, implementation: as in `prune_matmul`, bound with `functools.partial`.

  Returns:
    `[*B, O]`.

  Raises:
    ValueError: another contraction, or an argument that a sparse product has not.
  """
  (contract_x, contract_w), (batch_x, batch_w) = dimension_numbers
  if tuple(contract_x) != (inputs.ndim - 1,) or tuple(contract_w) != (0,) or batch_x or batch_w or kernel.ndim != 2:
    raise ValueError(
      f"prune_dot_general contracts the last axis of the input with the first of a kernel [K, O]; got shapes "
      f"{inputs.shape} and {kernel.shape} with dimension_numbers={dimension_numbers}. Keep this layer dense."
    )
  for name, value in (("precision", precision), ("out_sharding", out_sharding)):
    if value is not None:
      raise ValueError(f"prune_dot_general has no {name}, got {value}.")
  if preferred_element_type not in (None, inputs.dtype):
    raise ValueError(f"prune_dot_general gives the dtype of its input, {inputs.dtype}, not {preferred_element_type}.")
  return ops.prune_matmul(inputs, kernel, mask=mask, gradient=gradient, implementation=implementation)
