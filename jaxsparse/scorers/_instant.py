"""Scorers without memory: weights, gradients, chance."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse.scorers import _base


@dataclasses.dataclass(frozen=True)
class Magnitude(_base.AbstractScorer):
  """|w|."""

  def score(self, state, inputs):
    return jnp.abs(inputs.param)


@dataclasses.dataclass(frozen=True)
class Random(_base.AbstractScorer):
  """Independent and uniform; a new draw at every refresh."""

  def score(self, state, inputs):
    # 24 random bits fit float32 exactly; ties beyond that are broken by position and change no count.
    return jax.random.uniform(inputs.key, inputs.param.shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class GradientMagnitude(_base.AbstractScorer):
  """|dL/dw| of the current batch (the growth rule of RigL)."""

  uses_gradient: ClassVar[bool] = True

  def score(self, state, inputs):
    return jnp.abs(inputs.grad)


@dataclasses.dataclass(frozen=True)
class WeightTimesGradient(_base.AbstractScorer):
  """|w dL/dw|: first-order change of the loss when the weight is removed (saliency)."""

  uses_gradient: ClassVar[bool] = True

  def score(self, state, inputs):
    dtype = _tree.wider(inputs.param.dtype, inputs.grad.dtype)
    return jnp.abs(inputs.param.astype(dtype) * inputs.grad.astype(dtype))
