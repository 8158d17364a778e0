"""Scorers that remember past gradients, in float32 buffers of the leaf's shape."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxsparse.scorers import _base


@dataclasses.dataclass(frozen=True)
class Momentum(_base.AbstractElementwiseScorer):
  """|m| with m <- decay m + (1 - decay) g: the smoothed gradient, of removed weights too (SNFS)."""

  uses_gradient: ClassVar[bool] = True
  decay: float = 0.9

  def __post_init__(self):
    check_decay(self)

  def init(self, param):
    return jnp.zeros(param.shape, jnp.float32)

  def accumulate(self, state, inputs):
    return self.decay * state + (1 - self.decay) * inputs.grad.astype(jnp.float32)

  def terms(self, state, inputs):
    return jnp.abs, (state,)


@dataclasses.dataclass(frozen=True)
class Fisher(_base.AbstractElementwiseScorer):
  """w^2 F / 2 with F <- decay F + (1 - decay) g^2: the loss that removing w costs, to second order.

  F is the diagonal of the empirical Fisher matrix, estimated from squared batch gradients.
  """

  uses_gradient: ClassVar[bool] = True
  decay: float = 0.999

  def __post_init__(self):
    check_decay(self)

  def init(self, param):
    return jnp.zeros(param.shape, jnp.float32)

  def accumulate(self, state, inputs):
    return self.decay * state + (1 - self.decay) * jnp.square(inputs.grad.astype(jnp.float32))

  def terms(self, state, inputs):
    return _cost_of_removal, (inputs.param, state)


@dataclasses.dataclass(frozen=True)
class AdamFisher(_base.AbstractElementwiseScorer):
  """w^2 nu / 2 with Adam's own second moment as the diagonal Fisher: no buffer beside the optimizer's.

  `tx.update` finds "nu" in the state of an Adam-type inner optimizer, or takes it as the keyword argument `nu=`.
  """

  needs: ClassVar[tuple[str, ...]] = ("nu",)

  def terms(self, state, inputs):
    return _cost_of_removal, (inputs.param, inputs.extra["nu"])


@dataclasses.dataclass(frozen=True)
class Movement(_base.AbstractElementwiseScorer):
  """S <- S - w g: high for weights that training moves away from zero.

  References:
    Sanh et al., Movement Pruning, 2020, https://arxiv.org/abs/2005.10683.
    Differs from the paper: the sum is not weighted by the learning rate.
  """

  uses_gradient: ClassVar[bool] = True

  def init(self, param):
    return jnp.zeros(param.shape, jnp.float32)

  def accumulate(self, state, inputs):
    return state - inputs.param.astype(jnp.float32) * inputs.grad.astype(jnp.float32)

  def terms(self, state, inputs):
    return lambda s: s, (state,)


def _cost_of_removal(param, fisher):
  return jnp.square(param.astype(jnp.float32)) * fisher.astype(jnp.float32) / 2


def check_decay(scorer) -> None:
  """ValueError unless the scorer's `decay` is in [0, 1)."""
  if not 0.0 <= scorer.decay < 1.0:
    raise ValueError(f"{type(scorer).__name__}: decay={scorer.decay!r} must be in [0, 1).")
