"""The specification of `nm_matmul`, and the path that runs on every platform."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _nm_array
from jaxsparse.ops import _float32_sums

# In float32, between the bias and the one rounding to the output's dtype. gelu is the tanh approximation.
ACTIVATIONS = {None: lambda y: y, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


def reference(x, w: _nm_array.NMArray, bias, activation: str | None, out_dtype: Any) -> jax.Array:
  """`y[b, o] = act(sum_{g, j} x[b, g m + indices[g, j, o]] * values[g, j, o] * scale + bias[o])`, as it is written.

  Everything in float32, rounded once to `out_dtype`. It gathers an intermediate `[B, K/m, n, O]`: for tests, not for use.

  Args:
    x: `[B, K]`.
    w: `[K, O]`.
    bias: None or `[O]`.
    activation: None, "relu", "gelu" or "silu".
    out_dtype: of the result.

  Returns:
    `[B, O]`.
  """
  groups, _, outputs = w.values.shape
  first = w.m * jnp.arange(groups)[:, None, None]
  gathered = x.astype(jnp.float32)[:, first + w.indices.astype(first.dtype)]
  values = w.values.astype(jnp.float32)
  if w.scales is not None:
    values = values * jnp.repeat(w.scales.astype(jnp.float32), w.scale_group // w.m, axis=0)[:, None, :]
  y = jnp.einsum("bgjo,gjo->bo", gathered, values, precision="highest")
  return epilogue(y.reshape(-1, outputs), bias, activation, out_dtype)


def xla(x, dense: jax.Array, bias, activation: str | None, out_dtype: Any) -> jax.Array:
  """One dense dot with float32 accumulation, by a weight `[K, O]` that was decompressed to x's dtype.

  The dense weight is written to memory and read again in every call, so where the weights bound the time this is slower
  than keeping a dense weight. Quantised values are rounded to x's dtype.
  """
  return epilogue(_float32_sums.dot(x, dense), bias, activation, out_dtype)


def epilogue(y: jax.Array, bias: jax.Array | None, activation: str | None, out_dtype: Any) -> jax.Array:
  """Bias and activation in float32, then the one rounding."""
  if bias is not None:
    y = y + bias.astype(jnp.float32)[None]
  return ACTIVATIONS[activation](y).astype(out_dtype)
