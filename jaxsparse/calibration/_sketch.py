"""Quantiles of magnitudes from a histogram on a logarithmic scale."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_PER_OCTAVE = 16
_LOWEST, _HIGHEST = -24, 24  # powers of two; what lies outside is counted in the end bins
_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2  # with one for zeros and all that is smaller, and one above


class QuantileSketch(NamedTuple):
  """Counts of |x| in bins of a 16th of an octave, so that a quantile is right within 2.2 percent.

  Sketches add up, also across devices, and the sum is the sketch of the union: nothing is lost in a merge.

  Attributes:
    bins: `[770]`, float32: entries in each bin, exact up to 2**24 a bin.
  """

  bins: jax.Array


def init_sketch() -> QuantileSketch:
  """A sketch of nothing."""
  return QuantileSketch(jnp.zeros(_BINS, jnp.float32))


def update_sketch(sketch: QuantileSketch, x: jax.Array, where: jax.Array | None = None) -> QuantileSketch:
  """Adds the entries of x, any shape; `where` (bool, the leading axes of x) leaves rows out."""
  place = jnp.log2(jnp.abs(x).astype(jnp.float32)) - _LOWEST
  at = jnp.clip(jnp.floor(place * _PER_OCTAVE) + 1, 0, _BINS - 1).astype(jnp.int32)
  weight = 1.0 if where is None else jnp.broadcast_to(where[..., None], x.shape).astype(jnp.float32).reshape(-1)
  return QuantileSketch(sketch.bins.at[at.reshape(-1)].add(weight))


def quantile(sketch: QuantileSketch, q: float | jax.Array) -> jax.Array:
  """The q-th quantile of |x|, q in [0, 1]: the middle (geometrically) of the bin that holds it, 0 for the lowest bin."""
  cumulative = jnp.cumsum(sketch.bins)
  at = jnp.searchsorted(cumulative, jnp.asarray(q, jnp.float32) * cumulative[-1])
  middles = 2.0 ** (np.arange(-0.5, _BINS - 1) / _PER_OCTAVE + _LOWEST)
  middles[0] = 0.0
  return jnp.asarray(middles, jnp.float32)[jnp.clip(at, 0, _BINS - 1)]
