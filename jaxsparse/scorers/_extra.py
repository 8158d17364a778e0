"""Scores that the training loop computes, and restrictions that it sets."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxsparse.scorers import _base


@dataclasses.dataclass(frozen=True)
class Correlation(_base.AbstractElementwiseScorer):
  """|corr| of the activations before and after a connection, given as `tx.update(..., corr=tree)` (Hebbian growth).

  `jaxsparse.recipes.correlation(before, after)` computes it for one kernel; other leaves may hold `optax.MaskedNode()`.
  """

  needs: ClassVar[tuple[str, ...]] = ("corr",)

  def terms(self, state, inputs):
    return jnp.abs, (inputs.extra["corr"],)


@dataclasses.dataclass(frozen=True)
class Unused(_base.AbstractScorer):
  """Another scorer's scores, -inf where `tx.update(..., used=tree)` is True: weights that belong to earlier tasks."""

  scorer: _base.AbstractScorer

  @property
  def uses_gradient(self):
    return self.scorer.uses_gradient

  @property
  def needs(self):
    return ("used", *self.scorer.needs)

  def init(self, param):
    return self.scorer.init(param)

  def accumulate(self, state, inputs):
    return self.scorer.accumulate(state, inputs)

  def score(self, state, inputs):
    scores = self.scorer.score(state, inputs)
    scores = scores.astype(jnp.float32) if jnp.issubdtype(scores.dtype, jnp.integer) else scores
    return jnp.where(inputs.extra["used"], -jnp.inf, scores)
