"""The baseline of every search for a sparse network."""

from collections.abc import Callable
from typing import Any

import jax


def random_search(
  key: jax.Array | int, sample: Callable[[jax.Array], Any], score: Callable[[Any], float], n: int
) -> tuple[Any, list[float]]:
  """The best of n random candidates.

  Args:
    key: seed, or a typed key; candidate i is `sample(jax.random.fold_in(key, i))`.
    sample: key -> candidate, such as `updater.instant_sparsify(params, key)` of a random updater.
    score: candidate -> number, lower is better: the loss at initialisation, or after a few steps.
    n: candidates.

  Returns:
    `(best candidate, all scores in order)`; the first wins ties.

  >>> best, losses = random_search(0, lambda key: jax.random.uniform(key).item(), lambda x: x, n=5)
  >>> best == min(losses)
  True
  """
  if n < 1:
    raise ValueError(f"random_search: n={n} must be at least 1.")
  key = jax.random.key(key) if isinstance(key, int) else key
  best, scores = None, []
  for i in range(n):
    candidate = sample(jax.random.fold_in(key, i))
    scores.append(float(score(candidate)))
    if scores[-1] < min(scores[:-1], default=float("inf")) or i == 0:
      best = candidate
  return best, scores
