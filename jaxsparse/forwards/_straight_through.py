"""Straight-through estimators: the forward pass is masked, the stored weights stay dense."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse.forwards import _base


@jax.custom_jvp
def mask_straight_through(param: jax.Array, mask: jax.Array) -> jax.Array:
  """where(mask, param, 0) whose derivative with respect to `param` is the identity."""
  return jnp.where(mask, param, jnp.zeros((), param.dtype))


@mask_straight_through.defjvp
def _mask_straight_through_jvp(primals, tangents):
  return mask_straight_through(*primals), tangents[0]


@dataclasses.dataclass(frozen=True)
class StraightThrough(_base.AbstractForward):
  """Masked forward; the gradient with respect to the masked weights is applied to all stored weights.

  References:
    Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013, https://arxiv.org/abs/1308.3432.
  """

  storage: ClassVar[str] = "dense"

  def forward(self, param, mask, count):
    return mask_straight_through(param, mask)

  def gradient(self, grad, param, mask, count):
    return grad


@dataclasses.dataclass(frozen=True)
class SRSTE(_base.AbstractForward):
  """Straight-through, plus a decay of the removed weights: g + decay (1 - mask) w.

  The term is added to the gradient outside the differentiated loss, so neither loss scaling nor a clip before the
  wrapper touches it.

  References:
    Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021,
    https://arxiv.org/abs/2102.04010. No known differences.
  """

  storage: ClassVar[str] = "dense"
  decay: float = 2e-4

  def __post_init__(self):
    if not self.decay >= 0:
      raise ValueError(f"SRSTE: decay={self.decay!r} must not be negative.")

  def forward(self, param, mask, count):
    return mask_straight_through(param, mask)

  def gradient(self, grad, param, mask, count):
    # In bfloat16 a decay of 2e-4 would round away against the gradient: add in float32, return the wider of the two.
    dtype = _tree.wider(grad.dtype, param.dtype)
    wide = _tree.wider(dtype, jnp.float32)
    pull = jnp.where(mask, jnp.zeros((), wide), self.decay * param.astype(wide))
    return (grad.astype(wide) + pull).astype(dtype)
