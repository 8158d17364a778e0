"""Masks that close slowly: removed weights still count, less and less."""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse.forwards import _base
from jaxsparse.schedules import AbstractDecay


def dampen(x: jax.Array, mask: jax.Array, share: jax.Array) -> jax.Array:
  """where(mask, x, share x), in the dtype of `x`; exactly `x` at share 1 and exactly 0 off-mask at share 0."""
  wide = _tree.wider(x.dtype, jnp.float32)
  faded = (share.astype(wide) * x.astype(wide)).astype(x.dtype)
  # A share of 0 times infinity would be NaN.
  return jnp.where(mask, x, jnp.where(share > 0, faded, jnp.zeros((), x.dtype)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _dampen(param, mask, share, flow):
  return dampen(param, mask, share)


@_dampen.defjvp
def _dampen_jvp(flow, primals, tangents):
  param, mask, share = primals
  tangent = tangents[0] if flow == "straight_through" else dampen(tangents[0], mask, share)
  return _dampen(param, mask, share, flow), tangent


@dataclasses.dataclass(frozen=True)
class DecayingMask(_base.AbstractForward):
  """w (m + b_t (1 - m)), with b_t falling from 1 to 0; stored weights stay dense.

  Args:
    decay: b_t. At 1 this is dense training, bit for bit; at 0 a masked forward pass.
    flow: "straight_through" hands the gradient g of the effective weights to the optimizer; "chain" differentiates what
      is computed, g (m + b_t (1 - m)), so that less and less reaches the removed weights.

  References:
    Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, 2024,
    https://arxiv.org/abs/2402.04744.
  """

  storage: ClassVar[str] = "dense"
  decay: AbstractDecay
  flow: Literal["straight_through", "chain"] = "straight_through"

  def __post_init__(self):
    if not isinstance(self.decay, AbstractDecay):
      raise TypeError(f"DecayingMask: decay must be LinearDecay(...) or ExponentialDecay(...), got {self.decay!r}.")
    if self.flow not in ("straight_through", "chain"):
      raise ValueError(f"DecayingMask: flow must be 'straight_through' or 'chain', got {self.flow!r}.")

  def forward(self, param, mask, count):
    return _dampen(param, mask, self.decay.value(count), self.flow)

  def gradient(self, grad, param, mask, count):
    return grad

  def project(self, param, mask, count):
    return dampen(param, mask, self.decay.value(count))
