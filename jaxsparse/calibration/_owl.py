"""OWL: sparsities of layers by their outliers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def outlier_ratio(scores: Sequence[jax.Array], multiple: float = 5.0) -> jax.Array:
  """Share of a layer's weights whose score is above `multiple` times the mean score.

  Args:
    scores: Wanda scores of the weights of one layer (a decoder block), which are taken together.
    multiple: M of the paper.
  """
  size = sum(s.size for s in scores)
  mean = sum(jnp.sum(s) for s in scores) / size
  return sum(jnp.sum(s > multiple * mean, dtype=jnp.int32) for s in scores) / size


def owl_sparsities(
  ratios: Sequence[float], sparsity: float, *, spread: float = 0.08, sizes: Sequence[int] | None = None
) -> list[float]:
  """Layers with more outliers keep more: within `spread` of the mean, which is `sparsity`.

  Args:
    ratios: `outlier_ratio` of every layer.
    sparsity: of all layers together.
    spread: lambda of the paper; sparsities span `2 * spread`.
    sizes: weights of each layer, for the mean; equal ones by default.

  Raises:
    ValueError: a layer would get a sparsity outside [0, 1).

  References:
    Yin et al., Outlier Weighed Layerwise Sparsity (OWL), 2023 (https://arxiv.org/abs/2310.05175). Differs from the
    paper: layers of different sizes are weighted by them, so that the total is what was asked for.
  """
  ratios = np.asarray(ratios, np.float64)
  span = np.ptp(ratios)
  extra = (ratios - ratios.min()) * (2 * spread / span) if span > 0 else np.zeros_like(ratios)
  layers = sparsity + np.average(extra, weights=sizes) - extra
  if layers.min() < 0 or layers.max() >= 1:
    raise ValueError(
      f"a sparsity of {sparsity:g} with spread={spread:g} asks for layers between {layers.min():.3f} and "
      f"{layers.max():.3f}; all must be in [0, 1). Use a smaller spread."
    )
  return layers.tolist()
