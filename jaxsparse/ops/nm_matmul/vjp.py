"""Derivatives of `nm_matmul`.

With z = x @ w + bias, y = act(z) and the cotangent dz = dy * act'(z):

- `dx = dz @ w.T`, `dbias = sum_b dz`;
- the kept values get `dw = x.T @ dz` at their positions, and scales the sum over their run of `dw * q`.

Positions, packed metadata and quantised values are integers and have no gradient.

What it costs: `dw` is a dense product, of which the kept positions are gathered, and `dx` multiplies by the decompressed
weight. No backward pass here is faster than that of a dense layer. Decompression makes it slower by reading the packed
weight, and writing and reading a dense one: counting bytes on an H100, as long as the product itself at about 600 rows of
x, and a fourteenth of it at 8192. Under `jit`, what is not used is not computed: no `dx` for an input without gradient, no
`dw` for a frozen weight. A layer that trains faster than dense needs positions that are N:M along O as well, so that the
transposed product is sparse too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.ops import _float32_sums
from jaxsparse.ops.nm_matmul import reference


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static in a call.

  Attributes:
    forward: `(x, w, bias, activation, out_dtype) -> y`, an implementation.
    dense: `(w, dtype) -> [K, O]`, the decompressed weight.
    spread: the same, differentiable in the floating-point leaves of w: only what is kept has a gradient, not what fills
      the free slots of a packed layout.
    activation: name of the activation, or None.
    out_dtype: of the result.
  """

  forward: Any
  dense: Any
  spread: Any
  activation: str | None
  out_dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(call: Call, x: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
  """`act(x @ w + bias)`, `[B, K] @ [K, O] -> [B, O]`."""
  return call.forward(x, w, bias, call.activation, call.out_dtype)


def _forward(call, x, w, bias):
  if call.activation is None:
    return matmul(call, x, w, bias), (x, w, bias, None)
  # The derivative of the activation needs z, so the activation is not fused here.
  z = call.forward(x, w, bias, None, call.out_dtype)
  return reference.epilogue(z.astype(jnp.float32), None, call.activation, call.out_dtype), (x, w, bias, z)


def _backward(call, residuals, dy):
  x, w, bias, z = residuals
  dz = dy
  if z is not None:
    act = reference.ACTIVATIONS[call.activation]
    (dz,) = jax.vjp(act, z.astype(jnp.float32))[1](dy.astype(jnp.float32))
  dbias = None if bias is None else dz.sum(0, dtype=jnp.float32).astype(bias.dtype)
  # Operands of x's dtype run on the tensor cores; the sums are float32.
  dz = dz.astype(x.dtype)
  leaves, treedef = jax.tree.flatten(w)
  trains = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

  def dense(floats):
    floats = iter(floats)
    return call.spread(treedef.unflatten([next(floats) if t else leaf for t, leaf in zip(trains, leaves)]), jnp.float32)

  _, pull = jax.vjp(dense, [leaf for t, leaf in zip(trains, leaves) if t])
  (dfloats,) = pull(_float32_sums.dot(x.T, dz))
  dfloats = iter(dfloats)
  dw = treedef.unflatten(
    [next(dfloats) if t else np.zeros(leaf.shape, jax.dtypes.float0) for t, leaf in zip(trains, leaves)]
  )
  dx = _float32_sums.dot(dz, call.dense(w, x.dtype).T).astype(x.dtype)
  return dx, dw, dbias


matmul.defvjp(_forward, _backward)
