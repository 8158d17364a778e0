"""Which implementation each of the three products of a block-sparse layer takes here."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _dispatch
from jaxsparse.ops.block_matmul import preference
from jaxsparse.ops.block_matmul import vjp

_NAMES = {"fwd": "block_matmul", "dx": "block_matmul_transposed", "dw": "sampled_matmul"}


def choose(
  product: str, batch: int, dtype: Any, w: _block_array.BlockArray, named: str | None, out: Any
) -> _dispatch.Choice:
  """The implementation of one product.

  Args:
    product: "fwd" (`x @ w`), "dx" (`dy @ w.T`) or "dw" (`x.T @ dy` at the blocks of w).
    batch: rows of x and dy.
    dtype: of x and dy.
    w: `[K, O]`.
    named: what the caller named, or None.
    out: dtype of the result.

  Raises:
    NotImplementedError: the named implementation cannot run.
    ValueError: no such implementation.
  """
  target = _dispatch.current_target()

  def hopper():
    if target.platform != "gpu":
      return f"it needs an NVIDIA GPU; this is {target}."
    return _problem(product, batch, dtype, w, out)

  reasons = {name: lambda: None for name in vjp.IMPLEMENTATIONS} | {"hopper": hopper}
  order = preference.order(w, target, batch, product)
  return _dispatch.choose(_NAMES[product], named, reasons, order, target)


def call(first: _dispatch.Choice, product: str, batch: int, w: Any, named: str | None, out: Any) -> vjp.Call:
  """What is static in a call: the choice of its own product, and those of the products of its derivatives."""

  def other(which):
    if named is not None:
      return named
    return choose(which, batch, w.dtype, w, None, w.dtype).implementation

  names = {which: first.implementation if which == product else other(which) for which in _NAMES}
  return vjp.Call(**names, strict=named is not None, out_dtype=jnp.dtype(out))


def _problem(product, batch, dtype, w, out):
  """Why the kernel cannot run, as a sentence; None if it can."""
  from jaxsparse.ops.block_matmul import _hopper
  from jaxsparse.ops.sampled_matmul import _hopper as sampled_hopper

  x, dy = (jax.ShapeDtypeStruct((batch, n), dtype) for n in w.shape)
  if product == "dw":
    return sampled_hopper.supports(x, dy, w, out_dtype=out)
  transposed = product == "dx"
  return _hopper.supports(dy if transposed else x, w, transposed=transposed, out_dtype=out)
