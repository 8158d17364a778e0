"""GPTQ on a fixed mask: integers for the kept weights, each making up for the rounding of those before it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.calibration import _gram
from jaxsparse.calibration import _shapes
from jaxsparse.calibration import _sweep
from jaxsparse.quant import _dense


class Quantized(NamedTuple):
  """A quantised weight in dense layout; `jaxsparse.quant.pack` makes the array that kernels read.

  Attributes:
    values: int8 `[K, O]`, 0 off the mask.
    scales: `[K / group, O]`.
    mask: bool `[K, O]`.
  """

  values: jax.Array
  scales: jax.Array
  mask: jax.Array

  def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
    """The weight that the integers stand for, `[K, O]`."""
    return _dense.dequantize_dense(self.values, self.scales, dtype)


@functools.partial(jax.jit, static_argnames=("bits", "group", "scale_dtype"))
def gptq(
  w: jax.Array,
  gram: jax.Array,
  mask: jax.Array,
  *,
  bits: int = 8,
  group: int = 128,
  damping: float | jax.Array = 0.01,
  scale_dtype: Any = jnp.float32,
) -> Quantized:
  """Rounds the kept weights row after row; later rows of an output take up the error, as far as they are kept.

  A run's scale is `max |a| / q_max` over its kept weights as adjusted when the run begins.

  Args:
    w: `[K, O]`, the pruned (and refitted) weight.
    gram: float32 `[K, K]`, X^T X.
    mask: bool `[K, O]`; what is off it stays 0.
    bits: 8 or 4.
    group: rows that share a scale; divides K, and is a multiple of m for an n:m array.
    damping: relative to the mean of the diagonal.
    scale_dtype: of the scales.

  Raises:
    ValueError: other bits, or a group that does not divide K.

  References:
    Frantar et al., GPTQ, 2022 (https://arxiv.org/abs/2210.17323). Differs from the paper: the grid is symmetric and
    does without its most negative integer, as in `jaxsparse.quant.quantize`; the mask is kept.
  """
  _shapes.check_shapes("gptq", w, gram=gram, mask=mask)
  _dense.check_group(w.shape, bits, group)
  r, _ = _gram.upper_factor(gram, damping)
  limit = 2 ** (bits - 1) - 1
  kept = mask.reshape(-1, group, w.shape[1])

  def decide(index, adjusted, weight):
    del weight
    here = kept[index]
    scales = (jnp.abs(jnp.where(here, adjusted, 0)).max(0) / limit).astype(scale_dtype)
    return jnp.where(scales > 0, scales, jnp.ones_like(scales)), here

  def row(adjusted, decided, i):
    scales, here = decided
    scales = scales.astype(jnp.float32)
    return jnp.where(here[i], jnp.clip(jnp.round(adjusted / scales), -limit, limit) * scales, 0)

  start = jnp.where(mask, w.astype(jnp.float32), 0)
  block = _sweep.block_rows(w.shape[0], group)
  weight, (scales, _) = _sweep.sweep(start, r, decide, row, block, group)
  values = jnp.round(weight / jnp.repeat(scales.astype(jnp.float32), group, axis=0)).astype(jnp.int8)
  return Quantized(values, scales, mask)
