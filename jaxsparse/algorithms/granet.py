"""Gradual pruning with regrowth."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def granet(
  sparsity: float | None = None,
  *,
  initial_sparsity: float = 0.5,
  every: int = 1000,
  start: int = 0,
  ramp_stop: int | None = None,
  stop: int | None = None,
  drop_fraction: float | schedules.AbstractDropFraction = 0.5,
  distribution: distributions.AbstractDistribution = distributions.Global(),
  init_distribution: distributions.AbstractDistribution = distributions.ERK(),
  **common,
) -> _updater.Updater:
  """GraNet: prunes globally along a cubic ramp; then every leaf drops a share and grows as much by |dL/dw|.

  At a refresh the largest |w| over all leaves are kept, with sparsity_t = s_f + (s_i - s_f)(1 - tau)^3; then
  ceil(p_t * kept) of the smallest |w| in every leaf are dropped and as many of the largest |gradient| grown. p_t falls as a
  cosine from `drop_fraction` to 0.005 over [start, stop).

  Args:
    sparsity: final fraction removed.
    initial_sparsity: of the random first masks (0.5, the paper's sparse-to-sparse runs); 0 starts dense (dense-to-sparse).
    every: updates between refreshes (1000 in the paper's CIFAR runs, 4000 on ImageNet).
    start: count of the first refresh.
    ramp_stop: pruning ends before this count, regrowth goes on (30 of 100 epochs on ImageNet); None takes `stop`.
    stop: refreshes end before this count.
    drop_fraction: p at the start (0.5 in the authors' code), or any schedule.
    distribution: `Global()`, as in the paper; others fix the layer densities.
    init_distribution: layer densities of the first masks.
    **common: as in `magnitude`.

  >>> granet(sparsity=0.95, stop=80_000).schedule
  Polynomial(every=1000, stop=80000, start=0, ramp_stop=None, power=3.0)

  References:
    Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, 2021,
    https://arxiv.org/abs/2106.10404.
    Differs from the paper: the refresh comes before the step of its update, not after it, as everywhere in jaxsparse.
  """
  _schedule_arguments.check_stop("granet", stop)
  decay = lambda fraction: schedules.CosineFraction(fraction, end=0.005)
  starts_sparse = initial_sparsity > 0
  return _updater.Updater(
    schedule=schedules.Polynomial(every=every, stop=stop, start=start, ramp_stop=ramp_stop),
    drop=scorers.Magnitude(),
    grow=scorers.GradientMagnitude(),
    drop_fraction=_schedule_arguments.fraction("granet", drop_fraction, decay, stop),
    init=scorers.Random() if starts_sparse else None,
    init_distribution=init_distribution if starts_sparse and distribution.joint else None,
    sparsity=sparsity,
    initial_sparsity=initial_sparsity,
    distribution=distribution,
    **common,
  )
