"""Scores that need no inverse: magnitude and Wanda."""

import jax
import jax.numpy as jnp

from jaxsparse import structures
from jaxsparse.calibration import _selection
from jaxsparse.calibration import _shapes


def magnitude_scores(w: jax.Array) -> jax.Array:
  """|w|, float32 `[K, O]`."""
  return jnp.abs(w.astype(jnp.float32))


def wanda_scores(w: jax.Array, norm: jax.Array) -> jax.Array:
  """|w_ko| * norm_k: how much an output changes, at most, when the weight goes.

  Args:
    w: `[K, O]`.
    norm: `[K]`, `Statistics.norm` of the layer's inputs; any common factor is irrelevant.

  References:
    Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023
    (https://arxiv.org/abs/2306.11695). No known differences; the paper ranks per output: `FixedFanIn()`.
  """
  _shapes.check_shapes("wanda_scores", w, norm=norm)
  return jnp.abs(w.astype(jnp.float32)) * norm.astype(jnp.float32)[:, None]


def prune(
  w: jax.Array, scores: jax.Array, structure: structures.AbstractStructure, keep: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Removes the lowest scores and changes nothing else.

  Args:
    w, scores: `[K, O]`.
    structure: what is ranked together and removed together.
    keep: units kept per group, from `keep_units`; may be traced.

  Returns:
    (the pruned weight, its mask: bool `[K, O]`, True = kept).
  """
  _shapes.check_shapes("prune", w, scores=scores)
  mask = _selection.select(scores, structure, keep)
  return jnp.where(mask, w, 0), mask
