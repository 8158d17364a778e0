"""Chance with preferences: entries never used before, blocks of a modular network."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from jaxsparse.scorers import _base
from jaxsparse.scorers import _instant


@dataclasses.dataclass(frozen=True)
class RandomUnfired(_base.AbstractScorer):
  """Random, but entries that were never kept come first (DSL's and ITOP's "random unfired" growth).

  An entry counts as used once its stored value was not zero, so one that is grown and dropped before it ever moved does
  not. One byte per entry.
  """

  def init(self, param):
    return jnp.zeros(param.shape, bool)

  def accumulate(self, state, inputs):
    return state | (inputs.param != 0)

  def score(self, state, inputs):
    chance = _instant.Random().score((), inputs).astype(jnp.float32)
    return chance + jnp.where(state, jnp.float32(0), jnp.float32(2**16))


@dataclasses.dataclass(frozen=True)
class Modular(_base.AbstractScorer):
  """Random draws in which an entry inside its module has weight `inside`, one between modules weight `between`.

  Rows and columns of the last two axes are cut into `modules` equal runs; entry (i, j) is inside when i and j belong to
  runs of the same number. The kept entries are a weighted draw without replacement: those of largest log(u) / weight.

  >>> units = Modular(2, between=0.0).score((), _base.LeafInputs(jnp.ones((4, 4)), None, jax.random.key(0), {}))
  >>> jnp.isfinite(units).astype(int).tolist()
  [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
  """

  modules: int
  inside: float = 1.0
  between: float = 0.1

  def __post_init__(self):
    if not self.modules >= 1 or not self.inside > 0 or not self.between >= 0:
      raise ValueError(f"{self!r} needs modules >= 1, inside > 0 and between >= 0.")

  def score(self, state, inputs):
    shape = inputs.param.shape
    if len(shape) < 2 or min(shape[-2:]) < self.modules:
      raise ValueError(f"{self!r} cannot cut the last two axes of a leaf of shape {shape} into {self.modules} modules.")
    rows, cols = (
      lax.broadcasted_iota(jnp.int32, shape, a) * self.modules // shape[a] for a in (-2 % len(shape), -1 % len(shape))
    )
    chance = jnp.log(jax.random.uniform(inputs.key, shape, minval=jnp.finfo(jnp.float32).tiny))
    return jnp.where(rows == cols, chance / self.inside, chance / self.between if self.between else -jnp.inf)
