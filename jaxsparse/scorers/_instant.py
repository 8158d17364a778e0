"""Scorers without memory: weights, gradients, chance."""

import dataclasses
from typing import ClassVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _tree
from jaxsparse.scorers import _base


@dataclasses.dataclass(frozen=True)
class Magnitude(_base.AbstractElementwiseScorer):
  """|w|."""

  def terms(self, state, inputs):
    return jnp.abs, (inputs.param,)


@dataclasses.dataclass(frozen=True)
class MagnitudePlusGradient(_base.AbstractElementwiseScorer):
  """|w| + weight |dL/dw|: a small weight that the loss still pulls at is worth keeping (MEST, SparCL)."""

  uses_gradient: ClassVar[bool] = True
  weight: float = 0.5

  def __post_init__(self):
    if not self.weight >= 0:
      raise ValueError(f"MagnitudePlusGradient: weight={self.weight!r} must not be negative.")

  def terms(self, state, inputs):
    dtype = _tree.wider(inputs.param.dtype, inputs.grad.dtype)
    fn = lambda p, g: jnp.abs(p.astype(dtype)) + self.weight * jnp.abs(g.astype(dtype))
    return fn, (inputs.param, inputs.grad)


@dataclasses.dataclass(frozen=True)
class Random(_base.AbstractScorer):
  """Independent and uniform, in 2**16 steps; a new draw at every refresh.

  Ties are broken by position and change no count: they touch only the entries on the threshold, one in 65536.
  """

  def score(self, state, inputs):
    # Half the memory of float32, and the random scores are the largest array of such a refresh.
    return (_hashed_places(inputs.key, inputs.param.shape) >> 16).astype(jnp.uint16)


def _hashed_places(key, shape):
  """uint32 bits for every entry, hashed from its place and the key.

  `jax.random.bits` keeps several copies of a leaf beside its result on a CPU, a large part of what a refresh
  allocates; this is one fused pass, and a sharded leaf draws what an unsharded one does. The hash (twice the "lowbias32"
  finaliser, once with each word of the key) changes half the output bits for any changed input bit.
  """
  strides = np.cumprod((1, *shape[:0:-1]), dtype=np.uint64)[::-1]
  place = jnp.zeros(shape, jnp.uint32)
  for axis, stride in enumerate(strides):
    place += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(int(stride) % 2**32)
  bits = place
  for word in jax.random.bits(key, (2,), jnp.uint32):
    bits = bits ^ word
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
      bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> 16)
  return bits


@dataclasses.dataclass(frozen=True)
class GradientMagnitude(_base.AbstractElementwiseScorer):
  """|dL/dw| of the current batch (the growth rule of RigL)."""

  uses_gradient: ClassVar[bool] = True

  def terms(self, state, inputs):
    return jnp.abs, (inputs.grad,)


@dataclasses.dataclass(frozen=True)
class WeightTimesGradient(_base.AbstractElementwiseScorer):
  """|w dL/dw|: first-order change of the loss when the weight is removed (saliency)."""

  uses_gradient: ClassVar[bool] = True

  def terms(self, state, inputs):
    dtype = _tree.wider(inputs.param.dtype, inputs.grad.dtype)
    return lambda p, g: jnp.abs(p.astype(dtype) * g.astype(dtype)), (inputs.param, inputs.grad)
