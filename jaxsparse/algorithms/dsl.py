"""Sparse training of recommendation models."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def dsl(
  sparsity: float | None = 0.5,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  drop_fraction: float | schedules.AbstractDropFraction = 0.5,
  drop: scorers.AbstractScorer = scorers.Magnitude(),
  grow: scorers.AbstractScorer = scorers.GradientMagnitude(),
  distribution: distributions.AbstractDistribution = distributions.Uniform(),
  **common,
) -> _updater.Updater:
  """DSL: dynamic sparse training of a whole recommender, embedding tables included, at one density for all leaves.

  Args:
    sparsity: fraction removed, constant (0.5 in the paper).
    every: updates between refreshes (100 for MultVAE, 2000 and 3000 for others in the authors' code).
    start: count of the first refresh.
    stop: refreshes end before this count.
    drop_fraction: share replaced, on a cosine to 0.005 (0.5 in their code), or any schedule.
    drop: `Magnitude()`, or `WeightTimesGradient()` (their "Taylor").
    grow: `GradientMagnitude()`, `Momentum()`, `Random()` or `RandomUnfired()`, as in their code.
    distribution: `Uniform()`, over embeddings and everything else with two dimensions.
    **common: as in `magnitude`.

  >>> dsl(stop=1000, grow=scorers.RandomUnfired()).drop_fraction
  CosineFraction(fraction=0.5, end=0.005)

  References:
    Wang et al., Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation, 2024,
    https://arxiv.org/abs/2402.02855.
    Differs from the paper: the refresh comes before the step of its update; SET's dropping by sign is not offered.
  """
  _schedule_arguments.check_stop("dsl", stop)
  decay = lambda fraction: schedules.CosineFraction(fraction, end=0.005)
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=drop,
    grow=grow,
    drop_fraction=_schedule_arguments.fraction("dsl", drop_fraction, decay, stop),
    init=scorers.Random(),
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )
