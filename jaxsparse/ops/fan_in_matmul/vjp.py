"""`fan_in_matmul` with its derivatives: only kept values get a gradient, and it has their shape."""

import functools
from typing import Any

import jax
import numpy as np

from jaxsparse.ops.fan_in_matmul import reference as paths


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul(implementation: str, out_dtype: Any, x: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
  """`[B, K]` and `[F, O]` -> `[B, O]`."""
  path = paths.reference if implementation == "reference" else paths.product
  return path(x, values, indices, out_dtype)


def _forward(implementation, out_dtype, x, values, indices):
  return matmul(implementation, out_dtype, x, values, indices), (x, values, indices)


def _backward(implementation, out_dtype, residuals, dy):
  x, values, indices = residuals
  dx = paths.inputs_gradient(dy, values, indices, x.shape[1], x.dtype)
  dvalues = paths.values_gradient(x, dy, indices, values.dtype)
  return dx, dvalues, np.zeros(indices.shape, jax.dtypes.float0)


matmul.defvjp(_forward, _backward)
