"""Masked forward, dense storage, and gradients for some of the stored weights only."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse import selection
from jaxsparse.forwards import _base
from jaxsparse.forwards import _straight_through


@dataclasses.dataclass(frozen=True)
class MaskedGradient(_base.AbstractForward):
  """Masked forward; removed weights keep their stored value, get no gradient, and may come back (movement pruning).

  Momentum of the inner optimizer still carries a weight on for a while after its removal, and weight decay shrinks it.
  """

  storage: ClassVar[str] = "dense"

  def forward(self, param, mask, count):
    # The derivative is dense, so that scorers see the gradients of removed weights too.
    return _straight_through.mask_straight_through(param, mask)

  def gradient(self, grad, param, mask, count):
    return jnp.where(mask, grad, jnp.zeros((), grad.dtype))


@dataclasses.dataclass(frozen=True)
class TopKast(_base.AbstractForward):
  """Forward with the top weights A, gradients for a larger set B: g on B, plus decay w on A and decay w / D on B - A.

  B adds to A the `explore * size` largest stored |w| outside it, found anew in every update; D is A's density. Weights
  outside B keep their value.

  Args:
    explore: share of the leaf that B has more than A.
    decay: strength of the L2 pull.

  References:
    Jayakumar et al., Top-KAST: Top-K Always Sparse Training, 2020, https://arxiv.org/abs/2106.03517.
    Differs from the paper: A follows the schedule of refreshes, B follows the weights in every update.
  """

  storage: ClassVar[str] = "dense"
  explore: float = 0.3
  decay: float = 1e-4

  def __post_init__(self):
    if not 0.0 <= self.explore <= 1.0 or not self.decay >= 0:
      raise ValueError(f"{self!r} needs explore in [0, 1] and decay >= 0.")

  def forward(self, param, mask, count):
    return _straight_through.mask_straight_through(param, mask)

  def gradient(self, grad, param, mask, count):
    more = mask.size - selection.keep_count(mask.size, self.explore)
    trained = mask | selection.topk_mask(jnp.abs(param), more, where=~mask)
    dtype = _tree.wider(grad.dtype, param.dtype)
    wide = _tree.wider(dtype, jnp.float32)
    density = jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(wide) / mask.size
    pull = self.decay * param.astype(wide) * jnp.where(mask, jnp.ones((), wide), 1 / density)
    return jnp.where(trained, grad.astype(wide) + pull, jnp.zeros((), wide)).astype(dtype)
