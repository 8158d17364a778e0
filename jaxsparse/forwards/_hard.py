"""Sparse storage."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxsparse.forwards import _base


@dataclasses.dataclass(frozen=True)
class Hard(_base.AbstractForward):
  """Stored parameters are masked, so the forward pass uses them as they are; masked gradients do not count."""

  storage: ClassVar[str] = "hard"

  def forward(self, param, mask, count):
    return param

  def gradient(self, grad, param, mask, count):
    return jnp.where(mask, grad, jnp.zeros((), grad.dtype))
